//! What the helper knows of the program's pages from one checkpoint to the next: the
//! tracker, all that has changed since the last published generation, and which
//! generation the next one may stand on (docs/INCREMENTS.md).
//!
//! A sweep's result is lost to the next sweep, so it is kept here until a generation that
//! holds it is published: a checkpoint that fails, or is put off, loses nothing.
//!
//! Here: what is kept, and what is looked at during the stop. `ahead` is what is done before
//! it, `lives` what is handed over where the program goes back or comes back.
//! Helper thread.

pub mod ahead;
pub mod lives;

use crate::agent::collect::memory::{self, Piece, Plan};
use crate::agent::procfs::OwnFd;
use crate::agent::snapshot::SnapshotError;
use crate::agent::snapshot::choose::{self, Costs, Method, Room};
use crate::agent::snapshot::contents::Contents;
use crate::agent::snapshot::copy::Buffer;
use crate::agent::snapshot::precopy::Live;
use crate::agent::state::AGENT;
use crate::agent::track::pagemap::PageMap;
use crate::agent::track::{self, Change, Dirty, Probe, TrackError, Tracker, blank, full};
use crate::agent::{callsites, hooks, log, procfs, refusal};
use crate::config::{SnapshotChoice, TrackerChoice};
use crate::image::state::Base;
use crate::image::writer::ImageSink;
use crate::store::generation::{GenerationRecord, chain_length};
use ahead::{Ahead, Futile};
use std::sync::atomic::Ordering;

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

    /// At the stop: the flags of the map, as far as they are known.
    pub fn flags(&self, plan: &mut Plan) -> bool {
        hooks::memory::advice_number() == self.known_advice && plan.take_flags(&self.known)
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
