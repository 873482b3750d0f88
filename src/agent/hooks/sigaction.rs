//! rt_sigaction: the reserved signal is answered from a table, the others' masks
//! never hold it, and the program's handlers return through
//! [`callsite::program_sigreturn`], which counts them.
//!
//! The count (`ThreadBlock::handlers_run`) is what proves to the restart of
//! interrupted calls that *our* signal ended a call. It is taken when a handler
//! *returns*: a call that the handler itself made has left an entry record with the
//! count from before, so it can never be mistaken for the call that was interrupted,
//! even at the same site. The program is shown its own `sa_restorer`. glibc's 32 and 33
//! (cancellation, set-id) are left alone but for the sender ([`senders`]).
//!
//! Any thread, any context (vfork children too: they share this memory but not the
//! kernel's actions, so nothing is recorded for them).

use super::frame::{CallFrame, Verdict};
use super::{senders, user};
use crate::agent::state::{AGENT, InHook, RESERVED_BIT, RESERVED_SIGNAL, in_shared_child};
use crate::agent::track::fault;
use crate::image::state::KernelSigaction;
use ckpt_sys::{callsite, syscall};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::*};

// SAFETY: four u64, repr(C).
unsafe impl user::Plain for KernelSigaction {}

/// Bit `sig - 1`: the program's mask of that action holds the reserved signal.
static RESERVED_IN_MASK: AtomicU64 = AtomicU64::new(0);

/// The restorer that the program gave with each action (index = number); replaced,
/// never cleared.
static RESTORERS: [AtomicU64; 65] = [const { AtomicU64::new(0) }; 65];

const SA_RESTORER: u64 = 0x0400_0000;

/// The restorer that counts.
fn counting() -> u64 {
    callsite::program_sigreturn() as u64
}

/// May the action's restorer be replaced? Only for functions.
fn is_countable(action: &KernelSigaction) -> bool {
    action.handler > 1 && action.flags & SA_RESTORER != 0 && action.restorer != counting()
}

/// The program's action for the reserved signal: slots in turn, so that a reader
/// never waits for a writer that its own signal interrupted.
static OWN: [[AtomicU64; 4]; 16] = [const { [const { AtomicU64::new(0) }; 4] }; 16];
static OWN_NEXT: AtomicUsize = AtomicUsize::new(1);
static OWN_AT: AtomicUsize = AtomicUsize::new(0);

/// glibc's internal signals.
fn is_glibcs(sig: i32) -> bool {
    sig == 32 || sig == 33
}

/// The program's action for the reserved signal.
pub fn reserved_action() -> KernelSigaction {
    let slot = &OWN[OWN_AT.load(Acquire)];
    KernelSigaction {
        handler: slot[0].load(Relaxed),
        flags: slot[1].load(Relaxed),
        restorer: slot[2].load(Relaxed),
        mask: slot[3].load(Relaxed),
    }
}

/// Replaces it and returns the one before.
pub fn set_reserved_action(new: &KernelSigaction) -> KernelSigaction {
    let at = OWN_NEXT.fetch_add(1, Relaxed) % OWN.len();
    let slot = &OWN[at];
    slot[0].store(new.handler, Relaxed);
    slot[1].store(new.flags, Relaxed);
    slot[2].store(new.restorer, Relaxed);
    slot[3].store(new.mask, Relaxed);
    let before = reserved_action();
    OWN_AT.store(at, Release);
    before
}

/// What the program would see of the kernel's `action` for `sig`.
pub fn program_view(sig: i32, action: &mut KernelSigaction) {
    if is_kept(sig) {
        *action = match sig {
            RESERVED_SIGNAL => reserved_action(),
            _ => fault_action(),
        };
        return;
    }
    if FAULT_IN_MASK.load(Relaxed) & (1 << (sig - 1)) != 0 {
        action.mask |= fault::FAULT_BIT;
    }
    if action.restorer == counting() {
        action.restorer = RESTORERS[sig as usize].load(Relaxed);
    }
    senders::unwrap(action, senders::current(sig));
    if RESERVED_IN_MASK.load(Relaxed) & (1 << (sig - 1)) != 0 {
        action.mask |= RESERVED_BIT;
    }
}

