//! Stops are held off while a thread of the program calls exec.
//!
//! In the hook of that thread; the helper looks before and during a stop.

use super::STOP;
use crate::agent::state::InHook;
use ckpt_sys::syscall;
use std::sync::atomic::Ordering;

/// While one exists no thread is asked to stop.
#[must_use = "stops are held off until it goes"]
pub struct HeldOff(());

/// Holds stops off: the calling thread is about to call exec. A stop signal that is pending
/// then is handed on to the new program, which has no handler for it yet and dies of it.
/// The helper gives up a stop in progress, and what it has sent to this thread is taken
/// before this returns. The agent's own process only.
pub fn hold_off() -> HeldOff {
    STOP.leaving.fetch_add(1, Ordering::SeqCst);
    // No image may hold a thread that is counted: it does not park from here on.
    let _hook = InHook::enter();
    // The bound is for a helper that has died amid a stop.
    for _ in 0..20_000 {
        if STOP.word.load(Ordering::SeqCst) == 0 {
            break;
        }
        let pause = [0u64, 200_000];
        // SAFETY: a valid timespec.
        unsafe { syscall!(libc::SYS_nanosleep, &pause, 0) };
    }
    // Nothing is sent any more, and what was sent is delivered at the end of a system call.
    // SAFETY: no arguments.
    unsafe { syscall!(libc::SYS_gettid) };
    HeldOff(())
}

impl Drop for HeldOff {
    fn drop(&mut self) {
        STOP.leaving.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Is a thread about to call exec?
pub(super) fn held_off() -> bool {
    STOP.leaving.load(Ordering::SeqCst) != 0
}
