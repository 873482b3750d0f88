//! Ends, starters and children: what is left in the store by each way to end, how the
//! process that was started stands in for the restored one, checkpoints asked for from outside
//! and from several threads, children, namespaces.

mod common;

#[path = "ends/again.rs"]
mod again;

use common::run::{Life, Started, members};
use common::*;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(30);

/// Directories of jobs in the trial's store.
fn jobs(trial: &Trial) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(trial.dir.join("store/jobs"));
    let visible = |p: &PathBuf| {
        let name = p.file_name().unwrap_or_default().to_string_lossy();
        !name.starts_with('.') && p.join("journal").exists()
    };
    entries
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .filter(visible)
        .collect()
}

fn until(trial: &mut Trial, what: &str, mut done: impl FnMut(&mut Trial) -> bool) {
    let end = Instant::now() + LIMIT;
    while !done(trial) {
        if Instant::now() > end {
            trial.fail(&format!("this did not come to pass: {what}"));
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}

fn signal(pid: i32, signo: i32) {
    // SAFETY: no memory effects; the process is this test's own.
    assert_eq!(unsafe { libc::kill(pid, signo) }, 0, "kill {pid}");
}

/// Started, checkpointed, killed, and started again; running.
fn resumed(trial: &mut Trial) -> Started {
    trial.kill_and_resume(1);
    let recoveries = |trial: &Trial| {
        let log = std::fs::read_to_string(trial.dir.join("ckpt.log")).unwrap_or_default();
        log.matches("] restored:").count()
    };
    let before = recoveries(trial);
    let started = trial.start();
    until(trial, "it is restored", |t| recoveries(t) > before);
    started
}

/// The process that runs the program: the started one, or its child with the old id.
fn program_of(started: &Started) -> i32 {
    let all = members(started.id);
    all.iter()
        .copied()
        .find(|&id| id != started.id)
        .unwrap_or(started.id)
}

mod left_in_the_store {
    use super::*;

    fn ends(
        way: &str,
        keep: &str,
        killed: bool,
        jobs_left: usize,
        wanted: (Option<i32>, Option<i32>),
    ) {
        let program = Program::guest("end_ways").arg(way).seconds(0.6);
        let mut trial = Trial::new(program, LAZY_FORK).ckpt("CKPT_KEEP_ON_EXIT", keep);
        let started = if killed {
            resumed(&mut trial)
        } else {
            let mut started = trial.start();
            trial.await_generation(&mut started, 0);
            started
        };
        let life: Life = started.end(LIMIT);
        trial.note(life.describe());
        if (life.status, life.signal) != wanted {
            trial.fail(&format!("{way}: it should have ended with {wanted:?}"));
        }
        let left = jobs(&trial);
        if left.len() != jobs_left {
            trial.fail(&format!(
                "{way}: left in the store: {left:?}, not {jobs_left}"
            ));
        }
    }

    const WELL: (Option<i32>, Option<i32>) = (Some(0), None);

    /// A successful end removes the job, in whatever way it is told to the kernel.
    #[test]
    fn nothing_by_successful_ends() {
        for way in [
            "return",
            "exit",
            "_exit",
            "quick_exit",
            "exit_group",
            "last_thread",
            // What ended well was the program that it had become. The next start of the
            // same command went on from before the exec.
            "exec",
        ] {
            ends(way, "failure", false, 0, WELL);
        }
    }

    #[test]
    fn nothing_by_successful_ends_of_restored_programs() {
        for way in ["return", "_exit", "exit_group", "last_thread"] {
            ends(way, "failure", true, 0, WELL);
        }
    }

    #[test]
    fn the_job_by_failures() {
        for killed in [false, true] {
            ends("three", "failure", killed, 1, (Some(3), None));
            ends("term", "failure", killed, 1, (None, Some(libc::SIGTERM)));
            ends("abort", "failure", killed, 1, (None, Some(libc::SIGABRT)));
        }
        ends("exec_false", "failure", false, 1, (Some(1), None));
    }

    #[test]
    fn what_the_user_says() {
        ends("exit", "always", false, 1, WELL);
        ends("three", "never", false, 0, (Some(3), None));
        ends("term", "never", false, 1, (None, Some(libc::SIGTERM)));
    }
}

mod starter {
    use super::*;

    fn state(pid: i32) -> char {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        rest.trim_start().chars().next().unwrap_or('-')
    }

    /// Stopped with the program, continued with it, ended by the signal that it was sent.
    #[test]
    fn mirrors_the_program() {
        let program = Program::guest("end_ways").arg("return").seconds(20.0);
        let mut trial = Trial::new(program, LAZY_FORK);
        let started = resumed(&mut trial);
        let inner = program_of(&started);
        trial.note(format!("started {}, the program is {inner}", started.id));
        signal(inner, libc::SIGSTOP);
        until(&mut trial, "the starter stops", |_| {
            state(started.id) == 'T'
        });
        signal(started.id, libc::SIGCONT);
        until(&mut trial, "both go on", |_| {
            !['T', '-'].contains(&state(inner)) && !['T', '-'].contains(&state(started.id))
        });
        signal(started.id, libc::SIGTERM);
        let life = started.end(LIMIT);
        if life.signal != Some(libc::SIGTERM) {
            trial.fail(&format!("SIGTERM of the starter: {}", life.describe()));
        }
        until(&mut trial, "the program is gone", |_| {
            ['Z', '-'].contains(&state(inner))
        });
    }

    /// A restored program that gave up its privileges outlived the process that was started (the
    /// kernel forgets the death signal then), and so did one with a death signal of its own.
    #[test]
    fn takes_the_program_along() {
        for part in ["nothing", "sets_its_own", "drops_privileges", "executes"] {
            let program = Program::guest("proc_starter").arg(part);
            let mut trial = Trial::new(program, LAZY_FORK);
            // The second recovery is of a checkpoint that a starter's child took.
            trial.kill_and_resume(1);
            let started = resumed(&mut trial);
            let inner = program_of(&started);
            if inner == started.id {
                eprintln!("*** NOT TESTED: {part}: there is no starter without root");
                started.kill(false);
                continue;
            }
            signal(inner, libc::SIGUSR1);
            until(&mut trial, "it does its part", |t| t.notes("done") == 1);
            if part == "executes" {
                let comm = format!("/proc/{inner}/comm");
                until(&mut trial, "it executes sleep", |_| {
                    std::fs::read_to_string(&comm).is_ok_and(|name| name == "sleep\n")
                });
            }
            trial.note(format!(
                "{part}: started {}, the program is {inner}",
                started.id
            ));
            // Nothing of the session may live on.
            started.kill(false);
        }
    }

    /// The old id belongs to somebody else now: the program is restored with another one and goes
    /// on seeing the old, as root too; and it does not wait for the stranger's end.
    #[test]
    fn another_id_when_the_old_one_is_taken() {
        let program = Program::guest("proc_identity").seconds(1.5);
        let mut trial = Trial::new(program, EAGER_COPY);
        let bare = trial.bare();
        let mut started = trial.start();
        trial.await_generation(&mut started, 0);
        let old = started.id;
        started.kill(true);
        let Some(holder) = Holder::of(old) else {
            eprintln!("*** NOT TESTED: needs root to take a process id");
            return;
        };
        let began = Instant::now();
        let started = trial.start();
        until(&mut trial, "it is restored", |t| {
            let log = std::fs::read_to_string(t.dir.join("ckpt.log")).unwrap_or_default();
            log.contains("] restored:")
        });
        trial.note(format!("restored after {:?}", began.elapsed()));
        if members(started.id) != [started.id] {
            trial.fail("the started process is not the program");
        }
        let life = started.end(LIMIT);
        trial.compare(&bare, &life);
        drop(holder);
    }

    /// A process that holds an id.
    struct Holder(i32);

    impl Holder {
        fn of(id: i32) -> Option<Holder> {
            let set_tid = [id];
            let mut args = [0u64; 11];
            args[4] = libc::SIGCHLD as u64;
            args[8] = set_tid.as_ptr() as u64;
            args[9] = 1;
            let end = Instant::now() + LIMIT;
            loop {
                // SAFETY: clone3 as a fork; the child only waits to be killed.
                unsafe {
                    let size = 8 * args.len();
                    match libc::syscall(libc::SYS_clone3, args.as_ptr(), size) {
                        0 => loop {
                            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                            libc::pause();
                        },
                        -1 if *libc::__errno_location() == libc::EEXIST && Instant::now() < end => {
                            std::thread::sleep(Duration::from_millis(5));
                        }
                        -1 => return None,
                        _ => return Some(Holder(id)),
                    }
                }
            }
        }
    }

    impl Drop for Holder {
        fn drop(&mut self) {
            signal(self.0, libc::SIGKILL);
            // SAFETY: our own child.
            unsafe { libc::waitpid(self.0, std::ptr::null_mut(), 0) };
        }
    }
}

mod asked {
    use super::*;

    fn quiet(seconds: f64) -> Trial {
        let program = Program::guest("mem_heap").seconds(seconds);
        let mut trial = Trial::new(program, LAZY_FORK);
        trial.ckpt.remove("CKPT_INTERVAL");
        trial
    }

    fn ask(trial: &mut Trial, pid: i32) {
        let output = std::process::Command::new(build::command())
            .args(["checkpoint", "--wait", "--timeout", "20", &pid.to_string()])
            .env("CKPT_DIR", trial.dir.join("store"))
            .output()
            .expect("the command runs");
        trial.note(String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            trial.fail("ckpt checkpoint --wait failed");
        }
    }

    /// In inserted mode, by the command; then of the restored program, by the id of
    /// the process that was started as well as by its own.
    #[test]
    fn by_the_command() {
        let mut trial = quiet(3.0);
        let bare = trial.bare();
        let started = trial.start();
        std::thread::sleep(Duration::from_millis(300));
        ask(&mut trial, started.id);
        let first = trial.generation();
        started.kill(true);
        let started = trial.start();
        std::thread::sleep(Duration::from_millis(300));
        ask(&mut trial, started.id);
        let inner = program_of(&started);
        ask(&mut trial, inner);
        if first != 1 || trial.generation() != 3 {
            trial.fail("not one generation for each request");
        }
        let life = started.end(LIMIT);
        trial.compare(&bare, &life);
    }

    #[test]
    fn by_a_signal() {
        let mut trial = quiet(2.0).ckpt("CKPT_TRIGGER", "USR2");
        let bare = trial.bare();
        for _ in 0..2 {
            let mut started = trial.start();
            std::thread::sleep(Duration::from_millis(300));
            let known = trial.generation();
            signal(started.id, libc::SIGUSR2);
            if trial.await_generation(&mut started, known).is_none() {
                trial.fail("it ended");
            }
            started.kill(true);
        }
        let life = trial.finish();
        trial.compare(&bare, &life);
    }

    #[test]
    fn by_several_threads() {
        let program = Program::guest("ins_threads").seconds(2.0);
        let mut trial = Trial::new(program.clone(), LAZY_FORK);
        trial.ckpt.remove("CKPT_INTERVAL");
        trial.survives(3);
        Trial::new(program, EAGER_COPY).survives(3);
    }
}

mod others {
    use super::*;

    /// Children of every kind: no checkpoint is taken of them.
    #[test]
    fn children_are_let_alone() {
        let program = Program::guest("proc_children").seconds(1.2);
        let mut trial = Trial::new(program, LAZY_FORK).ckpt("CKPT_KEEP_ON_EXIT", "always");
        let bare = trial.bare();
        trial.kill_and_resume(2);
        let life = trial.finish();
        let left = jobs(&trial);
        if left.len() != 1 {
            trial.fail(&format!("jobs in the store: {left:?}"));
        }
        trial.compare(&bare, &life);
    }

    /// A process of one thread can make a user namespace, and our helper was a second thread.
    #[test]
    fn namespaces() {
        let program = Program::guest("ref_unshare").seconds(0.8);
        let mut trial = Trial::new(program, LAZY_FORK);
        let bare = trial.bare();
        let possible = std::fs::read_to_string(trial.dir.join("bare.log")).unwrap_or_default();
        let started = trial.start();
        let life = started.end(LIMIT);
        if possible.contains("no reason") {
            eprintln!("*** NOT TESTED: no user namespaces here");
        } else if trial.notes("reason there") != 1 {
            trial.fail("unshare failed under the library");
        }
        trial.compare(&bare, &life);
    }
}

mod another_program {
    use super::*;

    /// `nice ./program` died of signal 64 without a word: nice was asked to stop for a checkpoint
    /// when it called exec, which hands pending signals on to a program without a handler.
    #[test]
    fn is_not_met_by_a_stop() {
        let program = Program::guest("end_exec").arg("40");
        let mut trial = Trial::new(program, LAZY_FORK).ckpt("CKPT_INTERVAL", "1ms");
        let life = trial.start().end(2 * LIMIT);
        trial.note(life.describe());
        if life.status != Some(0) || life.stdout != b"the last one has run\n" {
            trial.fail("one of them did not come to its end");
        }
    }
}
