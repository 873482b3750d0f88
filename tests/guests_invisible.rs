//! Checkpoints are invisible: results and elapsed times of blocking calls, storms, leaks,
//! and long chains of generations.

mod common;

use common::*;

/// Runs under checkpoints without being killed; returns the last generation's number.
fn undisturbed(program: Program, setting: Setting, interval: &str, least: u64) {
    let mut trial = Trial::new(program, setting)
        .ckpt("CKPT_INTERVAL", interval)
        .ckpt("CKPT_KEEP_ON_EXIT", "always");
    let bare = trial.bare();
    let life = trial.finish();
    trial.compare(&bare, &life);
    let taken = trial.generation();
    if taken < least {
        trial.fail(&format!(
            "only {taken} checkpoints were taken, {least} wanted"
        ));
    }
}

/// The hooks use a part of the vector registers and save no other: nobody else's code behind a
/// call may see that, also while what a call does is recorded anew after each checkpoint.
mod registers {
    use super::*;

    fn survive(tracker: &str) {
        let guest = build::guest("net_vector");
        let program = Program::at(guest, &["written", "1000000"]).env("CKPT_TRACKER", tracker);
        undisturbed(program, LAZY_FORK, "5ms", 20);
    }

    #[test]
    fn hooks_with_uffd() {
        survive("uffd");
    }

    #[test]
    fn hooks_with_mprotect() {
        survive("mprotect");
    }
}

mod calls {
    use super::*;

    /// It goes on until a hundred checkpoints were taken, and each kind of call has been stopped
    /// often enough to tell a limit that a stop restarts.
    fn blocking_calls(setting: Setting) {
        let program = Program::guest("inv_calls").seconds(4.0);
        undisturbed(
            program.env("GUEST_CHECKPOINTS", "100"),
            setting,
            "20ms",
            100,
        );
    }

    #[test]
    fn inv_calls_lazy_fork() {
        blocking_calls(LAZY_FORK);
    }

    #[test]
    fn inv_calls_eager_copy() {
        blocking_calls(EAGER_COPY);
    }

    #[test]
    fn inv_calls_killed() {
        let program = Program::guest("inv_calls").seconds(2.0);
        Trial::new(program.env("GUEST_NO_ELAPSED", "1"), LAZY_FORK).survives(3);
    }

    #[test]
    fn wait_sees_no_strangers() {
        undisturbed(
            Program::guest("inv_wait").seconds(1.5),
            LAZY_FORK,
            "10ms",
            1,
        );
    }
}

mod leaks {
    use super::*;

    fn none(setting: Setting) {
        let program = Program::guest("inv_leak").env("GUEST_CHECKPOINTS", "1000");
        let mut trial = Trial::new(program, setting).ckpt("CKPT_KEEP_ON_EXIT", "always");
        trial.ckpt.remove("CKPT_INTERVAL");
        let bare = trial.bare();
        let life = trial.finish_within(std::time::Duration::from_secs(200));
        trial.compare(&bare, &life);
        if trial.generation() < 1000 {
            let taken = trial.generation();
            trial.fail(&format!("{taken} checkpoints were committed, not 1000"));
        }
    }

    #[test]
    fn thousand_checkpoints_fork() {
        none(LAZY_FORK);
    }

    #[test]
    fn thousand_checkpoints_copy() {
        none(EAGER_COPY);
    }
}

mod storms {
    use super::*;

    /// A storm in which checkpoints starve is no storm survived.
    const LEAST: u64 = 4;

    macro_rules! storms {
        ($($guest:ident)*) => { $(
            mod $guest {
                use super::*;

                #[test]
                fn undisturbed_fork() {
                    undisturbed(Program::guest(stringify!($guest)).seconds(2.5), LAZY_FORK, "10ms", LEAST);
                }

                #[test]
                fn undisturbed_copy() {
                    undisturbed(Program::guest(stringify!($guest)).seconds(2.5), EAGER_COPY, "10ms", LEAST);
                }

                #[test]
                fn killed() {
                    let program = Program::guest(stringify!($guest)).seconds(3.0);
                    Trial::new(program, LAZY_FORK).ckpt("CKPT_INTERVAL", "20ms").survives(3);
                }
            }
        )* };
    }

