//! The symbol net: what the exported libc names of `ckpt-preload` do where the
//! call-site net could not be laid. Fixed-arity functions only, and only calls that
//! the program makes by name: what libc calls itself stays unseen, which is why this
//! is the second choice and the reason is in `ckpt status`.
//!
//! Any thread; may run before the constructor. Unlike the rest of the hooks this sets
//! errno, as the functions it stands for do.

use super::frame::{CallFrame, Verdict};
use super::{dispatch, foreign, ids, sigaction as action};
use crate::agent::state::{AGENT, RESERVED_BIT, RESERVED_SIGNAL};
use crate::image::state::KernelSigaction;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering::*};

/// The constructor came as far as the stop handler: before, and in a process where the
/// library does nothing, every name is libc's own.
static STARTED: AtomicBool = AtomicBool::new(false);

/// Does the symbol net have the word?
#[inline]
pub fn on_duty() -> bool {
    STARTED.load(Relaxed) && !AGENT.net_installed.load(Relaxed)
}

static TOUCH: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());

/// `ckpt-preload` says here how its symbols are resolved.
pub fn set_touch(touch: fn()) {
    TOUCH.store(touch as *mut (), Release);
}

/// Resolves every real function behind the exports, so that none is looked up for
/// the first time in a signal handler or a forked child, and lets the names act.
/// Constructor, after the stop handler is installed.
pub fn touch() {
    STARTED.store(true, SeqCst);
    let at = TOUCH.load(Acquire);
    if !at.is_null() {
        // SAFETY: only `set_touch` stores here, from a `fn()`.
        let touch: fn() = unsafe { std::mem::transmute(at) };
        touch();
    }
}

/// A libc-style result: -1 and errno for the kernel's negative one.
fn with_errno(ret: i64) -> i64 {
    if (-4095..0).contains(&ret) {
        // SAFETY: the calling thread's errno.
        unsafe { *libc::__errno_location() = -ret as i32 };
        -1
    } else {
        ret
    }
}

fn kernel(nr: libc::c_long, args: &[u64]) -> i64 {
    let mut frame = CallFrame {
        rax: nr,
        args: [0; 6],
        rbp: 0,
        slot: 0,
    };
    frame.args[..args.len()].copy_from_slice(args);
    match dispatch(&mut frame) {
        Verdict::Done => frame.rax,
        Verdict::Forward => {
            let [a, b, c, d, e, f] = frame.args;
            // SAFETY: the program's own call.
            unsafe { syscall!(frame.rax, a, b, c, d, e, f) as i64 }
        }
    }
}

/// The system call `nr` under the hooks' policy, with libc's way of failing.
///
/// # Safety
/// The arguments are what the program passed to the function of that name.
pub unsafe fn call(nr: libc::c_long, args: &[u64]) -> i64 {
    with_errno(kernel(nr, args))
}

/// -1 and errno for an error number, else 0.
pub fn fail(error: i32) -> i32 {
    with_errno(-i64::from(error)) as i32
}

/// The kernel's id for an argument of a function that is passed on.
pub fn real_id(id: i32) -> i32 {
    if AGENT.ids_translated.load(Relaxed) {
        ids::to_real(id)
    } else {
        id
    }
}

/// glibc never lets a program touch its own two signals.
const GLIBCS: u64 = 1 << 31 | 1 << 32;

/// sigprocmask and pthread_sigmask: 0 or an errno.
///
/// # Safety
/// As the functions.
pub unsafe fn mask(how: i32, set: *const libc::sigset_t, old: *mut libc::sigset_t) -> i32 {
    let mut copy = 0u64;
    if !set.is_null() {
        // SAFETY: the caller's set; its first word is the kernel's.
        copy = unsafe { *set.cast::<u64>() } & !GLIBCS;
    }
    let at = if set.is_null() {
        0
    } else {
        &raw const copy as u64
    };
    -kernel(libc::SYS_rt_sigprocmask, &[how as u64, at, old as u64, 8]) as i32
}

type Sigaction = unsafe extern "C" fn(i32, *const libc::sigaction, *mut libc::sigaction) -> i32;

/// Bit `sig - 1`: the program's mask of that action holds the reserved signal.
static RESERVED_IN_MASK: AtomicU64 = AtomicU64::new(0);

