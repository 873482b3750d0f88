//! The end of the tape: what can be done only when memory is back.
//!
//! Constructor of the new process, or the leader at a rollback, as
//! [`crate::agent::restore::restore`].

use super::Tape;
use crate::agent::restore::area::Area;
use crate::agent::restore::descriptors::Late;
use crate::image::state::Manifest;
use ckpt_sys::blob::OP_MAY_FAIL;

/// `struct prctl_mm_map`.
#[repr(C)]
#[derive(Clone, Copy)]
struct PrctlMmMap {
    fields: [u64; 11],
    auxv: u64,
    auxv_size: u32,
    exe_fd: i32,
}

/// The mm fields (prctl(2), PR_SET_MM_MAP: works without privilege when exe_fd is -1)
/// and the signal actions.
pub fn attributes(tape: &mut Tape, manifest: &Manifest, area: &mut Area) {
    let mm = &manifest.process.mm;
    let auxv = area.put(&manifest.process.auxv);
    let map = PrctlMmMap {
        fields: [
            mm.start_code,
            mm.end_code,
            mm.start_data,
            mm.end_data,
            mm.start_brk,
            mm.brk,
            mm.start_stack,
            mm.arg_start,
            mm.arg_end,
            mm.env_start,
            mm.env_end,
        ],
        auxv,
        auxv_size: manifest.process.auxv.len() as u32,
        exe_fd: -1,
    };
    let map = area.put_slice(&[map]);
    const PR_SET_MM: u64 = 35;
    const PR_SET_MM_MAP: u64 = 14;
    tape.op(
        libc::SYS_prctl,
        0,
        [
            PR_SET_MM,
            PR_SET_MM_MAP,
            map,
            size_of::<PrctlMmMap>() as u64,
            0,
            0,
        ],
    );
    for (k, action) in manifest.signals.actions.iter().enumerate() {
        let signo = k as u64 + 1;
        if signo == libc::SIGKILL as u64 || signo == libc::SIGSTOP as u64 {
            continue;
        }
        let at = area.put_slice(&[*action]);
        tape.op(libc::SYS_rt_sigaction, 0, [signo, at, 0, 8, 0, 0]);
    }
}

/// Work on descriptors that had to wait for the memory map: it needs the program's
/// own descriptor table, which the helper does not share.
pub fn late(tape: &mut Tape, work: &Late, area: &mut Area) {
    const F_ADD_SEALS: u64 = libc::F_ADD_SEALS as u64;
    match work {
        Late::Seals { fd, seals } => {
            tape.op(
                libc::SYS_fcntl,
                OP_MAY_FAIL,
                [*fd as u64, F_ADD_SEALS, *seals as u64, 0, 0, 0],
            );
        }
        // The thread does not exist yet: the process is the owner.
        Late::Owner { fd, owner } => {
            tape.op(
                libc::SYS_fcntl,
                OP_MAY_FAIL,
                [*fd as u64, libc::F_SETOWN as u64, owner.1 as u64, 0, 0, 0],
            );
        }
        // Opening and closing mapped files has dropped the locks on them.
        Late::PosixLock(lock) => {
            let at = area.put_slice(&[Late::flock(lock)]);
            tape.op(
                libc::SYS_fcntl,
                OP_MAY_FAIL,
                [lock.fd as u64, libc::F_SETLK as u64, at, 0, 0, 0],
            );
        }
    }
}
