//! The process, languages, refusals and inserted mode (issue lines "process",
//! "what cannot be").

mod common;

guest_tests! {
    proc_identity = "proc_identity";
    proc_environment = "proc_environment" ["a-long-word-to-be-written-over"];
    proc_locks = "proc_locks";
    cpp_iostream = "cpp_iostream";
    rust_guest = "rust_guest";
    py_threads = "py_threads.py", 1.5 s;
    perl_guest = "perl_guest.pl", 1.5 s;
    sh_builtins = "sh_builtins.sh", 2.0 s;
}

mod refusals {
    use crate::common::*;
    use std::time::{Duration, Instant};

    /// While the reason is there nothing is committed; `comes_back`: when it is gone
    /// something is, and the program can be killed and resumed.
    fn refused(guest: &str, comes_back: bool) {
        let mut trial = Trial::new(Program::guest(guest).seconds(1.2), LAZY_FORK);
        let bare = trial.bare();
        let mut started = trial.start();
        let limit = Instant::now() + Duration::from_secs(30);
        while trial.notes("reason there") == 0 {
            if trial.notes("no reason") > 0 {
                eprintln!("*** NOT TESTED: {guest}: this kernel does not offer it to this user");
                return;
            }
            if started.has_ended() || Instant::now() > limit {
                trial.fail("the guest did not come to its reason");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        // One that began before the reason was there may still be published.
        std::thread::sleep(Duration::from_millis(100));
        let before = trial.generation();
        while trial.notes("reason goes") == 0 && Instant::now() < limit && !started.has_ended() {
            if trial.generation() != before && trial.notes("reason goes") == 0 {
                trial.fail("a checkpoint was taken in spite of the reason");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let log = std::fs::read_to_string(trial.dir.join("ckpt.log")).unwrap_or_default();
        if !log.contains("checkpoint refused") {
            trial.fail("the log does not say that the checkpoint was refused, and why");
        }
        if comes_back {
            if trial.await_generation(&mut started, before).is_none() {
                trial.fail("no checkpoint succeeded after the reason was gone");
            }
            started.kill(true);
            trial.kill_and_resume(1);
            let life = trial.finish();
            trial.compare(&bare, &life);
        } else {
            let life = started.end(Duration::from_secs(30));
            trial.compare(&bare, &life);
        }
    }

    #[test]
    fn child() {
        refused("ref_child", true);
    }

    #[test]
    fn io_uring() {
        refused("ref_iouring", true);
    }

    #[test]
    fn aio() {
        refused("ref_aio", true);
    }

    #[test]
    fn message_queue() {
        refused("ref_mqueue", true);
    }

    #[test]
    fn seccomp() {
        refused("ref_seccomp", false);
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
