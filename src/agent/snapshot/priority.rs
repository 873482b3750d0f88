//! `priority` (US 5,802,267, third embodiment): the program runs while its dirty pages are
//! stored; a page that it is about to overwrite is copied aside or stored first, and only
//! the thread that writes to it waits.
//!
//! The queue, the protection and the fault handler are `track::store`'s. Here is the
//! writer's side, in the helper thread. It needs no memory but the reserve for copies, and
//! no copy of the page tables.

use super::SnapshotError;
use super::pages::{Chunk, Pages};
use super::precopy::Live;
use crate::agent::collect::memory::{PAGE, Piece};
use crate::agent::track::mprotect::windows;
use crate::agent::track::store::{self, Storing};
use crate::agent::track::{Change, Dirty};
use crate::image::writer::ImageSink;

/// Pages under guard until they are stored.
pub struct Guarded {
    storing: Option<Storing>,
}

/// At the stop: guards `dirty`. What cannot be guarded is returned and must be brought
/// to safety before the program goes on. `watched`: the tracker protects pages as well.
pub fn guard(
    pieces: &[Piece],
    dirty: &Dirty,
    watched: bool,
) -> Result<(Guarded, Dirty), SnapshotError> {
    let (storing, open) = store::protect(pieces, dirty, &windows(pieces), watched)
        .map_err(|error| SnapshotError::Guard(error.to_string()))?;
    let mut rest = Dirty::new();
    for (start, end) in open {
        rest.insert(start, end, Change::Present);
    }
    let storing = Some(storing);
    Ok((Guarded { storing }, rest))
}

impl Guarded {
    /// After the release: stores everything.
    pub fn store<S: ImageSink>(
        mut self,
        pages: &mut Pages<S>,
        live: &mut Live,
        pieces: &[Piece],
    ) -> Result<(), SnapshotError> {
        let Some(storing) = &mut self.storing else {
            return Ok(());
        };
        while let Some(taken) = storing.take_next() {
            let piece = pieces.partition_point(|p| p.vma.end <= taken.addr);
            let over_file = pieces
                .get(piece)
                .is_some_and(|p| p.vma.kind.is_private_file());
            let contents = live.read_run(taken.at, taken.npages);
            // From here on the pages may be written: before the slow part.
            storing.stored(taken);
            let data = contents.ok_or(SnapshotError::Vanished(taken.addr))?;
            pages.put(&[Chunk {
                addr: taken.addr,
                data: &data[..(taken.npages * PAGE) as usize],
                over_file,
            }])?;
        }
        pages.end_pass();
        storing
            .lost()
            .map_or(Ok(()), |addr| Err(SnapshotError::Vanished(addr)))
    }
}

impl Drop for Guarded {
    /// Also after a failure: nobody may go on waiting.
    fn drop(&mut self) {
        if let Some(storing) = self.storing.take() {
            storing.finish();
        }
    }
}
