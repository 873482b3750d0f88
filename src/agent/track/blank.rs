//! What the trackers share: ranges, which pieces can be watched at all, and blank pages.
//!
//! A *blank* page is one that has no anonymous page: there is none, or it is the mapped
//! file's own. Trackers see writes; that a page was discarded shows only here: it was not
//! blank and is now. Helper thread, pure but for [`whole`].

use super::pagemap::{PageMap, Query, is};
use super::{Change, Dirty, TrackError};
use crate::agent::collect::memory::{How, Piece};
use crate::image::state::vma_flag;

pub type Range = (u64, u64);

/// Adds a range at or behind the end of the last one.
pub fn push(ranges: &mut Vec<Range>, (start, end): Range) {
    match ranges.last_mut() {
        _ if start >= end => {}
        Some(last) if last.1 >= start => last.1 = last.1.max(end),
        _ => ranges.push((start, end)),
    }
}

/// The parts of `a` that are not in `b` (both ascending, disjoint).
pub fn without(a: &[Range], b: &[Range], mut f: impl FnMut(u64, u64)) {
    let mut next = 0;
    for &(start, end) in a {
        let mut at = start;
        while next < b.len() && b[next].1 <= at {
            next += 1;
        }
        for &(from, to) in b[next..].iter().take_while(|r| r.0 < end) {
            if from > at {
                f(at, from);
            }
            at = at.max(to);
        }
        if at < end {
            f(at, end);
        }
    }
}

pub fn subtract(a: &mut Vec<Range>, b: &[Range]) {
    if !a.is_empty() && !b.is_empty() {
        let mut out = Vec::with_capacity(a.len());
        without(a, b, |start, end| push(&mut out, (start, end)));
        *a = out;
    }
}

/// Can the kernel watch this piece?
pub fn watchable(piece: &Piece) -> bool {
    let content = matches!(piece.how, How::Scan | How::All | How::Readable);
    content && piece.vma.flags & vma_flag::HUGETLB == 0
}

/// Is what has no page of its own in this piece content of the image (a mapped image, a
/// deleted file)? Elsewhere it is nothing.
pub fn blank_is_content(piece: &Piece) -> bool {
    !matches!(piece.how, How::Scan)
}

pub fn is_of_file(piece: &Piece) -> bool {
    blank_is_content(piece) || piece.vma.kind.is_private_file()
}

/// Calls `f` with the parts of `start..end` that lie in watchable pieces. `next` is the
/// place in `pieces`, moved on by calls with ascending ranges.
pub fn clip<'p>(
    pieces: &'p [Piece],
    next: &mut usize,
    (start, end): Range,
    mut f: impl FnMut(&'p Piece, u64, u64),
) {
    while *next < pieces.len() && pieces[*next].vma.end <= start {
        *next += 1;
    }
    for piece in pieces[*next..].iter().take_while(|p| p.vma.start < end) {
        if watchable(piece) {
            f(piece, piece.vma.start.max(start), piece.vma.end.min(end));
        }
    }
}

/// Watchable pieces with nothing but such pieces and holes between them: one walk each.
/// With whether they can have pages of a file: to ask for that costs a look at each page's
/// own record, many times what the page table costs.
pub fn groups(pieces: &[Piece]) -> Vec<(Range, bool)> {
    let mut groups: Vec<(Range, bool)> = Vec::new();
    let mut broken = true;
    for piece in pieces {
        if !watchable(piece) {
            broken = true;
            continue;
        }
        let of_file = is_of_file(piece);
        match groups.last_mut() {
            Some((last, kind)) if !broken && *kind == of_file => last.1 = piece.vma.end,
            _ => groups.push(((piece.vma.start, piece.vma.end), of_file)),
        }
        broken = false;
    }
    groups
}

/// The same query for memory that has no pages of files.
pub const fn without_file(query: Query) -> Query {
    Query {
        inverted: query.inverted & !is::FILE,
        all: query.all & !is::FILE,
        any: query.any & !is::FILE,
        tell: query.tell & !is::FILE,
        ..query
    }
}

