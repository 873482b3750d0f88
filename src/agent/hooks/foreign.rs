//! The reserved signal where it is *not* ours: the program (or somebody else) sent
//! it, and the program has an action, a mask and perhaps a wait for it.
//!
//! The kernel never has the signal blocked; the program's view of that is
//! `ThreadBlock::reserved_blocked`. The stop handler gives every reserved signal
//! that no stop asked for to [`deliver_foreign`]. What the program has blocked is
//! queued here for the thread that received it and sent again (`rt_tgsigqueueinfo` to
//! ourselves, same information) when the mask opens, so a handler always gets a
//! genuine frame. Signal context; lock-free; no allocation.
//!
//! Limits: the queue holds 64 signals; a blocked process-directed signal stays with
//! the thread that received it; `signalfd` never reports the signal; other
//! handlers' `sa_mask` does not hold it back.

use super::sigaction::{reserved_action, set_reserved_action};
use super::{frames, senders};
use crate::agent::callsites::restart;
use crate::agent::state::{RESERVED_BIT, RESERVED_SIGNAL};
use crate::image::state::KernelSigaction;
use ckpt_sys::{syscall, tls::thread_block};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, Ordering::*};

/// `ThreadBlock::masked_call`: the call in progress has a mask of its own that
/// leaves the reserved signal open, blocks it, or waits for it.
pub const CALL_PLAIN: u32 = 0;
pub const CALL_OPENS: u32 = 1;
pub const CALL_BLOCKS: u32 = 2;
pub const CALL_WAITS: u32 = 3;

/// The 128 bytes of a `siginfo_t`.
pub type Info = [u64; 16];

struct Queued {
    /// 0 free, 1 being written or read, else the thread's id + 1.
    owner: AtomicU32,
    info: UnsafeCell<Info>,
}

// SAFETY: `info` is only touched by whoever moved `owner` to 1.
unsafe impl Sync for Queued {}

static QUEUE: [Queued; 64] = [const {
    Queued {
        owner: AtomicU32::new(0),
        info: UnsafeCell::new([0; 16]),
    }
}; 64];

/// The id that stays this thread's over a restore.
fn own_name() -> u32 {
    super::ids::own_tid() as u32
}

/// Keeps a signal for this thread; false when the queue is full (it is then lost,
/// as a sender would lose it to RLIMIT_SIGPENDING).
fn enqueue(info: &Info) -> bool {
    let owner = own_name() + 1;
    for slot in &QUEUE {
        if slot.owner.compare_exchange(0, 1, AcqRel, Relaxed).is_ok() {
            // SAFETY: we own the slot.
            unsafe { *slot.info.get() = *info };
            slot.owner.store(owner, Release);
            return true;
        }
    }
    false
}

/// Is one waiting for this thread?
pub fn any_pending() -> bool {
    // The common case costs no system call.
    QUEUE.iter().any(|s| s.owner.load(Relaxed) != 0) && {
        let owner = own_name() + 1;
        QUEUE.iter().any(|s| s.owner.load(Relaxed) == owner)
    }
}

/// Takes one that waits for this thread.
pub fn take_pending() -> Option<Info> {
    let owner = own_name() + 1;
    for slot in &QUEUE {
        if slot
            .owner
            .compare_exchange(owner, 1, AcqRel, Relaxed)
            .is_ok()
        {
            // SAFETY: we own the slot.
            let info = unsafe { *slot.info.get() };
            slot.owner.store(0, Release);
            return Some(info);
        }
    }
    None
}

/// The mask has opened: sends everything that waits for this thread once more. The
/// handlers run before this returns. Returns how many were sent.
pub fn release_pending() -> u32 {
    let mut count = 0;
    while any_pending() {
        let Some(info) = take_pending() else { break };
        // SAFETY: to this very thread, with information that the kernel made.
        let ret = unsafe {
            let (pid, tid) = (syscall!(libc::SYS_getpid), syscall!(libc::SYS_gettid));
            syscall!(
                libc::SYS_rt_tgsigqueueinfo,
                pid,
                tid,
                RESERVED_SIGNAL,
                &raw const info
            )
        };
        if ret < 0 {
            enqueue(&info);
            break;
        }
        count += 1;
    }
    count
}

/// How a frame interrupted a call with a mask of its own, or [`CALL_PLAIN`].
///
/// # Safety
/// `uc` is the frame of the signal being handled.
unsafe fn masked_call(uc: *mut libc::ucontext_t) -> u32 {
    // SAFETY: the frame is ours; rip - 2 is checked by value only when rax says
    // that a system call was interrupted, so code lies before rip.
    unsafe {
        let regs = &(*uc).uc_mcontext.gregs;
        if regs[libc::REG_RAX as usize] != -i64::from(libc::EINTR) {
            return CALL_PLAIN;
        }
        let rip = regs[libc::REG_RIP as usize] as u64;
        if super::user::read_bytes(rip.wrapping_sub(2), &mut [0u8; 2]) != Ok(2)
            || *((rip - 2) as *const [u8; 2]) != [0x0f, 0x05]
        {
            return CALL_PLAIN;
        }
        (*thread_block()).masked_call
    }
}

