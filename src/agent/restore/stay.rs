//! Rollback: memory that is the same mapping now as at the checkpoint stays mapped, and only
//! the pages that have changed since are put back (US 5,802,267: the dirty page list).
//!
//! What has changed is what the generations since then hold or have dropped
//! ([`changed_since`], helper thread, before the stop), what the helper has seen since the
//! newest of them, and what the tracker sees now ([`look`], the leader, alone). A page too many
//! is no harm: each gets exactly what it had. Where anything is in doubt (no tracker, a
//! complete generation in between, another vdso) there is no [`Stay`], and all memory is
//! mapped anew; the same goes for single areas.

use crate::agent::checkpoint::increments::lives::Knowledge;
use crate::agent::checkpoint::increments::with_own;
use crate::agent::collect::memory::{self, How, PAGE, Piece, Plan};
use crate::agent::hooks::{self, maps::Maps};
use crate::agent::log;
use crate::agent::resume::ImageFile;
use crate::agent::track::blank::{push, without};
use crate::agent::track::pagemap::PageMap;
use crate::agent::track::{Change, Dirty, Kept, Open, fault, full, own};
use crate::image::chain::Sourced;
use crate::image::state::{Manifest, MemoryState, VmaKind, VmaState, vma_flag};
use crate::store::generation::GenerationRecord;
use crate::store::start::Claimed;

type Range = (u64, u64);

/// So many changed pages are put back in any case; more must not be half of all there is.
const MANY: u64 = 16384;
/// Pages that are put back and lie as near as this are protected by one walk.
const NEAR: u64 = 512 * PAGE;
/// Zero-initialised data of the C library behind its file.
const MOST_BSS: u64 = 1 << 20;

/// How memory becomes what it was.
#[derive(Debug, Default)]
pub struct Stay {
    /// What is mapped and must go, ascending.
    pub unmap: Vec<Range>,
    /// What must be mapped anew: areas of the checkpoint, or parts of them.
    pub areas: Vec<VmaState>,
    /// Their contents.
    pub pieces: Vec<Sourced>,
    /// What stays.
    pub parts: Vec<Part>,
    /// Those of them whose protection must be set: they are written to.
    pub open: Vec<Part>,
    /// Contents of what stays that must be put back.
    pub reads: Vec<Sourced>,
    /// What stays and had no page of its own.
    pub drops: Vec<Range>,
    /// What stays and is a mapping of an image: start, end, `vma_flag`s.
    pub images: Vec<(u64, u64, u32)>,
    /// The map as it was.
    pub mapped: Vec<Range>,
    /// What the tracker can rely on afterwards.
    pub kept: Kept,
}

/// A part of an area that stays mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub start: u64,
    pub end: u64,
    pub prot: u32,
    flags: u32,
    /// What is discarded here is nothing (and not an image's page).
    empties: bool,
}

/// What generations have changed since `to`, when they lead back to it one by one from the
/// one that the tracker stands on.
pub fn changed_since(claimed: &Claimed, base: Option<u64>, to: &GenerationRecord) -> Option<Dirty> {
    let base = base?;
    let mut changed = Dirty::new();
    if base == to.generation {
        return Some(changed);
    }
    let records = claimed.job.generations();
    let record = records.iter().find(|record| record.generation == base)?;
    let found = claimed.job.open_generation(record, false).ok()?;
    let member = found.members.first()?;
    let older = member.older.iter().map(|link| link.generation);
    let since = std::iter::once(base)
        .chain(older)
        .position(|generation| generation == to.generation)?;
    for (_, image) in member.chain().take(since) {
        let memory = &image.manifest.memory;
        for e in &memory.extents {
            changed.insert(e.addr, e.addr + e.npages * PAGE, Change::Present);
        }
        for &(addr, npages) in &memory.dropped {
            changed.insert(addr, addr + npages * PAGE, Change::Absent);
        }
    }
    Some(changed)
}

