//! `asm/clock.S` as seen from Rust: the clock of a restored program. `agent::clock` is the
//! only user.

use std::arch::global_asm;
use std::sync::atomic::{AtomicU64, Ordering};

global_asm!(include_str!("../asm/clock.S"), options(att_syntax));

/// Clocks that have an offset of their own: those of clock_gettime(2) by number.
pub const CLOCKS: usize = 10;

unsafe extern "C" {
    static ckpt_clock_gettime: u8;
    static ckpt_clock_gettime_end: u8;
    static ckpt_clock_system_call: u8;
    static ckpt_clock_real: AtomicU64;
    static ckpt_clock_offsets: [[AtomicU64; 2]; CLOCKS];
}

/// `int clock_gettime(clockid_t, struct timespec *)` as the vdso has it, with the offset.
pub fn gettime() -> u64 {
    &raw const ckpt_clock_gettime as u64
}

/// End of the code that begins at [`gettime`].
pub fn gettime_end() -> u64 {
    &raw const ckpt_clock_gettime_end as u64
}

/// The same by system call and without an offset.
pub fn system_call() -> u64 {
    &raw const ckpt_clock_system_call as u64
}

/// Which function [`gettime`] asks. While no thread is inside.
pub fn set_real(function: u64) {
    // SAFETY: lives in .data for ever; an atomic.
    unsafe { &ckpt_clock_real }.store(function, Ordering::SeqCst);
}

/// By how much, ns, a clock is put forward.
pub fn set_offset(clock: usize, ns: u64) {
    // SAFETY: as above.
    let [seconds, rest] = &(unsafe { &ckpt_clock_offsets })[clock];
    seconds.store(ns / 1_000_000_000, Ordering::SeqCst);
    rest.store(ns % 1_000_000_000, Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(function: u64, clock: i32) -> (i32, [i64; 2]) {
        // SAFETY: the functions of this file have this type.
        let function: extern "C" fn(i32, *mut i64) -> i32 = unsafe { std::mem::transmute(function) };
        let mut time = [0i64; 2];
        (function(clock, time.as_mut_ptr()), time)
    }

    #[test]
    fn the_offset_is_added_and_carried_over() {
        let ns = |[s, ns]: [i64; 2]| s * 1_000_000_000 + ns;
        for offset in [0u64, 1, 999_999_999, 1_000_000_000, 2_592_000_999_999_999] {
            set_offset(1, offset);
            for _ in 0..50 {
                let before = ns(ask(system_call(), 1).1);
                let (done, shown) = ask(gettime(), 1);
                let after = ns(ask(system_call(), 1).1);
                assert_eq!(done, 0);
                assert!((0..1_000_000_000).contains(&shown[1]), "{shown:?}");
                let plain = ns(shown) - offset as i64;
                assert!(before <= plain && plain <= after, "{offset}");
            }
            let (real, wall) = (ns(ask(system_call(), 0).1), ns(ask(gettime(), 0).1));
            assert!((wall - real).abs() < 1_000_000_000);
        }
        set_offset(1, 0);
        assert!(ask(gettime(), 99).0 < 0);
        assert_eq!(ask(gettime(), -2).0, 0, "CPU time of the process");
    }
}
