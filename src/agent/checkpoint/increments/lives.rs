//! What is known of the program's pages, handed from one life to the next: to the thread that
//! goes back (rollback), and to the helper of the restored program.
//!
//! The helper that ends ([`Increments::pass_on`]), the leader of a rollback ([`Knowledge`]),
//! the new helper before the program's threads run ([`prepare_restored`]) and when it begins
//! its work ([`take_restored`]).

use super::{Increments, with_own};
use crate::agent::collect::memory::{self, Piece, Plan};
use crate::agent::procfs::OwnFd;
use crate::agent::settings::Settings;
use crate::agent::snapshot::precopy::Live;
use crate::agent::state::AGENT;
use crate::agent::track::{Change, Dirty, Kept, TrackError, Tracker, blank, full, own};
use crate::agent::{hooks, log};
use crate::image::state::VmaState;
use std::sync::atomic::{AtomicPtr, Ordering};

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

impl Increments {
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
        for range in own::data(&plan.pieces) {
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
