//! Chains of images: restored, merged, damaged, killed (issue line "increments and merge").

mod common;

#[path = "chains/split.rs"]
mod split;

/// A full generation of a real program is made a chain by hand, with other contents in
/// all that newer images replace or drop; the program must not notice.
mod restored {
    use crate::common::*;
    use crate::split;

    fn survives(guest: &str, setting: Setting, links: u64) {
        let program = Program::guest(guest).seconds(4.0);
        let mut trial = Trial::new(program, setting)
            .ckpt("CKPT_INTERVAL", "40ms")
            .ckpt("CKPT_TRACKER", "full");
        let bare = trial.bare();
        for round in 0..2 {
            let mut started = trial.start();
            let mut known = trial.generation();
            while known <= links || trial.notes("begin") == 0 {
                match trial.await_generation(&mut started, known) {
                    Some(generation) => known = generation,
                    None => trial.fail("it ended too early"),
                }
            }
            if trial.await_generation(&mut started, known).is_none() {
                trial.fail("it ended too early");
            }
            started.kill(true);
            let seed = trial.random(u64::MAX) | 1;
            let text = match split::split(&trial.dir.join("store"), links, seed) {
                Ok(text) => text,
                Err(error) => trial.fail(&format!("{error:#}")),
            };
            trial.note(format!("round {round}: {text}, seed {seed}"));
        }
        let life = trial.finish();
        trial.compare(&bare, &life);
        let log = std::fs::read_to_string(trial.dir.join("ckpt.log")).unwrap_or_default();
        if log.matches("restored: ").count() < 2 {
            trial.fail("it was not restored from both chains");
        }
    }

    macro_rules! tests {
        ($($name:ident)*) => { $(
            mod $name {
                use super::*;
                #[test]
                fn lazy() {
                    survives(stringify!($name), LAZY_FORK, 3);
                }
                #[test]
                fn eager() {
                    survives(stringify!($name), EAGER_COPY, 3);
                }
            }
        )* };
    }

    tests! { mem_heap mem_maps mem_big mem_scatter mem_objects storm_threads }
}
