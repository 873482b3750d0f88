//! What a stopped thread reports about itself.
//!
//! A slot is the helper's memory (or the inserted caller's); the thread fills its own in the
//! stop handler, async-signal-safe, and the helper reads it while the world is stopped.

use crate::agent::refusal::{self, Kind};
use crate::agent::state::AGENT;
use crate::image::state::Switches;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// What a stopped thread reports about itself.
#[repr(C)]
#[derive(Debug)]
pub struct Slot {
    pub tid: AtomicU32,
    /// [`NEW`], [`PARKED`], [`GONE`] or [`AGAIN`].
    pub state: AtomicU32,
    /// How often it was [`AGAIN`].
    pub tries: u32,
    pub ucontext: u64,
    /// The restart record of an interrupted call, on the thread's own stack.
    pub interrupted: u64,
    /// Free stack below everything that is alive when the thread goes on.
    pub resume_stack: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub robust_list: u64,
    pub robust_list_len: u64,
    pub clear_child_tid: u64,
    pub rseq: u64,
    pub rseq_len: u32,
    pub pdeathsig: i32,
    pub timer_slack_ns: u64,
    pub switches: Switches,
    pub name: [u8; 16],
    /// rt_sigpending: this thread's and the process's.
    pub pending: u64,
    /// Captured by its own call of `ckpt_checkpoint`.
    pub inserted: bool,
    /// Signals that the helper wants this thread to take off its own queue, read and
    /// put back; 0 when there is nothing to do (or it is done).
    pub drain: AtomicU64,
    /// Where they go: room for `pending::DRAIN_MAX` of `siginfo_t`, in the helper's memory.
    pub drain_to: AtomicU64,
    pub drained: AtomicU32,
}

pub const NEW: u32 = 0;
pub const PARKED: u32 = 1;
pub const GONE: u32 = 2;
/// Amid a function that reads a clock, and it is not known where that will return to: it goes on, to
/// be stopped a moment later.
pub const AGAIN: u32 = 3;

/// Fills in what only the calling thread can read of itself.
pub fn report(slot: &mut Slot) {
    // SAFETY: each call writes into the fields given, all of the right size.
    unsafe {
        syscall!(libc::SYS_arch_prctl, 0x1003, &mut slot.fs_base); // ARCH_GET_FS
        syscall!(libc::SYS_arch_prctl, 0x1004, &mut slot.gs_base); // ARCH_GET_GS
        syscall!(
            libc::SYS_get_robust_list,
            0,
            &mut slot.robust_list,
            &mut slot.robust_list_len
        );
        syscall!(
            libc::SYS_prctl,
            libc::PR_GET_TID_ADDRESS,
            &mut slot.clear_child_tid
        );
        syscall!(libc::SYS_prctl, libc::PR_GET_NAME, &mut slot.name);
        syscall!(libc::SYS_prctl, libc::PR_GET_PDEATHSIG, &mut slot.pdeathsig);
        slot.timer_slack_ns = syscall!(libc::SYS_prctl, libc::PR_GET_TIMERSLACK).max(0) as u64;
        syscall!(libc::SYS_rt_sigpending, &mut slot.pending, 8);
        slot.switches = Switches::default();
        if refusal::was_noted(Kind::ThreadSwitches) {
            let mut tsc = 0i32;
            syscall!(libc::SYS_prctl, libc::PR_GET_TSC, &mut tsc);
            slot.switches.no_tsc = tsc == libc::PR_TSC_SIGSEGV;
            slot.switches.keepcaps = syscall!(libc::SYS_prctl, libc::PR_GET_KEEPCAPS) == 1;
        }
    }
    let rseq = rseq_area(slot.fs_base);
    slot.rseq = rseq.0;
    slot.rseq_len = rseq.1;
}

/// The rseq area that glibc has registered for the thread with this thread pointer:
/// (address, registered length), (0, 0) for none.
pub fn rseq_area(fs_base: u64) -> (u64, u32) {
    let (offset, size) = AGENT.rseq();
    if size == 0 || fs_base == 0 {
        return (0, 0);
    }
    let area = fs_base.wrapping_add(offset as u64);
    // cpu_id is negative while the area is not registered (rseq(2)), but a thread that
    // is just being born on the stack of a dead one finds that one's number in it. So
    // the kernel is asked: it takes no second registration.
    // SAFETY: glibc keeps the area in every thread's control block; an area that was not
    // registered is left as it was.
    unsafe {
        let cpu = (area + 4) as *mut i32;
        let stale = cpu.read_volatile();
        if stale < 0 {
            return (0, 0);
        }
        let sig = crate::agent::collect::threads::RSEQ_SIG;
        if syscall!(libc::SYS_rseq, area, 32, 0, sig) != 0 {
            return (area, 32);
        }
        const RSEQ_FLAG_UNREGISTER: u32 = 1;
        syscall!(libc::SYS_rseq, area, 32, RSEQ_FLAG_UNREGISTER, sig);
        (0, 0)
    }
}
