//! Signals that are pending for one stopped thread alone: only the thread itself can read them.
//!
//! The helper asks ([`drain`]); the thread, parked in its handler with all signals blocked or
//! waiting in its own call, takes them off its queue and puts them back ([`drain_if_asked`]).

use super::{FUTEX_WAIT_PRIVATE, FUTEX_WAKE_PRIVATE, Slot, look_again};
use crate::agent::collect::signals;
use crate::agent::request;
use crate::agent::state::AGENT;
use crate::image::state::PendingSignal;
use ckpt_sys::syscall;
use std::sync::atomic::Ordering;

/// More signals than this in one thread's own queue are left where they are.
pub const DRAIN_MAX: usize = 256;

/// In the stop handler (all signals blocked): reads the thread's own pending signals.
fn drain_own(slot: &Slot, set: u64, tid: i32) {
    let room = slot.drain_to.load(Ordering::Acquire) as *mut [u8; signals::SIGINFO_LEN];
    let at_once = [0u64; 2];
    let pid = AGENT.real_pid.load(Ordering::Relaxed);
    let mut count = 0;
    // SAFETY: the helper keeps DRAIN_MAX elements alive until `drain` is 0 again;
    // the signals go back to this very thread, in the order they came.
    unsafe {
        while count < DRAIN_MAX {
            let info = room.add(count);
            if syscall!(libc::SYS_rt_sigtimedwait, &set, info, &at_once, 8) <= 0 {
                break;
            }
            count += 1;
        }
        count = signals::joined(std::slice::from_raw_parts_mut(room, count));
        for k in 0..count {
            let info = room.add(k);
            let signo = *(info as *const i32);
            syscall!(libc::SYS_rt_tgsigqueueinfo, pid, tid, signo, info);
        }
    }
    slot.drained.store(count as u32, Ordering::Release);
    slot.drain.store(0, Ordering::Release);
    // SAFETY: a futex word of ours (the low half of the set).
    unsafe { syscall!(libc::SYS_futex, &slot.drain, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0) };
}

/// A stopped thread: reads its own signals if the helper wants them.
pub fn drain_if_asked(slot: &Slot, tid: i32) -> bool {
    let set = slot.drain.load(Ordering::Acquire);
    if set != 0 {
        drain_own(slot, set, tid);
    }
    set != 0
}

/// Helper thread: the signals of `set` pending for this stopped thread alone.
pub fn drain(slot: &Slot, set: u64) -> Vec<PendingSignal> {
    // An inserted caller is not in the handler, and looks at its own slot.
    let (slot, ask): (&Slot, fn()) = match request::inserted_call() {
        Some(call) if slot.inserted => (&call.slot, request::order_inserted),
        _ if slot.inserted => return Vec::new(),
        _ => (slot, look_again),
    };
    let mut room = vec![[0u8; signals::SIGINFO_LEN]; DRAIN_MAX];
    slot.drain_to
        .store(room.as_mut_ptr() as u64, Ordering::Release);
    slot.drain.store(set, Ordering::Release);
    ask();
    while slot.drain.load(Ordering::Acquire) != 0 {
        let timeout = [0u64, 1_000_000];
        // SAFETY: a futex word of ours and a valid timespec.
        unsafe {
            syscall!(
                libc::SYS_futex,
                &slot.drain,
                FUTEX_WAIT_PRIVATE,
                set as u32,
                &timeout,
                0,
                0
            )
        };
    }
    let count = slot.drained.load(Ordering::Acquire) as usize;
    room.truncate(count);
    room.iter()
        .map(|info| PendingSignal {
            signo: i32::from_ne_bytes([info[0], info[1], info[2], info[3]]),
            info: info.to_vec(),
        })
        .collect()
}
