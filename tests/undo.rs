//! `CKPT_UNDO=1` and `ckpt undo`: going back keeps the state that it leaves, memory and
//! files, whether the program runs or not, and killed anywhere it is here or there.

mod common;

use common::run::{self, Started};
use common::*;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);

/// Every file and directory below: mode and contents.
type Tree = BTreeMap<String, (u32, Vec<u8>)>;

fn look(dir: &Path, tree: &mut Tree) {
    for entry in std::fs::read_dir(dir).expect("the program's files") {
        let path = entry.expect("an entry").path();
        let mode = path.metadata().expect("its mode").permissions().mode();
        let contents = match path.is_dir() {
            true => Vec::new(),
            false => std::fs::read(&path).expect("its contents"),
        };
        tree.insert(path_text(&path), (mode, contents));
        if path.is_dir() {
            look(&path, tree);
        }
    }
}

struct Play {
    trial: Trial,
    started: Option<Started>,
}

impl Play {
    fn new() -> Play {
        Play::keeping(5)
    }

    fn keeping(generations: u32) -> Play {
        let trial = Trial::new(Program::guest("roll_undo"), LAZY_FORK);
        let run = path_text(&trial.dir.join("run"));
        let log = path_text(&trial.dir.join("guest.log"));
        let trial = trial
            .ckpt("CKPT_INTERVAL", "off")
            .ckpt("CKPT_UNDO", "1")
            .ckpt("CKPT_KEEP", &generations.to_string())
            .ckpt("CKPT_EXCLUDE", &format!("{run}/now:{run}/now.new:{log}"));
        let started = None;
        let mut play = Play { trial, started };
        play.start();
        play
    }

    fn start(&mut self) {
        self.started = Some(self.trial.start());
    }

    fn pid(&self) -> String {
        self.started.as_ref().expect("it runs").id.to_string()
    }

    fn aim(&self, step: i32) {
        let control = self.trial.dir.join("run/control");
        let new = self.trial.dir.join("run/control.new");
        std::os::unix::fs::symlink(step.to_string(), &new).expect("control");
        std::fs::rename(&new, &control).expect("control");
    }

    fn now(&self) -> Option<i32> {
        let now = std::fs::read_link(self.trial.dir.join("run/now")).ok()?;
        now.to_str()?.parse().ok()
    }

