//! The `uffd` tracker in a rollback: what the leader takes as changed, and how the new
//! helper goes on with memory that has stayed mapped. Leader, alone; restored helper, before
//! the program's threads run.
//!
//! Nobody else writes meanwhile, and each page that is reported gets exactly what the image
//! says. So the question that the kernel answers fastest is enough in both places, where a
//! sweep has to walk all memory three times.

use super::super::lazy::both;
use super::*;
use crate::agent::track::blank::content;

impl Uffd {
    /// For a rollback, in a group without files: whatever is not a protected page has changed,
    /// blank or not.
    pub(super) fn take_suspects(
        &mut self,
        (start, end): Range,
        seen: &mut Dirty,
        unregistered: &mut Vec<Range>,
    ) -> Result<(), TrackError> {
        self.pagemap.scan(start, end, SUSPECT, |from, to, _| {
            seen.insert(from, to, Change::Present);
        })?;
        self.pagemap.scan(start, end, UNREGISTERED, |from, to, _| {
            push(unregistered, (from, to));
        })
    }

    /// Notes what is blank in `parts` (each with whether it can have pages of files), and
    /// protects what exists. Returns what is blank.
    pub(super) fn take_as_clean(
        &mut self,
        pieces: &[Piece],
        parts: &[(Range, bool)],
    ) -> Result<Vec<Range>, TrackError> {
        let (mut blank, mut written): (Vec<Range>, Vec<Range>) = (Vec::new(), Vec::new());
        let mut next = 0;
        for &((start, end), of_file) in parts {
            let both_kinds = |query| if of_file { query } else { without_file(query) };
            self.pagemap
                .scan(start, end, both_kinds(BLANK), |from, to, what| {
                    let exists = what & (is::PRESENT | is::SWAPPED) != 0;
                    let of_file = what & is::PRESENT != 0 && what & is::FILE != 0;
                    clip(pieces, &mut next, (from, to), |piece, from, to| {
                        if !exists || (of_file && is_of_file(piece)) {
                            push(&mut blank, (from, to));
                        }
                    });
                })?;
            self.pagemap
                .scan(start, end, both_kinds(WRITTEN), |from, to, _| {
                    push(&mut written, (from, to));
                })?;
        }
        // What this very thread has written in between.
        subtract(&mut blank, &written);
        Ok(blank)
    }

    /// Goes on with a descriptor that memory is registered by. What is not registered was
    /// mapped anew; all else is as the image says, and protected but for what `kept` says was
    /// written or is left open. Where a page that nobody has written is content as well, the page tables are
    /// asked.
    pub(super) fn go_on(&mut self, pieces: &[Piece], kept: &Kept) -> Result<(), TrackError> {
        if self.new || pieces.iter().any(|piece| piece.how == How::All) {
            return self.begin(pieces);
        }
        self.arm(pieces)?;
        let mut unknown = std::mem::take(&mut self.fresh);
        unknown.extend(content(pieces));
        unknown.sort_unstable();
        let mut joined = Vec::with_capacity(unknown.len());
        for range in unknown {
            push(&mut joined, range);
        }
        let unknown = joined;
        let mut parts = Vec::new();
        for (group, of_file) in groups(pieces) {
            let ranges = both(&[group], &unknown).into_iter();
            parts.extend(ranges.map(|range| (range, of_file)));
        }
        let mut blank = kept.blank.clone();
        subtract(&mut blank, &unknown);
        blank.extend(self.take_as_clean(pieces, &parts)?);
        blank.sort_unstable();
        self.blank = Vec::with_capacity(blank.len());
        for range in blank {
            push(&mut self.blank, range);
        }
        let again = Query {
            protect: true,
            ..SUSPECT
        };
        for &(start, end) in &kept.written {
            self.pagemap.scan(start, end, again, |_, _, _| {})?;
        }
        self.open = kept.open.clone();
        Ok(())
    }
}
