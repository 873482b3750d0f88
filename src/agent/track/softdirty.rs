//! The `soft-dirty` tracker: the kernel's own bit (CONFIG_MEM_SOFT_DIRTY), set at each
//! write since the last "4" into clear_refs, and for all pages of mappings made since.
//! Helper thread.
//!
//! The bits of the whole process are cleared at once, so it is swept only while the
//! program is stopped. Clearing succeeds silently where the kernel has no such bit, so
//! [`probe`] writes a page and looks.

use super::blank::{Range, clip, groups, is_of_file, newly_blank, push, watchable, whole};
use super::pagemap::{PageMap, Query, is};
use super::probe::with_page;
use super::{Change, Dirty, TrackError, Tracker};
use crate::agent::collect::memory::{How, PAGE, Piece};
use crate::agent::procfs::OwnFd;
use ckpt_sys::raw::check;
use ckpt_sys::syscall;

const CLEAR_REFS: &str = "/proc/thread-self/clear_refs";

/// Asks for blank pages; [`is::SOFT_DIRTY`] tells that the mapping may be new.
const BLANK: Query = Query {
    inverted: is::PRESENT,
    all: 0,
    any: is::PRESENT | is::FILE,
    tell: is::PRESENT | is::SWAPPED | is::FILE | is::SOFT_DIRTY,
    protect: false,
};

/// Asks for written pages that are not the mapped file's.
const WRITTEN: Query = Query {
    inverted: is::FILE,
    all: is::FILE | is::SOFT_DIRTY,
    any: is::PRESENT | is::SWAPPED,
    tell: is::PFNZERO,
    protect: false,
};

/// Watches by the soft-dirty bit.
pub struct SoftDirty {
    pagemap: PageMap,
    blank: Vec<Range>,
}

impl SoftDirty {
    pub fn new() -> Result<SoftDirty, TrackError> {
        Ok(SoftDirty {
            pagemap: PageMap::open()?,
            blank: Vec::new(),
        })
    }
}

fn clear() -> Result<(), TrackError> {
    let fd = OwnFd::open_with(CLEAR_REFS.as_bytes(), libc::O_WRONLY).map_err(|errno| {
        TrackError::Open {
            path: CLEAR_REFS,
            errno,
        }
    })?;
    // SAFETY: one byte of a literal.
    check(unsafe { syscall!(libc::SYS_write, fd.raw(), b"4".as_ptr(), 1) })
        .map(|_| ())
        .map_err(|errno| TrackError::Call {
            call: "write to clear_refs",
            errno,
        })
}

impl Tracker for SoftDirty {
    fn name(&self) -> &'static str {
        "soft-dirty"
    }

    fn live(&self) -> bool {
        false
    }

    fn arm(&mut self, _: &[Piece]) -> Result<(), TrackError> {
        Ok(())
    }

    fn sweep(&mut self, pieces: &[Piece], seen: &mut Dirty) -> Result<(), TrackError> {
        let mut now = Dirty::new();
        let mut blank: Vec<Range> = Vec::new();
        let mut next = 0;
        for ((start, end), _) in groups(pieces) {
            self.pagemap.scan(start, end, BLANK, |from, to, what| {
                let exists = what & (is::PRESENT | is::SWAPPED) != 0;
                clip(pieces, &mut next, (from, to), |piece, from, to| {
                    if exists && !is_of_file(piece) {
                        return;
                    }
                    push(&mut blank, (from, to));
                    if what & is::SOFT_DIRTY != 0 {
                        let change = match matches!(piece.how, How::Scan) {
                            true => Change::Absent,
                            false => Change::Present,
                        };
                        now.insert(from, to, change);
                    }
                });
            })?;
        }
        newly_blank(pieces, &blank, &self.blank, &mut now);
        let mut written = Dirty::new();
        for ((start, end), _) in groups(pieces) {
            self.pagemap.scan(start, end, WRITTEN, |from, to, what| {
                let change = match what & is::PFNZERO {
                    0 => Change::Present,
                    _ => Change::Absent,
                };
                written.insert(from, to, change);
            })?;
        }
        now.unite(&written);
        for piece in pieces.iter().filter(|piece| !watchable(piece)) {
            if matches!(piece.how, How::Scan | How::All | How::Readable) {
                let range = (piece.vma.start, piece.vma.end);
                whole(&mut self.pagemap, piece, range, &mut now)?;
            }
        }
        clear()?;
        self.blank = blank;
        seen.unite(&now);
        Ok(())
    }
}

/// Does the bit move? Tried with one page; clears the bits of the whole process.
pub fn probe() -> Result<(), String> {
    let mut pagemap = PageMap::open().map_err(|error| error.to_string())?;
    let result = with_page(|addr| {
        let write = |value: u64| {
            // SAFETY: the page is ours.
            unsafe { (addr as *mut u64).write_volatile(value) };
        };
        let mut dirty = || {
            let mut n = 0;
            let scanned = pagemap.scan(addr, addr + PAGE, WRITTEN, |_, _, _| n += 1);
            scanned.map(|()| n).map_err(|error| error.to_string())
        };
        write(1);
        clear().map_err(|error| error.to_string())?;
        let idle = dirty()?;
        write(2);
        Ok((idle, dirty()?))
    });
    match result? {
        (0, 1) => Ok(()),
        (_, _) => Err("the kernel does not keep the bit (CONFIG_MEM_SOFT_DIRTY)".to_owned()),
    }
}
