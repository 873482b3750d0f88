//! What the memory of a generation is made of when its image stands on others: the
//! only place that knows the rule of docs/INCREMENTS.md ("What an increment is").
//!
//! Pure code. Runs in the constructor of a recovering target, in the helper thread
//! (merging) and in the command.

use super::PAGE;
use super::state::{MemoryState, VmaKind};

/// `npages` pages for `addr` lie at `offset` of image number `file` of the chain, newest
/// first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sourced {
    pub addr: u64,
    pub npages: u64,
    pub file: u32,
    pub offset: u64,
}

impl Sourced {
    pub fn end(&self) -> u64 {
        end_of(self.addr, self.npages)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    #[error("an empty chain")]
    Empty,
    #[error("it stands on generation {0}, which is not in the chain")]
    Open(u64),
    #[error("image {0} of the chain is complete, the ones behind it are not needed")]
    Closed(usize),
}

/// `[start, end)`.
type Range = (u64, u64);

/// The pages of the newest of `chain` (each standing on the next one, the last one on
/// nothing), ascending, disjoint, none across the border of a memory area.
pub fn compose(chain: &[&MemoryState]) -> Result<Vec<Sourced>, ChainError> {
    let newest = chain.first().ok_or(ChainError::Empty)?;
    let mut found = Vec::new();
    // What no image so far has said anything about.
    let mut open: Vec<Range> = newest.private().collect();
    for (file, memory) in chain.iter().enumerate() {
        if file > 0 {
            let mut known = Vec::new();
            cut(&open, memory.private(), |_, from, to| {
                known.push((from, to))
            });
            open = known;
        }
        let extents = memory.extents.iter();
        let ranges = extents.map(|e| (e.addr, end_of(e.addr, e.npages)));
        open = cut(&open, ranges, |index, from, to| {
            let extent = &memory.extents[index];
            found.push(Sourced {
                addr: from,
                npages: (to - from) / PAGE,
                file: file as u32,
                offset: extent.offset.saturating_add(from - extent.addr),
            });
        });
        let last = file + 1 == chain.len();
        match memory.base {
            None if last => break,
            None => return Err(ChainError::Closed(file)),
            Some(base) if last => return Err(ChainError::Open(base.generation)),
            Some(_) => {
                let dropped = memory.dropped.iter();
                let ranges = dropped.map(|&(addr, npages)| (addr, end_of(addr, npages)));
                open = cut(&open, ranges, |_, _, _| {});
            }
        }
    }
    found.sort_unstable_by_key(|piece| piece.addr);
    join(&mut found, newest);
    Ok(found)
}

fn end_of(addr: u64, npages: u64) -> u64 {
    addr.saturating_add(npages.saturating_mul(PAGE))
}

impl MemoryState {
    /// Areas whose contents are pages of images, the spaces of objects last. Contents of
    /// shared areas that have no such space stand in the generation itself.
    pub fn private(&self) -> impl Iterator<Item = (u64, u64)> {
        let vmas = self.vmas.iter().filter(|vma| match vma.kind {
            VmaKind::Anon | VmaKind::Stack | VmaKind::Heap => true,
            VmaKind::FilePrivate { .. } | VmaKind::PrivateOf { .. } => true,
            VmaKind::FileShared { .. } | VmaKind::Shared { .. } => false,
        });
        let objects = self.objects.iter().map(|object| (object.at, object.end()));
        vmas.map(|vma| (vma.start, vma.end)).chain(objects)
    }
}

/// Takes `runs` out of `open` (both ascending and disjoint) and returns what is left; each
/// part taken is told with the index of its run.
fn cut(
    open: &[Range],
    runs: impl Iterator<Item = Range>,
    mut taken: impl FnMut(usize, u64, u64),
) -> Vec<Range> {
    let mut left = Vec::with_capacity(open.len());
    let mut runs = runs.enumerate().peekable();
    for &(start, end) in open {
        let mut at = start;
        while let Some(&(index, (from, to))) = runs.peek() {
            if from >= end {
                break;
            }
            let (from, until) = (from.max(at), to.min(end));
            if from < until {
                if at < from {
                    left.push((at, from));
                }
                taken(index, from, until);
                at = until;
            }
            if to > end {
                // It goes on in the next open range.
                break;
            }
            runs.next();
        }
        if at < end {
            left.push((at, end));
        }
    }
    left
}

/// Joins pieces that lie side by side in memory and in one file, inside one area.
fn join(pieces: &mut Vec<Sourced>, newest: &MemoryState) {
    let mut vmas = newest.vmas.iter().peekable();
    pieces.dedup_by(|piece, last| {
        while vmas.next_if(|vma| vma.end <= piece.addr).is_some() {}
        let same_area = vmas.peek().is_some_and(|vma| vma.start <= last.addr);
        let fits = last.file == piece.file
            && last.end() == piece.addr
            && end_of(last.offset, last.npages) == piece.offset;
        if same_area && fits {
            last.npages += piece.npages;
        }
        same_area && fits
    });
}

/// The piece that holds an address; `pieces` are as [`compose`] gives them.
pub fn piece_at(pieces: &[Sourced], addr: u64) -> Option<&Sourced> {
    let at = pieces.partition_point(|piece| piece.end() <= addr);
    pieces.get(at).filter(|piece| piece.addr <= addr)
}

#[cfg(test)]
mod tests {
    use super::super::state::{Base, Extent, OBJECTS_AT, ObjectSpace, VmaState};
    use super::*;
    use std::collections::BTreeMap;

    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % n
        }
    }

    fn area(start: u64, end: u64, kind: VmaKind) -> VmaState {
        VmaState {
            start: start * PAGE,
            end: end * PAGE,
            prot: 3,
            kind,
            flags: 0,
        }
    }

    fn extent(page: u64, npages: u64, offset: u64) -> Extent {
        Extent {
            addr: page * PAGE,
            npages,
            offset: offset * PAGE,
        }
    }

    fn base(generation: u64) -> Option<Base> {
        Some(Base {
            generation,
            header_crc: 0,
        })
    }

    /// A random generation over pages 0..60: areas, then extents and dropped runs.
    fn random_memory(random: &mut Random, generation: u64) -> MemoryState {
        let mut memory = MemoryState::default();
        let mut at = random.below(4);
        while at < 60 {
            let end = (at + 1 + random.below(20)).min(60);
            let kind = match random.below(6) {
                0 => VmaKind::Shared {
                    object: 0,
                    offset: 0,
                },
                1 => VmaKind::FilePrivate {
                    path: Vec::new(),
                    offset: 0,
                },
                _ => VmaKind::Anon,
            };
            memory.vmas.push(area(at, end, kind));
            at = end
                + if random.below(2) == 0 {
                    0
                } else {
                    random.below(5)
                };
        }
        let (mut page, mut offset) = (0, 1);
        while page < 60 {
            let n = 1 + random.below(6);
            let inside = |m: &MemoryState| {
                let mut pages = page..page + n;
                pages.all(|p| m.private().any(|(s, e)| s <= p * PAGE && p * PAGE < e))
            };
            match random.below(4) {
                0 if inside(&memory) => {
                    offset += random.below(3);
                    memory.extents.push(extent(page, n, offset));
                    offset += n;
                }
                1 if generation > 0 => memory.dropped.push((page * PAGE, n)),
                _ => {}
            }
            page += n + if random.below(3) == 0 {
                0
            } else {
                random.below(3)
            };
        }
        if generation > 0 {
            memory.base = base(generation - 1);
        }
        memory
    }

    /// The rule as it is written down, page by page, oldest first.
    fn naive(chain: &[MemoryState]) -> BTreeMap<u64, (u32, u64)> {
        let mut pages: BTreeMap<u64, (u32, u64)> = BTreeMap::new();
        for (file, memory) in chain.iter().enumerate().rev() {
            for &(addr, npages) in &memory.dropped {
                for page in 0..npages {
                    pages.remove(&(addr + page * PAGE));
                }
            }
            for e in &memory.extents {
                for page in 0..e.npages {
                    let place = (file as u32, e.offset + page * PAGE);
                    pages.insert(e.addr + page * PAGE, place);
                }
            }
            pages.retain(|&page, _| memory.private().any(|(s, e)| s <= page && page < e));
        }
        pages
    }

    #[test]
    fn random_chains_are_what_the_rule_says() {
        let mut random = Random(0x1234_5678_9abc_def1);
        for round in 0..3000 {
            let len = 1 + random.below(6);
            let chain: Vec<MemoryState> = (0..len)
                .rev()
                .map(|generation| random_memory(&mut random, generation))
                .collect();
            let pieces = compose(&chain.iter().collect::<Vec<_>>()).unwrap();
            let mut pages = BTreeMap::new();
            let mut end = 0;
            for piece in &pieces {
                assert!(piece.addr >= end && piece.npages > 0, "round {round}");
                end = piece.end();
                let mut areas = chain[0].vmas.iter();
                assert!(areas.any(|v| v.start <= piece.addr && piece.end() <= v.end));
                for page in 0..piece.npages {
                    let place = (piece.file, piece.offset + page * PAGE);
                    pages.insert(piece.addr + page * PAGE, place);
                }
            }
            assert_eq!(pages, naive(&chain), "round {round}: {chain:#?}");
        }
    }

    /// An object that shrinks and grows again does not get back what it held.
    #[test]
    fn contents_of_objects_are_composed_like_memory() {
        let object = |npages| ObjectSpace {
            dev: 1,
            ino: 2,
            at: OBJECTS_AT,
            npages,
        };
        let page = OBJECTS_AT / PAGE;
        let generation = |number: u64, npages, extents: &[Extent], dropped: &[(u64, u64)]| {
            let dropped = dropped.iter().map(|&(p, n)| ((page + p) * PAGE, n));
            MemoryState {
                objects: vec![object(npages)],
                extents: extents.to_vec(),
                dropped: dropped.collect(),
                base: (number > 0).then(|| base(number - 1).expect("a base")),
                ..Default::default()
            }
        };
        let first = generation(0, 4, &[extent(page, 4, 1)], &[]);
        let small = generation(1, 2, &[extent(page, 1, 1)], &[]);
        let grown = generation(2, 4, &[], &[(2, 2)]);
        let pieces = |chain: &[&MemoryState]| {
            let pieces = compose(chain).unwrap();
            let told = |p: &Sourced| (p.addr / PAGE - page, p.npages, p.file);
            pieces.iter().map(told).collect::<Vec<_>>()
        };
        assert_eq!(pieces(&[&small, &first]), [(0, 1, 0), (1, 1, 1)]);
        assert_eq!(pieces(&[&grown, &small, &first]), [(0, 1, 1), (1, 1, 2)]);
        let without = MemoryState {
            base: base(1),
            ..Default::default()
        };
        assert!(pieces(&[&without, &small, &first]).is_empty());
    }

    #[test]
    fn neighbours_of_one_file_are_one_piece() {
        let mut full = MemoryState {
            vmas: vec![area(0, 8, VmaKind::Anon), area(8, 16, VmaKind::Anon)],
            extents: vec![extent(0, 3, 1), extent(3, 9, 4), extent(12, 1, 20)],
            ..Default::default()
        };
        let piece = |page: u64, npages, file, offset: u64| Sourced {
            addr: page * PAGE,
            npages,
            file,
            offset: offset * PAGE,
        };
        // Not across the border of the areas.
        let expected = [piece(0, 8, 0, 1), piece(8, 4, 0, 9), piece(12, 1, 0, 20)];
        assert_eq!(compose(&[&full]).unwrap(), expected);
        full.vmas = vec![area(0, 16, VmaKind::Anon)];
        let newer = MemoryState {
            vmas: full.vmas.clone(),
            extents: vec![extent(5, 1, 1)],
            dropped: vec![(0, 1)],
            base: base(0),
            ..Default::default()
        };
        let expected = [
            piece(1, 4, 1, 2),
            piece(5, 1, 0, 1),
            piece(6, 6, 1, 7),
            piece(12, 1, 1, 20),
        ];
        assert_eq!(compose(&[&newer, &full]).unwrap(), expected);
    }

    #[test]
    fn chains_that_do_not_end_where_they_should_are_errors() {
        let full = MemoryState::default();
        let newer = MemoryState {
            base: base(7),
            ..Default::default()
        };
        assert_eq!(compose(&[]), Err(ChainError::Empty));
        assert_eq!(compose(&[&newer]), Err(ChainError::Open(7)));
        assert_eq!(compose(&[&full, &newer]), Err(ChainError::Closed(0)));
        assert_eq!(compose(&[&newer, &full]), Ok(Vec::new()));
    }

    /// What only a damaged manifest says must not bring the program down.
    #[test]
    fn nonsense_does_not_panic() {
        let mut random = Random(0xfeed_beef_1234_9999);
        for _ in 0..2000 {
            let nonsense = |random: &mut Random| {
                let mut memory = random_memory(random, 1);
                for e in &mut memory.extents {
                    match random.below(4) {
                        0 => e.addr = random.below(u64::MAX),
                        1 => e.npages = random.below(u64::MAX),
                        2 => e.offset = u64::MAX - random.below(PAGE),
                        _ => {}
                    }
                }
                for d in &mut memory.dropped {
                    *d = (random.below(u64::MAX), random.below(u64::MAX));
                }
                for v in &mut memory.vmas {
                    if random.below(3) == 0 {
                        v.start = random.below(u64::MAX);
                        v.end = random.below(u64::MAX);
                    }
                }
                memory
            };
            let (a, mut b) = (nonsense(&mut random), nonsense(&mut random));
            b.base = None;
            let _ = compose(&[&a, &b]);
        }
    }
}
