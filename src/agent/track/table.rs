//! One byte of state for every page that is, or was, write-protected by us.
//!
//! Two levels: a word for each GiB of address space, which leads to 256 KiB of bytes once
//! a page of it is marked. All of it lies in one reservation that is opened as far as it
//! is needed and is no part of the image ([`own_range`]). Lock-free; any context.

use crate::agent::collect::memory::PAGE;
use crate::agent::headroom;
use crate::agent::reserve::{self, Bounds};
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU64, Ordering::*};

/// Protected by us; the program may write.
pub const WATCHED: u8 = 1;
/// Was protected, and was opened since the last sweep.
pub const OPEN: u8 = 2;
/// The program may also execute it.
pub const EXEC: u8 = 4;
/// Known to the base; the program may not write, or has not made the page its own.
pub const SETTLED: u8 = 8;
/// Must be stored before it is written (`priority` snapshot).
pub const STORE: u8 = 16;
/// Is being stored or copied.
pub const BUSY: u8 = 32;
/// A mapping of the program's may begin here (other flags than its neighbour): what the map
/// shows in two parts is not to be joined. Kept by [`set`].
pub const BORDER: u8 = 64;

const GIB: u64 = 1 << 30;
const LEAF: usize = (GIB / PAGE) as usize;
const DIRECTORY: usize = 1 << 17;
const LEAVES: usize = 2048;
static BASE: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static BOUNDS: Bounds = Bounds::none();

/// The reservation, empty when there is none.
pub fn own_range() -> (u64, u64) {
    let base = BASE.load(Relaxed) as u64;
    (base, base + BOUNDS.total())
}

/// After a restore: the table of the life before is not in the image.
pub fn forget() {
    BASE.store(std::ptr::null_mut(), SeqCst);
    BOUNDS.set(0, 0);
}

#[inline]
pub fn exists() -> bool {
    !BASE.load(Relaxed).is_null()
}

/// The length of a table for `space` bytes of address space, which lie scattered.
fn len_within(space: u64) -> u64 {
    let leaves = (space / GIB).saturating_mul(2).saturating_add(16);
    (DIRECTORY * 8) as u64 + leaves.min(LEAVES as u64) * LEAF as u64
}

/// Makes the table. Helper thread.
pub fn create() -> Result<(), i32> {
    if exists() {
        return Ok(());
    }
    let directory = (DIRECTORY * 8) as u64;
    let mut len = len_within(headroom::address_space());
    loop {
        match reserve::map(len) {
            Ok(base) => {
                BOUNDS.set(0, len);
                // SAFETY: the range just mapped.
                if unsafe { BOUNDS.open(base, directory) }.is_none() {
                    // SAFETY: as above; nobody knows of it.
                    unsafe { syscall!(libc::SYS_munmap, base, len) };
                    BOUNDS.set(0, 0);
                    return Err(libc::ENOMEM);
                }
                BASE.store(base as *mut u8, SeqCst);
                return Ok(());
            }
            // A limit of the address space: fewer leaves.
            Err(errno) if len <= directory + 4 * LEAF as u64 => return Err(errno),
            Err(_) => len = directory + (len - directory) / 2,
        }
    }
}

/// The program limits its address space to `limit` bytes: leaves that it will not need go. Any
/// thread, in a hook.
pub fn make_room(limit: u64) {
    let base = BASE.load(SeqCst) as u64;
    if base != 0 {
        // SAFETY: the table; a forked child has its copy of it.
        unsafe { BOUNDS.cut(base, len_within(limit)) };
    }
}

fn entry(addr: u64) -> Option<&'static AtomicU64> {
    let base = BASE.load(Relaxed);
    let index = (addr / GIB) as usize;
    if base.is_null() || index >= DIRECTORY {
        return None;
    }
    // SAFETY: inside the directory, which lives as long as `BASE` names it.
    Some(unsafe { &*base.cast::<AtomicU64>().add(index) })
}

fn leaf(addr: u64) -> Option<*mut AtomicU8> {
    match entry(addr)?.load(Acquire) {
        0 => None,
        at => Some(at as *mut AtomicU8),
    }
}

/// The byte of the page at `addr`; `None`: never marked.
#[inline]
pub fn byte(addr: u64) -> Option<&'static AtomicU8> {
    let leaf = leaf(addr)?;
    // SAFETY: inside a leaf.
    Some(unsafe { &*leaf.add((addr % GIB / PAGE) as usize) })
}

/// What the byte holds, but for [`BORDER`].
#[inline]
pub fn get(addr: u64) -> u8 {
    byte(addr).map_or(0, |byte| byte.load(Acquire) & !BORDER)
}

