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

/// What may be an argument of a system call: integers (sign-extended), pointers and
/// references.
pub trait Argument {
    fn argument(self) -> usize;
}

macro_rules! integer_arguments {
    ($($t:ty)*) => {
        $(impl Argument for $t {
            #[inline(always)]
            fn argument(self) -> usize {
                self as usize
            }
        })*
    };
}

integer_arguments!(i8 u8 i16 u16 i32 u32 i64 u64 isize usize bool);

impl<T> Argument for *const T {
    #[inline(always)]
    fn argument(self) -> usize {
        self as usize
    }
}

impl<T> Argument for *mut T {
    #[inline(always)]
    fn argument(self) -> usize {
        self as usize
    }
}

impl<T> Argument for &T {
    #[inline(always)]
    fn argument(self) -> usize {
        self as *const T as usize
    }
}

impl<T> Argument for &mut T {
    #[inline(always)]
    fn argument(self) -> usize {
        self as *mut T as usize
    }
}

/// `syscall!(nr, args...)`: up to six arguments of any type that is an
/// [`Argument`](raw::Argument); evaluates to the kernel's raw `isize`. Must stand in
/// an `unsafe` block.
#[macro_export]
macro_rules! syscall {
    ($nr:expr $(, $arg:expr)* $(,)?) => {
        $crate::syscall_padded!($nr; $($crate::raw::Argument::argument($arg)),*)
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! syscall_padded {
    ($nr:expr;) => { $crate::raw::syscall6($nr as usize, 0, 0, 0, 0, 0, 0) };
    ($nr:expr; $a:expr) => { $crate::raw::syscall6($nr as usize, $a, 0, 0, 0, 0, 0) };
    ($nr:expr; $a:expr, $b:expr) => { $crate::raw::syscall6($nr as usize, $a, $b, 0, 0, 0, 0) };
    ($nr:expr; $a:expr, $b:expr, $c:expr) => { $crate::raw::syscall6($nr as usize, $a, $b, $c, 0, 0, 0) };
    ($nr:expr; $a:expr, $b:expr, $c:expr, $d:expr) => {
        $crate::raw::syscall6($nr as usize, $a, $b, $c, $d, 0, 0)
    };
    ($nr:expr; $a:expr, $b:expr, $c:expr, $d:expr, $e:expr) => {
        $crate::raw::syscall6($nr as usize, $a, $b, $c, $d, $e, 0)
    };
    ($nr:expr; $a:expr, $b:expr, $c:expr, $d:expr, $e:expr, $f:expr) => {
        $crate::raw::syscall6($nr as usize, $a, $b, $c, $d, $e, $f)
    };
}