/// Finds out what can stay. The caller is the only thread of the process but for dead ones,
/// and writes to no memory of the program from here on, but to the library's own data, the C
/// library's, and, by the kernel, to its `rseq` area.
pub fn look(
    mut pages: Knowledge,
    manifest: &Manifest,
    pieces: &[Sourced],
    store_root: &[u8],
    rseq: u64,
) -> Option<Stay> {
    let mut plan = with_own(store_root, memory::collect).ok()?;
    let then = &manifest.memory;
    if (plan.vvar_start, plan.vdso_end) != (then.vvar_start, then.vdso_end) {
        return None;
    }
    // What is new is of no interest: it goes.
    let mut next = 0;
    plan.pieces.retain(|piece| {
        while then
            .vmas
            .get(next)
            .is_some_and(|vma| vma.end <= piece.vma.start)
        {
            next += 1;
        }
        then.vmas
            .get(next)
            .is_some_and(|vma| vma.start < piece.vma.end)
    });
    if guards_differ(then, &plan) {
        log::line(format_args!(
            "all memory is mapped anew: other guard regions"
        ));
        return None;
    }
    pages.read_flags(&mut plan);
    if let Err(error) = pages.look(&plan.pieces) {
        log::line(format_args!("all memory is mapped anew: {error}"));
        return None;
    }
    let mut changed = std::mem::take(&mut pages.changed);
    for (start, end) in written_by_the_leader(&plan, rseq) {
        changed.insert(start, end, Change::Present);
    }
    let parts = parts(&then.vmas, &plan.pieces);
    let mut stay = put_back(&then.vmas, pieces, parts, &changed);
    let back: u64 = stay.reads.iter().map(|piece| piece.npages).sum();
    let all: u64 = pieces.iter().map(|piece| piece.npages).sum();
    if back > MANY && back > all / 2 {
        return None;
    }
    // Where pages are (or may be) protected by us the program's own protection comes first.
    let guarded = fault::active();
    stay.open = stay.parts.clone();
    stay.open.retain(|part| {
        let written = stay
            .reads
            .iter()
            .any(|r| part.start < r.end() && r.addr < part.end);
        guarded || written && part.prot & libc::PROT_WRITE as u32 == 0
    });
    stay.images = images(&stay.parts, &plan.pieces);
    let open = pages.tracker.left_open().cloned().unwrap_or_default();
    stay.kept = kept(&stay, pieces, &open);
    let mut keep: Vec<Range> = stay
        .parts
        .iter()
        .map(|part| (part.start, part.end))
        .collect();
    if plan.vdso_end != 0 {
        keep.push((plan.vvar_start, plan.vdso_end));
        keep.sort_unstable();
    }
    let mapped = std::mem::take(&mut plan.mapped);
    without(&mapped, &keep, |start, end| match stay.unmap.last_mut() {
        Some(last) if last.1 == start => last.1 = end,
        _ => stay.unmap.push((start, end)),
    });
    stay.mapped = mapped;
    log::line(format_args!(
        "memory stays mapped: {} parts, {back} pages put back, {} ranges emptied, {} areas mapped anew",
        stay.parts.len(),
        stay.drops.len(),
        stay.areas.len(),
    ));
    Some(stay)
}

