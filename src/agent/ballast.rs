//! Address space in reserve, where the program's is limited (RLIMIT_AS): a checkpoint of a
//! program that has used up its memory, the very moment at which it wants one, still needs
//! a few mappings (tables of files, buffers). The helper gives the ballast back before a
//! checkpoint and takes it again behind it, as far as there is room.
//!
//! Helper thread. The mapping is no part of the image ([`range`]).

use crate::agent::{headroom, place, reserve};
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

const LEN: u64 = 4 << 20;

/// 0: there is none.
static AT: AtomicU64 = AtomicU64::new(0);

/// There was one before.
static HELD: AtomicBool = AtomicBool::new(false);

/// Takes what is in reserve, if the address space is limited and there is room.
pub fn take() {
    if AT.load(SeqCst) != 0 || !headroom::limited() {
        return;
    }
    // What was held may be held again; the first time, only of plenty.
    if !HELD.load(SeqCst) && !headroom::ample(LEN) {
        return;
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    if let Ok(addr) = place::passing(LEN, libc::PROT_NONE, flags) {
        reserve::unlock(addr, LEN);
        AT.store(addr, SeqCst);
        HELD.store(true, SeqCst);
    }
}

/// Gives it back, for what a checkpoint maps.
pub fn drop() {
    let at = AT.swap(0, SeqCst);
    if at != 0 {
        // SAFETY: our own mapping, never used.
        unsafe { syscall!(libc::SYS_munmap, at, LEN) };
    }
}

/// After a restore: what the image remembers is not mapped.
pub fn forget() {
    AT.store(0, SeqCst);
}

/// Where it is mapped; empty when there is none.
pub fn range() -> (u64, u64) {
    let at = AT.load(SeqCst);
    (at, if at == 0 { 0 } else { at + LEN })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;

    #[test]
    fn only_where_the_space_is_limited() {
        in_child(|| {
            take();
            assert_eq!(range(), (0, 0));
            let limit = [1u64 << 40, 1 << 40];
            // SAFETY: a valid pair; this process is a child of the test's own.
            unsafe { syscall!(libc::SYS_prlimit64, 0, libc::RLIMIT_AS, &limit, 0) };
            take();
            let (start, end) = range();
            assert_eq!(end - start, LEN);
            take();
            assert_eq!(range(), (start, end));
            drop();
            assert_eq!(range(), (0, 0));
        });
    }
}
