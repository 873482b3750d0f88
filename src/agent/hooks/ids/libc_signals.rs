//! glibc's own signals (32 cancels a thread, 33 changes the ids of all) in a process with
//! translated ids. Their handlers ignore a signal whose si_pid is not what getpid says,
//! and the kernel lets nobody write another si_pid for a different thread. So the
//! kernel's action is a stub of ours that puts the old pid into the siginfo and jumps
//! to glibc's handler.

use super::super::frame::{CallFrame, Verdict};
use super::super::user;
use crate::agent::state::AGENT;
use crate::image::state::KernelSigaction;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicU64, Ordering::*};

const FIRST: i32 = 32;

/// glibc's handlers; written before the stub is installed for them.
static HANDLERS: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

/// The handler that the kernel calls. No frame of its own is left when glibc's
/// handler runs: that unwinds the stack of a thread that is cancelled.
#[unsafe(naked)]
unsafe extern "C" fn stub(_signo: i32, _info: *mut libc::siginfo_t, _uc: *mut libc::ucontext_t) {
    std::arch::naked_asm!(
        "push rdi",
        "push rsi",
        "push rdx", // aligned for a call again
        "call {prepare}",
        "pop rdx",
        "pop rsi",
        "pop rdi",
        "jmp rax",
        prepare = sym prepare,
    )
}

/// Translates the sender's pid; returns glibc's handler.
unsafe extern "C" fn prepare(signo: i32, info: *mut libc::siginfo_t) -> u64 {
    const SI_PID: usize = 4; // in words
    if AGENT.ids_translated.load(Relaxed) {
        // SAFETY: the kernel's siginfo on this thread's stack.
        unsafe {
            let sender = (info as *mut i32).add(SI_PID);
            *sender = super::to_virtual(*sender);
        }
    }
    HANDLERS[(signo - FIRST) as usize & 1].load(Relaxed)
}

fn stub_address() -> u64 {
    stub as *const () as u64
}

fn kernel(sig: i32, act: *const KernelSigaction, old: *mut KernelSigaction) -> isize {
    // SAFETY: both are null or valid.
    unsafe { syscall!(libc::SYS_rt_sigaction, sig, act, old, 8) }
}

fn wrap(sig: i32, action: &mut KernelSigaction) {
    if action.handler > 1 && action.handler != stub_address() {
        HANDLERS[(sig - FIRST) as usize].store(action.handler, Relaxed);
        action.handler = stub_address();
    }
}

/// After a restore with other ids: the handlers that are installed already.
pub fn adopt() {
    for sig in [FIRST, FIRST + 1] {
        let mut action = KernelSigaction::default();
        if kernel(sig, std::ptr::null(), &mut action) == 0 {
            wrap(sig, &mut action);
            kernel(sig, &action, std::ptr::null_mut());
        }
    }
}

/// rt_sigaction(sig, act, old, 8) for 32 or 33.
pub fn rt_sigaction(frame: &mut CallFrame) -> Verdict {
    let [sig, act, old, ..] = frame.args;
    let sig = sig as i32;
    let exchange = || {
        let last = HANDLERS[(sig - FIRST) as usize].load(Relaxed);
        let mut before = KernelSigaction::default();
        let ret = if act == 0 {
            kernel(sig, std::ptr::null(), &mut before)
        } else {
            let mut new = user::read::<KernelSigaction>(act)?;
            wrap(sig, &mut new);
            kernel(sig, &new, &mut before)
        };
        if ret < 0 {
            return Err(-ret as i32);
        }
        if before.handler == stub_address() {
            before.handler = last;
        }
        if old != 0 {
            user::write(old, &before)
        } else {
            Ok(())
        }
    };
    frame.rax = exchange().map_or_else(|errno: i32| -i64::from(errno), |()| 0);
    Verdict::Done
}
