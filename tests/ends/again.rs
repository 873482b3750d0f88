//! The process that was started is killed, and the same command started again at once, as a loop in
//! a shell or a supervisor does: the program of the life before may not have ended yet.

use super::common::run::{self, Started};
use super::common::*;
use super::{LIMIT, jobs, program_of, signal, until};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// A file system of its own in a file, that can be frozen: writes wait and cannot be interrupted.
struct Freezer {
    at: PathBuf,
    frozen: bool,
}

impl Freezer {
    fn new(image: &Path, at: &Path) -> Option<Freezer> {
        let done = |command: &mut Command| command.output().is_ok_and(|out| out.status.success());
        let file = std::fs::File::create(image).expect("an image");
        file.set_len(64 << 20).expect("its length");
        std::fs::create_dir_all(at).expect("a mount point");
        let made = done(Command::new("mkfs.ext4").arg("-q").arg(image))
            && done(
                Command::new("mount")
                    .args(["-o", "loop"])
                    .arg(image)
                    .arg(at),
            );
        made.then(|| Freezer {
            at: at.to_owned(),
            frozen: false,
        })
    }

    fn set(&mut self, frozen: bool) {
        let flag = if frozen { "-f" } else { "-u" };
        let done = Command::new("fsfreeze").arg(flag).arg(&self.at).status();
        assert!(done.is_ok_and(|status| status.success()), "fsfreeze {flag}");
        self.frozen = frozen;
        if frozen {
            // Whatever waits for it by mistake, this test included, does not wait for ever.
            let at = self.at.clone();
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_secs(20));
                let _ = Command::new("fsfreeze").arg("-u").arg(&at).output();
            });
        }
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        if self.frozen {
            self.set(false);
        }
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}

/// Killed while its write waits, and started again: the new life must wait for the end of the old.
fn a_new_life_waits(restored: bool) {
    let program = Program::guest("files_patterns")
        .arg("append_held")
        .seconds(2.0);
    let mut trial = Trial::new(program, LAZY_FORK);
    let bare = trial.bare();
    let run = trial.dir.join("run");
    let Some(mut freezer) = Freezer::new(&trial.dir.join("image"), &run) else {
        eprintln!("*** NOT TESTED: no file system can be made and mounted here");
        return;
    };
    if let Some(user) = user::ordinary() {
        std::os::unix::fs::chown(&run, Some(user.uid), Some(user.gid)).expect("chown");
    }
    // What is opened by this test must not wait.
    let stdout = run::output(&trial.dir, "stdout", false);
    let prepared = |trial: &Trial| {
        let mut command = trial.prepare();
        let stdout = stdout.try_clone().expect("a descriptor");
        command.stdin(Stdio::null()).stdout(stdout);
        command
    };
    let start = |trial: &Trial| run::spawn(prepared(trial), &run);
    let two_more = |trial: &mut Trial, started: &mut Started| {
        for _ in 0..2 {
            let known = trial.generation();
            if trial.await_generation(started, known).is_none() {
                trial.fail("it ended by itself");
            }
        }
    };
    let mut old = start(&trial);
    two_more(&mut trial, &mut old);
    if restored {
        old.kill(true);
        old = start(&trial);
        two_more(&mut trial, &mut old);
    }
    let inner = program_of(&old);
    trial.note(format!("started {}, the program is {inner}", old.id));
    let again = prepared(&trial);
    freezer.set(true);
    let waits = || {
        let stat = std::fs::read_to_string(format!("/proc/{inner}/stat")).unwrap_or_default();
        let rest = stat.rsplit_once(") ").map(|(_, rest)| rest.to_owned());
        rest.is_some_and(|rest| rest.starts_with('D'))
    };
    until(&mut trial, "its write waits", |_| waits());
    signal(old.id, libc::SIGKILL);
    if inner != old.id {
        until(&mut trial, "the starter is dead", |_| old.has_ended());
    }
    let owner = |trial: &Trial| {
        let lock = std::fs::read_to_string(jobs(trial)[0].join("lock")).unwrap_or_default();
        lock.split(' ').next().and_then(|pid| pid.parse().ok())
    };
    let mut new = run::spawn(again, &run);
    std::thread::sleep(Duration::from_millis(500));
    assert!(waits(), "a write to a frozen file system ended");
    let (has, count) = (owner(&trial), jobs(&trial).len());
    if new.has_ended() || has != Some(inner) || count != 1 {
        trial.fail(&format!("{has:?} has the job of {inner}, one of {count}"));
    }
    freezer.set(false);
    until(&mut trial, "the old is dead", |_| old.has_ended());
    until(&mut trial, "the new one ends", |_| new.has_ended());
    let life = new.end(LIMIT);
    trial.note(life.describe());
    if life.status != Some(73) || trial.notes("begin") != 1 {
        trial.fail("the last life's status is wrong, or it began once more");
    }
    let said = std::fs::read(trial.dir.join("stdout")).expect("its output");
    let file = |dir: &Path| std::fs::read(dir.join("held")).expect("its file");
    if said != bare.stdout || file(&run) != file(&trial.dir.join("bare")) {
        trial.fail("output or file differ from the bare run's");
    }
}

/// The lock of the job went with the killed program's helper, while the program itself was in the
/// midst of a write that could not be interrupted: it would have come after the recovery had taken
/// the file back.
#[test]
fn while_a_write_is_not_over() {
    a_new_life_waits(false);
}

/// The same of a restored program, whose starter alone is killed and gone at once; and where the
/// program still had the job, the new start took itself for another instance of the command and
/// began a second job from the beginning, with the same files.
#[test]
fn while_the_starters_program_dies() {
    a_new_life_waits(true);
}
