//! PAGEMAP_SCAN (Linux 6.7): finds pages by what the page tables say of them, and
//! protects the ones found against writing in the same walk. Helper thread.

use super::TrackError;
use crate::agent::collect::memory::PAGE;
use crate::agent::procfs::OwnFd;
use ckpt_sys::raw::check;
use ckpt_sys::syscall;

/// `struct pm_scan_arg` (linux/fs.h).
#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Default, Clone, Copy)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// _IOWR('f', 16, struct pm_scan_arg)
const PAGEMAP_SCAN: u64 = 0xc060_6610;

const PM_SCAN_WP_MATCHING: u64 = 1;

/// Page categories.
pub mod is {
    /// In a mapping that is registered for asynchronous write protection.
    pub const WPALLOWED: u64 = 1;
    /// Exists and is not write-protected.
    pub const WRITTEN: u64 = 1 << 1;
    /// A page of a file (or of shared memory).
    pub const FILE: u64 = 1 << 2;
    pub const PRESENT: u64 = 1 << 3;
    /// Swapped out, or a marker of the kernel in an empty place.
    pub const SWAPPED: u64 = 1 << 4;
    /// The shared page of zeros.
    pub const PFNZERO: u64 = 1 << 5;
    pub const SOFT_DIRTY: u64 = 1 << 7;
    /// A guard region: no page is there, nor can be. Only in [`super::GUARDED`]: kernels that
    /// do not know the word refuse a query with it.
    pub const GUARD: u64 = 1 << 8;
}

/// Which pages: all of `all`, at least one of `any` (if there are any), where the
/// categories in `inverted` mean their opposite; `tell` are the categories to be told.
#[derive(Debug, Clone, Copy, Default)]
pub struct Query {
    pub inverted: u64,
    pub all: u64,
    pub any: u64,
    pub tell: u64,
    /// Protect what was found against writing.
    pub protect: bool,
}

/// Pages that exist and belong to the process: neither a file's own nor the shared page
/// of zeros.
pub const OWN: Query = Query {
    inverted: is::FILE | is::PFNZERO,
    all: is::FILE | is::PFNZERO,
    any: is::PRESENT | is::SWAPPED,
    tell: is::PRESENT,
    protect: false,
};

/// Guard regions. Linux 6.15 shows them in the words, later ones by a scan as well.
pub const GUARDED: Query = Query {
    inverted: 0,
    all: is::GUARD,
    any: 0,
    tell: is::GUARD,
    protect: false,
};

/// More than this many regions a call and the walk may end behind what was returned.
const REGIONS: usize = 512;

/// The page tables of this process.
pub struct PageMap {
    fd: OwnFd,
    regions: Vec<PageRegion>,
    /// The kernel has no PAGEMAP_SCAN (before 6.7): the map is read word by word, which
    /// tells no [`is::PFNZERO`], [`is::WRITTEN`] and [`is::WPALLOWED`].
    by_words: bool,
}

const PATH: &str = "/proc/thread-self/pagemap";

impl PageMap {
    pub fn open() -> Result<PageMap, TrackError> {
        let fd =
            OwnFd::open(PATH.as_bytes()).map_err(|errno| TrackError::Open { path: PATH, errno })?;
        Ok(PageMap {
            fd,
            regions: vec![PageRegion::default(); REGIONS],
            by_words: false,
        })
    }

    /// In a thread with another descriptor table; the old number is not closed.
    pub fn reopen(&mut self) -> Result<(), TrackError> {
        let new = PageMap::open()?;
        std::mem::forget(std::mem::replace(&mut self.fd, new.fd));
        Ok(())
    }

    /// Does the kernel have the system call?
    pub fn scans(&mut self) -> bool {
        let here = &raw const *self as u64 & !4095;
        let query = Query {
            any: is::PRESENT,
            tell: is::PRESENT,
            ..Query::default()
        };
        self.scan(here, here + 4096, query, |_, _, _| {}).is_ok() && !self.by_words
    }

