//! What the helper knows of the program's pages from one checkpoint to the next: the
//! tracker, all that has changed since the last published generation, and which
//! generation the next one may stand on (docs/INCREMENTS.md).
//!
//! A sweep's result is lost to the next sweep, so it is kept here until a generation that
//! holds it is published: a checkpoint that fails, or is put off, loses nothing.
//! Helper thread; [`prepare_restored`] before the threads of a restored program run.

use super::{CheckpointError, store_error};
use crate::agent::collect::memory::{self, How, Piece, Plan};
use crate::agent::headroom;
use crate::agent::procfs::OwnFd;
use crate::agent::settings::Settings;
use crate::agent::side::SideBuffer;
use crate::agent::snapshot::choose::{self, Costs, Method, Room};
use crate::agent::snapshot::contents::Contents;
use crate::agent::snapshot::copy::Buffer;
use crate::agent::snapshot::pages::Chunk;
use crate::agent::snapshot::precopy::{self, Live};
use crate::agent::snapshot::{Pages, SnapshotError};
use crate::agent::state::AGENT;
use crate::agent::stop::now_ns;
use crate::agent::track::pagemap::PageMap;
use crate::agent::track::{self, Change, Dirty, Kept, Probe, TrackError, Tracker, blank, full};
use crate::agent::{callsites, hooks, log, procfs, refusal};
use crate::config::{Compress, SnapshotChoice, TrackerChoice};
use crate::image::pack;
use crate::image::state::{Base, VmaState};
use crate::image::writer::{ImageSink, ImageWriter};
use crate::store::generation::{GenerationKind, GenerationRecord};
use std::sync::atomic::{AtomicPtr, Ordering};

/// A residue of no more pages than this is not worth another round while the program
/// runs: copying it takes a fraction of a millisecond.
const SMALL: u64 = 512;

/// Of so many generations it is known what no tracker has seen since.
const MOST_KNOWN: usize = 256;

/// The helper's memory of the program's pages.
pub struct Increments {
    pub tracker: Box<dyn Tracker>,
    /// What has changed since `base`.
    pub dirty: Dirty,
    /// The generation that the next one may stand on; `None`: the next one is complete.
    base: Option<u64>,
    /// What the base holds of shared memory and of files without a name.
    pub contents: Contents,
    pub buffer: Buffer,
    pub costs: Costs,
    pub live: Live,
    pagemap: Option<PageMap>,
    /// For guard regions.
    guards: Option<PageMap>,
    /// The map as it was before the latest stop, with VmFlags, and which advice it knows.
    known: Plan,
    known_advice: u32,
    /// Pages that were left for the latest stop.
    residue: u64,
    /// `hooks::memory::unseen_number` at the latest stop, and of published generations.
    unseen: u32,
    unseen_of: Vec<(u64, u32)>,
    /// Only a child may write, whose limits are its own.
    by_child: bool,
    futile: Futile,
    /// Where blank pages were content at the latest sweep, and where zeros were.
    content: Vec<blank::Range>,
    over_files: Vec<blank::Range>,
}

/// Pre-copy is in vain where the program writes faster than the helper copies: then it is
/// left out for a while, longer each time that it was in vain again.
#[derive(Debug, Default)]
struct Futile {
    times: u32,
    left: u32,
}

impl Futile {
    const MOST: u32 = 15;

    fn skip(&mut self) -> bool {
        let skip = self.left > 0;
        self.left = self.left.saturating_sub(1);
        skip
    }

    fn learn(&mut self, in_vain: bool) {
        self.times = match in_vain {
            true => (self.times * 2 + 1).min(Futile::MOST),
            false => 0,
        };
        self.left = self.times;
    }
}

/// What is known of the program's pages, for a rollback.
pub struct Knowledge {
    pub tracker: Box<dyn Tracker>,
    /// Everything seen to have changed since the generation gone back to.
    pub changed: Dirty,
    known: Plan,
    known_advice: u32,
    content: Vec<blank::Range>,
}

impl Knowledge {
    /// What the tracker sees now, added to what was seen before.
    pub fn look(&mut self, pieces: &[Piece]) -> Result<(), TrackError> {
        let mut seen = Dirty::new();
        self.tracker.look(pieces, &mut seen)?;
        blank::newly_content(&self.content, &blank::content(pieces), &mut seen);
        self.changed.unite(&seen);
        Ok(())
    }

