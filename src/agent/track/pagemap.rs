//! PAGEMAP_SCAN (Linux 6.7): finds pages by what the page tables say of them, and
//! protects the ones found against writing in the same walk. Helper thread.

use super::TrackError;
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

/// More than this many regions a call and the walk may end behind what was returned.
const REGIONS: usize = 512;

/// The page tables of this process.
pub struct PageMap {
    fd: OwnFd,
    regions: Vec<PageRegion>,
}

const PATH: &str = "/proc/thread-self/pagemap";

impl PageMap {
    pub fn open() -> Result<PageMap, TrackError> {
        let fd =
            OwnFd::open(PATH.as_bytes()).map_err(|errno| TrackError::Open { path: PATH, errno })?;
        Ok(PageMap {
            fd,
            regions: vec![PageRegion::default(); REGIONS],
        })
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
        while at < end {
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
                Err(libc::EINTR) => 0,
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
        Ok(())
    }
}