/// sigaction: libc's own function does the work, on a filtered copy.
///
/// # Safety
/// As sigaction; `real` is libc's.
pub unsafe fn sigaction(
    real: Sigaction,
    sig: i32,
    act: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> i32 {
    // SAFETY: the caller's structures, as libc's function would use them.
    unsafe {
        if sig == RESERVED_SIGNAL {
            let before = if act.is_null() {
                action::reserved_action()
            } else {
                action::set_reserved_action(&to_kernel(&*act))
            };
            if !old.is_null() {
                from_kernel(&before, &mut *old);
            }
            return 0;
        }
        if !(1..64).contains(&sig) {
            return real(sig, act, old);
        }
        let bit = 1u64 << (sig - 1);
        let had = RESERVED_IN_MASK.load(Relaxed) & bit != 0;
        let ret = if act.is_null() {
            real(sig, act, old)
        } else {
            let mut copy = *act;
            let word = (&raw mut copy.sa_mask).cast::<u64>();
            let has = *word & RESERVED_BIT != 0;
            *word &= !RESERVED_BIT;
            let ret = real(sig, &raw const copy, old);
            if ret == 0 && has {
                RESERVED_IN_MASK.fetch_or(bit, Relaxed);
            } else if ret == 0 && had {
                RESERVED_IN_MASK.fetch_and(!bit, Relaxed);
            }
            ret
        };
        if ret == 0 && had && !old.is_null() {
            *(&raw mut (*old).sa_mask).cast::<u64>() |= RESERVED_BIT;
        }
        ret
    }
}

fn to_kernel(act: &libc::sigaction) -> KernelSigaction {
    KernelSigaction {
        handler: act.sa_sigaction as u64,
        flags: act.sa_flags as u32 as u64,
        restorer: 0,
        // SAFETY: the first word of a sigset_t is the kernel's mask.
        mask: unsafe { *(&raw const act.sa_mask).cast::<u64>() },
    }
}

fn from_kernel(action: &KernelSigaction, out: &mut libc::sigaction) {
    out.sa_sigaction = action.handler as usize;
    out.sa_flags = action.flags as i32;
    out.sa_restorer = None;
    // SAFETY: all zero is an empty set; its first word is the kernel's mask.
    unsafe {
        out.sa_mask = std::mem::zeroed();
        *(&raw mut out.sa_mask).cast::<u64>() = action.mask;
    }
}

/// signal(64, handler).
pub fn signal_reserved(handler: usize) -> usize {
    let new = KernelSigaction {
        handler: handler as u64,
        flags: libc::SA_RESTART as u64,
        restorer: 0,
        mask: RESERVED_BIT,
    };
    action::set_reserved_action(&new).handler as usize
}

/// sigpending: ours never shows.
///
/// # Safety
/// As sigpending.
pub unsafe fn sigpending(set: *mut libc::sigset_t) -> i32 {
    // SAFETY: the program's own call.
    unsafe { call(libc::SYS_rt_sigpending, &[set as u64, 8]) as i32 }
}

/// A waiting function's mask without the reserved signal: the copy that the real
/// function is given, or the program's own pointer.
///
/// # Safety
/// `set` is null or valid; `copy` outlives the call.
pub unsafe fn waiting_mask(
    set: *const libc::sigset_t,
    copy: &mut libc::sigset_t,
) -> *const libc::sigset_t {
    // SAFETY: per contract; the first word is the kernel's.
    unsafe {
        if set.is_null() || *set.cast::<u64>() & RESERVED_BIT == 0 {
            if !set.is_null() && foreign::any_pending() {
                foreign::release_pending();
            }
            return set;
        }
        *copy = *set;
        *(copy as *mut libc::sigset_t).cast::<u64>() &= !RESERVED_BIT;
        copy
    }
}

/// _exit and its kin. Also the way when the call-site net is there: our own calls do
/// not pass it.
pub fn end(status: i32) -> ! {
    kernel_exit(status);
    loop {
        // SAFETY: ends the process.
        unsafe { syscall!(libc::SYS_exit_group, status) };
    }
}

fn kernel_exit(status: i32) {
    let mut frame = CallFrame {
        rax: libc::SYS_exit_group,
        args: [status as u64, 0, 0, 0, 0, 0],
        rbp: 0,
        slot: 0,
    };
    dispatch(&mut frame);
}

extern "C" fn at_exit(status: i32, _: *mut libc::c_void) {
    kernel_exit(status);
}

/// Where there is no call-site net: exit() and the return from main are seen by a
/// handler of libc's, which as the first to be registered runs last.
pub fn watch_exit() {
    unsafe extern "C" {
        fn on_exit(f: extern "C" fn(i32, *mut libc::c_void), arg: *mut libc::c_void) -> i32;
    }
    // SAFETY: registers a function of ours, constructor.
    unsafe { on_exit(at_exit, std::ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;

    #[test]
    fn masks_and_errors_are_libcs() {
        in_child(|| {
            // SAFETY: sets of our own.
            unsafe {
                let mut all: libc::sigset_t = std::mem::zeroed();
                let mut old: libc::sigset_t = std::mem::zeroed();
                libc::sigfillset(&mut all);
                assert_eq!(mask(libc::SIG_SETMASK, &all, &mut old), 0);
                assert_eq!(mask(99, &all, &mut old), libc::EINVAL);
                let mut real = 0u64;
                syscall!(libc::SYS_rt_sigprocmask, 0, 0, &raw mut real, 8);
                assert_eq!(real & (RESERVED_BIT | GLIBCS), 0);
                assert_eq!(mask(libc::SIG_SETMASK, std::ptr::null(), &mut old), 0);
                assert_eq!(libc::sigismember(&old, 64), 1);
                assert_eq!(call(libc::SYS_madvise, &[1, 4096, 4]), -1);
                assert_eq!(*libc::__errno_location(), libc::EINVAL);
            }
        });
    }

    #[test]
    fn actions_are_filtered_and_shown() {
        in_child(|| {
            // SAFETY: actions of our own.
            unsafe {
                let mut act: libc::sigaction = std::mem::zeroed();
                let mut old: libc::sigaction = std::mem::zeroed();
                libc::sigfillset(&mut act.sa_mask);
                act.sa_sigaction = libc::SIG_IGN;
                let none = std::ptr::null_mut();
                assert_eq!(sigaction(libc::sigaction, 10, &act, none), 0);
                assert_eq!(libc::sigaction(10, std::ptr::null(), &mut old), 0);
                assert_eq!(libc::sigismember(&old.sa_mask, 64), 0);
                assert_eq!(
                    sigaction(libc::sigaction, 10, std::ptr::null(), &mut old),
                    0
                );
                assert_eq!(libc::sigismember(&old.sa_mask, 64), 1);
                assert_eq!(sigaction(libc::sigaction, 64, &act, &mut old), 0);
                assert_eq!(signal_reserved(0), libc::SIG_IGN);
                assert_eq!(sigaction(libc::sigaction, 99, &act, none), -1);
            }
        });
    }
}