/// The program's action for SIGSEGV while the kernel's is ours (`track::fault`).
static FAULT: [[AtomicU64; 4]; 16] = [const { [const { AtomicU64::new(0) }; 4] }; 16];
static FAULT_NEXT: AtomicUsize = AtomicUsize::new(1);
static FAULT_AT: AtomicUsize = AtomicUsize::new(0);

/// The program's action for SIGSEGV.
pub fn fault_action() -> KernelSigaction {
    let slot = &FAULT[FAULT_AT.load(Acquire)];
    KernelSigaction {
        handler: slot[0].load(Relaxed),
        flags: slot[1].load(Relaxed),
        restorer: slot[2].load(Relaxed),
        mask: slot[3].load(Relaxed),
    }
}

/// Replaces it and returns the one before.
pub fn set_fault_action(new: &KernelSigaction) -> KernelSigaction {
    let at = FAULT_NEXT.fetch_add(1, Relaxed) % FAULT.len();
    let slot = &FAULT[at];
    slot[0].store(new.handler, Relaxed);
    slot[1].store(new.flags, Relaxed);
    slot[2].store(new.restorer, Relaxed);
    slot[3].store(new.mask, Relaxed);
    let before = fault_action();
    FAULT_AT.store(at, Release);
    before
}

/// Is this signal answered from a table?
fn is_kept(sig: i32) -> bool {
    sig == RESERVED_SIGNAL || (sig == libc::SIGSEGV && fault::installed())
}

/// Bit `sig - 1`: the program's mask of that action holds SIGSEGV.
static FAULT_IN_MASK: AtomicU64 = AtomicU64::new(0);

pub(super) fn kernel(sig: i32, act: *const KernelSigaction, old: *mut KernelSigaction) -> isize {
    // SAFETY: both are null or valid.
    unsafe { syscall!(libc::SYS_rt_sigaction, sig, act, old, 8) }
}

/// Takes over the handlers that were installed before the constructor. The
/// reserved signal's inherited action must be read (and given to
/// [`set_reserved_action`]) before our own handler is installed.
pub fn adopt_handlers() {
    for sig in 1..RESERVED_SIGNAL {
        let mut action = KernelSigaction::default();
        if is_glibcs(sig) || kernel(sig, std::ptr::null(), &mut action) != 0 {
            continue;
        }
        let in_mask = action.mask & RESERVED_BIT != 0;
        if !is_countable(&action) {
            continue;
        }
        RESTORERS[sig as usize].store(action.restorer, Relaxed);
        if in_mask {
            RESERVED_IN_MASK.fetch_or(1 << (sig - 1), Relaxed);
        }
        action.restorer = counting();
        action.mask &= !RESERVED_BIT;
        kernel(sig, &action, std::ptr::null_mut());
    }
}

/// Pages are about to be protected: no handler's mask may hold SIGSEGV any more.
pub fn open_masks() {
    for sig in 1..=64 {
        let mut action = KernelSigaction::default();
        if sig == libc::SIGSEGV || kernel(sig, std::ptr::null(), &mut action) != 0 {
            continue;
        }
        if action.handler > 1 && action.mask & fault::FAULT_BIT != 0 {
            if sig != RESERVED_SIGNAL {
                FAULT_IN_MASK.fetch_or(1 << (sig - 1), Relaxed);
            }
            action.mask &= !fault::FAULT_BIT;
            kernel(sig, &action, std::ptr::null_mut());
        }
    }
}

