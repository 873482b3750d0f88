//! Signal actions and pending signals.
//!
//! Pending signals carry data that can only be read by taking them off the queue:
//! the helper takes those of the process, each thread (in its stop handler, at the
//! helper's request) those of its own; all are put back in the same order at once.

use crate::agent::procfs;
use crate::agent::state::{AGENT, RESERVED_BIT};
use crate::agent::stop::{self, Slot, Stopped};
use crate::image::state::{KernelSigaction, PendingSignal, SignalState, ThreadState};
use ckpt_sys::syscall;
use std::sync::atomic::Ordering;

/// The kernel's `siginfo_t`.
pub const SIGINFO_LEN: usize = 128;

/// Takes one signal of `set` off the calling thread's queues; `None` when empty.
///
/// # Safety
/// All signals of `set` are blocked in the calling thread.
pub unsafe fn take(set: u64) -> Option<PendingSignal> {
    let mut info = [0u8; SIGINFO_LEN];
    let at_once = [0u64; 2];
    // SAFETY: a siginfo buffer, a set of 8 bytes and a zero timeout.
    let signo = unsafe {
        syscall!(
            libc::SYS_rt_sigtimedwait,
            &set,
            info.as_mut_ptr(),
            &at_once,
            8
        )
    };
    (signo > 0).then(|| PendingSignal {
        signo: signo as i32,
        info: info.to_vec(),
    })
}

/// Puts a signal back on the process's queue, with the sender's information as it was.
///
/// The kernel lets nobody but the *thread* `pid` itself queue a signal that claims to come
/// from kill(2) (si_code SI_USER), the process's other threads included. But any
/// thread's id names the process here, so the calling thread gives its own.
pub fn put_back(signal: &PendingSignal) -> isize {
    // SAFETY: a full siginfo; no other pointers.
    unsafe {
        let own = syscall!(libc::SYS_gettid);
        syscall!(
            libc::SYS_rt_sigqueueinfo,
            own,
            signal.signo,
            signal.info.as_ptr()
        )
    }
}

/// Puts a signal back on the calling thread's own queue; for the same reason nobody
/// else can do it for signals of tgkill(2).
pub fn put_back_own(signal: &PendingSignal) -> isize {
    let pid = AGENT.real_pid.load(Ordering::Relaxed);
    // SAFETY: as above.
    unsafe {
        let own = syscall!(libc::SYS_gettid);
        syscall!(
            libc::SYS_rt_tgsigqueueinfo,
            pid,
            own,
            signal.signo,
            signal.info.as_ptr()
        )
    }
}

fn actions() -> Vec<KernelSigaction> {
    (1..=64)
        .map(|signo| {
            let mut action = KernelSigaction::default();
            // SAFETY: the kernel fills the struct.
            unsafe { syscall!(libc::SYS_rt_sigaction, signo, 0, &mut action, 8) };
            action
        })
        .collect()
}

/// Collects actions and pending signals; fills in `pending` of each thread.
pub fn collect(stopped: &Stopped, threads: &mut [ThreadState]) -> SignalState {
    let mut state = SignalState {
        actions: actions(),
        pending: Vec::new(),
    };
    let pending = |slot: &Slot| {
        if !slot.inserted {
            return slot.pending;
        }
        // It has reported itself a while ago, before the pre-copy.
        let tid = slot.tid.load(Ordering::Relaxed) as i32;
        let status = procfs::task_file(tid, "status").unwrap_or_default();
        let set = |name| procfs::field(&status, name).and_then(procfs::hex);
        set("SigPnd").unwrap_or(slot.pending) | set("ShdPnd").unwrap_or(0)
    };
    let mut any = 0u64;
    for slot in stopped.threads() {
        any |= pending(slot);
    }
    any &= !RESERVED_BIT;
    if any == 0 {
        return state;
    }
    // The helper has none of its own: what it takes is the process's.
    // SAFETY: the helper blocks every signal.
    while let Some(signal) = unsafe { take(any) } {
        state.pending.push(signal);
    }
    for (slot, thread) in stopped.threads().zip(threads.iter_mut()) {
        if !slot.inserted && slot.pending & !RESERVED_BIT == 0 {
            continue;
        }
        let tid = slot.tid.load(Ordering::Relaxed) as i32;
        let status = procfs::task_file(tid, "status").unwrap_or_default();
        let own = procfs::field(&status, "SigPnd")
            .and_then(procfs::hex)
            .unwrap_or(0)
            & !RESERVED_BIT;
        if own != 0 {
            thread.pending = stop::drain(slot, own);
        }
    }
    for signal in &state.pending {
        put_back(signal);
    }
    state
}
