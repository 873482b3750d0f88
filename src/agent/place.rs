//! Where memory of ours is mapped: apart from the program's.
//!
//! Who lets the kernel choose gets the highest hole that is large enough, and that may be one which
//! the program has made and is going to fill again with MAP_FIXED: no other thread of its maps
//! anything. Our memory was gone then, or the program's, when what we believed to be ours was
//! given back. So we ask for places that are nobody's, between the executables (0x55..., 0x56...)
//! and what lies at fixed low addresses. They are wishes: where something lies already the kernel
//! chooses as before.
//!
//! Any thread, any context.

use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

const PAGE: u64 = 4096;
const HUGE: u64 = 2 << 20;

const WINDOW: u64 = 0x2a00_0000_0000;
/// What stays lies in the first half of the window, one behind the other.
const HALF: u64 = 8 << 40;
/// What is given back soon has places in the second half, where it can grow.
const SLOT: u64 = 128 << 30;
const SLOTS: u64 = 8;
/// So many wishes; then anywhere.
const TRIES: u32 = 8;

static NEXT: AtomicU64 = AtomicU64::new(0);

/// The window begins somewhere else in each process, as far as this library does.
fn window() -> u64 {
    let bits = (&raw const NEXT as u64 / PAGE) & 0x7_ffff;
    WINDOW + bits * HUGE
}

/// The next place for what stays. After 8 TiB they begin anew.
fn claim(len: u64) -> u64 {
    let unit = if len >= HUGE { HUGE } else { PAGE };
    let (mut start, len) = (0, len.next_multiple_of(PAGE) + PAGE);
    let _ = NEXT.fetch_update(Relaxed, Relaxed, |next| {
        start = next.next_multiple_of(unit);
        if start.saturating_add(len) > HALF {
            start = 0;
        }
        Some(start.saturating_add(len))
    });
    window() + start
}

/// The flag for a mapping at `wish`: there or nowhere (what is mapped elsewhere for a moment may lie
/// in a hole that the program is just filling). 0 is no wish.
pub fn there(wish: u64) -> i32 {
    match wish {
        0 => 0,
        _ => libc::MAP_FIXED_NOREPLACE,
    }
}

fn anonymous(at: u64, len: u64, prot: i32, flags: i32) -> Result<u64, i32> {
    let flags = flags | there(at);
    // SAFETY: a fresh mapping, at `at` or elsewhere.
    let got = unsafe { syscall!(libc::SYS_mmap, at, len, prot, flags, -1i32, 0) };
    Ok(check(got)? as u64)
}

/// What `map` got at `wish`; `None`: something lies there.
fn got(map: impl FnOnce(u64) -> Result<u64, i32>, wish: u64, len: u64) -> Option<Result<u64, i32>> {
    match map(wish) {
        Err(libc::EEXIST) => None,
        // A kernel that does not know the flag (before 4.17) took the wish for a hint.
        Ok(at) if at != wish => {
            // SAFETY: mapped a moment ago; nobody knows of it.
            unsafe { syscall!(libc::SYS_munmap, at, len) };
            None
        }
        result => Some(result),
    }
}

/// Calls `map`, which maps `len` bytes at a place that it is given, with [`there`].
pub fn wished(len: u64, map: impl Fn(u64) -> Result<u64, i32>) -> Result<u64, i32> {
    for _ in 0..TRIES {
        let wish = claim(len);
        if let Some(result) = got(&map, wish, len) {
            return result;
        }
    }
    map(0)
}

/// Fresh anonymous memory that stays.
pub fn lasting(len: u64, prot: i32, flags: i32) -> Result<u64, i32> {
    wished(len, |wish| anonymous(wish, len, prot, flags))
}

/// Fresh anonymous memory for a while, which mremap may make longer.
pub fn passing(len: u64, prot: i32, flags: i32) -> Result<u64, i32> {
    for slot in 0..SLOTS {
        let wish = window() + HALF + slot * SLOT;
        let map = |wish| anonymous(wish, len, prot, flags);
        if let Some(result) = got(map, wish, len) {
            return result;
        }
    }
    anonymous(0, len, prot, flags)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;

    const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

    /// Makes a hole of 64 pages where the kernel puts what may lie anywhere.
    fn hole() -> u64 {
        let at = anonymous(0, 64 * PAGE, 3, FLAGS).unwrap();
        // SAFETY: mapped a moment ago.
        unsafe { syscall!(libc::SYS_munmap, at, 64 * PAGE) };
        assert_eq!(anonymous(0, 64 * PAGE, 3, FLAGS), Ok(at));
        // SAFETY: as above.
        unsafe { syscall!(libc::SYS_munmap, at, 64 * PAGE) };
        at
    }

    #[test]
    fn nothing_lies_in_holes_of_the_program() {
        in_child(|| {
            let at = hole();
            let inside = |got: u64| got + 64 * PAGE > at && got < at + 64 * PAGE;
            for len in [1, 16, 64] {
                assert!(!inside(lasting(len * PAGE, 3, FLAGS).unwrap()));
                assert!(!inside(passing(len * PAGE, 3, FLAGS).unwrap()));
            }
            assert_eq!(lasting(HUGE, 3, FLAGS).unwrap() % HUGE, 0);
        });
    }

    /// One that is not given back leaves the next one another place; it grows where it is.
    #[test]
    fn what_passes_has_places_to_grow() {
        in_child(|| {
            let first = passing(16 * PAGE, 3, FLAGS).unwrap();
            let second = passing(16 * PAGE, 3, FLAGS).unwrap();
            assert_eq!(second, first + SLOT);
            for at in [first, second] {
                // SAFETY: a mapping of the test's own.
                let got = unsafe { syscall!(libc::SYS_mremap, at, 16 * PAGE, 1u64 << 30, 0) };
                assert_eq!(got as u64, at);
            }
            // SAFETY: as above.
            unsafe { syscall!(libc::SYS_munmap, first, 1u64 << 30) };
            assert_eq!(passing(PAGE, 3, FLAGS), Ok(first));
        });
    }

    #[test]
    fn what_stays_lies_apart() {
        in_child(|| {
            let a = lasting(3 * PAGE, 3, FLAGS).unwrap();
            let b = lasting(PAGE, 3, FLAGS).unwrap();
            assert!(a >= window() && b == a + 4 * PAGE);
            NEXT.store(HALF - PAGE, Relaxed);
            // The first places are taken by then.
            let again = lasting(PAGE, 3, FLAGS).unwrap();
            assert!(again > b && again < b + 64 * PAGE);
        });
    }
}
