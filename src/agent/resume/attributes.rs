//! Scheduling of threads, owners of descriptors and the process's resource limits.
//!
//! New helper thread, the program's threads waiting.

use crate::agent::collect::descriptors::sys;
use crate::agent::collect::rare;
use crate::agent::collect::threads::{SCHED_ATTR_SIZE, SCHED_FLAG_RESET_ON_FORK, SchedAttr};
use crate::agent::hooks::ids;
use crate::agent::state::AGENT;
use crate::agent::{headroom, log, settings};
use crate::image::state::{RareThread, SchedState};
use ckpt_sys::syscall;
use std::sync::atomic::Ordering;

/// `always`: the thread may have others than those of a new process.
pub fn set_sched(tid: i32, sched: &SchedState, rare: RareThread, always: bool) {
    let [runtime, deadline, period] = rare.deadline;
    let attr = SchedAttr {
        size: SCHED_ATTR_SIZE,
        policy: sched.policy,
        flags: if sched.reset_on_fork {
            SCHED_FLAG_RESET_ON_FORK
        } else {
            0
        },
        nice: sched.nice,
        priority: sched.priority as u32,
        runtime,
        deadline,
        period,
    };
    // SAFETY: valid structs; a policy or mask that is not permitted here is left out.
    unsafe {
        if always || *sched != SchedState::default() {
            syscall!(libc::SYS_sched_setattr, tid, &attr, 0);
        }
        if rare.ioprio != 0 || always {
            rare::set_ioprio(tid, rare.ioprio);
        }
        let mask = match settings::get() {
            Some(settings) if always && sched.affinity.is_empty() => &settings.affinity,
            _ => &sched.affinity,
        };
        if !mask.is_empty() {
            let len = mask.len() * 8;
            syscall!(libc::SYS_sched_setaffinity, tid, len, mask.as_ptr());
        }
    }
}

/// Whom the kernel signals (fd, F_OWNER_*, id). The program's descriptors, those of thread `tid`,
/// are not in this thread's table: by way of duplicates.
pub fn set_owners(owners: &[(i32, i32, i32)], tid: i32) {
    const F_SETOWN_EX: i32 = 15;
    const F_OWNER_PGRP: i32 = 2;
    let pid = AGENT.real_pid.load(Ordering::SeqCst);
    let set = |fd: i32, mut owner: [i32; 2]| {
        let file = sys::pidfd_getfd(sys::pidfd_of(pid, tid)?.raw(), fd)?;
        sys::fcntl(file.raw(), F_SETOWN_EX, owner.as_mut_ptr() as usize)
    };
    for &(fd, kind, id) in owners {
        let real = match kind {
            F_OWNER_PGRP => ids::group_to_real(id),
            _ => ids::to_real(id),
        };
        if let Err(errno) = set(fd, [kind, real]) {
            log::line(format_args!(
                "descriptor {fd}: its owner (F_SETOWN) {id} cannot be set again: errno {errno}"
            ));
        }
    }
}

/// Soft limits come back; a hard limit that is lower here stays as it is.
pub fn set_rlimit(resource: u32, soft: u64, hard: u64) {
    let mut now = [0u64; 2];
    // SAFETY: valid structs.
    unsafe {
        if syscall!(libc::SYS_prlimit64, 0, resource, 0, &mut now) != 0 || now == [soft, hard] {
            return;
        }
        let wanted = [soft, hard];
        if syscall!(libc::SYS_prlimit64, 0, resource, &wanted, 0) != 0 {
            let possible = [soft.min(now[1]), now[1].min(hard)];
            syscall!(libc::SYS_prlimit64, 0, resource, &possible, 0);
        }
    }
    if resource == libc::RLIMIT_AS {
        headroom::make_room(soft);
    }
}