/// Is there a border at `addr`?
pub fn is_border(addr: u64) -> bool {
    byte(addr).is_some_and(|byte| byte.load(Acquire) & BORDER != 0)
}

/// Makes room for the pages of `start..end`. False: no room is left.
pub fn prepare(start: u64, end: u64) -> bool {
    let mut at = start / GIB * GIB;
    while at < end {
        let Some(entry) = entry(at) else { return false };
        if entry.load(Relaxed) == 0 {
            // Two threads that meet here waste a leaf.
            let base = BASE.load(Relaxed) as u64;
            // SAFETY: the table is there: it has an entry.
            let Some(leaf) = (unsafe { BOUNDS.open(base, LEAF as u64) }) else {
                return false;
            };
            let _ = entry.compare_exchange(0, leaf, AcqRel, Relaxed);
        }
        at += GIB;
    }
    true
}

/// Marks a border at `addr`.
pub fn mark_border(addr: u64) {
    if prepare(addr, addr + 1)
        && let Some(byte) = byte(addr)
    {
        byte.fetch_or(BORDER, AcqRel);
    }
}

/// Calls `f(start, end, state)` for the runs of equal bytes in `start..end`; [`BORDER`] is
/// left out, though it may end a run.
pub fn runs(start: u64, end: u64, mut f: impl FnMut(u64, u64, u8)) {
    let mut f = |from, to, state: u8| f(from, to, state & !BORDER);
    let (mut from, mut state) = (start, None);
    let mut at = start;
    while at < end {
        let stop = (at / GIB + 1) * GIB;
        let stop = stop.min(end);
        let Some(leaf) = leaf(at) else {
            if state != Some(0) {
                if let Some(state) = state {
                    f(from, at, state);
                }
                (from, state) = (at, Some(0));
            }
            at = stop;
            continue;
        };
        // SAFETY: the part of a leaf up to the next GiB. Bytes may change while they are
        // looked at only where the caller can bear it.
        let bytes = unsafe {
            let first = leaf.add((at % GIB / PAGE) as usize);
            std::slice::from_raw_parts(first, ((stop - at) / PAGE) as usize)
        };
        let mut k = 0;
        while k < bytes.len() {
            let now = bytes[k].load(Relaxed);
            if state != Some(now) {
                if let Some(state) = state {
                    f(from, at + k as u64 * PAGE, state);
                }
                (from, state) = (at + k as u64 * PAGE, Some(now));
            }
            k += 1;
            while k + 8 <= bytes.len() {
                // SAFETY: eight bytes inside the slice, aligned or not.
                let word = unsafe { bytes.as_ptr().add(k).cast::<u64>().read_unaligned() };
                if word != u64::from_ne_bytes([now; 8]) {
                    break;
                }
                k += 8;
            }
        }
        at = stop;
    }
    if let Some(state) = state
        && from < end
    {
        f(from, end, state);
    }
}

/// Sets the bytes of `start..end` where there is room for them.
pub fn set(start: u64, end: u64, state: u8) {
    let mut at = start;
    while at < end {
        let stop = ((at / GIB + 1) * GIB).min(end);
        if let Some(leaf) = leaf(at) {
            for k in 0..(stop - at) / PAGE {
                // SAFETY: inside the leaf.
                let byte = unsafe { &*leaf.add((at % GIB / PAGE + k) as usize) };
                let now = byte.load(Relaxed);
                if now & !BORDER != state {
                    byte.store(state | now & BORDER, Release);
                }
            }
        }
        at = stop;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_runs() {
        create().unwrap();
        let base = 5 * GIB - 4 * PAGE;
        assert_eq!((get(base), get(u64::MAX)), (0, 0));
        let runs_of = |from: u64, to: u64| {
            let mut out = Vec::new();
            runs(base + from * PAGE, base + to * PAGE, |start, end, state| {
                out.push(((start - base) / PAGE, (end - base) / PAGE, state));
            });
            out
        };
        assert_eq!(runs_of(0, 10), [(0, 10, 0)]);
        assert!(prepare(base, base + 10 * PAGE));
        set(base + 2 * PAGE, base + 6 * PAGE, WATCHED);
        set(base + 5 * PAGE, base + 6 * PAGE, OPEN);
        assert_eq!(
            runs_of(0, 40),
            [(0, 2, 0), (2, 5, WATCHED), (5, 6, OPEN), (6, 40, 0)]
        );
        assert_eq!(runs_of(3, 4), [(3, 4, WATCHED)]);
        assert_eq!(get(base + 5 * PAGE + 17), OPEN);
        // What was never marked costs nothing, whatever its size.
        let mut n = 0;
        runs(0, 1 << 46, |_, _, _| n += 1);
        assert_eq!(n, 4);
    }
}
