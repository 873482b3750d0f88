//! Mappings of images that stay unregistered after a restore, for the `uffd` tracker.
//!
//! The kernel maps the pages of a registered file mapping one by one, those of another one
//! sixteen at a time: reading all of a restored program's memory costs several times less
//! as long as nothing is registered. Nor is it needed until the first sweep. A page of a
//! private mapping of an image is either the image's own, or it has been modified since
//! the file was mapped and is anonymous; and no page is protected yet, so the walk for
//! written pages finds every anonymous one. That holds for the very mapping that the
//! restore has made: the same part of the same file in the same place. So the kernel is
//! asked once more after the registration; whatever is no longer that is new.
//!
//! What was read over a mapping is anonymous as well and is reported once, modified or
//! not: mappings with much of that are registered at once. Helper thread.

use super::TrackError;
use super::blank::{Range, push, watchable};
use super::pagemap::{OWN, PageMap};
use crate::agent::collect::memory::{How, PAGE, Piece};
use crate::agent::hooks::maps::{Mapping, Maps};
use crate::agent::hooks::ranges;

/// One page in so many may be anonymous.
const FEW: u64 = 16;

/// A mapping as the restore has made it.
#[derive(Debug, Clone, Copy)]
struct Part {
    range: Range,
    /// Device and inode, as the memory map shows them.
    file: (u64, u64),
    /// The place in the file that address 0 would be.
    origin: u64,
}

fn file_of(mapping: &Mapping) -> (u64, u64) {
    (mapping.dev, mapping.ino)
}

fn origin_of(mapping: &Mapping) -> u64 {
    mapping.offset.wrapping_sub(mapping.start)
}

/// The mappings that are not registered yet.
#[derive(Debug, Default)]
pub struct Lazy {
    parts: Vec<Part>,
}

impl Lazy {
    /// Before the program's threads run: which of `pieces` can wait.
    pub fn find(pieces: &[Piece], pagemap: &mut PageMap) -> Result<Lazy, TrackError> {
        let mut lazy = Lazy::default();
        let mapped = |piece: &&Piece| piece.how == How::All && watchable(piece);
        let mut all = pieces.iter().filter(mapped).peekable();
        if all.peek().is_none() {
            return Ok(lazy);
        }
        let mut maps = open()?;
        for piece in all {
            let range = (piece.vma.start, piece.vma.end);
            let Ok(Some(mapping)) = maps.at(range.0) else {
                continue;
            };
            let covers = mapping.start <= range.0 && range.1 <= mapping.end;
            if !covers || mapping.shared || mapping.ino == 0 {
                continue;
            }
            let mut anonymous = 0;
            pagemap.scan(range.0, range.1, OWN, |from, to, _| {
                anonymous += (to - from) / PAGE;
            })?;
            if anonymous * FEW <= (range.1 - range.0) / PAGE {
                lazy.parts.push(Part {
                    range,
                    file: file_of(&mapping),
                    origin: origin_of(&mapping),
                });
            }
        }
        Ok(lazy)
    }

    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// All of them, ascending.
    pub fn ranges(&self) -> Vec<Range> {
        let mut ranges = Vec::new();
        for part in &self.parts {
            push(&mut ranges, part.range);
        }
        ranges
    }

    /// What of them is still mapped as it was, as the kernel says now.
    pub fn still(&self) -> Result<Vec<Range>, TrackError> {
        let mut maps = open()?;
        let mut ranges = Vec::new();
        for part in &self.parts {
            let (mut at, end) = part.range;
            // Where the kernel gives no answer there is nothing to rely on.
            while at < end
                && let Ok(Some(mapping)) = maps.at(at)
                && mapping.start < end
            {
                let same = !mapping.shared
                    && file_of(&mapping) == part.file
                    && origin_of(&mapping) == part.origin;
                if same {
                    push(&mut ranges, (mapping.start.max(at), mapping.end.min(end)));
                }
                at = mapping.end;
            }
        }
        Ok(ranges)
    }
}

fn open() -> Result<Maps, TrackError> {
    Maps::open().map_err(|errno| TrackError::Open {
        path: "/proc/thread-self/maps",
        errno,
    })
}

/// Mappings of images.
pub fn of_images(pieces: &[Piece]) -> Vec<Range> {
    let mut ranges = Vec::new();
    for piece in pieces.iter().filter(|piece| piece.how == How::All) {
        push(&mut ranges, (piece.vma.start, piece.vma.end));
    }
    ranges
}

/// Where in a range an image is mapped now, whatever the map said a moment ago. Such a page
/// has content although it does not exist.
pub fn images_in((start, end): Range) -> Result<Vec<Range>, TrackError> {
    let mut found = Vec::new();
    if !ranges::active() {
        return Ok(found);
    }
    let mut maps = open()?;
    let mut at = start;
    while at < end {
        let fail = |errno| TrackError::Call {
            call: "read the memory map",
            errno,
        };
        match maps.at(at).map_err(fail)? {
            Some(m) if m.start < end => {
                if !m.shared && ranges::is_image_file(m.dev, m.ino) {
                    push(&mut found, (m.start.max(at), m.end.min(end)));
                }
                at = m.end;
            }
            _ => break,
        }
    }
    Ok(found)
}

/// What is in both (ascending, disjoint).
pub fn both(a: &[Range], b: &[Range]) -> Vec<Range> {
    let mut out = Vec::new();
    let mut next = 0;
    for &(start, end) in a {
        while next < b.len() && b[next].1 <= start {
            next += 1;
        }
        for &(from, to) in b[next..].iter().take_while(|r| r.0 < end) {
            push(&mut out, (from.max(start), to.min(end)));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_both() {
        let a = [(0, 10), (20, 30), (40, 50)];
        let b = [(5, 22), (25, 26), (28, 45), (60, 70)];
        let wanted = [(5, 10), (20, 22), (25, 26), (28, 30), (40, 45)];
        assert_eq!(both(&a, &b), wanted);
        assert_eq!(both(&b, &a), wanted);
        assert!(both(&a, &[]).is_empty());
    }
}
