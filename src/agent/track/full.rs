//! No tracking: everything that exists is reported, always. Helper thread.

use super::pagemap::{PageMap, Query, is};
use super::{Change, Dirty, TrackError, Tracker};
use crate::agent::collect::memory::{How, Piece};

/// Reports the pages that exist.
pub struct Full {
    pagemap: PageMap,
}

impl Full {
    pub fn new() -> Result<Full, TrackError> {
        Ok(Full {
            pagemap: PageMap::open()?,
        })
    }
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
        for piece in pieces {
            let (start, end) = (piece.vma.start, piece.vma.end);
            match piece.how {
                How::Scan => {
                    let query = Query {
                        inverted: is::FILE | is::PFNZERO,
                        all: is::FILE | is::PFNZERO,
                        any: is::PRESENT | is::SWAPPED,
                        tell: is::PRESENT,
                        protect: false,
                    };
                    let scanned = self.pagemap.scan(start, end, query, |from, to, _| {
                        seen.insert(from, to, Change::Present);
                    });
                    if scanned.is_err() {
                        seen.insert(start, end, Change::Present);
                    }
                }
                How::All | How::Readable => seen.insert(start, end, Change::Present),
                How::Copied | How::Nothing => {}
            }
        }
        Ok(())
    }
}

/// Where not even the page tables can be read: every page may exist.
pub struct Blind;

impl Tracker for Blind {
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
        for piece in pieces {
            if !matches!(piece.how, How::Copied | How::Nothing) {
                seen.insert(piece.vma.start, piece.vma.end, Change::Present);
            }
        }
        Ok(())
    }
}
