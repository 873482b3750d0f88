//! Files that somebody else removes, replaces or moves while the program runs, or while it is
//! dead: what `CKPT_FOREIGN` makes of it.

use super::common::run::{Life, Started};
use super::common::*;
use super::compare_files;
use std::path::{Path, PathBuf};
use std::time::Duration;

fn trial(args: &[&str], foreign: &str) -> Trial {
    let mut program = Program::guest("files_lost").seconds(2.5);
    for arg in args {
        program = program.arg(arg);
    }
    let trial = Trial::new(program, LAZY_FORK).ckpt("CKPT_FOREIGN", foreign);
    // Checkpoints when the test says so: what is done by others comes after the last one.
    trial.ckpt("CKPT_INTERVAL", "150ms")
}

/// A file of the program's user.
fn give(path: &Path, content: &[u8]) {
    std::fs::write(path, content).expect("a file");
    if let Some(user) = user::ordinary() {
        std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)).expect("chown");
    }
}

fn path(trial: &Trial, name: &str) -> PathBuf {
    trial.dir.join("run").join(name)
}

/// Runs until two more generations are there, and a little more has been done.
fn live(trial: &mut Trial) -> Started {
    let mut started = trial.start();
    for _ in 0..2 {
        let known = trial.generation();
        if trial.await_generation(&mut started, known).is_none() {
            trial.fail("it ended by itself, or was refused");
        }
    }
    std::thread::sleep(Duration::from_millis(40));
    started
}

fn kill(trial: &mut Trial, started: Started) {
    let life = started.kill(true);
    trial.note(life.describe());
}

fn log_has(trial: &mut Trial, line: &str) {
    let log = std::fs::read_to_string(trial.dir.join("ckpt.log")).expect("the log");
    if !log.contains(line) {
        trial.fail(&format!("{line:?} is not in the log"));
    }
}

/// It goes on from its checkpoint to its end, and its output is the bare run's.
fn goes_on(trial: &mut Trial, bare: &Life) {
    let life = trial.finish();
    trial.compare(bare, &life);
    if trial.notes("begin") != 1 {
        trial.fail("it began anew");
    }
}

fn is_refused(trial: &mut Trial, reason: &str) {
    let life = trial.start().end(Duration::from_secs(20));
    if life.status != Some(125) {
        trial.fail(&format!("not refused: {}", life.describe()));
    }
    let stderr = std::fs::read_to_string(trial.dir.join("run/stderr")).expect("stderr");
    let last = stderr.lines().last().unwrap_or_default().to_owned();
    if !last.contains(reason) {
        trial.fail(&format!("{reason:?} is not in what it says: {last:?}"));
    }
}

fn remove(trial: &Trial, name: &str) {
    std::fs::remove_file(path(trial, name)).expect("the file is there");
}

fn put(trial: &Trial, name: &str, text: &str) {
    give(&path(trial, name), text.as_ref());
}

fn made_again_under(foreign: &str) {
    for (file, arg) in [("d/mapped", "mapped"), ("whole", "whole")] {
        let mut trial = trial(&[arg], foreign);
        let bare = trial.bare();
        let started = live(&mut trial);
        kill(&mut trial, started);
        remove(&trial, file);
        goes_on(&mut trial, &bare);
        log_has(
            &mut trial,
            "was removed by somebody else: made again as it was",
        );
        compare_files(&mut trial);
    }
}

#[test]
fn removed_while_it_was_dead() {
    made_again_under("restore");
}

#[test]
fn removed_with_its_directory() {
    let mut trial = trial(&["mapped"], "restore");
    let bare = trial.bare();
    let started = live(&mut trial);
    kill(&mut trial, started);
    std::fs::remove_dir_all(path(&trial, "d")).expect("it is removed");
    goes_on(&mut trial, &bare);
    log_has(
        &mut trial,
        "/run/d was removed by somebody else: made again",
    );
    for name in ["d", "d/mapped"] {
        let (was, is) = (trial.dir.join("bare").join(name), path(&trial, name));
        let (was, is) = (std::fs::metadata(was), std::fs::metadata(is));
        let (was, is) = (was.expect("there"), is.expect("made again"));
        use std::os::unix::fs::MetadataExt;
        assert_eq!((was.uid(), was.is_dir()), (is.uid(), is.is_dir()));
    }
    let read = |dir: &str| std::fs::read(trial.dir.join(dir).join("d/mapped")).expect("it");
    assert!(read("bare") == read("run"));
}

