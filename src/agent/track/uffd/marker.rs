//! Places of private file mappings that look swapped out, for the `uffd` tracker.
//!
//! When a protected page of a file mapping goes (MADV_DONTNEED, ftruncate) the kernel leaves a marker
//! that there was protection. The page tables do not tell it from a page that is swapped out. But
//! what the program sees there is the file's own page, and what is written to the file: stored as a
//! page of the program's it would hide that after a restart; and behind the end of the file there
//! is nothing that could be read. So protection is taken from such places: a marker is gone then,
//! a page in the swap stays and is reported. Helper thread.

use super::super::TrackError;
use super::super::blank::{Range, push};
use super::super::pagemap::{PageMap, Query, is};
use super::UFFDIO_WRITEPROTECT;
use crate::agent::procfs::OwnFd;
use ckpt_sys::syscall;

/// Asks for what is still there and not in memory.
const SWAPPED: Query = Query {
    inverted: is::PRESENT,
    all: is::PRESENT | is::SWAPPED,
    any: 0,
    tell: is::SWAPPED,
    protect: false,
};

/// Takes the markers from `places` (ascending); returns where there was none.
pub fn clear(
    fd: &OwnFd,
    pagemap: &mut PageMap,
    places: &[Range],
) -> Result<Vec<Range>, TrackError> {
    let mut swapped = Vec::new();
    for &(start, end) in places {
        let mut arg = [start, end - start, 0];
        // Refused where nothing is registered: there are no markers either.
        // SAFETY: struct uffdio_writeprotect is three words.
        unsafe { syscall!(libc::SYS_ioctl, fd.raw(), UFFDIO_WRITEPROTECT, &mut arg) };
        pagemap.scan(start, end, SWAPPED, |from, to, _| {
            push(&mut swapped, (from, to));
        })?;
    }
    Ok(swapped)
}
