//! Signals and time come back exactly (issue lines "signals", "time").

mod common;

guest_tests! {
    sig_handlers = "sig_handlers";
    sig_masks = "sig_masks";
    sig_pending = "sig_pending";
    sig_last = "sig_last";
    sig_lent = "sig_lent";
    sig_inhandler = "sig_inhandler";
    sig_nested = "sig_nested", 2.0 s;
    sig_segv = "sig_segv";
    sig_overrun = "sig_overrun";
    time_cpu_sleep = "time_cpusleep";
    time_cpu_stopped = "time_cpu" ["stopped"];
}

/// Timers that expired, and signals that threads sent each other, while the program was being
/// stopped were in no image: a restored program waited for them for ever, and the checkpoints
/// that it went on taking pushed the good ones out. One restore in 10 to 50 each.
mod moment {
    use crate::common::*;

    fn nothing_is_lost(setting: Setting) {
        let trial = Trial::new(Program::guest("sig_moment").seconds(8.0), setting);
        trial.ckpt("CKPT_INTERVAL", "15ms").survives(25);
    }

    /// A signal of the highest number, which waited while the program was being stopped by one of
    /// that number; and a kill that the stop found just before the kernel was called, which then,
    /// in a process with another id, went to nobody or to somebody else.
    #[test]
    fn the_last_signal_is_not_lost() {
        let trial = Trial::new(Program::guest("sig_last").seconds(4.0), EAGER_COPY);
        trial.ckpt("CKPT_INTERVAL", "15ms").survives(12);
    }

    #[test]
    fn nothing_is_lost_lazy_fork() {
        nothing_is_lost(LAZY_FORK);
    }

    #[test]
    fn nothing_is_lost_eager_copy() {
        nothing_is_lost(EAGER_COPY);
    }
}

/// Pages are protected, and a SIGSEGV that is blocked ends the program: a thread that waited in
/// sigsuspend when the first checkpoint was taken died in the handler of the signal that it waited
/// for (3 of 10 runs of `sig_masks`).
mod protected {
    use crate::common::*;

    fn program_survives(program: &Program) {
        for _ in 0..4 {
            let trial = Trial::new(program.clone().seconds(1.2), LAZY_FORK);
            trial.ckpt("CKPT_TRACKER", "mprotect").survives(2);
        }
    }

    fn survives(guest: &str) {
        program_survives(&Program::guest(guest));
    }

    #[test]
    fn sig_masks() {
        survives("sig_masks");
    }

    #[test]
    fn sig_handlers() {
        survives("sig_handlers");
    }

    #[test]
    fn sig_inhandler() {
        survives("sig_inhandler");
    }

    /// A handler that ran at the first checkpoint went back to a mask that blocked it.
    #[test]
    fn sig_nested() {
        survives("sig_nested");
    }

    #[test]
    fn sig_moment() {
        survives("sig_moment");
    }

    #[test]
    fn sig_segv() {
        survives("sig_segv");
    }

    /// The program's own handler of SIGSEGV ran when the first checkpoint was taken: behind it the
    /// signal still counted as blocked, and the program's next fault was its death (1 of 80 runs
    /// of `sig_segv`; nearly all where the handler takes its time).
    #[test]
    fn a_handler_of_faults_in_progress() {
        program_survives(&Program::guest("sig_segv").arg("slow"));
    }
}

/// The process lies dead for a while after each kill: that time must not be counted.
mod time {
    use crate::common::*;
    use std::time::Duration;

    fn lies_dead(guest: &str, setting: Setting) {
        let mut trial = Trial::new(Program::guest(guest).seconds(2.0), setting);
        let bare = trial.bare();
        for _ in 0..2 {
            let known = trial.generation();
            let mut started = trial.start();
            trial.await_generation(&mut started, known);
            let wait = trial.random(200);
            std::thread::sleep(Duration::from_millis(wait));
            started.kill(true);
            std::thread::sleep(Duration::from_millis(2500));
        }
        let life = trial.finish();
        trial.compare(&bare, &life);
    }

    #[test]
    fn timers_lazy_fork() {
        lies_dead("time_timers", LAZY_FORK);
    }

    #[test]
    fn timers_eager_copy() {
        lies_dead("time_timers", EAGER_COPY);
    }

    #[test]
    fn cpu_lazy_fork() {
        lies_dead("time_cpu", LAZY_FORK);
    }

    #[test]
    fn cpu_eager_copy() {
        lies_dead("time_cpu", EAGER_COPY);
    }

    #[test]
    fn sleeps_lazy_fork() {
        lies_dead("time_sleep", LAZY_FORK);
    }

    #[test]
    fn sleeps_eager_copy() {
        lies_dead("time_sleep", EAGER_COPY);
    }

    /// A sleep that began while the stop waited for other threads was over at once after a
    /// restore: what it had slept at the stop's beginning was less than nothing.
    #[test]
    fn sleeps_that_begin_during_a_stop() {
        Trial::new(Program::guest("time_begun").seconds(3.0), EAGER_COPY).survives(6);
    }
}