    /// VmFlags of the present map.
    pub fn read_flags(&self, plan: &mut Plan) {
        let unchanged = hooks::memory::advice_number() == self.known_advice;
        if !(unchanged && plan.take_flags(&self.known)) {
            plan.read_flags();
        }
    }
}

/// What is ready before the stop.
pub struct Ahead<S> {
    pub pages: Pages<S>,
    /// Changed, and not in the image yet.
    pub pending: Dirty,
    /// Has the tracker been swept for this checkpoint?
    swept: bool,
    pub base: Option<Base>,
    pub room: Room,
    pub precopy_us: u64,
    pub precopied: u64,
}

/// Does the kernel write to pages some time after it has looked them up?
fn is_written_late() -> bool {
    use refusal::Kind::{DirectIo, MemoryFile};
    refusal::was_noted(DirectIo) || refusal::was_noted(MemoryFile)
}

/// How the image is compressed.
fn packing(choice: Compress) -> Option<pack::Method> {
    match choice {
        Compress::None => None,
        Compress::Lz4 => Some(pack::Method::Lz4),
        Compress::Zstd => Some(pack::Method::Zstd),
    }
}

/// Which ranges are the library's own.
pub fn with_own<R>(store_root: &[u8], f: impl FnOnce(&memory::Own<'_>) -> R) -> R {
    let mut store = store_root.to_vec();
    store.extend_from_slice(b"/jobs");
    let mut store = procfs::real_path(&store).unwrap_or(store);
    store.push(b'/');
    f(&memory::Own {
        store: &store,
        is_cache: callsites::cache::is_cache_path,
    })
}

/// What a round of pre-copy can deal with: all private memory of the map.
fn stored_ranges(plan: &Plan) -> Vec<(u64, u64)> {
    let private = |piece: &&Piece| !matches!(piece.how, How::Nothing | How::Copied);
    let pieces = plan.pieces.iter().filter(private);
    pieces.map(|p| (p.vma.start, p.vma.end)).collect()
}

/// The library's writable data: the mappings side by side around the agent's block.
pub fn own_data(pieces: &[Piece]) -> Vec<(u64, u64)> {
    let here = &raw const AGENT as u64;
    let Some(middle) = pieces
        .iter()
        .position(|p| p.vma.start <= here && here < p.vma.end)
    else {
        return Vec::new();
    };
    let writable = |p: &Piece| p.vma.prot & libc::PROT_WRITE as u32 != 0;
    let joined = |a: &Piece, b: &Piece| a.vma.end == b.vma.start && writable(a) && writable(b);
    let (mut first, mut last) = (middle, middle);
    while first > 0 && joined(&pieces[first - 1], &pieces[first]) {
        first -= 1;
    }
    while last + 1 < pieces.len() && joined(&pieces[last], &pieces[last + 1]) {
        last += 1;
    }
    // The kernel may have joined large neighbours to it.
    const REACH: u64 = 4 << 20;
    let all = pieces[first..=last].iter();
    all.map(|p| {
        (
            p.vma
                .start
                .max(here.saturating_sub(REACH) & !(memory::PAGE - 1)),
            p.vma.end.min((here + REACH) & !(memory::PAGE - 1)),
        )
    })
    .filter(|(start, end)| start < end)
    .collect()
}

/// How many increments a generation consists of.
pub(super) fn chain_length(records: &[&GenerationRecord], generation: u64) -> Option<u32> {
    let mut at = generation;
    let mut length = 0;
    loop {
        let record = records.iter().find(|r| r.generation == at)?;
        match (record.kind_now(), record.needs()) {
            (GenerationKind::Full, _) => return Some(length),
            (GenerationKind::Increment, Some(parent)) if parent < at => at = parent,
            _ => return None,
        }
        length += 1;
    }
}

impl Increments {
    pub fn new(choice: TrackerChoice) -> Increments {
        Increments::with(choice, None, Live::new())
    }

    fn with(choice: TrackerChoice, fd: Option<OwnFd>, live: Live) -> Increments {
        Increments {
            tracker: track::choose_adopting(choice, fd, || Probe::for_choice(choice)),
            dirty: Dirty::new(),
            base: None,
            contents: Contents::default(),
            buffer: Buffer::default(),
            costs: Costs::default(),
            live,
            pagemap: None,
            guards: None,
            known: Plan::default(),
            known_advice: 0,
            residue: 0,
            unseen: 0,
            unseen_of: Vec::new(),
            by_child: false,
            futile: Futile::default(),
            content: Vec::new(),
            over_files: Vec::new(),
        }
    }

    fn sweep(&mut self, pieces: &[Piece], seen: &mut Dirty) -> Result<(), TrackError> {
        self.tracker.sweep(pieces, seen)?;
        let content = blank::content(pieces);
        blank::newly_content(&self.content, &content, seen);
        let over_files = blank::over_files(pieces);
        let before = &self.over_files;
        let mut again = Dirty::new();
        blank::newly_over_files(PageMap::open, pieces, before, &over_files, &mut again)?;
        self.tracker.exist(&blank::existing(pieces, &again));
        seen.unite(&again);
        (self.content, self.over_files) = (content, over_files);
        Ok(())
    }

    /// Must all that is written be left to a child?
    pub fn by_child(&self) -> bool {
        self.by_child
    }

    /// The present contents are those of `generation`, as far as the tracker can tell later.
    fn stand_on(&mut self, store_root: &[u8], generation: u64, kept: Option<&Kept>) {
        if !self.tracker.increments() {
            return;
        }
        let Ok(plan) = with_own(store_root, memory::collect) else {
            return;
        };
        self.content = blank::content(&plan.pieces);
        self.over_files = blank::over_files(&plan.pieces);
        let begun = match kept {
            Some(kept) => self.tracker.begin_again(&plan.pieces, kept),
            None => self.tracker.begin(&plan.pieces),
        };
        match begun {
            Ok(()) => self.base = Some(generation),
            Err(error) => log::line(format_args!("tracker: {error}")),
        }
        // The restored helper has changed a few words of the library's data already.
        for range in own_data(&plan.pieces) {
            self.dirty.insert(range.0, range.1, Change::Present);
        }
    }

    /// The generation that everything which has changed is known since; `to`: since when it
    /// is to be known.
    pub fn standing_on(&self, to: u64) -> Option<u64> {
        let net = AGENT.net_installed.load(Ordering::Relaxed);
        let of = self.unseen_of.iter().find(|of| of.0 == to)?;
        let all = net && of.1 == hooks::memory::unseen_number();
        self.base.filter(|_| all && self.tracker.increments())
    }

    /// What the thread that goes back must know. This helper ends.
    pub fn pass_on(&mut self) -> Knowledge {
        let tracker = std::mem::replace(&mut self.tracker, Box::new(full::Full::open()));
        Knowledge {
            tracker,
            changed: std::mem::take(&mut self.dirty),
            known: std::mem::take(&mut self.known),
            known_advice: self.known_advice,
            content: std::mem::take(&mut self.content),
        }
    }

    /// A generation with everything in `dirty` is durable.
    pub fn published(&mut self, generation: u64) {
        if self.unseen_of.len() == MOST_KNOWN {
            self.unseen_of.remove(0);
        }
        self.unseen_of.push((generation, self.unseen));
        self.dirty.clear();
        self.contents.published();
        self.base = self.tracker.increments().then_some(generation);
    }

    /// Everything that exists, for a complete image. What was known is of no use any more.
    pub fn everything(&mut self, plan: &Plan) -> Result<(), SnapshotError> {
        self.base = None;
        self.dirty.clear();
        let pagemap = match &mut self.pagemap {
            Some(pagemap) => pagemap,
            None => self.pagemap.insert(PageMap::open()?),
        };
        Ok(full::everything(pagemap, &plan.pieces, &mut self.dirty)?)
    }

    /// What the next image may stand on.
    fn base(&mut self, records: &[&GenerationRecord], longest: u32) -> Option<Base> {
        let generation = self.base.filter(|_| self.tracker.increments())?;
        let length = chain_length(records, generation)?;
        let record = records.iter().find(|r| r.generation == generation)?;
        let header_crc = record.members.first()?.header_crc;
        (length < longest).then_some(Base {
            generation,
            header_crc,
        })
    }

    /// Everything that can be done before the stop.
    pub fn ahead<S: ImageSink>(
        &mut self,
        sink: S,
        generation: u64,
        records: &[&GenerationRecord],
        settings: &Settings,
    ) -> Result<Ahead<S>, CheckpointError> {
        let started = now_ns();
        let base = self.base(records, settings.config.chain);
        self.by_child = headroom::file_size_is_limited();
        if base.is_none() {
            self.base = None;
        }
        let mut writer = ImageWriter::new(sink, generation);
        if let Some(method) = packing(settings.config.compress) {
            writer = writer.packed(method);
        }
        let mut ahead = Ahead {
            pages: Pages::new(writer),
            pending: Dirty::new(),
            swept: false,
            base,
            room: Room::look(),
            precopy_us: 0,
            precopied: 0,
        };
        with_own(&settings.store_root, |own| {
            // A map that cannot be saved is refused at the stop, in words.
            if let Ok(plan) = memory::collect(own) {
                self.precopy(&mut ahead, plan, own)?;
            }
            Ok::<(), SnapshotError>(())
        })
        .map_err(store_error)?;
        self.contents
            .begin(self.tracker.increments(), ahead.base.is_some());
        if !self.by_child {
            self.contents_ahead(&mut ahead, settings)
                .map_err(store_error)?;
        }
        self.prepare_buffer(&ahead, settings.config.snapshot);
        ahead.precopied = ahead.pages.written;
        ahead.precopy_us = (now_ns() - started) / 1000;
        Ok(ahead)
    }

    fn precopy<S: ImageSink>(
        &mut self,
        ahead: &mut Ahead<S>,
        mut plan: Plan,
        own: &memory::Own<'_>,
    ) -> Result<(), SnapshotError> {
        let live = self.tracker.live() && !self.by_child && !is_written_late();
        if live && self.sweep_ahead(ahead, &plan)? {
            let mut left = ahead.pending.present_pages();
            let mut before = u64::MAX;
            let mut rounds = 0;
            while rounds < precopy::MOST_ROUNDS && left > SMALL && left < before / 2 {
                if rounds == 0 && ahead.base.is_some() && self.futile.skip() {
                    break;
                }
                let wanted = std::mem::take(&mut ahead.pending);
                let rest = &mut ahead.pending;
                precopy::round(
                    &mut ahead.pages,
                    &mut self.live,
                    &plan.pieces,
                    &wanted,
                    rest,
                )?;
                rounds += 1;
                // A mapping may have grown between the look at the map and the sweep.
                let mut elsewhere = wanted;
                elsewhere.remove(&stored_ranges(&plan));
                ahead.pending.unite(&elsewhere);
                match memory::collect(own) {
                    Ok(now) => plan = now,
                    Err(_) => break,
                }
                if !self.sweep_ahead(ahead, &plan)? {
                    break;
                }
                before = left;
                left = ahead.pending.present_pages();
                if rounds == 1 && ahead.base.is_some() {
                    self.futile.learn(left > before / 2);
                }
            }
        }
        self.know_flags(plan);
        Ok(())
    }

    /// Stores what is new of shared memory. What cannot be read now is left for the stop, which
    /// looks at all of it again.
    fn contents_ahead<S: ImageSink>(
        &mut self,
        ahead: &mut Ahead<S>,
        settings: &Settings,
    ) -> Result<(), SnapshotError> {
        let Ok(mut plan) = with_own(&settings.store_root, memory::collect) else {
            return Ok(());
        };
        let mut side = SideBuffer::default();
        let mut error = None;
        let pages = &mut ahead.pages;
        let mut outlet = |places: &[u64], data: &[u8]| {
            let mut chunks = Vec::with_capacity(places.len());
            for (&addr, data) in places.iter().zip(data.chunks_exact(memory::PAGE as usize)) {
                let over_file = false;
                chunks.push(Chunk {
                    addr,
                    data,
                    over_file,
                });
            }
            pages.put(&chunks).map_err(|failed| {
                error = Some(failed);
                libc::EIO
            })
        };
        let read = plan.shared_ahead(&mut side, &mut self.contents, &mut outlet);
        match (error, read) {
            (Some(error), _) => return Err(error),
            (None, Err(error)) => log::line(format_args!("before the stop: {error}")),
            (None, Ok(())) => {}
        }
        ahead.pages.end_pass();
        Ok(())
    }

    /// Was the tracker swept while the program ran, though the kernel may write to pages after
    /// it has looked them up? Known only now: such a generation is not to be.
    pub fn swept_too_early<S>(ahead: &Ahead<S>) -> bool {
        ahead.swept && is_written_late()
    }

    /// One sweep while the program runs; false when the tracker has failed.
    fn sweep_ahead<S: ImageSink>(
        &mut self,
        ahead: &mut Ahead<S>,
        plan: &Plan,
    ) -> Result<bool, SnapshotError> {
        let mut seen = Dirty::new();
        let first = !std::mem::replace(&mut ahead.swept, true);
        if let Err(error) = self.sweep(&plan.pieces, &mut seen) {
            log::line(format_args!("tracker: {error}"));
            (self.base, ahead.base, ahead.swept) = (None, None, false);
            ahead.pending.clear();
            return Ok(false);
        }
        if first && ahead.base.is_none() {
            self.everything(plan)?;
            let seen = blank::existing(&plan.pieces, &self.dirty);
            self.tracker.exist(&seen);
            ahead.pending = self.dirty.clone();
        } else if first {
            self.dirty.unite(&seen);
            ahead.pending = self.dirty.clone();
        } else {
            self.dirty.unite(&seen);
            ahead.pending.unite(&seen);
        }
        Ok(true)
    }

    /// Reads VmFlags, unless the map and the flags are those of the time before.
    fn know_flags(&mut self, mut plan: Plan) {
        let advice = hooks::memory::advice_number();
        let unchanged = advice == self.known_advice && plan.take_flags(&self.known);
        if !unchanged {
            plan.read_flags();
        }
        (self.known, self.known_advice) = (plan, advice);
    }

    /// At the stop: the flags of the map, as far as they are known.
    pub fn flags(&self, plan: &mut Plan) -> bool {
        hooks::memory::advice_number() == self.known_advice && plan.take_flags(&self.known)
    }

    /// Room for the residue that is to be expected, if copying it may be the best way.
    fn prepare_buffer<S>(&mut self, ahead: &Ahead<S>, choice: SnapshotChoice) {
        let asked = matches!(choice, SnapshotChoice::Copy);
        if choice == SnapshotChoice::Fork {
            return;
        }
        let pending = if ahead.swept {
            ahead.pending.present_pages()
        } else {
            0
        };
        let expected = pending.max(self.residue.min(ahead.room.resident));
        let limit = if asked {
            ahead.room.resident / 4 + 4096
        } else {
            let worth = self.costs.worth_a_fork(ahead.room.tables);
            worth.min(ahead.room.resident / 8 + 4096) + SMALL
        };
        if expected > limit {
            return;
        }
        // What the program does next may be more than what it did last.
        let least = SMALL + ahead.room.resident / 64;
        let wanted = (expected + expected / 2 + SMALL).max(least).min(limit);
        if wanted > self.buffer.warm_pages()
            && ahead.room.has(wanted)
            && let Err(error) = self.buffer.prepare(wanted)
        {
            log::line(format_args!("{error}"));
        }
    }

    /// At the stop: what is still to be stored, into `pending`. [`Increments::keep`] must
    /// follow, whatever becomes of the checkpoint; it can wait until the program runs.
    pub fn residue<S: ImageSink>(
        &mut self,
        ahead: &mut Ahead<S>,
        plan: &mut Plan,
    ) -> Result<(), SnapshotError> {
        self.unseen = hooks::memory::unseen_number();
        let mut seen = Dirty::new();
        let swept = self.sweep(&plan.pieces, &mut seen);
        if let Err(error) = &swept {
            log::line(format_args!("tracker: {error}"));
            ahead.base = None;
        }
        if swept.is_err() || (ahead.base.is_none() && !ahead.swept) {
            // What was stored ahead may be gone by now, and nobody would say so.
            ahead.pages.forget_all();
            if swept.is_err() || self.tracker.increments() {
                self.everything(plan)?;
                seen = std::mem::take(&mut self.dirty);
            } else {
                self.base = None;
                self.dirty.clear();
            }
            ahead.pending = seen;
        } else if !ahead.swept && !self.dirty.is_empty() {
            // Nothing was stored ahead: also what earlier attempts have seen.
            ahead.pending = std::mem::take(&mut self.dirty);
            ahead.pending.unite(&seen);
        } else if ahead.pending.is_empty() {
            ahead.pending = seen;
        } else {
            ahead.pending.unite(&seen);
        }
        // A map of its own: where a scan does not tell of guards it is read word by word.
        let guards = match &mut self.guards {
            Some(guards) => guards,
            None => self.guards.insert(PageMap::open()?),
        };
        if !hooks::memory::guards_seen() && full::has_guards(guards, &ahead.pending)? {
            hooks::memory::note_guards();
        }
        if hooks::memory::guards_seen() {
            if !full::tells_guards(guards)? {
                return Err(SnapshotError::Guards);
            }
            plan.guarded = full::guarded(guards, &plan.pieces)?;
            for &(start, npages) in &plan.guarded {
                let end = start + npages * memory::PAGE;
                ahead.pending.insert(start, end, Change::Absent);
            }
        }
        self.residue = ahead.pending.present_pages();
        Ok(())
    }

    /// What was left for the stop has changed since the base as well.
    pub fn keep(&mut self, residue: &Dirty) {
        self.dirty.unite(residue);
    }

    /// How many pages were left for the latest stop.
    pub fn residue_pages(&self) -> u64 {
        self.residue
    }

    pub fn method<S>(&self, ahead: &Ahead<S>, choice: SnapshotChoice) -> Method {
        if self.by_child {
            return Method::Fork;
        }
        let warm = self.buffer.warm_pages();
        // Without the net the kernel's writes into guarded pages would fail.
        let guarding = AGENT.net_installed.load(Ordering::Relaxed)
            && !refusal::was_noted(refusal::Kind::MemoryFile);
        let (pages, costs) = (self.residue, &self.costs);
        choose::choose(choice, pages, warm, costs, &ahead.room, guarding)
    }

    /// After the checkpoint: memory that is not worth keeping goes back.
    pub fn shrink(&mut self, room: &Room) {
        self.buffer
            .shrink((8 << 20) + room.resident * memory::PAGE / 64);
    }
}

static RESTORED: AtomicPtr<Increments> = AtomicPtr::new(std::ptr::null_mut());

/// In the restored helper, before it changes anything but a few words of the library's own
/// data: what is written from now on has changed since `generation`.
///
/// After a rollback `fd` is the tracker's descriptor of the life before, `kept` what is known
/// of the memory that it watches, and `flags` are the areas with their VmFlags.
pub fn prepare_restored(
    settings: &Settings,
    generation: u64,
    fd: Option<OwnFd>,
    kept: Option<&Kept>,
    flags: Vec<VmaState>,
) {
    let live = Live::cold();
    let kept = kept.filter(|_| fd.is_some());
    let mut increments = Box::new(Increments::with(settings.config.tracker, fd, live));
    if !flags.is_empty() {
        increments.known = Plan::with_flags(flags);
        increments.known_advice = hooks::memory::advice_number();
    }
    let unseen = hooks::memory::unseen_number();
    increments.unseen_of.push((generation, unseen));
    increments.stand_on(&settings.store_root, generation, kept);
    RESTORED.store(Box::into_raw(increments), Ordering::SeqCst);
}

/// Takes what [`prepare_restored`] has left, once.
pub fn take_restored() -> Option<Increments> {
    let left = RESTORED.swap(std::ptr::null_mut(), Ordering::SeqCst);
    // SAFETY: made by Box::into_raw in this very thread, taken once.
    (!left.is_null()).then(|| *unsafe { Box::from_raw(left) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_in_vain_is_tried_again_later() {
        let mut futile = Futile::default();
        let mut tries = Vec::new();
        for checkpoint in 0..40 {
            if !futile.skip() {
                tries.push(checkpoint);
                futile.learn(true);
            }
        }
        assert_eq!(tries, [0, 2, 6, 14, 30]);
        while futile.skip() {}
        futile.learn(false);
        assert!(!futile.skip());
    }

    #[test]
    fn the_length_of_a_chain() {
        let record = |generation, parent, kind| GenerationRecord {
            generation,
            parent,
            kind,
            ..Default::default()
        };
        use GenerationKind::{Full, Increment};
        let all = [
            record(3, None, Full),
            record(4, Some(3), Increment),
            record(6, Some(4), Increment),
            record(7, Some(6), Full),
            record(8, Some(5), Increment),
            record(9, Some(9), Increment),
        ];
        let all: Vec<_> = all.iter().collect();
        let lengths: Vec<_> = (3..=10).map(|g| chain_length(&all, g)).collect();
        assert_eq!(
            lengths,
            [Some(0), Some(1), None, Some(2), Some(0), None, None, None]
        );
    }
}
