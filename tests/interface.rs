//! The small calls of the C interface, the header without the library, and what `ckpt
//! status` makes of it (issue line "execution control").

mod common;

use common::*;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

fn inserted(guest: &str) -> Trial {
    let trial = Trial::new(Program::guest(guest).seconds(1.0), LAZY_FORK);
    trial.ckpt("CKPT_INTERVAL", "off")
}

#[test]
fn sections_events_and_texts() {
    let mut trial = inserted("api_calls");
    let bare = trial.bare();
    let mut started = trial.start();
    trial.await_generation(&mut started, 0);
    let limit = Instant::now() + Duration::from_secs(30);
    while trial.notes("taken") == 0 && Instant::now() < limit && !started.has_ended() {
        std::thread::sleep(Duration::from_millis(5));
    }
    if trial.notes("taken") != 1 || started.has_ended() {
        trial.fail("the guest did not come to its checkpoint");
    }

    // What it has said of itself, before it dies.
    let status = || {
        let shown = Command::new(build::command())
            .args(["--json", "status", &started.id.to_string()])
            .env("CKPT_DIR", trial.dir.join("store"))
            .output()
            .expect("ckpt status");
        let value: serde_json::Value = serde_json::from_slice(&shown.stdout).expect("JSON");
        value["status"][0].clone()
    };
    let first = status();
    assert!(first["ready_ns"].as_u64().unwrap() > 1 << 60, "{first}");
    assert!(first["heartbeats"].as_u64().unwrap() > 0, "{first}");
    std::thread::sleep(Duration::from_millis(150));
    let second = status();
    assert!(
        second["heartbeats"].as_u64() > first["heartbeats"].as_u64()
            && second["heartbeat_ns"].as_u64() > first["heartbeat_ns"].as_u64(),
        "{first} {second}"
    );
    // A helper that saw the call before the wish that came with it took a second checkpoint,
    // behind the call, and the recovery did not come back to the call.
    assert_eq!(trial.generation(), 1, "one call, one checkpoint");
    started.kill(true);
    let life = trial.finish();
    trial.compare(&bare, &life);
    assert_eq!(trial.notes("restored"), 2, "two handlers, once each");
}

/// The header was no C89.
#[test]
fn the_header_is_strict_c_and_cpp() {
    let dir = user::fresh_dir("header");
    let source = "#include \"ckpt.h\"\nint main(void) { return ckpt_checkpoint(0) != -1; }\n";
    for (compiler, name) in [("gcc", "h.c"), ("g++", "h.cpp")] {
        std::fs::write(dir.join(name), source).expect("a source");
        let options: &[&[&str]] = match compiler {
            "gcc" => &[
                &["-std=c89"],
                &["-std=c11"],
                &["-std=c89", "-no-pie", "-fno-pie", "-masm=intel"],
            ],
            _ => &[&["-std=c++98"], &["-std=c++20", "-no-pie", "-fno-pie"]],
        };
        for options in options {
            let done = Command::new(compiler)
                .args(*options)
                .args(["-Wall", "-Wextra", "-pedantic", "-Werror", "-O1", "-I"])
                .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("ckpt-sys/include"))
                .args([name, "-o", "h"])
                .current_dir(&dir)
                .output()
                .expect("a compiler");
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            assert!(done.status.success(), "{compiler} {options:?}: {said}");
            let ran = Command::new(dir.join("h")).status().expect("the program");
            assert!(ran.success(), "{compiler} {options:?}");
        }
    }
    let _ = std::fs::remove_dir_all(&dir);
}

#[test]
fn handlers_of_a_clock_checkpoint_run_at_the_next_call() {
    handlers_of_a_clock_checkpoint(Program::guest("api_clock"));
}

/// They did not run in these calls.
#[test]
fn and_at_the_next_call_of_any_kind() {
    for call in ["exclude", "include", "redirect"] {
        handlers_of_a_clock_checkpoint(Program::guest("api_clock").arg(call));
    }
}