/// Asks for pages that exist.
pub const EXISTING: Query = Query {
    inverted: is::PFNZERO,
    all: is::PFNZERO,
    any: is::PRESENT | is::SWAPPED,
    tell: is::FILE | is::PRESENT,
    protect: false,
};

/// Everything in a part of a piece, whether written or not.
pub fn whole(
    pagemap: &mut PageMap,
    piece: &Piece,
    (start, end): Range,
    seen: &mut Dirty,
) -> Result<(), TrackError> {
    if blank_is_content(piece) {
        seen.insert(start, end, Change::Present);
        return Ok(());
    }
    let of_file = is_of_file(piece);
    let mut at = start;
    pagemap.scan(start, end, EXISTING, |from, to, what| {
        if of_file && what & is::PRESENT != 0 && what & is::FILE != 0 {
            return;
        }
        seen.insert(at, from, Change::Absent);
        seen.insert(from, to, Change::Present);
        at = to;
    })?;
    seen.insert(at, end, Change::Absent);
    Ok(())
}

/// Pages said to exist where a blank one is nothing.
pub fn existing(pieces: &[Piece], seen: &Dirty) -> Vec<Range> {
    let mut ranges = Vec::new();
    for piece in pieces {
        if !watchable(piece) || blank_is_content(piece) {
            continue;
        }
        for run in seen.within(piece.vma.start, piece.vma.end) {
            if run.change == Change::Present {
                push(&mut ranges, (run.start, run.end));
            }
        }
    }
    ranges
}

/// Ranges whose blank pages are content.
pub fn content(pieces: &[Piece]) -> Vec<Range> {
    let mut ranges = Vec::new();
    for piece in pieces {
        if watchable(piece) && blank_is_content(piece) {
            push(&mut ranges, (piece.vma.start, piece.vma.end));
        }
    }
    ranges
}

/// What became content without being written: the mapped file was removed, so that its own
/// pages are to be stored from now on. `before`: [`content`] as of the last sweep.
pub fn newly_content(before: &[Range], now: &[Range], seen: &mut Dirty) {
    without(now, before, |start, end| {
        seen.insert(start, end, Change::Present);
    });
}

/// Where a file's own pages lie below what the program has written: zeros are content there.
pub fn over_files(pieces: &[Piece]) -> Vec<Range> {
    let mut ranges = Vec::new();
    for piece in pieces {
        if watchable(piece) && !blank_is_content(piece) && piece.vma.kind.is_private_file() {
            push(&mut ranges, (piece.vma.start, piece.vma.end));
        }
    }
    ranges
}

/// Where this is so and was not at the last sweep (`before`, [`over_files`] as of then) everything
/// is looked at again. A file without a name is open again, and its own pages are the file's; or
/// the program has mapped one between the look at the map and the sweep, and pages of zeros were
/// taken for nothing.
pub fn newly_over_files(
    pagemap: impl FnOnce() -> Result<PageMap, TrackError>,
    pieces: &[Piece],
    before: &[Range],
    now: &[Range],
    seen: &mut Dirty,
) -> Result<(), TrackError> {
    let mut fresh = Vec::new();
    without(now, before, |start, end| fresh.push((start, end)));
    if fresh.is_empty() {
        return Ok(());
    }
    let mut pagemap = pagemap()?;
    let mut next = 0;
    for range in fresh {
        let mut parts = Vec::new();
        clip(pieces, &mut next, range, |piece, from, to| {
            parts.push((piece, from, to));
        });
        for (piece, from, to) in parts {
            whole(&mut pagemap, piece, (from, to), seen)?;
        }
    }
    Ok(())
}

/// What became blank: in `now` and not in `before`.
pub fn newly_blank(pieces: &[Piece], now: &[Range], before: &[Range], seen: &mut Dirty) {
    let mut next = 0;
    without(now, before, |start, end| {
        clip(pieces, &mut next, (start, end), |piece, from, to| {
            let change = match blank_is_content(piece) {
                true => Change::Present,
                false => Change::Absent,
            };
            seen.insert(from, to, change);
        });
    });
}
