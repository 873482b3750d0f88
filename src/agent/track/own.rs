//! The library's own writable data in the program's memory: what no tracker protects, and what is not
//! compared with a generation.
//!
//! Helper thread, from the pieces of a map that it has read.

use super::blank::Range;
use crate::agent::collect::memory::{PAGE, Piece};
use crate::agent::state::AGENT;
use crate::image::state::VmaKind;

/// The kernel may have joined large neighbours to it.
const REACH: u64 = 4 << 20;

/// The library's writable data: the mappings side by side around the agent's block, and what
/// anonymous memory there is beside them. No other mapping of a file: pages of one that are
/// taken for written are the program's own in the next life, and no longer the file's.
pub fn data(pieces: &[Piece]) -> Vec<Range> {
    around(pieces, &raw const AGENT as u64)
}

fn around(pieces: &[Piece], here: u64) -> Vec<Range> {
    let within = |p: &Piece| p.vma.start <= here && here < p.vma.end;
    let Some(middle) = pieces.iter().position(within) else {
        return Vec::new();
    };
    // Its file is the first that is met downwards: what is zero at the start lies above it.
    let mut file = None;
    let mut is_own = |piece: &Piece, below: bool| match &piece.vma.kind {
        VmaKind::Anon => true,
        VmaKind::FilePrivate { path, .. } if below && file.is_none() => {
            file = Some(path.clone());
            true
        }
        VmaKind::FilePrivate { path, .. } => file.as_ref() == Some(path),
        _ => false,
    };
    let writable = |p: &Piece| p.vma.prot & libc::PROT_WRITE as u32 != 0;
    let joined = |a: &Piece, b: &Piece| a.vma.end == b.vma.start && writable(a) && writable(b);
    let (mut first, mut last) = (middle, middle);
    is_own(&pieces[middle], true);
    while first > 0
        && joined(&pieces[first - 1], &pieces[first])
        && is_own(&pieces[first - 1], true)
    {
        first -= 1;
    }
    while last + 1 < pieces.len()
        && joined(&pieces[last], &pieces[last + 1])
        && is_own(&pieces[last + 1], false)
    {
        last += 1;
    }
    let all = pieces[first..=last].iter();
    all.map(|p| {
        (
            p.vma.start.max(here.saturating_sub(REACH) & !(PAGE - 1)),
            p.vma.end.min((here + REACH) & !(PAGE - 1)),
        )
    })
    .filter(|(start, end)| start < end)
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::collect::memory::How;
    use crate::image::state::VmaState;

    /// `(first page, last page, kind)`, writable.
    fn map(list: &[(u64, u64, VmaKind)]) -> Vec<Piece> {
        let piece = |(first, end, kind): &(u64, u64, VmaKind)| Piece {
            vma: VmaState {
                start: first * PAGE,
                end: end * PAGE,
                prot: 3,
                kind: kind.clone(),
                flags: 0,
            },
            how: How::Scan,
        };
        list.iter().map(piece).collect()
    }

    fn file(path: &str) -> VmaKind {
        let path = path.as_bytes().to_vec();
        VmaKind::FilePrivate { path, offset: 0 }
    }

    /// A private mapping of a file without a name lay just behind the library's data: after a
    /// restart all of it was stored as the program's own, and what was written to the file
    /// afterwards was not seen through it in the life after that.
    #[test]
    fn other_files_beside_it_are_the_programs() {
        let nameless = VmaKind::PrivateOf {
            object: 0,
            offset: 0,
        };
        let all = map(&[
            (10, 12, file("/other")),
            (12, 14, file("/lib")),
            (14, 15, file("/lib")),
            (15, 20, VmaKind::Anon),
            (20, 30, nameless.clone()),
            (30, 31, VmaKind::Anon),
        ]);
        let range = |first: u64, end: u64| (first * PAGE, end * PAGE);
        let own = vec![range(12, 14), range(14, 15), range(15, 20)];
        for page in 12..20 {
            assert_eq!(around(&all, page * PAGE + 8), own, "page {page}");
        }
        let above = map(&[(14, 15, VmaKind::Anon), (15, 16, file("/other"))]);
        assert_eq!(around(&above, 14 * PAGE), [range(14, 15)]);
        let mut read_only = all.clone();
        read_only[1].vma.prot = 1;
        assert_eq!(around(&read_only, 15 * PAGE), own[1..]);
        assert_eq!(around(&all, 9 * PAGE), []);
    }

    #[test]
    fn the_agents_block_lies_in_it() {
        let own = crate::agent::collect::memory::Own {
            store: b"/nowhere/",
            is_cache: |_| false,
        };
        let pieces = crate::agent::collect::memory::collect(&own).unwrap().pieces;
        let here = &raw const AGENT as u64;
        let ranges = data(&pieces);
        assert!(
            ranges.iter().any(|r| r.0 <= here && here < r.1),
            "{ranges:x?}"
        );
    }
}
