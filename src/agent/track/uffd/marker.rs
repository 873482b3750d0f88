//! Places of private file mappings that look swapped out, for the `uffd` tracker.
//!
//! When a protected page of a file mapping is discarded (MADV_DONTNEED) the kernel leaves a marker
//! that there was protection. The page tables do not tell it from a page that is swapped out. What
//! the program sees there is the file's own page, and what is written to the file; stored as a page
//! of the program's it would hide that after a restart. So each such place is read: then there is
//! either the page from the swap or the file's. Helper thread.

use super::super::TrackError;
use super::super::blank::{Range, push};
use super::super::pagemap::{PageMap, Query, is};
use crate::agent::collect::memory::PAGE;
use crate::agent::procfs::OwnFd;
use ckpt_sys::syscall;

/// Asks for pages of files.
const OF_FILE: Query = Query {
    inverted: 0,
    all: is::PRESENT | is::FILE,
    any: 0,
    tell: is::FILE,
    protect: false,
};

/// Which of `swapped` (ascending) are the mapped file's own pages. What cannot be read, as behind
/// the end of a file, is none of them.
pub fn own_pages(pagemap: &mut PageMap, swapped: &[Range]) -> Result<Vec<Range>, TrackError> {
    let path = "/proc/thread-self/mem";
    let mem = OwnFd::open(path.as_bytes()).map_err(|errno| TrackError::Open { path, errno })?;
    let mut own = Vec::new();
    for &(start, end) in swapped {
        for page in (start..end).step_by(PAGE as usize) {
            let mut byte = 0u8;
            // SAFETY: a byte of ours; the file reports bad addresses.
            unsafe { syscall!(libc::SYS_pread64, mem.raw(), &raw mut byte, 1, page) };
        }
        pagemap.scan(start, end, OF_FILE, |from, to, _| {
            push(&mut own, (from, to));
        })?;
    }
    Ok(own)
}
