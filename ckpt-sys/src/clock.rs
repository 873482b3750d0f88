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
    static ckpt_clock_leave: u8;
    static ckpt_clock_return: u8;
    static ckpt_clock_returned: AtomicU64;
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

/// How far above the stack pointer the return address of [`gettime`]'s code is at `rip`.
pub fn return_slot(rip: u64) -> u64 {
    // The length of its `sub` and `add` of the stack pointer; a push and a pop have one byte.
    const ADJUSTED: u64 = 4;
    if rip >= system_call() {
        return 0;
    }
    let leave = &raw const ckpt_clock_leave as u64;
    if rip > leave {
        // Behind `add`, behind the first `pop`, behind the second.
        return (16u64).saturating_sub(8 * (rip - leave).saturating_sub(ADJUSTED));
    }
    match rip - gettime() {
        0 => 0,
        1 => 8,
        within if within < 2 + ADJUSTED => 16,
        _ => 24,
    }
}

/// What a return address is replaced by.
pub fn return_here() -> u64 {
    &raw const ckpt_clock_return as u64
}

/// `returned` is called there, and says where to go on.
pub fn set_returned(returned: extern "C" fn() -> u64) {
    // SAFETY: lives in .data for ever; an atomic.
    unsafe { &ckpt_clock_returned }.store(returned as *const () as u64, Ordering::SeqCst);
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
        let function: extern "C" fn(i32, *mut i64) -> i32 =
            unsafe { std::mem::transmute(function) };
        let mut time = [0i64; 2];
        (function(clock, time.as_mut_ptr()), time)
    }

    #[test]
    fn the_return_address_is_where_the_code_leaves_it() {
        // SAFETY: the assembly's own bytes.
        let code = |at: u64| unsafe { *(at as *const u8) };
        let (start, leave) = (gettime(), &raw const ckpt_clock_leave as u64);
        // push, push, sub; add, pop, pop, ret.
        assert_eq!([code(start), code(start + 1)], [0x53, 0x55]);
        assert_eq!([code(start + 2), code(start + 6)], [0x48, 0x89]);
        assert_eq!([code(leave), code(leave + 4)], [0x48, 0x5d]);
        assert_eq!([code(leave + 5), code(leave + 6)], [0x5b, 0xc3]);
        let slots = [0, 1, 2, 6, 7].map(|k| return_slot(start + k));
        assert_eq!(slots, [0, 8, 16, 24, 24]);
        let slots = [0, 4, 5, 6].map(|k| return_slot(leave + k));
        assert_eq!(slots, [24, 16, 8, 0]);
        assert_eq!(return_slot(system_call()), 0);
    }

    #[test]
    fn a_result_comes_through() {
        static TO: AtomicU64 = AtomicU64::new(0);
        extern "C" fn returned() -> u64 {
            TO.load(Ordering::SeqCst)
        }
        set_returned(returned);
        let (result, second): (u64, u64);
        // SAFETY: as a function whose return address was replaced: the stack is as behind its
        // `ret`, and it comes back to the label with the stack as it was.
        unsafe {
            std::arch::asm!(
                "lea r12, [rip + 2f]",
                "mov [{to}], r12",
                "mov r13, rsp",
                "and rsp, -16",
                "mov eax, 41",
                "mov edx, 43",
                "jmp {here}",
                "2:",
                "mov rsp, r13",
                out("r12") _, out("r13") _,
                to = in(reg) TO.as_ptr(), here = in(reg) return_here(),
                lateout("rax") result, lateout("rdx") second,
                clobber_abi("C"),
            );
        }
        assert_eq!((result, second), (41, 43));
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
