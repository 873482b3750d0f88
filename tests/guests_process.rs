//! The process, languages, refusals and inserted mode (issue lines "process",
//! "what cannot be").

mod common;

guest_tests! {
    proc_identity = "proc_identity";
    proc_environment = "proc_environment" ["a-long-word-to-be-written-over"];
    proc_locks = "proc_locks";
    proc_rare = "proc_rare";
    proc_privileges = "proc_privileges";
    mem_lockall = "mem_lockall";
    cpp_iostream = "cpp_iostream";
    rust_guest = "rust_guest";
    py_threads = "py_threads.py", 1.5 s;
    perl_guest = "perl_guest.pl", 1.5 s;
    sh_builtins = "sh_builtins.sh", 2.0 s;
    sh_children = "sh_children.sh", 3.0 s;
}

mod refusals {
    use crate::common::run::Started;
    use crate::common::*;
    use std::process::Command;
    use std::time::{Duration, Instant};

    const LIMIT: Duration = Duration::from_secs(30);

    /// What `ckpt status` says of everything in the trial's store.
    fn status(trial: &Trial, json: bool) -> String {
        let mut command = Command::new(build::command());
        command.env("CKPT_DIR", trial.dir.join("store"));
        command.args(if json {
            &["--json", "status"][..]
        } else {
            &["status"]
        });
        let output = command.output().expect("ckpt status");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn log(trial: &Trial) -> String {
        std::fs::read_to_string(trial.dir.join("ckpt.log")).unwrap_or_default()
    }

    /// Until the guest says that its reason is there; false where there can be none.
    fn comes_to_its_reason(trial: &mut Trial, started: &mut Started, times: usize) -> bool {
        let limit = Instant::now() + LIMIT;
        while trial.notes("reason there") < times {
            if trial.notes("no reason") > 0 {
                let what = trial.program.args.join(" ");
                eprintln!("*** NOT TESTED: {what}: this kernel does not offer it to this user");
                return false;
            }
            if started.has_ended() || Instant::now() > limit {
                trial.fail("the guest did not come to its reason");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    /// While the reason is there nothing is committed; `comes_back`: when it is gone
    /// something is, and the program can be killed and resumed.
    fn refused(program: Program, reason: &str, comes_back: bool) {
        let mut trial = Trial::new(program.seconds(1.2), LAZY_FORK);
        let bare = trial.bare();
        let mut started = trial.start();
        let limit = Instant::now() + LIMIT;
        if !comes_to_its_reason(&mut trial, &mut started, 1) {
            started.kill(true);
            return;
        }
        // One that began before the reason was there may still be published, and takes as
        // long as the disk does; when a later one was refused it is over.
        let refusal = |trial: &Trial| log(trial).contains(reason);
        while !refusal(&trial) && !started.has_ended() && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(2));
        }
        let before = trial.generation();
        let mut shown = false;
        while trial.notes("reason goes") == 0 && Instant::now() < limit && !started.has_ended() {
            if trial.generation() != before && trial.notes("reason goes") == 0 {
                trial.fail("a checkpoint was taken in spite of the reason");
            }
            shown = shown || status(&trial, false).contains(reason);
            std::thread::sleep(Duration::from_millis(5));
        }
        let refusals: Vec<String> = log(&trial)
            .lines()
            .filter(|line| line.contains("checkpoint refused"))
            .map(str::to_owned)
            .collect();
        if !refusals.iter().any(|line| line.contains(reason)) {
            trial.fail(&format!("the log does not say {reason:?}: {refusals:?}"));
        }
        if !shown {
            trial.fail("`ckpt status` did not show the reason");
        }
        if comes_back {
            if trial.await_generation(&mut started, before).is_none() {
                trial.fail("no checkpoint succeeded after the reason was gone");
            }
            started.kill(true);
            if status(&trial, false).contains(reason) {
                trial.fail("`ckpt status` shows a reason that has been gone since");
            }
            trial.kill_and_resume(1);
            let life = trial.finish();
            trial.compare(&bare, &life);
        } else {
            let life = started.end(LIMIT);
            trial.compare(&bare, &life);
        }
    }

    /// Killed while checkpoints are refused: the reason outlives the program, and the
    /// generation from before is what the next life goes on from.
    fn killed(program: Program, reason: &str) {
        let mut trial = Trial::new(program.seconds(1.2), LAZY_FORK);
        let bare = trial.bare();
        for life in 1..=2 {
            let mut started = trial.start();
            if !comes_to_its_reason(&mut trial, &mut started, life) {
                started.kill(true);
                return;
            }
            let limit = Instant::now() + LIMIT;
            while log(&trial).matches(reason).count() < life && Instant::now() < limit {
                std::thread::sleep(Duration::from_millis(5));
            }
            started.kill(true);
            if trial.notes("reason goes") != 0 {
                trial.fail("the kill came too late");
            }
            for json in [false, true] {
                let said = status(&trial, json);
                if !said.contains(reason) {
                    trial.fail(&format!("after the kill `ckpt status` says {said}"));
                }
            }
        }
        if trial.generation() == 0 {
            trial.fail("there was no generation before the reason: this proves nothing");
        }
        let life = trial.finish();
        trial.compare(&bare, &life);
    }

    fn facility(kind: &str) -> Program {
        Program::guest("ref_facility").arg(kind)
    }

    /// For each kind of reason: refused in words, and the generation before it stays good.
    macro_rules! facilities {
        ($($name:ident: $kind:literal, $reason:literal, $back:literal;)*) => { $(
            mod $name {
                #[test]
                fn is_refused() {
                    super::refused(super::facility($kind), $reason, $back);
                }
                #[test]
                fn keeps_the_last_good_generation() {
                    super::killed(super::facility($kind), $reason);
                }
            }
        )* };
    }

    facilities! {
        perf: "perf", "[perf_event]", true;
        bpf: "bpf", "bpf-map", true;
        secret_memory: "secret", "secretmem", true;
        protection_keys: "keys", "memory protection keys", false;
        ldt: "ldt", "LDT", false;
        landlock: "landlock", "landlock", false;
        user_dispatch: "dispatch", "PR_SET_SYSCALL_USER_DISPATCH", false;
        // Capabilities that were dropped were there again after a restore.
        capabilities: "capabilities", "changed its effective capabilities", true;
        capabilities_of_a_thread: "thread", "changed its effective capabilities", true;
        securebits: "securebits", "changed its securebits", false;
        user: "user", "changed its user ids", true;
        not_readable: "dumpable", "PR_SET_DUMPABLE", true;
    }

    /// A program that had locked itself in was outside again after a restore. (What it does to
    /// files in there cannot be put back, so there is no going back to before.)
    #[test]
    fn chroot() {
        refused(facility("chroot"), "changed its root directory", true);
    }

    #[test]
    fn child() {
        refused(Program::guest("ref_child"), "has a child process", true);
    }

    #[test]
    fn io_uring() {
        refused(Program::guest("ref_iouring"), "io_uring", true);
    }

    #[test]
    fn aio() {
        refused(Program::guest("ref_aio"), "aio", true);
    }

    #[test]
    fn message_queue() {
        refused(Program::guest("ref_mqueue"), "message queue", true);
    }

    /// A program that had entered a sandbox gave up its lock: `ckpt status` called it not
    /// running, and its job could be restored while it lived. Nor may it be asked by a
    /// signal, whose handler might be its death.
    #[test]
    fn a_sandboxed_program_keeps_its_job() {
        let reason = "PR_SET_SYSCALL_USER_DISPATCH";
        let mut trial = Trial::new(facility("dispatch").seconds(1.2), LAZY_FORK);
        let bare = trial.bare();
        let mut started = trial.start();
        if !comes_to_its_reason(&mut trial, &mut started, 1) {
            started.kill(true);
            return;
        }
        let limit = Instant::now() + LIMIT;
        while !log(&trial).contains(reason) && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(2));
        }
        let said: serde_json::Value = serde_json::from_str(&status(&trial, true)).expect("JSON");
        let state = &said["status"][0];
        if state["state"] != "asleep" || state["running"] != true || state["answered"] != false {
            trial.fail(&format!("`ckpt status` says {said}"));
        }
        let mut restore = Command::new(build::command());
        restore.env("CKPT_DIR", trial.dir.join("store"));
        let output = restore.arg("restore").output().expect("ckpt restore");
        let line = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() || !line.contains(&started.id.to_string()) {
            trial.fail(&format!("`ckpt restore` while it runs: {output:?}"));
        }
        if trial.notes("reason goes") != 0 {
            trial.fail("it was asked too late");
        }
        let life = started.end(LIMIT);
        trial.compare(&bare, &life);
    }

