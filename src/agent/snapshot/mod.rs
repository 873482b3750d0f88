//! How the pages that a checkpoint must store get into its image.
//!
//! | file | owns |
//! |---|---|
//! | [`scan`] | which pages exist: what a complete image must hold |
//! | [`stretch`] | a dirty set, cut into batches of pages that are read in the same way |
//! | [`pages`] | pages on their way into the image, the latest copy of each |
//! | [`precopy`] | rounds of copying while the program runs |
//! | [`contents`] | shared memory and files without a name: what the base holds of them |
//! | [`copy`] | the residue is copied aside during the stop, stored after it |
//! | [`fork`] | the residue is stored by a child whose memory the kernel freezes |
//! | [`priority`] | the residue is stored while the program runs; what it writes goes first |
//! | [`choose`] | which of them, by what they cost here |
//! | this one | the end of all of them: manifest, checksums, header |
//!
//! Helper thread; after [`fork::fork`] also the child.

pub mod choose;
pub mod contents;
pub mod copy;
pub mod fork;
pub mod pages;
pub mod precopy;
pub mod priority;
pub mod stretch;

pub use choose::Method;
pub use pages::Pages;

use crate::agent::collect::memory::{How, MemoryError, PAGE, Piece, Plan};
use crate::agent::snapshot::contents::Spaced;
use crate::agent::state;
use crate::agent::track::{Dirty, TrackError};
use crate::image::state::{Base, DescriptorTable, Extent, Manifest, ObjectSpace, SharedObject};
use crate::image::writer::{ImageSink, WriteError, Written};
use crate::store::MergeError;