/// What the tracker needs no look at the page tables for. It has to look where a page that
/// nobody has written is content.
fn kept(stay: &Stay, pieces: &[Sourced], before: &Open) -> Kept {
    let parts = stay.parts.iter().filter(|part| part.empties);
    let parts: Vec<Range> = parts.map(|part| (part.start, part.end)).collect();
    let mut contents: Vec<Range> = Vec::new();
    for piece in pieces {
        push(&mut contents, (piece.addr, piece.end()));
    }
    let mut kept = Kept::default();
    without(&parts, &contents, |start, end| {
        push(&mut kept.blank, (start, end));
    });
    let reads = stay.reads.iter();
    kept.open = before.next(reads.map(|read| (read.addr, read.end())));
    if !kept.open.ranges.is_empty() {
        return kept;
    }
    // What lies between two pages that are put back exists where the image has it.
    let all_there = |start: u64, end: u64| {
        let at = contents.partition_point(|range| range.1 <= start);
        contents.get(at).is_some_and(|r| r.0 <= start && end <= r.1)
    };
    for read in &stay.reads {
        match kept.written.last_mut() {
            Some(last) if read.addr <= last.1 + NEAR && all_there(last.0, read.end()) => {
                last.1 = read.end();
            }
            _ => kept.written.push((read.addr, read.end())),
        }
    }
    kept
}

/// Guard regions stay whatever is discarded, and nothing can be put back into them.
fn guards_differ(then: &MemoryState, plan: &Plan) -> bool {
    if then.guarded.is_empty() && !hooks::memory::guards_seen() {
        return false;
    }
    let now = PageMap::open().and_then(|mut pagemap| full::guarded(&mut pagemap, &plan.pieces));
    now.map_or(true, |now| now != then.guarded)
}

/// What the caller (and the kernel for it) may still write to.
fn written_by_the_leader(plan: &Plan, rseq: u64) -> Vec<Range> {
    let mut ranges = own::data(&plan.pieces);
    let mut behind = None;
    for piece in &plan.pieces {
        let vma = &piece.vma;
        let is_of_libc = match &vma.kind {
            VmaKind::FilePrivate { path, .. } => {
                let name = path.rsplit(|&b| b == b'/').next().unwrap_or(path);
                [&b"libc.so"[..], b"libc-", b"ld-"]
                    .iter()
                    .any(|n| name.starts_with(n))
            }
            VmaKind::Anon => behind == Some(vma.start) && vma.end - vma.start <= MOST_BSS,
            _ => false,
        };
        behind = is_of_libc.then_some(vma.end);
        if is_of_libc && vma.prot & libc::PROT_WRITE as u32 != 0 {
            ranges.push((vma.start, vma.end));
        }
    }
    if rseq != 0 {
        let page = rseq & !(PAGE - 1);
        // It is aligned and shorter than a page, but may lie at the end of one.
        ranges.push((page, page + 2 * PAGE));
    }
    ranges
}

/// The parts of the areas of the checkpoint that are the same mappings now.
fn parts(then: &[VmaState], now: &[Piece]) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut next = 0;
    for vma in then {
        while now
            .get(next)
            .is_some_and(|piece| piece.vma.end <= vma.start)
        {
            next += 1;
        }
        for piece in now[next..].iter().take_while(|p| p.vma.start < vma.end) {
            if same(vma, piece) {
                parts.push(Part {
                    start: vma.start.max(piece.vma.start),
                    end: vma.end.min(piece.vma.end),
                    prot: vma.prot,
                    flags: vma.flags,
                    empties: piece.how == How::Scan,
                });
            }
        }
    }
    parts
}

fn same(then: &VmaState, piece: &Piece) -> bool {
    let now = &piece.vma;
    let special = vma_flag::HUGETLB | vma_flag::LOCKED;
    let kind = match (&then.kind, &now.kind) {
        (VmaKind::Anon, VmaKind::Anon) | (VmaKind::Heap, VmaKind::Heap) => true,
        // The kernel grows it from its lower end: all of it or nothing.
        (VmaKind::Stack, VmaKind::Stack) => now.start <= then.start && then.end <= now.end,
        (
            VmaKind::FilePrivate { path, offset },
            VmaKind::FilePrivate {
                path: now_path,
                offset: now_offset,
            },
        ) => {
            path == now_path
                && offset.wrapping_sub(then.start) == now_offset.wrapping_sub(now.start)
        }
        _ => false,
    };
    kind && (then.prot, then.flags) == (now.prot, now.flags)
        && then.flags & special == 0
        && matches!(piece.how, How::Scan | How::All | How::Readable)
}

