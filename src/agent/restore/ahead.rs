//! What of images that are not in memory is to be brought there ahead of the program, by
//! what it touched after the restart before.
//!
//! Constructor of the new process; the helper thread does what is left (`agent::prefetch`).

use super::unpack;
use crate::image::PAGE;
use crate::image::chain::{Sourced, piece_at};
use crate::store::working_set::WorkingSet;
use ckpt_sys::syscall;

/// Bytes that are asked for before the program runs. More would stand in the way of what
/// the restore itself reads.
const AT_ONCE: u64 = 1 << 20;
/// Places in an image so near to each other are read as one.
const NEAR: u64 = 4 * PAGE;

/// The ranges to be fetched, in order, and how many of them are known to be wanted: what
/// the program touched, what was beside that, then all the rest if there is room for it.
pub fn queue(mapped: &[(u64, u64, u32)], before: Option<&WorkingSet>) -> (Vec<(u64, u64)>, u64) {
    let mut ranges = Vec::new();
    let mut touched = 0;
    if let Some(set) = before {
        for look in &set.looks {
            inside(mapped, look, &mut ranges);
        }
        touched = ranges.len() as u64;
        inside(mapped, &set.around, &mut ranges);
    }
    let all: u64 = mapped.iter().map(|range| range.1 - range.0).sum();
    if all < unpack::available() / 4 * 3 {
        ranges.extend(mapped.iter().map(|range| (range.0, range.1)));
    }
    (ranges, touched)
}

/// The parts of `runs` (pages, ascending) that are mapped.
fn inside(mapped: &[(u64, u64, u32)], runs: &[(u64, u64)], ranges: &mut Vec<(u64, u64)>) {
    let mut first = 0;
    for &(page, pages) in runs {
        let (start, end) = (page * PAGE, (page + pages) * PAGE);
        while mapped.get(first).is_some_and(|range| range.1 <= start) {
            first += 1;
        }
        let touched = mapped[first..].iter().take_while(|range| range.0 < end);
        ranges.extend(touched.map(|range| (range.0.max(start), range.1.min(end))));
    }
}

/// Asks for what the program touched first, while the rest of the restore goes on.
pub fn at_once(pieces: &[Sourced], before: Option<&WorkingSet>, image_fds: &[i32]) {
    let first = before.and_then(|set| set.looks.first());
    for (file, offset, len) in places(pieces, first.map_or(&[][..], |look| look)) {
        let fd = image_fds.get(file as usize).copied().unwrap_or(-1);
        let advice = libc::POSIX_FADV_WILLNEED;
        // SAFETY: no pointers; what cannot be read ahead is read later.
        unsafe { syscall!(libc::SYS_fadvise64, fd, offset, len, advice) };
    }
}

/// Where so many of the first runs lie: file, offset, bytes.
fn places(pieces: &[Sourced], runs: &[(u64, u64)]) -> Vec<(u32, u64, u64)> {
    let mut places = Vec::new();
    let mut left = AT_ONCE;
    for &(page, pages) in runs {
        let (mut at, end) = (page * PAGE, (page + pages) * PAGE);
        while at < end && left > 0 {
            let Some(piece) = piece_at(pieces, at) else {
                break;
            };
            let len = (piece.end().min(end) - at).min(left);
            places.push((piece.file, piece.offset + (at - piece.addr), len));
            at += len;
            left -= len;
        }
    }
    places.sort_unstable();
    places.dedup_by(|next, last| {
        let near = next.0 == last.0 && next.1 <= last.1 + last.2 + NEAR;
        if near {
            last.2 = last.2.max(next.1 + next.2 - last.1);
        }
        near
    });
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(page: u64, npages: u64, file: u32, offset: u64) -> Sourced {
        Sourced {
            addr: page * PAGE,
            npages,
            file,
            offset: offset * PAGE,
        }
    }

    #[test]
    fn places_are_those_of_the_pages() {
        let pieces = [
            piece(10, 5, 1, 100),
            piece(15, 10, 0, 7),
            piece(40, 1, 1, 107),
        ];
        // A run over two files, one that is nowhere, and one near to the first in its file.
        let found = places(&pieces, &[(13, 4), (30, 2), (40, 1)]);
        let pages: Vec<_> = found
            .iter()
            .map(|p| (p.0, p.1 / PAGE, p.2 / PAGE))
            .collect();
        assert_eq!(pages, [(0, 7, 2), (1, 103, 5)]);
        let much = [piece(0, 1000, 0, 1)];
        let found = places(&much, &[(0, 1000)]);
        assert_eq!(found, [(0, PAGE, AT_ONCE)]);
    }

    #[test]
    fn what_was_touched_comes_before_what_was_beside_it() {
        let mapped = [(10 * PAGE, 20 * PAGE, 0), (30 * PAGE, 40 * PAGE, 0)];
        let set = WorkingSet {
            looks: vec![vec![(18, 14)], vec![(5, 6)]],
            around: vec![(12, 1), (50, 1)],
            ..WorkingSet::default()
        };
        let (ranges, touched) = queue(&mapped, Some(&set));
        let pages: Vec<_> = ranges.iter().map(|r| (r.0 / PAGE, r.1 / PAGE)).collect();
        let known = [(18, 20), (30, 32), (10, 11), (12, 13)];
        assert_eq!((&pages[..4], touched), (&known[..], 3));
        assert_eq!(pages[4..], [(10, 20), (30, 40)]);
    }
}