    #[test]
    fn seccomp() {
        refused(Program::guest("ref_seccomp"), "seccomp", false);
    }
}

mod privileges {
    use crate::common::*;
    use std::os::unix::process::CommandExt;

    /// Makes the calling process somebody else; as the call that it is.
    type Become = fn() -> libc::c_int;

    /// Another group, fewer capabilities, other groups: a restart with these ends with one
    /// line and 125, and the checkpoint is still there for the right start. Only root can
    /// become somebody else.
    #[test]
    fn a_restart_as_somebody_else_is_refused() {
        // SAFETY: no arguments.
        if unsafe { libc::geteuid() } != 0 || user::ordinary().is_some() {
            eprintln!("*** NOT TESTED: only root can start a program as somebody else");
            return;
        }
        const CAP_SYS_TIME: libc::c_ulong = 25;
        // SAFETY: each is one system call between fork and exec.
        let starts: [(&str, Become); 3] = unsafe {
            [
                ("belongs to uid 0 gid 0, this is uid 0 gid 1", || {
                    libc::setgid(1)
                }),
                ("process with other groups", || libc::setgroups(1, &7)),
                ("process with other capabilities", || {
                    libc::prctl(libc::PR_CAPBSET_DROP, CAP_SYS_TIME, 0, 0, 0)
                }),
            ]
        };
        let mut trial = Trial::new(Program::guest("mem_heap").seconds(1.2), LAZY_FORK);
        let bare = trial.bare();
        trial.kill_and_resume(1);
        for (line, other) in starts {
            let mut command = trial.prepare();
            // SAFETY: only system calls between fork and exec.
            unsafe {
                command.pre_exec(move || match other() {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                })
            };
            let said = command.stderr(std::process::Stdio::piped());
            let said = said.output().expect("the program starts");
            let text = String::from_utf8_lossy(&said.stderr).into_owned();
            if said.status.code() != Some(125) || text.lines().count() != 1 || !text.contains(line)
            {
                trial.fail(&format!("{line}: {:?}, {text:?}", said.status));
            }
        }
        let life = trial.finish();
        trial.compare(&bare, &life);
    }
}