/// What a snapshot method reports.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    pub bytes_stored: u64,
    /// Pages that the image holds.
    pub pages: u64,
    pub header_crc: u32,
    /// Processor time of a forked writer.
    pub cpu_us: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error(transparent)]
    Write(#[from] WriteError),
    /// Memory that the program excludes from forks, by an madvise that no hook saw:
    /// the next checkpoint looks for such ranges during the stop.
    #[error("memory at {0:#x} is not passed on to a forked writer")]
    NotInherited(u64),
    #[error(transparent)]
    Merge(#[from] MergeError),
    #[error(transparent)]
    Scan(#[from] TrackError),
    #[error("open {path}: errno {errno}")]
    Open { path: &'static str, errno: i32 },
    #[error(transparent)]
    Memory(MemoryError),
    #[error("the program has guard regions, and this kernel does not tell where they are")]
    Guards,
    #[error("guard pages until they are stored: {0}")]
    Guard(String),
    #[error("memory at {0:#x} went away before it was stored")]
    Vanished(u64),
    #[error("no memory to copy pages to: errno {0}")]
    NoRoom(i32),
}

/// What the image says besides its pages.
#[derive(Clone)]
pub struct Frame<'a> {
    pub manifest: Manifest,
    pub plan: Plan,
    /// Contents copied during the stop, to which offsets in the two above refer.
    pub side: &'a [u8],
    /// The generation that the image stands on, and all that has changed since.
    pub base: Option<Base>,
    pub dirty: &'a Dirty,
}

/// Makes the image whole once every page of the residue is in it.
pub fn finish<S: ImageSink>(
    pages: &mut Pages<S>,
    frame: Frame<'_>,
    forked: bool,
    sync: bool,
) -> Result<Outcome, SnapshotError> {
    let Frame {
        mut manifest,
        mut plan,
        side,
        base,
        dirty,
    } = frame;
    if !plan.flags_known() {
        plan.read_flags();
        if forked && let Some(addr) = plan.not_inherited(state::awake_page()) {
            return Err(SnapshotError::NotInherited(addr));
        }
    }
    let (writer, stored) = pages.parts();
    let at = writer.write_bytes_as_pages(side)?;
    let (spaces, shared) = (std::mem::take(&mut plan.objects), plan.shared.iter_mut());
    let objects = shared.map(|object| &mut object.extents);
    for extents in objects.chain(manifest.descriptors.content_extents()) {
        extents.iter_mut().for_each(|e| e.offset += at);
        // Collected mapping by mapping, and a lower one may show later pages.
        extents.sort_unstable_by_key(|e| e.addr);
    }
    plan.copied.iter_mut().for_each(|e| e.offset += at);
    plan.copied.sort_unstable_by_key(|e| e.addr);
    let mut extents = held(&plan, stored);
    let dropped = match base {
        Some(_) => dropped(&plan.pieces, dirty, &extents),
        None => Vec::new(),
    };
    plan.join();
    join_extents(&mut extents, &plan.pieces);
    let mut dropped = dropped;
    for Spaced {
        space,
        kept,
        dropped: runs,
    } in spaces
    {
        let mut contents = take_contents(&mut plan.shared, &mut manifest.descriptors, &space);
        contents.iter_mut().for_each(|e| e.addr += space.at);
        for &(start, npages) in &kept {
            let before = contents.len();
            let end = start + npages * PAGE;
            let first = stored.partition_point(|e| e.addr + e.npages * PAGE <= start);
            let inside = stored[first..].iter().take_while(|e| e.addr < end);
            contents.extend(inside.filter_map(|e| pages::clip(e, start, end)));
            if contents[before..].iter().map(|e| e.npages).sum::<u64>() != npages {
                return Err(SnapshotError::Vanished(start));
            }
        }
        contents.sort_unstable_by_key(|e| e.addr);
        extents.append(&mut contents);
        if base.is_some() {
            dropped.extend(runs);
        }
        plan.spaces.push(space);
    }
    let npages = extents.iter().map(|e| e.npages).sum();
    let stopped_ns = manifest.identity.realtime_ns;
    manifest.identity.objects = crate::agent::collect::objects::collect(&plan, stopped_ns);
    manifest.memory = plan.into_state(extents);
    manifest.memory.base = base;
    manifest.memory.dropped = dropped;
    let Written {
        bytes, header_crc, ..
    } = writer.finish(&manifest, sync)?;
    Ok(Outcome {
        bytes_stored: bytes,
        pages: npages,
        header_crc,
        cpu_us: 0,
    })
}

/// Takes the contents of an object from wherever they were collected; they become pages of the
/// object's space.
fn take_contents(
    shared: &mut [SharedObject],
    descriptors: &mut DescriptorTable,
    space: &ObjectSpace,
) -> Vec<Extent> {
    let id = (space.dev, space.ino);
    let mut found = Vec::new();
    let mut take = |extents: &mut Vec<Extent>| {
        let extents = std::mem::take(extents);
        if found.is_empty() {
            found = extents;
        }
    };
    for object in shared.iter_mut().filter(|o| (o.dev, o.ino) == id) {
        take(&mut object.extents);
    }
    for file in &mut descriptors.files {
        if let Some((of, _, extents)) = file.contents_mut()
            && of == id
        {
            take(extents);
        }
    }
    found.sort_unstable_by_key(|e| e.addr);
    found
}

/// The extents of the image: none crosses the end of a piece.
fn held(plan: &Plan, stored: &[Extent]) -> Vec<Extent> {
    let mut out = Vec::with_capacity(stored.len());
    for piece in &plan.pieces {
        let (start, end) = (piece.vma.start, piece.vma.end);
        let source = match piece.how {
            How::Nothing => continue,
            How::Copied => &plan.copied[..],
            How::Scan | How::All | How::Readable => stored,
        };
        let first = source.partition_point(|e| e.addr + e.npages * PAGE <= start);
        let inside = source[first..].iter().take_while(|e| e.addr < end);
        out.extend(inside.filter_map(|e| pages::clip(e, start, end)));
    }
    out
}

/// Pages that changed, and of which the image holds nothing: what the base says of them
/// no longer counts. Where memory is not private the base never counts.
fn dropped(pieces: &[Piece], dirty: &Dirty, extents: &[Extent]) -> Vec<(u64, u64)> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    let mut add = |start: u64, end: u64| match out.last_mut() {
        _ if start >= end => {}
        Some(last) if last.0 + last.1 * PAGE == start => last.1 += (end - start) / PAGE,
        _ => out.push((start, (end - start) / PAGE)),
    };
    let mut next = 0;
    let mut without_extents = |start: u64, end: u64| {
        let mut at = start;
        while let Some(e) = extents.get(next).filter(|e| e.addr < end) {
            let e_end = e.addr + e.npages * PAGE;
            if e_end > at {
                add(at, e.addr.max(at));
                at = e_end;
            }
            if e_end > end {
                break;
            }
            next += 1;
        }
        add(at, end);
    };
    for piece in pieces {
        let (start, end) = (piece.vma.start, piece.vma.end);
        match piece.how {
            How::Nothing | How::Copied => without_extents(start, end),
            How::Scan | How::All | How::Readable => {
                for run in dirty.within(start, end) {
                    without_extents(run.start, run.end);
                }
            }
        }
    }
    out
}

/// Extents that lie side by side in memory and in the image become one, as far as the
/// ranges allow. After a lazy restore each of them was a mapping of its own, and the
/// next restore must not need more of them.
fn join_extents(extents: &mut Vec<Extent>, pieces: &[Piece]) {
    let mut next = 0;
    extents.dedup_by(|e, last| {
        while next < pieces.len() && pieces[next].vma.end <= e.addr {
            next += 1;
        }
        let whole = pieces.get(next).is_some_and(|p| p.vma.start <= last.addr);
        let fits = last.addr + last.npages * PAGE == e.addr
            && last.offset + last.npages * PAGE == e.offset;
        if whole && fits {
            last.npages += e.npages;
        }
        whole && fits
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::track::Change;
    use crate::image::state::{VmaKind, VmaState};

    fn piece(start: u64, end: u64, how: How) -> Piece {
        Piece {
            vma: VmaState {
                start: start * PAGE,
                end: end * PAGE,
                prot: 3,
                kind: VmaKind::Anon,
                flags: 0,
            },
            how,
        }
    }

    fn extent(addr: u64, npages: u64, offset: u64) -> Extent {
        Extent {
            addr: addr * PAGE,
            npages,
            offset: offset * PAGE,
        }
    }

    #[test]
    fn what_changed_and_is_not_held_is_dropped() {
        let pieces = [
            piece(0, 10, How::Scan),
            piece(10, 12, How::Nothing),
            piece(12, 20, How::Copied),
            piece(30, 40, How::All),
        ];
        let mut dirty = Dirty::new();
        dirty.insert(2 * PAGE, 8 * PAGE, Change::Present);
        dirty.insert(8 * PAGE, 35 * PAGE, Change::Absent);
        let mut plan = Plan::default();
        plan.pieces = pieces.to_vec();
        plan.copied = vec![extent(14, 2, 1)];
        // One extent crosses pieces and holes.
        let stored = [extent(3, 2, 10), extent(6, 1, 20), extent(32, 20, 30)];
        let extents = held(&plan, &stored);
        assert_eq!(
            extents,
            [
                extent(3, 2, 10),
                extent(6, 1, 20),
                extent(14, 2, 1),
                extent(32, 8, 30)
            ]
        );
        let pages: Vec<_> = dropped(&pieces, &dirty, &extents)
            .iter()
            .map(|&(addr, n)| (addr / PAGE, n))
            .collect();
        assert_eq!(pages, [(2, 1), (5, 1), (7, 7), (16, 4), (30, 2)]);
    }
}