/// rt_sigaction(sig, act, old, 8).
pub fn rt_sigaction(frame: &mut CallFrame) -> Verdict {
    let [sig, act, old, size, ..] = frame.args;
    let sig = sig as i32;
    if size != 8 || !(1..=64).contains(&sig) || (act == 0 && old == 0) {
        return Verdict::Forward;
    }
    // What the helper does to all actions at a stop (the first one that protects pages takes SIGSEGV
    // over and opens the masks) comes before this one or behind it.
    let _guard = InHook::enter();
    if is_glibcs(sig) {
        if !AGENT.ids_translated.load(Relaxed) {
            return Verdict::Forward;
        }
        frame.rax = senders::glibcs_action(sig, act, old).unwrap_or_else(|e| -i64::from(e));
        return Verdict::Done;
    }
    if sig == libc::SIGKILL || sig == libc::SIGSTOP {
        return Verdict::Forward;
    }
    frame.rax = match replace(sig, act, old) {
        Ok(()) => 0,
        Err(e) => -i64::from(e),
    };
    Verdict::Done
}

fn replace(sig: i32, act: u64, old: u64) -> Result<(), i32> {
    let new = if act != 0 {
        Some(user::read::<KernelSigaction>(act)?)
    } else {
        None
    };
    // A child that shares our memory changes its own actions only. (posix_spawn's sets all to the
    // default, and the program lost its handler.)
    let before = if sig == RESERVED_SIGNAL {
        match new {
            Some(new) if !in_shared_child() => set_reserved_action(&new),
            _ => reserved_action(),
        }
    } else if is_kept(sig) {
        match new {
            Some(_) if in_shared_child() => fault_action(),
            Some(new) => set_fault_action(&new),
            None => fault_action(),
        }
    } else {
        exchange(sig, new)?
    };
    if old != 0 {
        user::write(old, &before)?;
    }
    Ok(())
}

