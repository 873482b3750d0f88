//! Which contents are mapped from image files and which are read: few, large mappings.
//!
//! A full image of a chain is mostly one long run, of which increments replace a page
//! here and there. Such a run is mapped as a whole, also where newer images replace it:
//! what they replace is painted over, by a mapping where it is large and by reading where
//! it is small. So what is mapped is bounded by what is large, not by the number of pieces.
//!
//! Pure code. Constructor of the new process.

use crate::image::PAGE;
use crate::image::chain::Sourced;
use crate::image::state::VmaState;

/// Runs smaller than this are read, not mapped: a mapping costs two areas in the kernel,
/// and more time than a few pages take to read.
pub const MAP_MIN_PAGES: u64 = 4;

/// The contents of one memory area.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Contents {
    /// To be mapped in this order: later ones replace parts of earlier ones.
    pub maps: Vec<Sourced>,
    /// To be read after all mappings, ascending.
    pub reads: Vec<Sourced>,
}

/// How a layout may look.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Mappings at most.
    pub maps: u64,
    /// Pages that a run must have to be mapped.
    pub least: u64,
    /// Only images from this number on (older ones) are mapped.
    pub first_file: u32,
}

/// Pieces of one file that lie where one mapping of it puts them.
#[derive(Debug, Clone, Copy)]
struct Strip {
    /// What the mapping would be.
    span: Sourced,
    /// Pages of it that count.
    own: u64,
    area: usize,
}

/// Decides for all areas; `pieces` ascend and lie inside one area each.
pub fn plan(
    vmas: &[VmaState],
    pieces: &[Sourced],
    mappable: impl Fn(&VmaState) -> bool,
    limits: Limits,
) -> Vec<Contents> {
    let mut contents = vec![Contents::default(); vmas.len()];
    let mut strips: Vec<Strip> = Vec::new();
    // The strip that each piece belongs to; none: it is read.
    let mut strip_of: Vec<Option<usize>> = Vec::with_capacity(pieces.len());
    let mut open: Vec<usize> = Vec::new();
    let (mut area, mut end, mut may_map) = (0, 0, None);
    for piece in pieces {
        while vmas.get(area).is_some_and(|vma| vma.end <= piece.addr) {
            area += 1;
            may_map = None;
        }
        let Some(vma) = vmas.get(area) else { break };
        let fresh_area = may_map.is_none();
        if !*may_map.get_or_insert_with(|| mappable(vma)) || piece.file < limits.first_file {
            // It is read over whatever lies there, but nothing shines through a gap.
            if fresh_area || piece.addr != end {
                open.clear();
            }
            end = piece.end();
            strip_of.push(None);
            continue;
        }
        if fresh_area || piece.addr != end {
            // A page that nobody holds must not show through.
            open.clear();
        }
        end = piece.end();
        let same = open.iter().copied().find(|&k| {
            let span = &strips[k].span;
            span.file == piece.file
                && span.offset.wrapping_sub(span.addr) == piece.offset.wrapping_sub(piece.addr)
        });
        // What is painted before this piece's own file goes on below it.
        open.retain(|&k| strips[k].span.file > piece.file);
        let strip = match same {
            Some(k) => {
                let strip = &mut strips[k];
                strip.span.npages = (piece.end() - strip.span.addr) / PAGE;
                strip.own += piece.npages;
                k
            }
            None => {
                strips.push(Strip {
                    span: *piece,
                    own: piece.npages,
                    area,
                });
                strips.len() - 1
            }
        };
        open.push(strip);
        strip_of.push(Some(strip));
    }
    let threshold = threshold(&strips, limits);
    let mapped = |strip: &Strip| strip.own >= threshold;
    let mut chosen: Vec<&Strip> = strips.iter().filter(|s| mapped(s)).collect();
    // Oldest first: what is newer lies on top.
    chosen.sort_by_key(|strip| {
        (
            strip.area,
            std::cmp::Reverse(strip.span.file),
            strip.span.addr,
        )
    });
    for strip in chosen {
        contents[strip.area].maps.push(strip.span);
    }
    let mut area = 0;
    for (piece, strip) in pieces.iter().zip(&strip_of) {
        if strip.is_some_and(|k| mapped(&strips[k])) {
            continue;
        }
        while vmas[area].end <= piece.addr {
            area += 1;
        }
        contents[area].reads.push(*piece);
    }
    contents
}

/// The smallest strip to be mapped.
fn threshold(strips: &[Strip], limits: Limits) -> u64 {
    let mut threshold = limits.least.max(1);
    while strips.iter().filter(|s| s.own >= threshold).count() as u64 > limits.maps {
        threshold *= 2;
    }
    threshold
}

