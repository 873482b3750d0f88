//! What few programs ask of the kernel, and what was lost once without a word: registrations of
//! membarrier(2), I/O priorities, the times of SCHED_DEADLINE.
//!
//! Helper thread: collected during the stop, set again by the helper of the restored process.

use crate::agent::collect::threads::{SCHED_ATTR_SIZE, SchedAttr};
use crate::agent::hooks::ids::to_real;
use crate::image::state::{Rare, RareThread, ThreadState};
use ckpt_sys::syscall;

const IOPRIO_WHO_PROCESS: u32 = 1;
const SCHED_DEADLINE: u32 = 6;

/// Each command of membarrier(2) that only those may give who have registered, and the command
/// that registers: private expedited, its variants for core serialising and for rseq.
const EXPEDITED: [(u32, u32); 3] = [(1 << 3, 1 << 4), (1 << 5, 1 << 6), (1 << 7, 1 << 8)];
/// Asks for the registrations (Linux 6.3).
const GET_REGISTRATIONS: u32 = 1 << 9;

fn membarrier(command: u32) -> isize {
    // SAFETY: no pointers.
    unsafe { syscall!(libc::SYS_membarrier, command, 0, 0) }
}

/// The registrations in force. An older kernel does not tell them, but refuses the barriers
/// of those who have none.
fn registrations() -> u32 {
    let told = membarrier(GET_REGISTRATIONS);
    if told >= 0 {
        return told as u32;
    }
    let may = |&&(barrier, _): &&(u32, u32)| membarrier(barrier) == 0;
    let registered = EXPEDITED.iter().filter(may);
    registered.fold(0, |all, (_, register)| all | register)
}

/// Registers for each command in the set.
pub fn register(set: u32) {
    for bit in (0..u32::BITS).map(|n| 1 << n).filter(|bit| set & bit != 0) {
        membarrier(bit);
    }
}

pub fn set_ioprio(tid: i32, priority: u32) {
    // SAFETY: no pointers.
    unsafe { syscall!(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, tid, priority) };
}

/// The I/O priority that a thread has set, 0 where it goes by its nice value.
fn ioprio(tid: i32) -> u32 {
    // SAFETY: no pointers.
    let ret = unsafe { syscall!(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid) };
    // Class 0 is none, whatever the level.
    match ret {
        ret if ret > 0 && ret >> 13 != 0 => ret as u32,
        _ => 0,
    }
}

fn deadline(tid: i32) -> [u64; 3] {
    let mut attr = SchedAttr::default();
    // SAFETY: the kernel fills at most SCHED_ATTR_SIZE bytes.
    unsafe { syscall!(libc::SYS_sched_getattr, tid, &mut attr, SCHED_ATTR_SIZE, 0) };
    [attr.runtime, attr.deadline, attr.period]
}

/// `threads` as the image has them.
pub fn collect(threads: &[ThreadState]) -> Rare {
    let rare = threads.iter().map(|thread| {
        let tid = to_real(thread.tid);
        RareThread {
            ioprio: ioprio(tid),
            deadline: match thread.sched.policy {
                SCHED_DEADLINE => deadline(tid),
                _ => [0; 3],
            },
        }
    });
    let mut rare: Vec<RareThread> = rare.collect();
    let used = rare.iter().rposition(|one| *one != RareThread::default());
    rare.truncate(used.map_or(0, |last| last + 1));
    Rare {
        membarrier: registrations(),
        threads: rare,
        ..Rare::default()
    }
}
