//! Before the stop: pages are stored while the program runs, VmFlags are read, and there is
//! room for what is left.
//!
//! Helper thread; the program runs.

use super::{Increments, with_own};
use crate::agent::checkpoint::{CheckpointError, store_error};
use crate::agent::collect::memory::{self, How, Piece, Plan};
use crate::agent::settings::Settings;
use crate::agent::side::SideBuffer;
use crate::agent::snapshot::choose::Room;
use crate::agent::snapshot::pages::Chunk;
use crate::agent::snapshot::precopy;
use crate::agent::snapshot::{Pages, SnapshotError};
use crate::agent::stop::now_ns;
use crate::agent::track::Dirty;
use crate::agent::track::blank;
use crate::agent::{headroom, hooks, log, refusal};
use crate::config::{Compress, SnapshotChoice};
use crate::image::pack;
use crate::image::state::Base;
use crate::image::writer::{ImageSink, ImageWriter};
use crate::store::generation::GenerationRecord;

/// A residue of no more pages than this is not worth another round while the program
/// runs: copying it takes a fraction of a millisecond.
const SMALL: u64 = 512;

/// Pre-copy is in vain where the program writes faster than the helper copies: then it is
/// left out for a while, longer each time that it was in vain again.
#[derive(Debug, Default)]
pub(super) struct Futile {
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

/// What is ready before the stop.
pub struct Ahead<S> {
    pub pages: Pages<S>,
    /// Changed, and not in the image yet.
    pub pending: Dirty,
    /// Has the tracker been swept for this checkpoint?
    pub(super) swept: bool,
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

/// What a round of pre-copy can deal with: all private memory of the map.
fn stored_ranges(plan: &Plan) -> Vec<(u64, u64)> {
    let private = |piece: &&Piece| !matches!(piece.how, How::Nothing | How::Copied);
    let pieces = plan.pieces.iter().filter(private);
    pieces.map(|p| (p.vma.start, p.vma.end)).collect()
}

impl Increments {
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
            let existing = blank::existing(&plan.pieces, &self.dirty);
            self.tracker.exist(&existing);
            // What has grown since the look at the map is no part of it, was protected by the sweep,
            // and will not be reported again.
            seen.unite(&self.dirty);
            self.dirty = seen;
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
}