    /// Does a scan know guard regions? Else [`GUARDED`] is answered by the words.
    pub fn scans_guards(&mut self) -> bool {
        let here = &raw const *self as u64 & !4095;
        self.scan(here, here + 4096, GUARDED, |_, _, _| {}).is_ok() && !self.by_words
    }

    /// Calls `f(start, end, categories)` for the runs of `start..end` that match, ascending.
    pub fn scan(
        &mut self,
        start: u64,
        end: u64,
        query: Query,
        mut f: impl FnMut(u64, u64, u64),
    ) -> Result<(), TrackError> {
        let fail = |errno| TrackError::Call {
            call: "PAGEMAP_SCAN",
            errno,
        };
        let mut at = start;
        while at < end && !self.by_words {
            let mut arg = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                flags: if query.protect {
                    PM_SCAN_WP_MATCHING
                } else {
                    0
                },
                start: at,
                end,
                vec: self.regions.as_mut_ptr() as u64,
                vec_len: REGIONS as u64,
                category_inverted: query.inverted,
                category_mask: query.all,
                category_anyof_mask: query.any,
                return_mask: query.tell,
                ..PmScanArg::default()
            };
            // SAFETY: a filled struct and a region array of the length given.
            let result =
                check(unsafe { syscall!(libc::SYS_ioctl, self.fd.raw(), PAGEMAP_SCAN, &mut arg) });
            let n = match result {
                Ok(n) => n,
                Err(libc::ENOTTY | libc::EINVAL | libc::ENOSYS)
                    if at == start && !query.protect =>
                {
                    self.by_words = true;
                    break;
                }
                Err(errno) => return Err(fail(errno)),
            };
            for region in &self.regions[..n.min(REGIONS)] {
                f(region.start, region.end, region.categories);
            }
            if arg.walk_end <= at {
                return Err(fail(libc::EIO));
            }
            at = arg.walk_end;
        }
        if self.by_words {
            return self.scan_words(start, end, query, f);
        }
        Ok(())
    }

    fn scan_words(
        &mut self,
        start: u64,
        end: u64,
        query: Query,
        mut f: impl FnMut(u64, u64, u64),
    ) -> Result<(), TrackError> {
        let fail = |errno| TrackError::Call {
            call: "read pagemap",
            errno,
        };
        let mut words = vec![0u64; 8192];
        let mut at = start;
        let mut run: Option<(u64, u64)> = None;
        while at < end {
            let want = ((end - at) / PAGE).min(words.len() as u64);
            // SAFETY: a buffer of that many words.
            let n = check(unsafe {
                let from = at / PAGE * 8;
                syscall!(
                    libc::SYS_pread64,
                    self.fd.raw(),
                    words.as_mut_ptr(),
                    want * 8,
                    from
                )
            })
            .map_err(fail)?;
            if n < 8 {
                return Err(fail(libc::EIO));
            }
            for &word in &words[..n / 8] {
                let what = categories(word);
                let found = query.matches(what).then_some(what & query.tell);
                if let Some((from, told)) = run
                    && found != Some(told)
                {
                    f(from, at, told);
                    run = None;
                }
                if let Some(told) = found {
                    run.get_or_insert((at, told));
                }
                at += PAGE;
            }
        }
        if let Some((from, told)) = run {
            f(from, at, told);
        }
        Ok(())
    }
}

/// proc_pid_pagemap(5): bit 63 present, 62 swapped, 61 file or shared memory, 58 guard region,
/// 55 soft-dirty.
fn categories(word: u64) -> u64 {
    let bit = |k: u32, category: u64| if word >> k & 1 != 0 { category } else { 0 };
    bit(63, is::PRESENT)
        | bit(62, is::SWAPPED)
        | bit(61, is::FILE)
        | bit(58, is::GUARD)
        | bit(55, is::SOFT_DIRTY)
}

