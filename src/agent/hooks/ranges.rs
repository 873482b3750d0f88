//! Where the program's memory may still be a private mapping of our image files.
//!
//! Filled after a lazy restore, before the threads run; afterwards lock-free: a
//! range is only trimmed or dropped, never split (what was converted in its middle
//! stays listed), and what mremap moved is added to a small second list. So the
//! lists *over-report*; `memory` asks the kernel before it acts. Copied by fork like
//! any memory. No stop comes while a thread looks at them ([`InHook`]): a restored process has
//! another list at another place. What was found holds for this life only, so who goes by it
//! has a guard of its own around the look and the call.

use crate::agent::place;
use crate::agent::state::InHook;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering::*};

/// `[start, end)`; empty when start >= end.
struct Range {
    start: AtomicU64,
    end: AtomicU64,
    /// What of `image::state::vma_flag` the program's range had.
    flags: AtomicU32,
}

impl Range {
    fn overlaps(&self, start: u64, end: u64) -> bool {
        let (s, e) = (self.start.load(Acquire), self.end.load(Acquire));
        s < e && s < end && start < e
    }

    /// `[start, end)` is no longer ours: drop what of it is at an edge.
    fn trim(&self, start: u64, end: u64) {
        let (s, e) = (self.start.load(Acquire), self.end.load(Acquire));
        if s >= e || end <= s || start >= e {
            return;
        }
        if start <= s {
            let _ = self.start.compare_exchange(s, end.min(e), AcqRel, Relaxed);
        } else if end >= e {
            let _ = self.end.compare_exchange(e, start, AcqRel, Relaxed);
        }
    }
}

static TABLE: AtomicPtr<Range> = AtomicPtr::new(std::ptr::null_mut());
static COUNT: AtomicUsize = AtomicUsize::new(0);
/// Bytes of the table's mapping.
static TABLE_LEN: AtomicUsize = AtomicUsize::new(0);

const EXTRA: usize = 256;
static MOVED: [Range; EXTRA] = [const {
    Range {
        start: AtomicU64::new(0),
        end: AtomicU64::new(0),
        flags: AtomicU32::new(0),
    }
}; EXTRA];
static MOVED_LEN: AtomicUsize = AtomicUsize::new(0);
/// More was moved than the list holds: any address may be ours.
static ANYWHERE: AtomicBool = AtomicBool::new(false);

const FILES: usize = 256;
static FILE_COUNT: AtomicUsize = AtomicUsize::new(0);
static FILE_IDS: [[AtomicU64; 2]; FILES] = [const { [const { AtomicU64::new(0) }; 2] }; FILES];

fn table() -> &'static [Range] {
    let at = TABLE.load(Acquire);
    if at.is_null() {
        return &[];
    }
    // SAFETY: mapped by `set_image_ranges` for COUNT ranges, unmapped only by its next call.
    unsafe { std::slice::from_raw_parts(at, COUNT.load(Relaxed)) }
}

/// After a lazy restore, before the program's threads run: the ranges that are
/// mapped from image files, ascending and disjoint, with their `vma_flag`s. Replaces the
/// list before it.
pub fn set_image_ranges(ranges: &[(u64, u64, u32)]) -> Result<(), i32> {
    let old = TABLE.swap(std::ptr::null_mut(), AcqRel);
    if !old.is_null() {
        // The table of the life before came back with the image.
        // SAFETY: a mapping of our own that no other thread looks at now.
        unsafe { syscall!(libc::SYS_munmap, old, TABLE_LEN.load(Relaxed)) };
    }
    COUNT.store(0, Relaxed);
    MOVED_LEN.store(0, Relaxed);
    for slot in &MOVED {
        slot.start.store(0, Relaxed);
        slot.end.store(0, Relaxed);
    }
    ANYWHERE.store(false, Relaxed);
    if ranges.is_empty() {
        return Ok(());
    }
    let size = (ranges.len() * size_of::<Range>() + 4095) & !4095;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let at = place::lasting(size as u64, prot, flags)? as *mut Range;
    // SAFETY: a fresh mapping, filled before it is published.
    unsafe {
        let mut n = 0;
        for &(start, end, flags) in ranges {
            // Neighbours become one range.
            if n > 0 {
                let last = &*at.add(n - 1);
                if last.end.load(Relaxed) == start && last.flags.load(Relaxed) == flags {
                    last.end.store(end, Relaxed);
                    continue;
                }
            }
            at.add(n).write(Range {
                start: AtomicU64::new(start),
                end: AtomicU64::new(end),
                flags: AtomicU32::new(flags),
            });
            n += 1;
        }
        COUNT.store(n, Relaxed);
        TABLE_LEN.store(size, Relaxed);
        TABLE.store(at, Release);
    }
    Ok(())
}

/// The image files that ranges may be mapped from, as the memory map shows them:
/// `(major << 32 | minor, inode)` (see [`super::maps::Mapping`]; take it from the
/// mapping itself, stat(2) shows another device on some file systems). False when
/// there are more than 256.
pub fn set_image_files(files: &[(u64, u64)]) -> bool {
    if files.len() > FILES {
        return false;
    }
    for (slot, (dev, ino)) in FILE_IDS.iter().zip(files) {
        slot[0].store(*dev, Relaxed);
        slot[1].store(*ino, Relaxed);
    }
    FILE_COUNT.store(files.len(), Release);
    true
}

