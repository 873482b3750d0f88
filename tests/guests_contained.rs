//! Under the system-call filter that containers have by default (`common/contained.rs`): what
//! the library uses most is not there, and everything comes back all the same. No checkpoint was
//! taken there (pidfd_getfd), none restored (clone3), and a guest died when it opened its log: the
//! path is the last string on the stack, and bytes behind it were read (`hooks/user.rs`).

mod common;

use common::*;

/// The guests that lean most on what is forbidden: descriptors, threads, memory, files.
macro_rules! contained {
    ($($test:ident = $guest:literal $([$($arg:literal),*])?;)*) => { $(
        #[test]
        fn $test() {
            let mut program = Program::guest($guest).seconds(1.2);
            $($(program = program.arg($arg);)*)?
            program.contained = true;
            Trial::new(program, LAZY_FORK).survives(3);
        }
    )* };
}

contained! {
    pipes = "fd_pipes";
    sockets = "fd_sockets";
    epoll_and_the_like = "fd_kernel";
    files = "fd_files";
    locks = "thr_locks";
    attributes_of_threads = "thr_attributes";
    timers = "time_timers";
    pending_signals = "sig_pending";
    mappings = "mem_maps";
    random_memory = "inc_model" ["1"];
}

/// Rollbacks hand descriptors from the helper to the program, and protected bytes to the memory.
#[test]
fn rollbacks() {
    for tracker in ["auto", "mprotect", "full"] {
        let mut program = Program::guest("roll_many").arg("30").arg("3");
        program.contained = true;
        let mut trial = Trial::new(program, LAZY_FORK)
            .ckpt("CKPT_INTERVAL", "off")
            .ckpt("CKPT_TRACKER", tracker);
        let life = trial.start().end(std::time::Duration::from_secs(60));
        let said = String::from_utf8_lossy(&life.stdout).into_owned();
        if life.status != Some(73) || said != "30 rollbacks\n" {
            let how = life.describe();
            trial.fail(&format!("{tracker}: {how}, said {said:?}"));
        }
    }
}
