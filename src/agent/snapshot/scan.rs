//! Which pages exist: everything that a complete image must hold.
//!
//! Helper thread, while the program runs (pre-copy) or stands still.

use super::SnapshotError;
use crate::agent::collect::memory::{How, PAGE, Piece};
use crate::agent::procfs::OwnFd;
use crate::agent::track::{Change, Dirty};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;

/// `struct pm_scan_arg` (linux/fs.h, Linux 6.7).
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

#[repr(C)]
#[derive(Default, Clone, Copy)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// _IOWR('f', 16, struct pm_scan_arg)
const PAGEMAP_SCAN: u64 = 0xc060_6610;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// Finds the pages of a range that exist and belong to the process.
pub struct PageScanner {
    pagemap: OwnFd,
    regions: Vec<PageRegion>,
    /// The kernel has no PAGEMAP_SCAN (before 6.7): read the map word by word.
    by_words: bool,
}

impl PageScanner {
    pub fn new() -> Result<PageScanner, SnapshotError> {
        let pagemap =
            OwnFd::open(b"/proc/thread-self/pagemap").map_err(|errno| SnapshotError::Open {
                path: "/proc/thread-self/pagemap",
                errno,
            })?;
        // More than 512 regions a call and the walk may end behind what was returned.
        Ok(PageScanner {
            pagemap,
            regions: vec![PageRegion::default(); 512],
            by_words: false,
        })
    }

    pub fn scan(
        &mut self,
        start: u64,
        end: u64,
        f: &mut dyn FnMut(u64, u64) -> Result<(), SnapshotError>,
    ) -> Result<(), SnapshotError> {
        let mut at = start;
        while at < end && !self.by_words {
            let mut arg = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                start: at,
                end,
                vec: self.regions.as_mut_ptr() as u64,
                vec_len: self.regions.len() as u64,
                category_inverted: PAGE_IS_FILE | PAGE_IS_PFNZERO,
                category_mask: PAGE_IS_FILE | PAGE_IS_PFNZERO,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: PAGE_IS_PRESENT,
                ..PmScanArg::default()
            };
            // SAFETY: a filled struct and a region array of the length given.
            let n = match check(unsafe {
                syscall!(libc::SYS_ioctl, self.pagemap.raw(), PAGEMAP_SCAN, &mut arg)
            }) {
                Ok(n) => n,
                Err(libc::ENOTTY | libc::EINVAL | libc::ENOSYS) if at == start => {
                    self.by_words = true;
                    break;
                }
                Err(errno) => return Err(SnapshotError::Scan(errno)),
            };
            for region in &self.regions[..n] {
                f(region.start, (region.end - region.start) / PAGE)?;
            }
            if arg.walk_end <= at {
                return Err(SnapshotError::Scan(libc::EIO));
            }
            at = arg.walk_end;
        }
        if self.by_words {
            self.scan_words(start, end, f)
        } else {
            Ok(())
        }
    }

    /// proc_pid_pagemap(5): bit 63 present, 62 swapped, 61 file or shared anonymous.
    fn scan_words(
        &mut self,
        start: u64,
        end: u64,
        f: &mut dyn FnMut(u64, u64) -> Result<(), SnapshotError>,
    ) -> Result<(), SnapshotError> {
        let mut words = vec![0u64; 8192];
        let mut at = start;
        let (mut run, mut len) = (start, 0);
        while at < end {
            let want = ((end - at) / PAGE).min(words.len() as u64);
            // SAFETY: a buffer of that many words.
            let n = check(unsafe {
                syscall!(
                    libc::SYS_pread64,
                    self.pagemap.raw(),
                    words.as_mut_ptr(),
                    want * 8,
                    at / PAGE * 8
                )
            })
            .map_err(SnapshotError::Scan)?;
            if n < 8 {
                return Err(SnapshotError::Scan(libc::EIO));
            }
            for word in &words[..n / 8] {
                if word >> 62 != 0 && word & (1 << 61) == 0 {
                    if len == 0 {
                        run = at;
                    }
                    len += 1;
                } else if len > 0 {
                    f(run, len)?;
                    len = 0;
                }
                at += PAGE;
            }
        }
        if len > 0 { f(run, len) } else { Ok(()) }
    }
}

/// Adds every page that exists and belongs to the process; what was known of other pages
/// is of no use any more.
pub fn everything(
    scanner: &mut PageScanner,
    pieces: &[Piece],
    all: &mut Dirty,
) -> Result<(), SnapshotError> {
    all.clear();
    for piece in pieces {
        let (start, end) = (piece.vma.start, piece.vma.end);
        match piece.how {
            How::Nothing | How::Copied => {}
            How::Readable | How::All => all.insert(start, end, Change::Present),
            How::Scan => scanner.scan(start, end, &mut |at, npages| {
                all.insert(at, at + npages * PAGE, Change::Present);
                Ok(())
            })?,
        }
    }
    Ok(())
}