/// Is that mapping's file one of our images?
pub fn is_image_file(dev: u64, ino: u64) -> bool {
    FILE_IDS[..FILE_COUNT.load(Acquire)]
        .iter()
        .any(|f| f[0].load(Relaxed) == dev && f[1].load(Relaxed) == ino)
}

/// Was anything restored lazily in this process's life?
pub fn active() -> bool {
    COUNT.load(Relaxed) != 0
}

/// May `[start, end)` hold image mappings? Cheap; errs on the side of yes.
pub fn may_overlap(start: u64, end: u64) -> bool {
    let _hook = InHook::enter();
    if !active() {
        return false;
    }
    if ANYWHERE.load(Relaxed) {
        return true;
    }
    let all = table();
    // Trimming moves a start up and an end down, never past a neighbour, so the
    // search stays valid.
    let from = all.partition_point(|r| r.end.load(Relaxed) <= start);
    for r in &all[from..] {
        if r.overlaps(start, end) {
            return true;
        }
        if r.start.load(Relaxed) >= end {
            break;
        }
    }
    let moved = MOVED_LEN.load(Acquire).min(EXTRA);
    MOVED[..moved].iter().any(|r| r.overlaps(start, end))
}

/// The flags of the range at `addr`; none for what was moved.
pub fn flags_at(addr: u64) -> u32 {
    let _hook = InHook::enter();
    let all = table();
    let found = all.get(all.partition_point(|r| r.end.load(Relaxed) <= addr));
    found
        .filter(|r| r.overlaps(addr, addr + 1))
        .map_or(0, |r| r.flags.load(Relaxed))
}

/// `[start, end)` holds no image mapping any more.
pub fn remove(start: u64, end: u64) {
    let _hook = InHook::enter();
    let all = table();
    let from = all.partition_point(|r| r.end.load(Relaxed) <= start);
    for r in &all[from..] {
        if r.start.load(Relaxed) >= end {
            break;
        }
        r.trim(start, end);
    }
    let moved = MOVED_LEN.load(Acquire).min(EXTRA);
    for r in &MOVED[..moved] {
        r.trim(start, end);
    }
}

/// Image mappings were moved to `[start, end)`. (What they have left is taken off the list before: a
/// place that is left is another thread's.)
pub fn add_moved(start: u64, end: u64) {
    let _hook = InHook::enter();
    let at = MOVED_LEN.fetch_add(1, AcqRel);
    if at >= EXTRA {
        MOVED_LEN.store(EXTRA, Relaxed);
        // Emptied places first.
        for r in &MOVED {
            let e = r.end.load(Relaxed);
            let s = r.start.load(Relaxed);
            // Not one that another thread is about to fill.
            if s >= e
                && s != u64::MAX
                && r.start
                    .compare_exchange(s, u64::MAX, AcqRel, Relaxed)
                    .is_ok()
            {
                r.end.store(end, Release);
                r.start.store(start, Release);
                return;
            }
        }
        ANYWHERE.store(true, Release);
        return;
    }
    MOVED[at].end.store(end, Release);
    MOVED[at].start.store(start, Release);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;

    #[test]
    fn trims_and_finds() {
        in_child(|| {
            assert!(!may_overlap(0, !0));
            let list: Vec<_> = (0..40_000u64)
                .map(|i| (i * 100, i * 100 + 50, i as u32))
                .collect();
            set_image_ranges(&list).unwrap();
            assert!(may_overlap(100, 101) && !may_overlap(150, 200));
            assert_eq!((flags_at(149), flags_at(150), flags_at(200)), (1, 0, 2));
            assert!(may_overlap(150, 201) && may_overlap(0, !0));
            remove(100, 150);
            assert!(!may_overlap(100, 150) && may_overlap(200, 201) && may_overlap(49, 50));
            remove(200, 220);
            assert!(!may_overlap(200, 220) && may_overlap(219, 221));
            remove(240, 260);
            assert!(!may_overlap(240, 260) && may_overlap(220, 240));
            remove(225, 230); // in the middle: stays listed
            assert!(may_overlap(225, 230));
            remove(0, 1_000_000);
            assert!(!may_overlap(0, 1_000_000) && may_overlap(1_000_000, 1_000_001));
            assert!(may_overlap(0, 1_000_001));
        });
    }

    #[test]
    fn moved_ranges_are_found_and_overflow_is_safe() {
        in_child(|| {
            set_image_ranges(&[(1000, 1100, 0), (1100, 1200, 0)]).unwrap();
            assert_eq!(COUNT.load(Relaxed), 1);
            add_moved(5000, 6000);
            assert!(may_overlap(5500, 5501));
            remove(5000, 6000);
            assert!(!may_overlap(5500, 5501));
            for i in 0..300 {
                add_moved(10_000 + i * 10, 10_005 + i * 10);
            }
            for i in 0..300 {
                assert!(may_overlap(10_000 + i * 10, 10_001 + i * 10));
            }
        });
    }
}