/// A reserved signal that no stop asked for. Returns true when the program must see
/// the interrupted call end (its handler ran, or its wait was answered): the call is
/// then not to be restarted.
///
/// # Safety
/// Called by the handler of the reserved signal with its own arguments, outside of
/// any hook guard of its own.
pub unsafe fn deliver_foreign(
    sig: i32,
    info: *mut libc::siginfo_t,
    uc: *mut libc::ucontext_t,
) -> bool {
    // SAFETY: the block is this thread's; info and uc are the kernel's frame.
    unsafe {
        let block = thread_block();
        senders::correct(&mut *info.cast::<Info>());
        let bytes: Info = *info.cast::<Info>();
        let call = masked_call(uc);
        let blocked = match call {
            CALL_OPENS => false,
            CALL_BLOCKS | CALL_WAITS => true,
            _ => (*block).reserved_blocked != 0,
        };
        if call == CALL_WAITS {
            // rt_sigtimedwait(set, info, ...): the wait is over, with this signal.
            let regs = &mut (*uc).uc_mcontext.gregs;
            let out = regs[libc::REG_RSI as usize] as u64;
            regs[libc::REG_RAX as usize] = i64::from(sig);
            if out != 0 && super::user::write(out, &bytes).is_err() {
                regs[libc::REG_RAX as usize] = -i64::from(libc::EFAULT);
            }
            return true;
        }
        if blocked {
            enqueue(&bytes);
            return false;
        }
        let action = reserved_action();
        match action.handler {
            0 => die(sig),
            1 => false,
            _ => {
                run_handler(sig, info, uc, &action);
                true
            }
        }
    }
}

/// The default action: the process ends by this signal.
fn die(sig: i32) -> ! {
    let default = KernelSigaction::default();
    let mask = RESERVED_BIT;
    // SAFETY: our own action and mask; the process ends.
    unsafe {
        syscall!(
            libc::SYS_rt_sigaction,
            sig,
            &raw const default,
            std::ptr::null::<u8>(),
            8
        );
        syscall!(
            libc::SYS_rt_sigprocmask,
            libc::SIG_UNBLOCK,
            &raw const mask,
            0,
            8
        );
        let pid = syscall!(libc::SYS_getpid);
        let tid = syscall!(libc::SYS_gettid);
        syscall!(libc::SYS_tgkill, pid, tid, sig);
        loop {
            syscall!(libc::SYS_exit_group, 128 + sig);
        }
    }
}

/// Calls the program's handler as the kernel would have.
///
/// # Safety
/// As `deliver_foreign`; `action.handler` is a function.
unsafe fn run_handler(
    sig: i32,
    info: *mut libc::siginfo_t,
    uc: *mut libc::ucontext_t,
    action: &KernelSigaction,
) {
    type Handler = unsafe extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::ucontext_t);
    const SA_NODEFER: u64 = 0x4000_0000;
    const SA_RESETHAND: u64 = 0x8000_0000;
    if action.flags & SA_RESETHAND != 0 {
        set_reserved_action(&KernelSigaction {
            handler: 0,
            ..*action
        });
    }
    // SAFETY: the frame is the kernel's; the first word of uc_sigmask is its mask;
    // the program installed the handler for this signal.
    unsafe {
        let block = thread_block();
        let frame_mask = (&raw mut (*uc).uc_sigmask).cast::<u64>();
        let own = if action.flags & SA_NODEFER == 0 {
            RESERVED_BIT
        } else {
            0
        };
        if (*block).reserved_blocked != 0 {
            *frame_mask |= RESERVED_BIT;
        }
        let during = *frame_mask | action.mask | own;
        (*block).reserved_blocked = u32::from(during & RESERVED_BIT != 0);
        (*block).masked_call = CALL_PLAIN;
        if action.flags & libc::SA_ONSTACK as u64 == 0 && frames::changed_stack(uc) {
            frames::move_to_stack(sig, info, uc, action, during & !RESERVED_BIT);
            return;
        }
        let real = during & !RESERVED_BIT;
        syscall!(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const real,
            0,
            8
        );
        let run: Handler = std::mem::transmute(action.handler);
        run(sig, info, uc);
        // Counted at its end, as the others are (`super::sigaction`).
        (*block).handlers_run += 1;
        restart::program_handler_runs(uc);
        after_handler(uc);
    }
}

