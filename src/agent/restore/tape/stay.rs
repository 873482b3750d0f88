//! The beginning of a rollback's tape: what goes, and what is put back in memory that stays.
//!
//! Leader of the old process, as [`crate::agent::restore::restore`].

use super::{Options, PROT_WRITE, Tape};
use crate::agent::restore::area::Area;
use crate::agent::restore::stay::{Part, Stay};
use ckpt_sys::blob::TapeOp;

/// Fewer reads are not worth a second thread.
const LEAST_SHARED: usize = 64;

/// What must go, and the changed pages of what stays: the beginning of a rollback's tape.
pub fn write(tape: &mut Tape, stay: &Stay, options: &Options, area: &mut Area) {
    for &(start, end) in &stay.unmap {
        tape.op(libc::SYS_munmap, 0, [start, end - start, 0, 0, 0, 0]);
    }
    let protect = |tape: &mut Tape, part: &Part, prot: u64| {
        let arg = [part.start, part.end - part.start, prot, 0, 0, 0];
        tape.op(libc::SYS_mprotect, 0, arg);
    };
    for part in &stay.open {
        protect(tape, part, u64::from(part.prot) | PROT_WRITE);
    }
    for &(start, end) in &stay.drops {
        let advice = libc::MADV_DONTNEED as u64;
        tape.op(libc::SYS_madvise, 0, [start, end - start, advice, 0, 0, 0]);
    }
    let from = tape.ops.len();
    tape.contents(&stay.reads, options, area);
    if tape.ops.len() - from >= LEAST_SHARED {
        tape.shared = (from, tape.ops.len());
    }
    for part in &stay.open {
        if u64::from(part.prot) & PROT_WRITE == 0 {
            protect(tape, part, u64::from(part.prot));
        }
    }
}

/// Bytes of the area that [`write`] needs at most.
pub fn needs(stay: &Stay) -> u64 {
    let ops = stay.unmap.len() + 2 * stay.open.len() + stay.drops.len() + stay.reads.len();
    let vectors = stay.reads.len() * (size_of::<[u64; 2]>() + 64);
    (ops * size_of::<TapeOp>() + vectors) as u64
}
