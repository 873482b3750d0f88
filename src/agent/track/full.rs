//! No tracking: everything that exists is reported, always. Helper thread.

use super::pagemap::{OWN, PageMap};
use super::{Change, Dirty, TrackError, Tracker};
use crate::agent::collect::memory::{How, Piece};

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
