//! System calls by number, straight into the kernel.
//!
//! The kernel's convention is kept: a negative result is `-errno`. Callers that
//! want a `Result` use [`check`].

use std::arch::asm;

/// The kernel's result: `Ok(value)` or `Err(errno)` (a positive errno number).
pub type SysResult = Result<usize, i32>;

/// Turns the kernel's raw return value into a [`SysResult`].
#[inline]
pub fn check(ret: isize) -> SysResult {
    if (-4095..0).contains(&ret) {
        Err(-ret as i32)
    } else {
        Ok(ret as usize)
    }
}

/// System call with six arguments.
///
/// # Safety
/// The arguments must be valid for the call `nr`; the call must not change the
/// stack or return twice in a way the compiler cannot see (use dedicated
/// assembly for `clone` with a new stack, `vfork`, `rt_sigreturn`).
#[inline(always)]
pub unsafe fn syscall6(
    nr: usize,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    f: usize,
) -> isize {
    let ret: isize;
    // SAFETY: the caller vouches for the arguments; rcx and r11 are the only
    // registers that the `syscall` instruction clobbers besides rax.
    unsafe {
        asm!("syscall", inlateout("rax") nr as isize => ret,
             in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    ret
}

/// `syscall!(nr, args...)`: up to six arguments of any type castable to `usize`;
/// (negative literals need a type: `-1i32`);
/// evaluates to the kernel's raw `isize`. Must stand in an `unsafe` block.
#[macro_export]
macro_rules! syscall {
    ($nr:expr) => { $crate::raw::syscall6(($nr) as usize, 0, 0, 0, 0, 0, 0) };
    ($nr:expr, $a:expr) => { $crate::raw::syscall6(($nr) as usize, ($a) as usize, 0, 0, 0, 0, 0) };
    ($nr:expr, $a:expr, $b:expr) => { $crate::raw::syscall6(($nr) as usize, ($a) as usize, ($b) as usize, 0, 0, 0, 0) };
    ($nr:expr, $a:expr, $b:expr, $c:expr) => { $crate::raw::syscall6(($nr) as usize, ($a) as usize, ($b) as usize, ($c) as usize, 0, 0, 0) };
    ($nr:expr, $a:expr, $b:expr, $c:expr, $d:expr) => { $crate::raw::syscall6(($nr) as usize, ($a) as usize, ($b) as usize, ($c) as usize, ($d) as usize, 0, 0) };
    ($nr:expr, $a:expr, $b:expr, $c:expr, $d:expr, $e:expr) => { $crate::raw::syscall6(($nr) as usize, ($a) as usize, ($b) as usize, ($c) as usize, ($d) as usize, ($e) as usize, 0) };
    ($nr:expr, $a:expr, $b:expr, $c:expr, $d:expr, $e:expr, $f:expr) => { $crate::raw::syscall6(($nr) as usize, ($a) as usize, ($b) as usize, ($c) as usize, ($d) as usize, ($e) as usize, ($f) as usize) };
}