impl Query {
    /// Does a page of these categories match?
    fn matches(&self, what: u64) -> bool {
        let what = what ^ self.inverted;
        what & self.all == self.all && (self.any == 0 || what & self.any != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_tell_what_the_scan_tells() {
        let mut map = PageMap::open().unwrap();
        if !map.scans() {
            return;
        }
        // SAFETY: a fresh mapping of this test.
        let base = unsafe {
            let (prot, flags) = (
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            );
            check(syscall!(
                libc::SYS_mmap,
                0,
                64 * PAGE,
                prot,
                flags,
                -1i32,
                0
            ))
            .unwrap() as u64
        };
        for page in [3, 4, 5, 9, 63] {
            // SAFETY: inside the mapping.
            unsafe { ((base + page * PAGE) as *mut u8).write_volatile(1) };
        }
        for query in [
            Query {
                any: is::PRESENT | is::SWAPPED,
                tell: is::PRESENT,
                ..Query::default()
            },
            Query {
                inverted: is::PRESENT | is::SWAPPED,
                all: is::PRESENT | is::SWAPPED,
                tell: is::PRESENT,
                ..Query::default()
            },
        ] {
            let mut both = [Vec::new(), Vec::new()];
            for (by_words, out) in [false, true].into_iter().zip(&mut both) {
                map.by_words = by_words;
                map.scan(base, base + 64 * PAGE, query, |from, to, what| {
                    out.push(((from - base) / PAGE, (to - base) / PAGE, what));
                })
                .unwrap();
            }
            assert_eq!(both[0], both[1]);
            assert!(both[0].len() >= 3);
        }
        // SAFETY: mapped above.
        unsafe { syscall!(libc::SYS_munmap, base, 64 * PAGE) };
    }

    #[test]
    fn guard_regions_are_told_from_pages() {
        const GUARD_INSTALL: i32 = 102;
        // SAFETY: a fresh mapping of this test.
        let base = unsafe {
            let (prot, flags) = (
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            );
            check(syscall!(
                libc::SYS_mmap,
                0,
                16 * PAGE,
                prot,
                flags,
                -1i32,
                0
            ))
            .unwrap() as u64
        };
        for page in 0..8 {
            // SAFETY: inside the mapping.
            unsafe { ((base + page * PAGE) as *mut u8).write_volatile(1) };
        }
        let mut installed = Ok(0);
        for (page, npages) in [(2, 3), (12, 1)] {
            // SAFETY: inside the mapping, which nobody else uses.
            let done = unsafe {
                let at = base + page * PAGE;
                check(syscall!(
                    libc::SYS_madvise,
                    at,
                    npages * PAGE,
                    GUARD_INSTALL
                ))
            };
            installed = installed.and(done);
        }
        let mut map = PageMap::open().unwrap();
        let mut found = Vec::new();
        map.scan(base, base + 16 * PAGE, GUARDED, |from, to, _| {
            found.push(((from - base) / PAGE, (to - base) / PAGE));
        })
        .unwrap();
        match installed {
            // Linux 6.13 and 6.14 have guard regions and do not tell.
            Ok(_) if found.is_empty() => println!("NOT RUN: the kernel does not tell"),
            Ok(_) => assert_eq!(found, [(2, 5), (12, 13)]),
            Err(_) => assert_eq!(found, []),
        }
        // SAFETY: mapped above.
        unsafe { syscall!(libc::SYS_munmap, base, 16 * PAGE) };
    }

    #[test]
    fn the_soft_dirty_bit_is_bit_55() {
        assert_eq!(categories(1 << 55 | 1 << 63), is::PRESENT | is::SOFT_DIRTY);
        assert_eq!(categories(1 << 61 | 1 << 62), is::SWAPPED | is::FILE);
        let query = Query {
            inverted: is::FILE,
            all: is::FILE | is::SOFT_DIRTY,
            any: is::PRESENT | is::SWAPPED,
            ..Query::default()
        };
        assert!(query.matches(is::PRESENT | is::SOFT_DIRTY));
        assert!(!query.matches(is::PRESENT | is::SOFT_DIRTY | is::FILE));
        assert!(!query.matches(is::PRESENT) && !query.matches(is::SOFT_DIRTY));
    }
}
