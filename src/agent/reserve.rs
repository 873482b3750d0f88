//! Address space of our own that is reserved whole and opened from its start as it is needed.
//!
//! What is closed (PROT_NONE) does not count against RLIMIT_DATA, only against RLIMIT_AS: where
//! the program limits that, the closed rest goes ([`Bounds::cut`]).
//!
//! The helper thread (its heap) and fault handlers (the table of the trackers) open, hooks in any
//! thread cut: a word says what is whose, without a lock, so a child that is forked amid it has
//! nothing to wait for.

use crate::agent::place;
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicU64, Ordering::*};

const PAGE: u64 = 4096;

/// Pages open (upper half) and reserved (lower half) of a range.
#[derive(Debug)]
pub struct Bounds(AtomicU64);

fn unpack(word: u64) -> (u64, u64) {
    ((word >> 32) * PAGE, (word & 0xffff_ffff) * PAGE)
}

fn pack(open: u64, len: u64) -> u64 {
    ((open / PAGE) << 32) | (len / PAGE)
}

impl Bounds {
    /// Nothing is reserved.
    pub const fn none() -> Bounds {
        Bounds(AtomicU64::new(0))
    }

    /// `open` bytes of `len` can be used.
    pub fn set(&self, open: u64, len: u64) {
        self.0.store(pack(open, len), SeqCst);
    }

    /// How long it is, what is closed included.
    pub fn total(&self) -> u64 {
        unpack(self.0.load(SeqCst)).1
    }

    /// Opens the next `bytes` (whole pages), and says where they begin; `None`: there is no room.
    ///
    /// # Safety
    /// `base` is where the range lies.
    pub unsafe fn open(&self, base: u64, bytes: u64) -> Option<u64> {
        let claim = |word| {
            let (open, len) = unpack(word);
            (bytes <= len.saturating_sub(open)).then(|| pack(open + bytes, len))
        };
        let (open, _) = unpack(self.0.fetch_update(SeqCst, SeqCst, claim).ok()?);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: closed memory of the range that nobody else has claimed.
        if check(unsafe { syscall!(libc::SYS_mprotect, base + open, bytes, prot) }).is_ok() {
            return Some(base + open);
        }
        // Back, unless somebody has opened more: then it is lost.
        let _ = self.0.fetch_update(SeqCst, SeqCst, |word| {
            let (now, len) = unpack(word);
            (now == open + bytes).then(|| pack(open, len))
        });
        None
    }

    /// What is closed of the range at `base`, but for the first `spare` bytes of it.
    pub fn closed(&self, base: u64, spare: u64) -> (u64, u64) {
        let (open, len) = unpack(self.0.load(SeqCst));
        let from = (open + spare).min(len);
        (base + from, base + len)
    }

    /// Gives back what is beyond the first `keep` bytes (whole pages) and closed.
    ///
    /// # Safety
    /// `base` is where the range lies, in the memory of the caller.
    pub unsafe fn cut(&self, base: u64, keep: u64) {
        let shorter = |word| {
            let (open, len) = unpack(word);
            let rest = keep.max(open);
            (rest < len).then(|| pack(open, rest))
        };
        if let Ok(before) = self.0.fetch_update(SeqCst, SeqCst, shorter) {
            let (open, len) = unpack(before);
            let rest = keep.max(open);
            // SAFETY: no longer part of the range; nobody could use it.
            unsafe { syscall!(libc::SYS_munmap, base + rest, len - rest) };
        }
    }
}

/// Reserves fresh address space, all of it closed.
pub fn map(len: u64) -> Result<u64, i32> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let at = place::lasting(len, libc::PROT_NONE, flags)?;
    unlock(at, len);
    Ok(at)
}

/// Makes a range that was reserved one of a kind that RLIMIT_DATA does not count when it is opened
/// (a stack): what cannot be refused must not meet the program's limit. Below it a page must stay
/// reserved that is of the ordinary kind, or it would grow. Where it is not possible, it counts.
///
/// # Safety
/// The range is the caller's, and closed.
pub unsafe fn exempt(at: u64, len: u64) {
    let flags = libc::MAP_PRIVATE
        | libc::MAP_ANONYMOUS
        | libc::MAP_NORESERVE
        | libc::MAP_FIXED
        | libc::MAP_GROWSDOWN;
    // SAFETY: replaces what nobody uses.
    unsafe { syscall!(libc::SYS_mmap, at, len, libc::PROT_NONE, flags, -1i32, 0) };
    unlock(at, len);
}

/// The program's mlockall(MCL_FUTURE) is not meant for memory of ours: a fresh mapping counts as
/// locked, and all of it is brought in when it is opened.
pub fn unlock(at: u64, len: u64) {
    // SAFETY: it does nothing to contents.
    unsafe { syscall!(libc::SYS_munlock, at, len) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;
    use crate::agent::hooks::user;

    #[test]
    fn opened_from_the_start_and_cut_at_the_end() {
        in_child(|| {
            let base = map(100 * PAGE).unwrap();
            let bounds = Bounds::none();
            bounds.set(0, 100 * PAGE);
            // SAFETY: the range just mapped.
            unsafe {
                assert_eq!(bounds.open(base, 3 * PAGE), Some(base));
                *((base + 3 * PAGE - 1) as *mut u8) = 1;
                assert_eq!(bounds.open(base, 98 * PAGE), None);
                assert_eq!(bounds.open(base, PAGE), Some(base + 3 * PAGE));
                bounds.cut(base, 200 * PAGE);
                assert_eq!(bounds.total(), 100 * PAGE);
                bounds.cut(base, 10 * PAGE);
                bounds.cut(base, 20 * PAGE);
                assert_eq!(bounds.total(), 10 * PAGE);
                let gone = syscall!(libc::SYS_madvise, base + 10 * PAGE, PAGE, 0);
                assert_eq!(gone, -(libc::ENOMEM as isize));
                // What is open stays.
                bounds.cut(base, PAGE);
                assert_eq!(bounds.total(), 4 * PAGE);
                *((base + 4 * PAGE - 1) as *mut u8) = 1;
                assert_eq!(bounds.open(base, PAGE), None);
            }
        });
    }

    #[test]
    fn what_is_closed_is_no_data() {
        in_child(|| {
            let limit = [256u64 << 20; 2];
            // SAFETY: a valid pair; this process is a child of the test's own.
            unsafe { syscall!(libc::SYS_prlimit64, 0, libc::RLIMIT_DATA, &limit, 0) };
            let base = map(1 << 30).unwrap();
            let bounds = Bounds::none();
            bounds.set(0, 1 << 30);
            // SAFETY: the range just mapped.
            unsafe {
                assert_eq!(bounds.open(base, 1 << 20), Some(base));
                // The limit does not allow it: what could not be opened is not lost.
                assert_eq!(bounds.open(base, 512 << 20), None);
                assert_eq!(bounds.open(base, 1 << 20), Some(base + (1 << 20)));
                // What is exempt may be opened all the same, and does not grow.
                let base = map(1 << 30).unwrap() + PAGE;
                exempt(base, 512 << 20);
                bounds.set(0, 512 << 20);
                assert_eq!(bounds.open(base, 512 << 20), Some(base));
                *((base + (512 << 20) - 1) as *mut u8) = 1;
                *(base as *mut u8) = 1;
                let mut byte = [0u8];
                assert!(user::read_bytes(base - 1, &mut byte).is_err());
            }
        });
    }
}
