//! What is left out of a recovery, goes elsewhere, or goes back further.

use super::common::*;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

fn trial(name: &str) -> Trial {
    let program = Program::guest("files_loose").seconds(1.5);
    let mut trial = Trial::new(program, LAZY_FORK);
    trial.note(name);
    trial
}

fn path(trial: &Trial, name: &str) -> PathBuf {
    trial.dir.join("run").join(name)
}

fn read(trial: &mut Trial, name: &str) -> String {
    let path = path(trial, name);
    match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) => trial.fail(&format!("{}: {error}", path.display())),
    }
}

/// Lets the program live until two more generations are there and some more was done.
fn live(trial: &mut Trial) {
    let mut started = trial.start();
    for _ in 0..2 {
        let known = trial.generation();
        if trial.await_generation(&mut started, known).is_none() {
            trial.fail("it ended by itself, or was refused");
        }
    }
    std::thread::sleep(Duration::from_millis(45));
    let life = started.kill(true);
    trial.note(life.describe());
}

fn finish(trial: &mut Trial) {
    let life = trial.finish();
    if life.status != Some(trial.program.status) {
        trial.fail("the last life's status is wrong");
    }
}

/// All rounds once, in order.
fn whole(trial: &Trial) -> String {
    let bare = trial.dir.join("bare/held");
    std::fs::read_to_string(bare).expect("the bare run's file")
}

/// Is a round in it more than once?
fn repeats(text: &str) -> bool {
    let mut lines: Vec<&str> = text.lines().collect();
    let all = lines.len();
    lines.sort_unstable();
    lines.dedup();
    lines.len() < all
}

fn expect(trial: &mut Trial, name: &str, repeated: bool) {
    let (text, whole) = (read(trial, name), whole(trial));
    if !repeated && text != whole {
        trial.fail(&format!("{name} is not what it should be: {text:?}"));
    }
    if repeated && !repeats(&text) {
        trial.fail(&format!("{name} was taken back: {text:?}"));
    }
}

#[test]
fn an_excluded_file_keeps_what_was_written() {
    let mut trial = trial("exclude");
    let globs = format!(
        "{}:{}",
        path_text(&trial.dir.join("guest.log")),
        path_text(&path(&trial, "lo*"))
    );
    trial = trial.ckpt("CKPT_EXCLUDE", &globs);
    trial.bare();
    live(&mut trial);
    finish(&mut trial);
    expect(&mut trial, "log", true);
    expect(&mut trial, "held", false);
}

#[test]
fn an_exception_from_the_exclusion() {
    let mut trial = trial("include");
    let log = path_text(&path(&trial, "log"));
    trial = trial.ckpt("CKPT_EXCLUDE", "*").ckpt("CKPT_INCLUDE", &log);
    trial.bare();
    live(&mut trial);
    finish(&mut trial);
    expect(&mut trial, "log", false);
}

/// `ckpt_exclude`, and `ckpt_include` after it: the later rule wins.
#[test]
fn excluded_by_calls() {
    for argument in ["exclude", "include"] {
        let mut trial = trial(argument);
        trial.program = trial.program.clone().arg(argument);
        trial.bare();
        live(&mut trial);
        finish(&mut trial);
        expect(&mut trial, "log", argument == "exclude");
        expect(&mut trial, "held", false);
    }
}

#[test]
fn excluded_at_the_recovery() {
    let mut trial = trial("restore-exclude");
    trial.bare();
    live(&mut trial);
    let log = path_text(&path(&trial, "log"));
    trial = trial.ckpt("CKPT_RESTORE_EXCLUDE", &log);
    finish(&mut trial);
    expect(&mut trial, "log", true);
    expect(&mut trial, "held", false);
}

#[test]
fn a_descriptor_goes_to_another_file() {
    let mut trial = trial("redirect");
    trial.bare();
    live(&mut trial);
    let (held, other) = (path(&trial, "held"), path(&trial, "other"));
    let copied = std::fs::read(&held).expect("the file");
    let mut file = run::output(other.parent().expect("a directory"), "other", false);
    std::io::Write::write_all(&mut file, &copied).expect("a copy");
    let pair = format!("{}={}", path_text(&held), path_text(&other));
    trial = trial.ckpt("CKPT_REDIRECT", &pair);
    finish(&mut trial);
    expect(&mut trial, "other", false);
    let (held, whole) = (read(&mut trial, "held"), whole(&trial));
    if held.len() >= whole.len() || !whole.starts_with(&held) {
        trial.fail(&format!("held was written to: {held:?}"));
    }
}

/// To the generation before the last, over the tables of both.
#[test]
fn an_older_generation() {
    let mut trial = trial("older");
    trial.bare();
    live(&mut trial);
    let last = trial.generation();
    trial = trial.ckpt("CKPT_RESUME", &(last - 1).to_string());
    let mut started = trial.start();
    std::thread::sleep(Duration::from_millis(60));
    if started.has_ended() {
        trial.fail("it does not go on from the older generation");
    }
    started.kill(true);
    trial = trial.ckpt("CKPT_RESUME", "auto");
    finish(&mut trial);
    expect(&mut trial, "log", false);
    expect(&mut trial, "held", false);
}

fn command(trial: &mut Trial, args: &[&str]) -> serde_json::Value {
    let done = Command::new(build::command())
        .arg("--dir")
        .arg(trial.dir.join("store"))
        .arg("--json")
        .args(args)
        .output()
        .expect("the command");
    if !done.status.success() {
        let text = String::from_utf8_lossy(&done.stderr).into_owned();
        trial.fail(&format!("ckpt {args:?}: {text}"));
    }
    serde_json::from_slice(&done.stdout).expect("JSON")
}

#[test]
fn the_command_shows_what_was_modified() {
    let mut trial = trial("command");
    trial.bare();
    live(&mut trial);
    let changes = command(&mut trial, &["diff"]).to_string();
    let shown = command(&mut trial, &["show", "--files"]);
    let modified = shown["modified"].to_string();
    let listed = command(&mut trial, &["list"]).to_string();
    for (what, text, want) in [
        ("diff", &changes, "/run/log"),
        ("show", &modified, "/run/held"),
        ("list", &listed, "\"files_incomplete\":null"),
    ] {
        if !text.contains(want) {
            trial.fail(&format!("{want} is not in ckpt {what}: {text}"));
        }
    }
    let before = read(&mut trial, "log");
    command(&mut trial, &["verify"]);
    finish(&mut trial);
    if !before.is_empty() {
        expect(&mut trial, "log", false);
    }
}

/// Files that a fresh start has modified without a record do not go back to what was
/// before it.
#[test]
fn a_fresh_start_ends_the_way_back() {
    let mut trial = trial("fresh").ckpt("CKPT_KEEP", "9");
    trial.bare();
    live(&mut trial);
    let old = trial.generation();
    trial = trial.ckpt("CKPT_RESUME", "never");
    let mut started = trial.start();
    trial.await_generation(&mut started, old);
    started.kill(true);
    trial = trial.ckpt("CKPT_RESUME", &old.to_string());
    let refused = trial.start().end(Duration::from_secs(20));
    if refused.status != Some(125) {
        trial.fail(&format!("not refused: {}", refused.describe()));
    }
    trial = trial.ckpt("CKPT_RESUME", "auto");
    finish(&mut trial);
    expect(&mut trial, "held", false);
}
