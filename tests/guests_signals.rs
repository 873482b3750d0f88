//! Signals and time come back exactly (issue lines "signals", "time").

mod common;

guest_tests! {
    sig_handlers = "sig_handlers";
    sig_masks = "sig_masks";
    sig_pending = "sig_pending";
    sig_inhandler = "sig_inhandler";
    sig_segv = "sig_segv";
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
    fn sleeps_lazy_fork() {
        lies_dead("time_sleep", LAZY_FORK);
    }

    #[test]
    fn sleeps_eager_copy() {
        lies_dead("time_sleep", EAGER_COPY);
    }
}