/// The program cannot go on without a file that it has mapped or open.
#[test]
fn removed_and_kept_so() {
    made_again_under("keep");
}

#[test]
fn removed_and_refused() {
    let mut trial = trial(&["mapped"], "refuse");
    let bare = trial.bare();
    let started = live(&mut trial);
    kill(&mut trial, started);
    remove(&trial, "d/mapped");
    is_refused(&mut trial, "/d/mapped was removed by somebody else");
    // Nothing was done: it can be had otherwise.
    trial = trial.ckpt("CKPT_FOREIGN", "restore");
    goes_on(&mut trial, &bare);
    compare_files(&mut trial);
}

/// Only its end was written since: nobody knows what else it held.
#[test]
fn removed_and_not_known() {
    let mut trial = trial(&["log"], "restore");
    let bare = trial.bare();
    let started = live(&mut trial);
    kill(&mut trial, started);
    let log = std::fs::read(path(&trial, "log")).expect("the log");
    remove(&trial, "log");
    for foreign in ["restore", "keep"] {
        trial = trial.ckpt("CKPT_FOREIGN", foreign);
        is_refused(
            &mut trial,
            "/log was removed by somebody else, and what it held at the checkpoint is not \
             known: put a file there and start with CKPT_FOREIGN=keep",
        );
    }
    give(&path(&trial, "log"), log.as_ref());
    goes_on(&mut trial, &bare);
    let whole = std::fs::read(trial.dir.join("bare/log")).expect("the bare run's");
    let is = std::fs::read(path(&trial, "log")).expect("the log");
    assert!(is.len() >= whole.len() && is.ends_with(b"\n"));
}

/// An editor that writes a new file and renames it over the old one, while the program runs.
#[test]
fn replaced_while_it_ran() {
    for foreign in ["restore", "keep"] {
        let mut trial = trial(&["whole"], foreign);
        let bare = trial.bare();
        let started = live(&mut trial);
        put(&trial, "whole.new", "an editor's");
        std::fs::rename(path(&trial, "whole.new"), path(&trial, "whole")).expect("renamed");
        kill(&mut trial, started);
        if foreign == "restore" {
            goes_on(&mut trial, &bare);
            log_has(
                &mut trial,
                "was replaced by somebody else: made again as it was; what was",
            );
            compare_files(&mut trial);
            let aside = std::process::Command::new("grep")
                .args(["-rl", "an editor's"])
                .arg(trial.dir.join("store"))
                .output();
            let found = aside.expect("grep").stdout;
            assert!(String::from_utf8_lossy(&found).contains("/aside/whole."));
        } else {
            // It goes on with the editor's version, and finds that it is not its own.
            let life = trial.finish();
            log_has(&mut trial, "was replaced by somebody else: left as it is");
            assert_eq!(life.status, Some(99), "{}", life.describe());
            let now = std::fs::read(path(&trial, "whole")).expect("the editor's version");
            assert_eq!(now, b"an editor's");
        }
    }
}

/// Cut off by somebody else (`> log`): it came back with zeros. What the program has appended does
/// not tell what was there.
#[test]
fn cut_off_while_it_was_dead() {
    let mut trial = trial(&["log"], "restore");
    trial.bare();
    let started = live(&mut trial);
    kill(&mut trial, started);
    let log = path(&trial, "log");
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&log)
        .expect("the log");
    file.set_len(3).expect("cut off");
    is_refused(
        &mut trial,
        "log was cut off by somebody else, and what it held",
    );
    assert_eq!(std::fs::metadata(&log).expect("the log").len(), 3);
}

