//! The extent of a hook that records: signals blocked, `InHook`, the recorder's session.
//!
//! The program's handlers do not run in between (a `siglongjmp` out of one would leave the
//! lock taken); what they wait for, an operation on a regular file, is not interruptible by
//! signals anyway. A stop request waits like any other signal and is served when the mask goes
//! back, when the operation is over.

use crate::agent::state::{InHook, is_agents_thread};
use crate::persist::recorder::{self, Session};
use ckpt_sys::syscall;

/// See the module.
pub struct Recording {
    // Dropped in this order.
    pub session: Session,
    _hook: InHook,
    _mask: Blocked,
}

/// All signals blocked but the synchronous ones (blocked, they would end the program); the
/// old mask comes back at the end.
struct Blocked(u64);

const ALL: u64 = !(1 << (libc::SIGSEGV - 1) | 1 << (libc::SIGBUS - 1));

impl Blocked {
    fn enter() -> Blocked {
        let (all, mut old) = (ALL, 0u64);
        // SAFETY: two words of this stack.
        unsafe {
            syscall!(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                &raw const all,
                &raw mut old,
                8
            )
        };
        Blocked(old)
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: a word of this stack.
        unsafe {
            syscall!(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                &raw const self.0,
                0,
                8
            )
        };
    }
}

impl Unlocked {
    /// The extent alone. `None` as for [`Recording::begin`].
    pub fn begin() -> Option<Unlocked> {
        if !recorder::active() || !is_agents_thread() {
            return None;
        }
        let _mask = Blocked::enter();
        let _hook = InHook::enter();
        Some(Unlocked { _hook, _mask })
    }
}

impl Recording {
    /// `None`: nothing to record (no table, or not the agent's process).
    pub fn begin() -> Option<Recording> {
        if !recorder::active() || !is_agents_thread() {
            return None;
        }
        let mask = Blocked::enter();
        let hook = InHook::enter();
        match recorder::enter_blocked() {
            Some(session) => Some(Recording {
                session,
                _hook: hook,
                _mask: mask,
            }),
            None => {
                drop(hook);
                drop(mask);
                None
            }
        }
    }

    /// Ends the session, for an operation that may take its time (data of a regular file);
    /// the rest of the extent goes on.
    pub fn unlock(self) -> Unlocked {
        let Recording {
            session,
            _hook,
            _mask,
        } = self;
        drop(session);
        Unlocked { _hook, _mask }
    }
}

/// What is left of a [`Recording`] after its session.
pub struct Unlocked {
    _hook: InHook,
    _mask: Blocked,
}