/// Puts the mask that the frame restores in force for the reserved signal too; the handler may
/// have edited it.
///
/// # Safety
/// `uc` is the frame that the handler returns to next.
pub(super) unsafe fn after_handler(uc: *mut libc::ucontext_t) {
    // SAFETY: the frame (the caller's promise) and the thread's own block.
    unsafe {
        let block = thread_block();
        let frame_mask = (&raw mut (*uc).uc_sigmask).cast::<u64>();
        (*block).reserved_blocked = u32::from(*frame_mask & RESERVED_BIT != 0);
        *frame_mask &= !RESERVED_BIT;
        if (*block).reserved_blocked == 0 {
            release_pending();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::{call, child_status, in_child};
    use std::sync::atomic::AtomicU64;

    static RAN: AtomicU32 = AtomicU32::new(0);
    static ENDED: AtomicU32 = AtomicU32::new(9);
    static VALUE: AtomicU64 = AtomicU64::new(0);

    extern "C" fn theirs(sig: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        assert_eq!(sig, 64);
        // SAFETY: the test's own signal and block.
        unsafe {
            VALUE.store((*info).si_value().sival_ptr as u64, SeqCst);
            assert_ne!((*thread_block()).reserved_blocked, 0);
        }
        RAN.fetch_add(1, SeqCst);
    }

    /// Stands for the stop handler: nothing is ours here.
    extern "C" fn stop(sig: i32, info: *mut libc::siginfo_t, uc: *mut libc::c_void) {
        // SAFETY: the handler's own arguments.
        let ended = unsafe { deliver_foreign(sig, info, uc.cast()) };
        ENDED.store(u32::from(ended), SeqCst);
    }

    fn install_stop() {
        // SAFETY: an ordinary sigaction with all signals blocked.
        unsafe {
            let mut act: libc::sigaction = std::mem::zeroed();
            act.sa_sigaction = stop as *const () as usize;
            act.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            libc::sigfillset(&mut act.sa_mask);
            assert_eq!(libc::sigaction(64, &act, std::ptr::null_mut()), 0);
        }
    }

    fn send(value: usize) {
        let value = libc::sigval {
            sival_ptr: value as *mut libc::c_void,
        };
        // SAFETY: to ourselves.
        unsafe { assert_eq!(libc::sigqueue(libc::getpid(), 64, value), 0) };
    }

    fn set_handler(handler: u64) {
        set_reserved_action(&KernelSigaction {
            handler,
            flags: libc::SA_SIGINFO as u64,
            ..Default::default()
        });
    }

    #[test]
    fn a_blocked_one_waits_for_the_unblock() {
        in_child(|| {
            install_stop();
            set_handler(theirs as *const () as u64);
            let (mask, mut old) = (RESERVED_BIT, 0u64);
            let (at, old_at) = (&raw const mask as u64, &raw mut old as u64);
            assert_eq!(call(libc::SYS_rt_sigprocmask, &[0, at, old_at, 8]), Some(0));
            assert_eq!(old & RESERVED_BIT, 0);
            send(77);
            assert_eq!((RAN.load(SeqCst), ENDED.load(SeqCst)), (0, 0));
            let mut pending = 0u64;
            let p = &raw mut pending as u64;
            assert_eq!(call(libc::SYS_rt_sigpending, &[p, 8]), Some(0));
            assert_eq!(pending, RESERVED_BIT);
            assert_eq!(call(libc::SYS_rt_sigprocmask, &[1, at, old_at, 8]), Some(0));
            assert_eq!(old & RESERVED_BIT, RESERVED_BIT);
            assert_eq!((RAN.load(SeqCst), VALUE.load(SeqCst)), (1, 77));
            // SAFETY: this thread's block.
            unsafe { assert_eq!((*thread_block()).reserved_blocked, 0) };
        });
    }

    #[test]
    fn a_wait_takes_it() {
        in_child(|| {
            install_stop();
            set_handler(theirs as *const () as u64);
            let set = RESERVED_BIT;
            let at = &raw const set as u64;
            call(libc::SYS_rt_sigprocmask, &[0, at, 0, 8]);
            send(5);
            let mut info: Info = [0; 16];
            let out = &raw mut info as u64;
            assert_eq!(call(libc::SYS_rt_sigtimedwait, &[at, out, 0, 8]), Some(64));
            assert_eq!(info[0] as u32, 64);
            // A mask that opens it ends the call at once.
            send(6);
            let none = 0u64;
            let at = &raw const none as u64;
            assert_eq!(call(libc::SYS_rt_sigsuspend, &[at, 8]), Some(-4));
            assert_eq!((RAN.load(SeqCst), VALUE.load(SeqCst)), (1, 6));
        });
    }

    #[test]
    fn default_kills_ignore_ignores() {
        in_child(|| {
            install_stop();
            set_handler(1);
            send(1);
            assert_eq!(ENDED.load(SeqCst), 0);
        });
        let status = child_status(|| {
            install_stop();
            send(1);
        });
        assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == 64);
    }
}
