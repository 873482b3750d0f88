//! Scheduling of threads and the process's resource limits.
//!
//! New helper thread, the program's threads waiting.

use crate::agent::collect::threads::{SCHED_ATTR_SIZE, SCHED_FLAG_RESET_ON_FORK, SchedAttr};
use crate::agent::{headroom, settings};
use crate::image::state::SchedState;
use ckpt_sys::syscall;

/// `always`: the thread may have others than those of a new process.
pub fn set_sched(tid: i32, sched: &SchedState, always: bool) {
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
        ..SchedAttr::default()
    };
    // SAFETY: valid structs; a policy or mask that is not permitted here is left out.
    unsafe {
        if always || *sched != SchedState::default() {
            syscall!(libc::SYS_sched_setattr, tid, &attr, 0);
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