impl Contents {
    /// What stays a mapping of an image, ascending and disjoint.
    pub fn mapped_ranges(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = self.maps.iter().map(|m| (m.addr, m.end())).collect();
        ranges.sort_unstable();
        ranges.dedup_by(|next, last| {
            let touch = next.0 <= last.1;
            if touch {
                last.1 = last.1.max(next.1);
            }
            touch
        });
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::state::VmaKind;
    use std::collections::BTreeMap;

    const NO_LIMIT: Limits = Limits {
        maps: 1000,
        least: MAP_MIN_PAGES,
        first_file: 0,
    };

    fn area(start: u64, end: u64) -> VmaState {
        VmaState {
            start: start * PAGE,
            end: end * PAGE,
            prot: 3,
            kind: VmaKind::Anon,
            flags: 0,
        }
    }

    fn piece(page: u64, npages: u64, file: u32, offset: u64) -> Sourced {
        Sourced {
            addr: page * PAGE,
            npages,
            file,
            offset: offset * PAGE,
        }
    }

    /// What memory holds after the layout was carried out.
    fn carry_out(contents: &[Contents]) -> BTreeMap<u64, (u32, u64)> {
        let mut pages = BTreeMap::new();
        for area in contents {
            for p in area.maps.iter().chain(&area.reads) {
                for k in 0..p.npages {
                    pages.insert(p.addr + k * PAGE, (p.file, p.offset + k * PAGE));
                }
            }
        }
        pages
    }

    fn wanted(pieces: &[Sourced]) -> BTreeMap<u64, (u32, u64)> {
        carry_out(&[Contents {
            maps: Vec::new(),
            reads: pieces.to_vec(),
        }])
    }

    #[test]
    fn single_pages_are_read_over_one_mapping() {
        let vmas = [area(0, 100)];
        // Every tenth page was replaced by an increment.
        let mut pieces = Vec::new();
        for k in 0..10 {
            pieces.push(piece(k * 10, 9, 1, 1 + k * 10));
            pieces.push(piece(k * 10 + 9, 1, 0, 1 + k));
        }
        let contents = plan(&vmas, &pieces, |_| true, NO_LIMIT);
        assert_eq!(contents[0].maps, [piece(0, 99, 1, 1)]);
        assert_eq!(contents[0].reads.len(), 10);
        assert_eq!(contents[0].mapped_ranges(), [(0, 99 * PAGE)]);
        assert_eq!(carry_out(&contents), wanted(&pieces));
    }

    #[test]
    fn a_hole_ends_a_mapping() {
        let vmas = [area(0, 30), area(30, 40)];
        let pieces = [
            piece(0, 10, 1, 1),
            // 10 is dropped.
            piece(11, 10, 1, 12),
            piece(25, 5, 1, 26),
            piece(30, 5, 1, 31),
        ];
        let contents = plan(&vmas, &pieces, |_| true, NO_LIMIT);
        assert_eq!(contents[0].maps, pieces[..3]);
        assert_eq!(contents[1].maps, pieces[3..]);
        assert_eq!(contents[0].mapped_ranges().len(), 3);
    }

    #[test]
    fn what_may_not_be_mapped_is_read() {
        let vmas = [area(0, 30), area(30, 60)];
        let pieces = [piece(0, 30, 0, 1), piece(30, 30, 0, 31)];
        let contents = plan(&vmas, &pieces, |vma| vma.start > 0, NO_LIMIT);
        assert_eq!(contents[0].reads, [pieces[0]]);
        assert_eq!(contents[1].maps, [pieces[1]]);
        let contents = plan(
            &vmas,
            &pieces,
            |_| true,
            Limits {
                maps: 1,
                ..NO_LIMIT
            },
        );
        assert!(
            contents
                .iter()
                .all(|c| c.maps.is_empty() && c.reads.len() == 1)
        );
    }

    #[test]
    fn random_layouts_paint_what_was_asked_for() {
        let mut seed = 0x51ab_1234_5678_9abdu64;
        let mut below = |n: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % n
        };
        for round in 0..3000 {
            let vmas = [area(0, 40), area(40, 70), area(75, 120)];
            let mut pieces = Vec::new();
            let mut at = 0;
            while at < 120 {
                let most = if below(2) == 0 { 2 } else { 12 };
                let n = (1 + below(most)).min(120 - at);
                let inside = vmas
                    .iter()
                    .any(|v| v.start <= at * PAGE && (at + n) * PAGE <= v.end);
                if below(8) != 0 && inside {
                    let file = below(4) as u32;
                    // Mostly where one mapping of the file would put it.
                    let shift = 1 + u64::from(below(5) == 0) * below(3) * 200;
                    pieces.push(piece(at, n, file, at + shift));
                }
                at += n;
            }
            let limits = Limits {
                maps: below(12),
                least: 1 + below(4),
                first_file: below(3) as u32,
            };
            let odd = below(4);
            let contents = plan(&vmas, &pieces, |v| v.start / PAGE != odd * 40, limits);
            assert_eq!(carry_out(&contents), wanted(&pieces), "round {round}");
            let maps: usize = contents.iter().map(|c| c.maps.len()).sum();
            assert!(maps as u64 <= limits.maps);
            for (vma, area) in vmas.iter().zip(&contents) {
                for m in &area.maps {
                    assert!(m.file >= limits.first_file);
                    assert!(vma.start <= m.addr && m.end() <= vma.end);
                }
            }
        }
    }
}
