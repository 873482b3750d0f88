//! The recorder's lock: a futex, taken with all signals blocked so that no handler of
//! the program meets it held by its own thread. Any thread, inside hooks.

use ckpt_sys::syscall;
use std::sync::atomic::{AtomicU32, Ordering};

/// 0 free, 1 held, 2 held and waited for.
pub struct Lock(AtomicU32);

/// All signals but the synchronous ones, which must not be lost.
const BLOCKED: u64 = !(bit(libc::SIGSEGV) | bit(libc::SIGBUS));

const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

fn set_mask(mask: u64) -> u64 {
    let mut old = 0u64;
    // SAFETY: both sets live on this stack.
    unsafe {
        syscall!(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const mask,
            &raw mut old,
            8
        )
    };
    old
}

impl Lock {
    pub const fn new() -> Lock {
        Lock(AtomicU32::new(0))
    }

    /// Returns the signal mask to give to `unlock`.
    pub fn lock(&self) -> u64 {
        let mask = set_mask(BLOCKED);
        self.lock_blocked();
        mask
    }

    /// For callers that have all signals blocked already.
    pub fn lock_blocked(&self) {
        let order = (Ordering::Acquire, Ordering::Relaxed);
        if self.0.compare_exchange(0, 1, order.0, order.1).is_err() {
            while self.0.swap(2, Ordering::Acquire) != 0 {
                self.futex(libc::FUTEX_WAIT, 2);
            }
        }
    }

    pub fn unlock(&self, mask: u64) {
        self.unlock_blocked();
        set_mask(mask);
    }

    /// After [`Lock::lock_blocked`].
    pub fn unlock_blocked(&self) {
        if self.0.swap(0, Ordering::Release) == 2 {
            self.futex(libc::FUTEX_WAKE, 1);
        }
    }

    /// After a restore: nobody holds it.
    pub fn reset(&self) {
        self.0.store(0, Ordering::SeqCst);
    }

    fn futex(&self, op: i32, value: u32) {
        // SAFETY: the word is ours; no timeout.
        unsafe {
            syscall!(
                libc::SYS_futex,
                self.0.as_ptr(),
                op | libc::FUTEX_PRIVATE_FLAG,
                value,
                0
            )
        };
    }
}
