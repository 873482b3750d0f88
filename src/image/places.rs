//! Where the pages of an image lie, in few bytes: a section of the manifest region beside the
//! manifest, which says the same in far more. A restore from a chain reads this of every image
//! but the newest, and nothing else of their manifests.
//!
//! Pure code.

use super::PAGE;
use super::codec::CodecError;
use super::state::{Extent, MemoryState, VmaKind, VmaState};
use serde::{Deserialize, Serialize};

/// All numbers count pages.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Places {
    /// Areas whose contents are pages of images: distance from the end of the one before, and
    /// length. Neighbours are one.
    areas: Vec<(u64, u64)>,
    /// Distance from the end of the extent before, length, and how far behind the end of the
    /// one before it lies in the image.
    extents: Vec<(u64, u64, i64)>,
}

impl Places {
    /// `None`: there is nothing to tell, or it is nothing that can be told like this.
    pub fn of(memory: &MemoryState) -> Option<Places> {
        let mut joined: Vec<(u64, u64)> = Vec::new();
        for (start, end) in memory.private() {
            match joined.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => joined.push((start, end)),
            }
        }
        let mut at = 0u64;
        let mut areas = Vec::with_capacity(joined.len());
        for (start, end) in joined {
            let gap = (start / PAGE).checked_sub(at)?;
            at = end / PAGE;
            areas.push((gap, at.checked_sub(start / PAGE)?));
        }
        let (mut at, mut place) = (0u64, 0i64);
        let mut extents = Vec::with_capacity(memory.extents.len());
        for e in &memory.extents {
            let gap = (e.addr / PAGE).checked_sub(at)?;
            at = (e.addr / PAGE).checked_add(e.npages)?;
            let offset = (e.offset / PAGE) as i64;
            extents.push((gap, e.npages, offset.checked_sub(place)?));
            place = offset.checked_add_unsigned(e.npages)?;
        }
        (!areas.is_empty()).then_some(Places { areas, extents })
    }

    /// The areas (as such of no kind in particular) and extents of a memory. A number that
    /// leaves the address space is an error.
    pub fn memory(&self) -> Result<MemoryState, CodecError> {
        let bytes = |pages: u64| pages.checked_mul(PAGE);
        let area = |at: &mut u64, gap: u64, pages: u64| {
            let start = at.checked_add(gap)?;
            *at = start.checked_add(pages)?;
            Some((bytes(start)?, bytes(*at)?))
        };
        let mut memory = MemoryState::default();
        memory.vmas.reserve_exact(self.areas.len());
        let mut at = 0;
        for &(gap, pages) in &self.areas {
            let (start, end) = area(&mut at, gap, pages).ok_or(CodecError::Section)?;
            memory.vmas.push(VmaState {
                start,
                end,
                prot: 0,
                kind: VmaKind::Anon,
                flags: 0,
            });
        }
        memory.extents.reserve_exact(self.extents.len());
        let (mut at, mut place) = (0, 0i64);
        for &(gap, npages, distance) in &self.extents {
            let mut extent = || {
                let (addr, _) = area(&mut at, gap, npages)?;
                let offset = u64::try_from(place.checked_add(distance)?).ok()?;
                place = i64::try_from(offset.checked_add(npages)?).ok()?;
                let offset = bytes(offset)?;
                Some(Extent {
                    addr,
                    npages,
                    offset,
                })
            };
            memory.extents.push(extent().ok_or(CodecError::Section)?);
        }
        Ok(memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(start: u64, end: u64, kind: VmaKind) -> VmaState {
        VmaState {
            start: start * PAGE,
            end: end * PAGE,
            prot: 3,
            kind,
            flags: 0,
        }
    }

    #[test]
    fn places_are_those_of_the_memory() {
        let file = VmaKind::FilePrivate {
            path: b"/lib".to_vec(),
            offset: 0,
        };
        let shared = VmaKind::Shared {
            object: 0,
            offset: 0,
        };
        let extent = |page: u64, npages, offset: u64| Extent {
            addr: page * PAGE,
            npages,
            offset: offset * PAGE,
        };
        let memory = MemoryState {
            vmas: vec![
                area(1, 9, VmaKind::Anon),
                area(9, 12, file),
                area(12, 20, shared),
                area(20, 1 << 35, VmaKind::Stack),
            ],
            extents: vec![extent(2, 3, 9), extent(5, 1, 1), extent(1 << 34, 7, 2)],
            ..MemoryState::default()
        };
        let told = Places::of(&memory).unwrap().memory().unwrap();
        assert_eq!(told.extents, memory.extents);
        let areas: Vec<_> = told.private().map(|a| (a.0 / PAGE, a.1 / PAGE)).collect();
        assert_eq!(areas, [(1, 12), (20, 1 << 35)]);
        assert_eq!(Places::of(&MemoryState::default()), None);
    }

    #[test]
    fn nonsense_is_an_error() {
        for areas in [vec![(u64::MAX, 1)], vec![(1, 2), (1 << 52, 1)]] {
            let extents = Vec::new();
            assert!(Places { areas, extents }.memory().is_err());
        }
        for extent in [
            (1, 1, -1),
            (1, u64::MAX, 1),
            (1, 1, i64::MAX),
            (u64::MAX, 1, 1),
        ] {
            let (areas, extents) = (vec![(1, 9)], vec![extent]);
            assert!(Places { areas, extents }.memory().is_err());
        }
    }
}