    storms! { storm_malloc storm_dlopen storm_printf storm_fork storm_threads storm_signals }
}

mod chains {
    use super::*;
    use crate::common::run::{Sizes, Started};
    use std::time::Duration;

    fn later(started: &Started) -> Sizes {
        std::thread::sleep(Duration::from_millis(25));
        started.sizes()
    }

    /// Twenty generations in a chain (checkpoint, kill, resume, ...): nothing drifts.
    fn twenty(guest: &str, setting: Setting) {
        let mut trial = Trial::new(Program::guest(guest).seconds(5.0), setting);
        let bare = trial.bare();
        let mut sizes = Vec::new();
        for _ in 0..20 {
            let known = trial.generation();
            let mut started = trial.start();
            if trial.await_generation(&mut started, known).is_none() {
                trial.fail("it ended before twenty lives were over");
            }
            let wait = trial.random(60);
            std::thread::sleep(Duration::from_millis(wait));
            // A merge under way has mappings of its own for a moment.
            let looks = [started.sizes(), later(&started), later(&started)];
            sizes.push(looks.into_iter().min_by_key(|s| s.mappings).unwrap());
            started.kill(true);
        }
        for (life, sizes) in sizes.iter().enumerate() {
            trial.note(format!("life {}: {sizes:?}", life + 1));
        }
        let life = trial.finish();
        trial.compare(&bare, &life);
        // Each of these grew once: the page between the restorer's area and the helper's
        // region, the tables of ids and of lazy ranges of the life before, and the
        // mappings of a lazy restore, which fell apart further in the next one.
        // The least of some lives: a checkpoint, or the restart just before, may be at work.
        let least = |lives: std::ops::Range<usize>| {
            let lives = sizes[lives].iter();
            *lives.min_by_key(|s| s.mappings).expect("some lives")
        };
        let (early, late) = (least(2..7), least(15..20));
        let grows = |name: &str, early: usize, late: usize, slack: usize| {
            (late > early + early / 50 + slack).then(|| format!("{name} grow: {early}, {late}"))
        };
        // What is resident after a lazy restore depends on what was touched so far, and on the
        // moment: one life of twenty had a fifth more, where its mappings were the fewest.
        let resident = |lives: std::ops::Range<usize>| sizes[lives].iter().map(|s| s.resident);
        let (before, after) = (resident(2..6).max().unwrap_or(0), resident(15..20).min());
        let grown = grows("mappings", early.mappings, late.mappings, 2)
            .or_else(|| grows("descriptors", early.descriptors, late.descriptors, 0))
            .or_else(|| grows("address space", early.address_space, late.address_space, 64))
            .or_else(|| {
                let after = after.unwrap_or(usize::MAX);
                grows("resident memory", before, after, before / 10 + 256)
            });
        if early.mappings == 0 {
            trial.fail("the sizes could not be read");
        }
        if let Some(what) = grown {
            trial.fail(&format!("from life to life {what}"));
        }
    }

    #[test]
    fn memory_lazy_fork() {
        twenty("mem_maps", LAZY_FORK);
    }

    #[test]
    fn memory_eager_copy() {
        twenty("mem_maps", EAGER_COPY);
    }

    #[test]
    fn threads_lazy_fork() {
        twenty("thr_many", LAZY_FORK);
    }

    #[test]
    fn pipes_eager_copy() {
        twenty("fd_pipes", EAGER_COPY);
    }

    #[test]
    fn signals_lazy_fork() {
        twenty("sig_handlers", LAZY_FORK);
    }
}