mod inserted {
    use crate::common::*;

    /// No clock at all: checkpoints by call, the return value after a recovery.
    #[test]
    fn returns_the_value() {
        let program = Program::guest("ins_calls")
            .seconds(1.5)
            .env("GUEST_RETURN", "7");
        let mut trial = Trial::new(program, LAZY_FORK).ckpt("CKPT_RETURN_VALUE", "7");
        trial.ckpt.remove("CKPT_INTERVAL");
        let bare = trial.bare();
        // A life that is killed before it is back has nothing to note, and a checkpoint after
        // the return is needed for the next life to count it.
        for life in 0..4 {
            let known = trial.generation();
            let mut started = trial.start();
            trial.await_generation(&mut started, known);
            if trial.notes("returned") != life {
                trial.fail(&format!("life {life} came back another number of times"));
            }
            started.kill(true);
        }
        let life = trial.finish();
        trial.compare(&bare, &life);
        if trial.notes("returned") != 4 {
            trial.fail("the last life did not come back");
        }
    }

    /// Killed at any instant, it never comes back between hold and release: of the notes
    /// that it writes there, "released" always follows "held".
    #[test]
    fn holds() {
        let program = Program::guest("ins_hold").seconds(2.0);
        let mut trial = Trial::new(program, LAZY_FORK).ckpt("CKPT_INTERVAL", "20ms");
        let bare = trial.bare();
        trial.kill_and_resume(4);
        let life = trial.finish();
        trial.compare(&bare, &life);
        let log = std::fs::read_to_string(trial.dir.join("guest.log")).unwrap_or_default();
        let mut held = false;
        for line in log.lines() {
            if line == "released" && !held {
                trial.fail("a checkpoint was taken between hold and release");
            }
            held = line == "held";
        }
    }

    /// A program that had pinned itself to one CPU before the helper was born had all of them
    /// after the restore.
    #[test]
    fn stays_on_its_cpu() {
        let mut trial = Trial::new(Program::guest("ins_pinned").seconds(1.5), LAZY_FORK);
        trial.ckpt.remove("CKPT_INTERVAL");
        trial.survives(3);
    }

    /// Nothing is written by a program that never asks.
    #[test]
    fn silent_without_calls() {
        let mut trial = Trial::new(Program::guest("mem_heap").seconds(0.5), LAZY_FORK);
        trial.ckpt.remove("CKPT_INTERVAL");
        let bare = trial.bare();
        let life = trial.finish();
        trial.compare(&bare, &life);
        if trial.generation() != 0 {
            trial.fail("a generation was written");
        }
    }
}
