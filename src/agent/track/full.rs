//! No tracking: everything that exists is reported, always. Helper thread.

use super::dirty::Run;
use super::pagemap::{GUARDED, OWN, PageMap};
use super::{Change, Dirty, TrackError, Tracker};
use crate::agent::collect::memory::{How, PAGE, Piece};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;

/// Reports the pages that exist; where not even the page tables can be read every page may.
pub struct Full {
    pagemap: Option<PageMap>,
}

impl Full {
    pub fn open() -> Full {
        Full {
            pagemap: PageMap::open().ok(),
        }
    }
}

/// Adds every page that exists and belongs to the process.
pub fn everything(
    pagemap: &mut PageMap,
    pieces: &[Piece],
    all: &mut Dirty,
) -> Result<(), TrackError> {
    for piece in pieces {
        let (start, end) = (piece.vma.start, piece.vma.end);
        match piece.how {
            How::Nothing | How::Copied => {}
            How::Readable | How::All => all.insert(start, end, Change::Present),
            How::Scan => pagemap.scan(start, end, OWN, |from, to, _| {
                all.insert(from, to, Change::Present);
            })?,
        }
    }
    Ok(())
}

/// Is there a guard region in what is to be stored? A glance: what lies near is looked at as
/// well. False where only the words would tell, page by page.
pub fn has_guards(pagemap: &mut PageMap, pending: &Dirty) -> Result<bool, TrackError> {
    const NEAR: u64 = 512 * PAGE;
    if !pagemap.scans_guards() {
        return Ok(false);
    }
    let present = |run: &&Run| run.change == Change::Present;
    let mut runs = pending.runs().iter().filter(present).peekable();
    let mut found = false;
    while let Some(run) = runs.next() {
        let mut end = run.end;
        while let Some(next) = runs.next_if(|next| next.start <= end + NEAR) {
            end = next.end;
        }
        pagemap.scan(run.start, end, GUARDED, |_, _, _| found = true)?;
    }
    Ok(found)
}

/// Would the kernel tell of a guard region? Tried on a page of our own. Linux 6.13 and 6.14 have
/// them and do not; older ones do not have them.
pub fn tells_guards(pagemap: &mut PageMap) -> Result<bool, TrackError> {
    const GUARD_INSTALL: i32 = 102;
    let fail = |errno| TrackError::Call {
        call: "try a guard region",
        errno,
    };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh mapping, which goes at once.
    unsafe {
        let page = check(syscall!(
            libc::SYS_mmap,
            0,
            PAGE,
            libc::PROT_NONE,
            flags,
            -1i32,
            0
        ));
        let page = page.map_err(fail)? as u64;
        let made = check(syscall!(libc::SYS_madvise, page, PAGE, GUARD_INSTALL));
        let mut told = made.is_err();
        let scanned = pagemap.scan(page, page + PAGE, GUARDED, |_, _, _| told = true);
        syscall!(libc::SYS_munmap, page, PAGE);
        scanned.map(|()| told)
    }
}

/// Guard regions, as `(address, pages)`: they look like pages, hold nothing and cannot be read.
pub fn guarded(pagemap: &mut PageMap, pieces: &[Piece]) -> Result<Vec<(u64, u64)>, TrackError> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    for piece in pieces {
        let (start, end) = (piece.vma.start, piece.vma.end);
        pagemap.scan(start, end, GUARDED, |from, to, _| {
            found.push((from, (to - from) / PAGE));
        })?;
    }
    Ok(found)
}

impl Tracker for Full {
    fn name(&self) -> &'static str {
        "full"
    }

    fn live(&self) -> bool {
        false
    }

    fn increments(&self) -> bool {
        false
    }

    fn arm(&mut self, _: &[Piece]) -> Result<(), TrackError> {
        Ok(())
    }

    fn sweep(&mut self, pieces: &[Piece], seen: &mut Dirty) -> Result<(), TrackError> {
        if let Some(pagemap) = &mut self.pagemap
            && everything(pagemap, pieces, seen).is_ok()
        {
            return Ok(());
        }
        for piece in pieces {
            if !matches!(piece.how, How::Copied | How::Nothing) {
                seen.insert(piece.vma.start, piece.vma.end, Change::Present);
            }
        }
        Ok(())
    }
}
