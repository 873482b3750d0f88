//! What a process has and its threads inherit: limits, permissions, personality, prctl state.
//!
//! Constructor of the new process; at a rollback the leader.

use super::RestoreError;
use super::memory::read_number;
use crate::image::state::Manifest;
use ckpt_sys::syscall;

/// Descriptors above the present soft limit need a higher one first.
pub fn raise_nofile(manifest: &Manifest) {
    const RLIMIT_NOFILE: u32 = libc::RLIMIT_NOFILE;
    let wanted = manifest
        .process
        .rlimits
        .iter()
        .find(|l| l.0 == RLIMIT_NOFILE)
        .map_or(0, |l| l.1);
    let mut now = [0u64; 2];
    // SAFETY: valid structs.
    unsafe {
        syscall!(libc::SYS_prlimit64, 0, RLIMIT_NOFILE, 0, &mut now);
        if now[0] < wanted {
            let new = [wanted.min(now[1]), now[1]];
            syscall!(libc::SYS_prlimit64, 0, RLIMIT_NOFILE, &new, 0);
        }
    }
}

/// A frame with AMX state is only accepted once AMX is permitted.
pub fn permit_features(manifest: &Manifest) -> Result<(), RestoreError> {
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    let here = crate::agent::collect::process::xcomp_perm();
    for bit in 0..64u64 {
        if manifest.process.xcomp_perm & !here & (1 << bit) != 0 {
            // SAFETY: no pointers.
            let ret = unsafe { syscall!(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, bit) };
            if ret != 0 {
                return Err(RestoreError::Features(-ret as i32));
            }
        }
    }
    Ok(())
}

/// What the program wants to get when its parent dies, or 0: its first thread's, as the kernel
/// has it for a new process.
pub fn death_signal(manifest: &Manifest) -> i32 {
    let first = manifest
        .threads
        .iter()
        .find(|t| t.tid == manifest.process.pid);
    first.map_or(0, |thread| thread.pdeathsig)
}

/// Attributes that threads inherit when they are born. In a new process only what differs
/// from the beginning is set.
pub fn process(manifest: &Manifest, inside: bool) {
    let process = &manifest.process;
    // SAFETY: no pointers; what is not permitted here is left as it is.
    unsafe {
        syscall!(libc::SYS_personality, process.personality);
        if process.no_new_privs {
            syscall!(libc::SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        }
        if process.child_subreaper || inside {
            let on = u64::from(process.child_subreaper);
            syscall!(libc::SYS_prctl, libc::PR_SET_CHILD_SUBREAPER, on, 0, 0, 0);
        }
        if process.thp_disable || inside {
            let on = u64::from(process.thp_disable);
            syscall!(libc::SYS_prctl, libc::PR_SET_THP_DISABLE, on, 0, 0, 0);
        }
    }
    let adjusted = || read_number(b"/proc/self/oom_score_adj").map(|n| n as i64);
    let wanted = i64::from(process.oom_score_adj);
    if wanted != 0 || inside && adjusted() != Some(wanted) {
        let _ = std::fs::write(
            "/proc/self/oom_score_adj",
            process.oom_score_adj.to_string(),
        );
    }
}