    /// Waits until the program says again where it is.
    fn await_any(&mut self) -> i32 {
        let _ = std::fs::remove_file(self.trial.dir.join("run/now"));
        let limit = Instant::now() + LIMIT;
        loop {
            if let Some(now) = self.now() {
                return now;
            }
            let ended = self.started.as_mut().is_some_and(Started::has_ended);
            if ended || Instant::now() > limit {
                self.trial.fail("it does not say where it is");
            }
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    /// The program is at this step, by its memory, and does nothing more: what its files
    /// and its output are.
    fn at(&mut self, step: i32) -> Tree {
        let limit = Instant::now() + LIMIT;
        loop {
            let now = self.await_any();
            if now == step {
                break;
            }
            if Instant::now() > limit {
                self.trial.fail(&format!("it is at step {now}, not {step}"));
            }
        }
        let mut tree = Tree::new();
        look(&self.trial.dir.join("run/tree"), &mut tree);
        let said = std::fs::read(self.trial.dir.join("run/stdout")).expect("its output");
        let lines: String = (1..=step).map(|k| format!("step {k}\n")).collect();
        if String::from_utf8_lossy(&said) != lines {
            self.trial
                .fail(&format!("step {step}: its output is another"));
        }
        tree
    }

    fn go(&mut self, step: i32) -> Tree {
        self.aim(step);
        self.at(step)
    }

    fn expect(&mut self, step: i32, tree: &Tree) {
        let now = self.at(step);
        if now != *tree {
            let other = |name: &&String| now.get(*name) != tree.get(*name);
            let names: Vec<&String> = now.keys().chain(tree.keys()).filter(other).collect();
            self.trial
                .fail(&format!("step {step}: {names:?} are others"));
        }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(build::command());
        command
            .arg("--dir")
            .arg(self.trial.dir.join("store"))
            .args(args);
        command
    }

    fn ckpt(&mut self, args: &[&str]) -> Output {
        let output = self.command(args).output().expect("the command");
        if !output.status.success() {
            self.trial.fail(&format!("{args:?}: {output:?}"));
        }
        output
    }

    fn checkpoint(&mut self) -> u64 {
        let pid = self.pid();
        self.ckpt(&["checkpoint", "--wait", &pid]);
        self.trial.generation()
    }

    fn rollback(&mut self, generation: u64) {
        let pid = self.pid();
        self.ckpt(&["rollback", &pid, "--generation", &generation.to_string()]);
    }

    fn undo(&mut self) {
        let pid = self.pid();
        self.ckpt(&["undo", &pid]);
    }

    fn kill(&mut self) {
        if let Some(started) = self.started.take() {
            let life = started.kill(true);
            self.trial.note(life.describe());
        }
    }

    /// Generations that are shown as states that were left.
    fn left(&mut self) -> Vec<u64> {
        let output = self.ckpt(&["list", "--json"]);
        let list: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let generations = list["jobs"][0]["generations"].as_array().cloned();
        let left = generations.into_iter().flatten();
        let left = left.filter(|g| g["undo"] == true && g["restorable"] == true);
        left.filter_map(|g| g["generation"].as_u64()).collect()
    }

    fn end(mut self) {
        self.aim(-1);
        let started = self.started.take().expect("it runs");
        let life = started.end(LIMIT);
        if life.status != Some(self.trial.program.status) {
            self.trial.fail(&life.describe());
        }
    }
}

#[test]
fn a_rollback_in_place_is_undone_and_that_too() {
    let mut play = Play::new();
    let three = play.go(3);
    let first = play.checkpoint();
    let five = play.go(5);
    let second = play.checkpoint();
    let nine = play.go(9);
    play.aim(0);
    play.rollback(first);
    play.expect(3, &three);
    assert_eq!(play.left().len(), 1);
    // On another way from there.
    let four = play.go(4);
    play.aim(0);
    play.undo();
    play.expect(9, &nine);
    play.undo();
    play.expect(4, &four);
    play.rollback(second);
    play.expect(5, &five);
    play.rollback(first);
    play.expect(3, &three);
    play.undo();
    play.expect(5, &five);
    // A checkpoint on top of it, and what comes of a kill.
    let six = play.go(6);
    play.checkpoint();
    play.go(7);
    play.aim(0);
    play.kill();
    play.start();
    play.expect(6, &six);
    play.undo();
    play.expect(3, &three);
    play.end();
}

#[test]
fn what_was_gone_back_to_is_recovered() {
    let mut play = Play::new();
    let three = play.go(3);
    let first = play.checkpoint();
    let nine = play.go(9);
    play.aim(0);
    play.rollback(first);
    play.expect(3, &three);
    play.go(6);
    play.aim(0);
    play.kill();
    play.start();
    play.expect(3, &three);
    play.undo();
    play.expect(9, &nine);
    play.kill();
    play.start();
    play.expect(9, &nine);
    play.end();
}

#[test]
fn a_restore_of_an_older_generation_is_undone() {
    let mut play = Play::new();
    let three = play.go(3);
    let first = play.checkpoint();
    play.go(5);
    play.checkpoint();
    let seven = play.go(7);
    let last = play.checkpoint();
    play.go(8);
    play.aim(0);
    play.kill();
    // What was done after the latest checkpoint is lost, as in any recovery.
    let mut command = play.trial.prepare();
    let run = play.trial.dir.join("run");
    command.env("CKPT_RESUME", first.to_string());
    command.stdout(run::output(&run, "stdout", false));
    play.started = Some(run::spawn(command, &run));
    play.expect(3, &three);
    assert_eq!(play.left(), [last]);
    let four = play.go(4);
    play.aim(0);
    play.checkpoint();
    play.kill();
    // Without a process: the job is started there.
    for (step, tree) in [(7, &seven), (4, &four)] {
        let mut env = play.trial.ckpt.clone();
        env.insert("CKPT_LIB".into(), path_text(&build::library()));
        env.insert(
            "GUEST_LOG".into(),
            path_text(&play.trial.dir.join("guest.log")),
        );
        env.remove("CKPT_UNDO");
        let mut undo = run::prepare(&Program::at(build::command(), &["undo"]), &run, &env);
        undo.stdout(run::output(&run, "stdout", false));
        play.started = Some(run::spawn(undo, &run));
        play.expect(step, tree);
        play.kill();
    }
    play.start();
    play.expect(4, &four);
    play.end();
}

/// Killed at any instant of it, the next start is at the one state or at the other.
#[test]
fn killed_while_it_goes_back() {
    // Each going back that is killed leaves a generation, and the goal is to stay.
    let mut play = Play::keeping(1000);
    let three = play.go(3);
    let first = play.checkpoint();
    let mut seen = [0, 0];
    let kills = match std::env::var("CKPT_TEST_KILLS") {
        Ok(kills) => kills.parse().expect("a number"),
        Err(_) => 50,
    };
    let nine = play.go(9);
    // Killed before there is a generation of this state, it would be lost.
    play.checkpoint();
    play.aim(0);
    for _ in 0..kills {
        let pid = play.pid();
        let goal = first.to_string();
        let mut rollback = play.command(&["rollback", &pid, "--generation", &goal]);
        rollback.stderr(std::process::Stdio::piped());
        let rollback = rollback.spawn().expect("the command");
        let us = play.trial.random(200_000);
        std::thread::sleep(Duration::from_micros(us));
        play.kill();
        // "ended before it went back", mostly.
        let output = rollback.wait_with_output().expect("the command");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        play.trial.note(format_args!("{us} us: {}", said.trim()));
        println!("{us} us: {}", said.trim());
        play.start();
        let here = play.await_any();
        match here {
            3 => play.expect(3, &three),
            _ => play.expect(9, &nine),
        }
        seen[usize::from(here == 3)] += 1;
        // And from there to what was left.
        if here == 3 {
            play.undo();
            play.expect(9, &nine);
        }
    }
    println!(
        "killed {kills} times: {} where it was, {} at the goal",
        seen[0], seen[1]
    );
    if kills >= 50 && seen[1] == 0 {
        play.trial.fail("it never went back");
    }
    play.end();
}

/// The thread that had called `ckpt_rollback` is in the state that was left.
#[test]
fn the_call_of_a_rollback_is_taken_back() {
    for threads in ["1", "8"] {
        let program = Program::guest("roll_cancel").arg(threads);
        let trial = Trial::new(program, EAGER_COPY);
        let mut trial = trial.ckpt("CKPT_INTERVAL", "off").ckpt("CKPT_UNDO", "1");
        let started = trial.start();
        let limit = Instant::now() + LIMIT;
        while trial.notes("back") < 1 {
            if Instant::now() > limit {
                trial.fail("it does not go back");
            }
            std::thread::sleep(Duration::from_millis(3));
        }
        let store = path_text(&trial.dir.join("store"));
        let undo = Command::new(build::command())
            .args(["--dir", &store, "undo", &started.id.to_string()])
            .output()
            .expect("the command");
        let error = String::from_utf8_lossy(&undo.stderr).into_owned();
        if !undo.status.success() && !error.contains("ended before") {
            trial.fail(&error);
        }
        let life = started.end(LIMIT);
        if life.status != Some(trial.program.status) || life.stdout != b"undone\n" {
            trial.fail(&life.describe());
        }
    }
}
