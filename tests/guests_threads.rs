//! Threads come back exactly (issue line "threads").

mod common;

guest_tests! {
    thr_many_1 = "thr_many" ["1"];
    thr_many_2 = "thr_many" ["2"];
    thr_many_64 = "thr_many" ["64"];
    thr_many_1500 = "thr_many" ["1500"], 4.0 s;
    thr_locks = "thr_locks";
    thr_robust = "thr_robust";
    thr_ends = "thr_ends";
    thr_attributes = "thr_attributes";
    thr_leader = "thr_leader";
    thr_rawexit = "thr_rawexit";
}

/// The last thread leaves by exit(2) with status 0: the helper notices, the process ends
/// with that status, and the job's files are removed as after any good end.
#[test]
fn the_last_thread_leaves_quietly() {
    use common::*;
    let mut program = Program::guest("thr_rawexit").arg("0").seconds(1.0);
    program.status = 0;
    let mut trial = Trial::new(program, LAZY_FORK);
    let bare = trial.bare();
    trial.kill_and_resume(1);
    let life = trial.finish();
    trial.compare(&bare, &life);
    if trial.generation() != 0 {
        trial.fail("the job's files are still there");
    }
}

/// R with OpenBLAS crashed at every recovery: the library's pool of threads is started when
/// it is loaded, before libckpt.so's constructor, and went on running while the memory
/// under it was replaced.
mod threads_before_main {
    use crate::common::*;

    fn program() -> Program {
        let library = build::guest("early_plugin");
        Program::guest("thr_early")
            .seconds(1.2)
            .env("LD_PRELOAD", &path_text(&library))
    }

    #[test]
    fn lazy_fork() {
        Trial::new(program(), LAZY_FORK).survives(3);
    }

    #[test]
    fn eager_copy() {
        Trial::new(program(), EAGER_COPY).survives(3);
    }
}