/// Which contents must be put back into `parts`, and what is not in them any more.
fn put_back(then: &[VmaState], pieces: &[Sourced], mut parts: Vec<Part>, changed: &Dirty) -> Stay {
    let mut stay = Stay::default();
    // A list that grows costs a fault for each page of each of its sizes.
    stay.reads.reserve(changed.runs().len());
    parts.retain(|part| {
        let (reads, drops) = (stay.reads.len(), stay.drops.len());
        for run in changed.within(part.start, part.end) {
            let mut at = run.start;
            for piece in overlapping(pieces, run.start, run.end) {
                let read = clipped(piece, run.start, run.end);
                if at < read.addr {
                    stay.drops.push((at, read.addr));
                }
                at = read.end();
                stay.reads.push(read);
            }
            if at < run.end {
                stay.drops.push((at, run.end));
            }
        }
        let can = part.empties || stay.drops.len() == drops;
        if !can {
            stay.reads.truncate(reads);
            stay.drops.truncate(drops);
        }
        can
    });
    let kept: Vec<Range> = parts.iter().map(|part| (part.start, part.end)).collect();
    for vma in then {
        without(&[(vma.start, vma.end)], &kept, |start, end| {
            let mut part = VmaState {
                start,
                end,
                ..vma.clone()
            };
            match &mut part.kind {
                VmaKind::FilePrivate { offset, .. }
                | VmaKind::FileShared { offset, .. }
                | VmaKind::Shared { offset, .. }
                | VmaKind::PrivateOf { offset, .. } => *offset += start - vma.start,
                VmaKind::Anon | VmaKind::Heap | VmaKind::Stack => {}
            }
            stay.areas.push(part);
            let contents = overlapping(pieces, start, end);
            stay.pieces
                .extend(contents.map(|piece| clipped(piece, start, end)));
        });
    }
    stay.parts = parts;
    stay
}

fn overlapping(pieces: &[Sourced], start: u64, end: u64) -> impl Iterator<Item = &Sourced> {
    let first = pieces.partition_point(|piece| piece.end() <= start);
    pieces[first..]
        .iter()
        .take_while(move |piece| piece.addr < end)
}

fn clipped(piece: &Sourced, start: u64, end: u64) -> Sourced {
    let (from, to) = (piece.addr.max(start), piece.end().min(end));
    Sourced {
        addr: from,
        npages: (to - from) / PAGE,
        file: piece.file,
        offset: piece.offset + (from - piece.addr),
    }
}

/// What stays and is mapped from images.
fn images(parts: &[Part], now: &[Piece]) -> Vec<(u64, u64, u32)> {
    let mut images = Vec::new();
    for piece in now.iter().filter(|piece| piece.how == How::All) {
        let (start, end) = (piece.vma.start, piece.vma.end);
        let first = parts.partition_point(|part| part.end <= start);
        for part in parts[first..].iter().take_while(|part| part.start < end) {
            images.push((start.max(part.start), end.min(part.end), part.flags));
        }
    }
    images
}

/// The files of [`Stay::images`], each with an address where it is mapped.
pub fn image_files(images: &[(u64, u64, u32)]) -> Vec<ImageFile> {
    let mut files: Vec<ImageFile> = Vec::new();
    if images.is_empty() {
        return files;
    }
    let Ok(mut maps) = Maps::open() else {
        return files;
    };
    for &(start, ..) in images {
        if let Ok(Some(mapping)) = maps.at(start)
            && !files
                .iter()
                .any(|f| (f.dev, f.ino) == (mapping.dev, mapping.ino))
        {
            files.push(ImageFile {
                dev: mapping.dev,
                ino: mapping.ino,
                example: start,
            });
        }
    }
    files
}

#[cfg(test)]
mod tests;
