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
}
