//! Threads: what each reported of itself in the stop handler, and what the kernel
//! tells of it from outside (scheduling, affinity).

use crate::agent::stop::{Slot, Stopped};
use crate::image::state::{SchedState, Switches, ThreadState};
use ckpt_sys::syscall;
use std::sync::atomic::Ordering;

/// `struct sched_attr` (sched_setattr(2)), first version.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct SchedAttr {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

pub const SCHED_ATTR_SIZE: u32 = size_of::<SchedAttr>() as u32;
pub const SCHED_FLAG_RESET_ON_FORK: u64 = 1;

/// CPUs beyond 1024 are not looked at.
const MASK_WORDS: usize = 16;

/// The CPUs that a thread may run on, 64 a word.
pub fn affinity(tid: i32) -> Vec<u64> {
    let mut mask = [0u64; MASK_WORDS];
    // SAFETY: a buffer of the length given.
    let n = unsafe {
        syscall!(
            libc::SYS_sched_getaffinity,
            tid,
            size_of_val(&mask),
            &mut mask
        )
    };
    let words = (n.max(0) as usize / 8).min(MASK_WORDS);
    mask[..words].to_vec()
}

fn sched(tid: i32, default_affinity: &[u64]) -> SchedState {
    let mut attr = SchedAttr::default();
    // SAFETY: the kernel fills at most SCHED_ATTR_SIZE bytes.
    let ret = unsafe { syscall!(libc::SYS_sched_getattr, tid, &mut attr, SCHED_ATTR_SIZE, 0) };
    let mask = affinity(tid);
    let own = if mask == default_affinity {
        Vec::new()
    } else {
        mask
    };
    if ret < 0 {
        return SchedState {
            affinity: own,
            ..SchedState::default()
        };
    }
    SchedState {
        policy: attr.policy,
        priority: attr.priority as i32,
        nice: attr.nice,
        reset_on_fork: attr.flags & SCHED_FLAG_RESET_ON_FORK != 0,
        affinity: own,
    }
}

fn state(slot: &Slot, default_affinity: &[u64]) -> ThreadState {
    let tid = slot.tid.load(Ordering::Relaxed) as i32;
    let name_len = slot.name.iter().position(|&b| b == 0).unwrap_or(16);
    ThreadState {
        tid: crate::agent::hooks::ids::to_virtual(tid),
        ucontext: slot.ucontext,
        interrupted: slot.interrupted,
        resume_stack: slot.resume_stack,
        fs_base: slot.fs_base,
        gs_base: slot.gs_base,
        robust_list: slot.robust_list,
        robust_list_len: slot.robust_list_len,
        clear_child_tid: slot.clear_child_tid,
        rseq: slot.rseq,
        rseq_len: slot.rseq_len,
        rseq_sig: RSEQ_SIG,
        name: slot.name[..name_len].to_vec(),
        sched: sched(tid, default_affinity),
        pending: Vec::new(),
        inserted: slot.inserted,
        pdeathsig: slot.pdeathsig,
        timer_slack_ns: slot.timer_slack_ns,
    }
}

/// What the threads have set for themselves, in the same order as [`collect`]'s; empty where
/// all is as the kernel has it for a new process.
pub fn switches(stopped: &Stopped) -> Vec<Switches> {
    let all: Vec<Switches> = stopped.threads().map(|slot| slot.switches).collect();
    if all.iter().all(|one| *one == Switches::default()) {
        return Vec::new();
    }
    all
}

/// The signature that glibc registers on x86_64 (sys/rseq.h).
pub const RSEQ_SIG: u32 = 0x5305_3053;

/// All stopped threads, in the order of their slots. `default` are the CPUs that the process
/// was started with: a thread that has these gets those of the next start.
pub fn collect(stopped: &Stopped, default: &[u64]) -> Vec<ThreadState> {
    stopped.threads().map(|slot| state(slot, default)).collect()
}