/// Nor in this one, here refused.
#[test]
fn and_at_a_rollback() {
    handlers_of_a_clock_checkpoint(Program::guest("api_clock").arg("rollback"));
}

fn handlers_of_a_clock_checkpoint(guest: Program) {
    let mut trial = Trial::new(guest.seconds(3.0), LAZY_FORK);
    let bare = trial.bare();
    let mut lives = 0;
    for _ in 0..3 {
        let known = trial.generation();
        let mut started = trial.start();
        if trial.await_generation(&mut started, known.max(1)).is_none() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        started.kill(true);
        lives += 1;
    }
    let life = trial.finish();
    trial.compare(&bare, &life);
    assert!(lives > 0, "it was never killed");
    assert_eq!(trial.notes("wrong"), 0);
    assert_eq!(trial.notes("restored"), lives, "once in each life");
}

/// A template in a directory of its own, checkpointed.
struct Template(PathBuf);

impl Template {
    fn new(name: &str) -> Template {
        let dir = user::fresh_dir(&format!("template-{name}"));
        for (name, text) in [("in", "first\n"), ("data", "data\n"), ("in2", "second\n")] {
            std::fs::write(dir.join(name), text).expect("an input");
        }
        let template = Template(dir);
        let taken = template
            .command(&build::guest("api_template"))
            .env("LD_PRELOAD", build::library())
            .env("CKPT_JOB", "tt")
            .env("CKPT_INTERVAL", "off")
            .env("CKPT_KEEP_ON_EXIT", "always")
            .output()
            .expect("the template");
        assert_eq!(taken.status.code(), Some(3), "{taken:?}");
        template
    }

    fn command(&self, path: &Path) -> Command {
        let mut command = Command::new(path);
        command
            .current_dir(&self.0)
            .env("CKPT_DIR", self.0.join("store"))
            .env("CKPT_LIB", build::library());
        command
    }

    fn starts(&self, redirects: &[&str]) -> Output {
        let mut command = self.command(&build::command());
        command.args(["restore", "tt", "--template"]);
        for redirect in redirects {
            command.args(["--redirect", redirect]);
        }
        command.output().expect("ckpt restore")
    }

    fn jobs(&self) -> Vec<String> {
        let list = std::fs::read_dir(self.0.join("store/jobs")).expect("the store");
        let names = list.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }

    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.0.join(name)).unwrap_or_default()
    }
}

impl Drop for Template {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

/// The output of a start had to exist beforehand.
#[test]
fn an_output_of_a_template_start_is_made() {
    let template = Template::new("output");
    let done = template.starts(&["in=in2", "out=new"]);
    assert!(done.status.success(), "{done:?}");
    assert_eq!(String::from_utf8_lossy(&done.stdout), "second\n");
    assert_eq!(template.text("new"), "second\n");
    assert_eq!(template.text("out"), "head", "the template's own");
}

/// A path that is not open was passed over without a word: the start read the template's own
/// input. And a start that failed left its job.
#[test]
fn a_template_start_that_fails_says_why_and_leaves_nothing() {
    let template = Template::new("fails");
    for (redirect, reason) in [
        ("inn=in2", "nothing is open at"),
        ("in=missing", "missing: No such file"),
        ("in=.", "not a file of the same kind"),
        ("out=missing/new", "missing/new: No such file"),
    ] {
        let done = template.starts(&[redirect]);
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(125), "{redirect}: {said}");
        assert!(said.contains(reason), "{redirect}: {said}");
        assert_eq!(template.jobs(), ["tt"], "{redirect}");
    }
    // Found only by the start itself.
    std::fs::remove_file(template.0.join("data")).expect("an input");
    let done = template.starts(&["in=in2"]);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(125), "{said}");
    assert!(said.contains("data"), "{said}");
    assert_eq!(template.jobs(), ["tt"], "{said}");
}
