//! The Python module: installed by pip into a virtual environment of the test's own (no
//! network, no compiler), run bare and under the library. A machine without venv or pip
//! fails here, loudly: scripts/install-deps has them. Making the environment takes longer than
//! all else, so only one test does; the others take the module from the tree.

mod common;

use common::*;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

struct Python {
    dir: PathBuf,
    interpreter: PathBuf,
    /// `None`: installed.
    module: Option<PathBuf>,
}

fn text(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).into_owned()
}

fn must(command: &mut Command) {
    let done = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        done.status.success(),
        "{command:?} (python3-venv and pip are needed: scripts/install-deps): {}",
        text(&done)
    );
}

impl Python {
    fn installed(name: &str) -> Python {
        let dir = user::fresh_dir(&format!("python-{name}"));
        let venv = dir.join("venv");
        must(
            Command::new(build::find_command("python3"))
                .args(["-m", "venv"])
                .arg(&venv),
        );
        let interpreter = venv.join("bin/python");
        // A copy: pip builds in the source tree.
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("python");
        let copy = dir.join("python");
        must(Command::new("cp").arg("-r").arg(source).arg(&copy));
        must(
            Command::new(&interpreter)
                .args(["-m", "pip", "install", "--quiet", "--no-index"])
                .arg("--disable-pip-version-check")
                .arg(&copy),
        );
        std::fs::remove_dir_all(&copy).expect("the copy");
        Python {
            dir,
            interpreter,
            module: None,
        }
    }

    fn from_tree(name: &str) -> Python {
        Python {
            dir: user::fresh_dir(&format!("python-{name}")),
            interpreter: build::find_command("python3"),
            module: Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("python")),
        }
    }

    /// One part of tests/python/interface.py; without CKPT variables of the test's own.
    fn part(&self, part: &str, loaded: bool) -> Command {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/interface.py");
        let mut command = Command::new(&self.interpreter);
        command
            .arg(build::readable(&script))
            .arg(part)
            .current_dir(&self.dir)
            .env_remove("PYTHONPATH")
            .env("CKPT_DIR", self.dir.join("store"))
            .env(
                "CKPT_LOG",
                format!("debug:{}", self.dir.join("log").display()),
            );
        if let Some(module) = &self.module {
            command.env("PYTHONPATH", module);
            command.env("PYTHONDONTWRITEBYTECODE", "1");
        }
        if loaded {
            command.env("LD_PRELOAD", build::library());
        }
        command
    }

    fn fail(&self, what: &str, output: &Output) -> ! {
        let log = std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        panic!(
            "{what}: {}\n{}\n-- log:\n{log}",
            output.status,
            text(output)
        );
    }

    fn ends_well(&self, part: &str, loaded: bool) -> String {
        let done = self.part(part, loaded).output().expect("python");
        if !done.status.success() || !text(&done).ends_with("ok\n") {
            self.fail(part, &done);
        }
        text(&done)
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

#[test]
fn bare_it_says_that_the_library_is_not_loaded() {
    Python::from_tree("bare").ends_well("bare", false);
}

#[test]
fn installed_by_pip_recovery_and_events() {
    let python = Python::installed("recovery");
    let first = python.part("recovery", true).output().expect("python");
    let taken = text(&first);
    if first.status.code().is_some() || !taken.starts_with("taken 0.32383276483316237") {
        python.fail("the first life", &first);
    }
    let mut again = python.part("recovery", true);
    let again = again
        .env("CKPT_RETURN_VALUE", "9")
        .output()
        .expect("python");
    let back = text(&again);
    // Seeded anew by the handler: not the number of the first life.
    let other = back.starts_with("back with 9 0.") && !back.contains("0.32383276483316237");
    if !again.status.success() || !other || !back.ends_with("ok\n") {
        python.fail("the second life", &again);
    }
}

#[test]
fn a_handler_s_exception_comes_out_of_checkpoint() {
    Python::from_tree("failure").ends_well("handler_failure", true);
}

#[test]
fn rollback() {
    let out = Python::from_tree("rollback").ends_well("rollback", true);
    assert!(out.contains("five times"), "{out}");
}

#[test]
fn arguments_that_c_would_cut() {
    Python::from_tree("arguments").ends_well("arguments", true);
}