/// As logrotate does it: moved, and another made in its place. With what the program writes
/// after that, the reopening included.
#[test]
fn rotated_while_it_ran() {
    for (make, reopen) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut trial = trial(&["log"], "restore");
        let bare = trial.bare();
        let started = live(&mut trial);
        std::fs::rename(path(&trial, "log"), path(&trial, "log.1")).expect("moved");
        if make {
            put(&trial, "log", "");
        }
        if reopen {
            put(&trial, "reopen", "");
        }
        std::thread::sleep(Duration::from_millis(20));
        kill(&mut trial, started);
        let _ = std::fs::remove_file(path(&trial, "reopen"));
        goes_on(&mut trial, &bare);
        compare_files(&mut trial);
    }
}

#[test]
fn rotated_and_kept_so() {
    let mut trial = trial(&["log"], "keep");
    let bare = trial.bare();
    let started = live(&mut trial);
    std::fs::rename(path(&trial, "log"), path(&trial, "log.1")).expect("moved");
    put(&trial, "log", "the new one\n");
    std::thread::sleep(Duration::from_millis(20));
    kill(&mut trial, started);
    goes_on(&mut trial, &bare);
    let read = |name: PathBuf| std::fs::read_to_string(name).expect("a log");
    assert_eq!(read(path(&trial, "log")), "the new one\n");
    assert_eq!(
        read(path(&trial, "log.1")),
        read(trial.dir.join("bare/log"))
    );
}

/// Not written since the checkpoint, so that no table tells of it.
#[test]
fn moved_without_a_row() {
    for (foreign, replaced) in [
        ("restore", false),
        ("restore", true),
        ("keep", false),
        ("keep", true),
    ] {
        let mut trial = trial(&["still"], foreign);
        let bare = trial.bare();
        let started = live(&mut trial);
        std::fs::rename(path(&trial, "still"), path(&trial, "still.1")).expect("moved");
        if replaced {
            put(&trial, "still", "another");
        }
        kill(&mut trial, started);
        goes_on(&mut trial, &bare);
        if foreign == "restore" {
            log_has(&mut trial, "/still was moved by somebody else: moved back");
            compare_files(&mut trial);
        } else {
            log_has(
                &mut trial,
                "/still was moved by somebody else: it stays where it is",
            );
            assert!(path(&trial, "still.1").exists());
            assert_eq!(path(&trial, "still").exists(), replaced);
        }
    }
}

#[test]
fn gone_without_a_row() {
    for foreign in ["restore", "keep"] {
        let mut trial = trial(&["still"], foreign);
        let bare = trial.bare();
        let started = live(&mut trial);
        kill(&mut trial, started);
        remove(&trial, "still");
        is_refused(&mut trial, "still for descriptor");
        put(&trial, "still", "as it is");
        if foreign == "restore" {
            is_refused(&mut trial, "CKPT_FOREIGN=keep takes that");
        }
        trial = trial.ckpt("CKPT_FOREIGN", "keep");
        goes_on(&mut trial, &bare);
        compare_files(&mut trial);
    }
}

/// Removed by a cron job while the program has it open and goes on to write it. The next
/// checkpoint has what it holds; before that one it must not come back with something else.
#[test]
fn removed_while_it_ran() {
    for later in [true, false] {
        let mut trial = trial(&["whole", "log"], "restore");
        let bare = trial.bare();
        let mut started = live(&mut trial);
        remove(&trial, "whole");
        if later {
            let known = trial.generation();
            let next = trial.await_generation(&mut started, known);
            trial.await_generation(&mut started, next.unwrap_or(known));
        } else {
            std::thread::sleep(Duration::from_millis(20));
        }
        kill(&mut trial, started);
        goes_on(&mut trial, &bare);
        let there = path(&trial, "whole").exists();
        // Without a name at the checkpoint it has none afterwards; else it comes back.
        if later {
            assert!(!there, "it has come back");
        }
    }
}