/// Installs `new` for an ordinary signal; returns the program's view of the one before.
fn exchange(sig: i32, new: Option<KernelSigaction>) -> Result<KernelSigaction, i32> {
    let mut before = KernelSigaction::default();
    let place = &RESTORERS[sig as usize];
    let bit = 1u64 << (sig - 1);
    let behind = senders::current(sig);
    let (last, had) = (place.load(Relaxed), RESERVED_IN_MASK.load(Relaxed) & bit);
    let had_fault = FAULT_IN_MASK.load(Relaxed) & bit;
    let ret = match new {
        None => kernel(sig, std::ptr::null(), &mut before),
        Some(mut new) => {
            let has = new.mask & RESERVED_BIT != 0;
            let has_fault = new.mask & fault::never_blocked() != 0;
            new.mask &= !(RESERVED_BIT | fault::never_blocked());
            if !in_shared_child() {
                if has_fault {
                    FAULT_IN_MASK.fetch_or(bit, Relaxed);
                } else if had_fault != 0 {
                    FAULT_IN_MASK.fetch_and(!bit, Relaxed);
                }
                if has {
                    RESERVED_IN_MASK.fetch_or(bit, Relaxed);
                } else if had != 0 {
                    RESERVED_IN_MASK.fetch_and(!bit, Relaxed);
                }
                if is_countable(&new) {
                    place.store(new.restorer, Relaxed);
                    new.restorer = counting();
                }
                senders::wrap(sig, &mut new);
            }
            kernel(sig, &new, &mut before)
        }
    };
    if ret < 0 {
        return Err(-ret as i32);
    }
    if before.restorer == counting() {
        before.restorer = last;
    }
    senders::unwrap(&mut before, behind);
    if had != 0 {
        before.mask |= RESERVED_BIT;
    }
    if had_fault != 0 {
        before.mask |= fault::FAULT_BIT;
    }
    Ok(before)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::{call, in_child};
    use ckpt_sys::tls::thread_block;
    use std::sync::atomic::AtomicI32;

    static SEEN: AtomicI32 = AtomicI32::new(0);
    extern "C" fn note(sig: i32, info: *mut libc::siginfo_t, uc: *mut libc::c_void) {
        assert!(!info.is_null() && !uc.is_null());
        SEEN.store(sig, SeqCst);
    }

    /// libc's own restorer, learned by installing a handler through libc.
    fn action(mask: u64) -> KernelSigaction {
        let mut k = KernelSigaction::default();
        // SAFETY: an ordinary handler, then read back in the kernel's form.
        unsafe {
            libc::signal(libc::SIGUSR2, libc::SIG_DFL);
            libc::signal(libc::SIGUSR2, note as *const () as usize);
        }
        kernel(libc::SIGUSR2, std::ptr::null(), &mut k);
        k.flags |= libc::SA_SIGINFO as u64;
        k.mask = mask;
        k
    }

    #[test]
    fn handlers_are_counted_and_shown_as_given() {
        in_child(|| {
            let act = action(RESERVED_BIT | 1);
            let mut old = KernelSigaction::default();
            let at = &raw const act as u64;
            let sig = libc::SIGUSR1 as u64;
            assert_eq!(call(libc::SYS_rt_sigaction, &[sig, at, 0, 8]), Some(0));
            kernel(libc::SIGUSR1, std::ptr::null(), &mut old);
            assert_eq!((old.restorer, old.mask), (counting(), 1));
            let old_at = &raw mut old as u64;
            assert_eq!(call(libc::SYS_rt_sigaction, &[sig, 0, old_at, 8]), Some(0));
            assert_eq!(old, act);
            // SAFETY: raise; then the thread's own block.
            unsafe {
                let runs = (*thread_block()).handlers_run;
                libc::raise(libc::SIGUSR1);
                assert_eq!(SEEN.load(SeqCst), libc::SIGUSR1);
                assert_eq!((*thread_block()).handlers_run, runs + 1);
            }
            let default = KernelSigaction::default();
            let at = &raw const default as u64;
            assert_eq!(call(libc::SYS_rt_sigaction, &[sig, at, old_at, 8]), Some(0));
            assert_eq!(old, act);
            assert_eq!(call(libc::SYS_rt_sigaction, &[sig, 0, old_at, 8]), Some(0));
            assert_eq!(old, default);
        });
    }

    #[test]
    fn the_reserved_signal_is_answered_from_the_table() {
        in_child(|| {
            let act = action(5);
            let mut old = KernelSigaction::default();
            let (at, old_at) = (&raw const act as u64, &raw mut old as u64);
            assert_eq!(call(libc::SYS_rt_sigaction, &[64, at, old_at, 8]), Some(0));
            assert_eq!(old, KernelSigaction::default());
            assert_eq!(call(libc::SYS_rt_sigaction, &[64, 0, old_at, 8]), Some(0));
            assert_eq!(old, act);
            kernel(64, std::ptr::null(), &mut old);
            assert_eq!(old.handler, 0);
        });
    }

    #[test]
    fn errors_are_the_kernels() {
        in_child(|| {
            assert_eq!(call(libc::SYS_rt_sigaction, &[10, 8, 0, 8]), Some(-14));
            assert_eq!(call(libc::SYS_rt_sigaction, &[10, 8, 0, 4]), None);
            assert_eq!(call(libc::SYS_rt_sigaction, &[33, 8, 0, 8]), None);
            assert_eq!(call(libc::SYS_rt_sigaction, &[65, 8, 0, 8]), None);
        });
    }

    #[test]
    fn earlier_handlers_are_adopted() {
        in_child(|| {
            let act = action(RESERVED_BIT);
            kernel(libc::SIGUSR1, &act, std::ptr::null_mut());
            adopt_handlers();
            let mut now = KernelSigaction::default();
            kernel(libc::SIGUSR1, std::ptr::null(), &mut now);
            assert_eq!((now.restorer, now.mask), (counting(), 0));
            program_view(libc::SIGUSR1, &mut now);
            assert_eq!(now, act);
        });
    }
}
