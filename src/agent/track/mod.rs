//! Trackers: which pages were written since when (US 5,802,267, dirty page list).
//!
//! The helper thread owns the tracker in use and drives it; only the `mprotect` tracker
//! has a part that runs elsewhere, the fault handler.
//!
//! | file | owns |
//! |---|---|
//! | [`dirty`] | the sets of page runs that sweeps yield |
//! | [`uffd`] | userfaultfd, write protection resolved by the kernel, PAGEMAP_SCAN |
//! | [`moving`] | that nothing is registered while the program moves it |
//! | [`lazy`] | mappings of images that it leaves alone until the first sweep |
//! | [`open`] | what a rollback leaves open for writing |
//! | [`mprotect`] | write protection and SIGSEGV |
//! | [`fault`], [`table`], [`touch`] | its handler, state of pages, writes by the kernel |
//! | [`blocked`] | what the program believes of SIGSEGV in its mask |
//! | [`store`] | pages to be stored before they are written |
//! | [`softdirty`] | the soft-dirty bit of the page tables |
//! | [`full`] | no tracking: everything that exists |
//! | [`pagemap`] | the system call that finds pages in the page tables |
//! | [`probe`] | what works here |

pub mod blank;
pub mod blocked;
pub mod dirty;
pub mod fault;
pub mod full;
pub mod lazy;
#[cfg(test)]
pub mod model;
pub mod moving;
pub mod mprotect;
pub mod open;
pub mod own;
pub mod pagemap;
pub mod probe;
pub mod softdirty;
pub mod store;
pub mod table;
pub mod touch;
pub mod uffd;

pub use dirty::{Change, Dirty, Run};
pub use open::Open;
pub use probe::Probe;

use crate::agent::collect::memory::Piece;
use crate::agent::log;
use crate::agent::procfs::OwnFd;
use crate::agent::state::AGENT;
use crate::config::TrackerChoice;
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;

/// Why there is nothing to be known of the pages: this checkpoint must be full, and
/// whatever was seen before says nothing.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    #[error("open {path}: errno {errno}")]
    Open { path: &'static str, errno: i32 },
    #[error("{call}: errno {errno}")]
    Call { call: &'static str, errno: i32 },
}

/// What a rollback knows of the memory that it leaves mapped: all of it is as the image says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Where the image has nothing.
    pub blank: Vec<(u64, u64)>,
    /// What was put back, and is not watched until it is protected again. Every page in these
    /// ranges exists.
    pub written: Vec<(u64, u64)>,
    /// What was put back and is not to be protected.
    pub open: Open,
}

/// Watches which pages of the program are written. Helper thread only.
pub trait Tracker {
    fn name(&self) -> &'static str;

    /// Can it be swept while the program runs (for pre-copy)?
    fn live(&self) -> bool;

    /// May a generation stand on another one with what it reports?
    fn increments(&self) -> bool {
        true
    }

    /// Begins to watch all of `pieces` that it can. Nothing becomes clean by it: what is
    /// new is reported whole by the next sweep. Idempotent; cheap when nothing is new.
    fn arm(&mut self, pieces: &[Piece]) -> Result<(), TrackError>;

    /// After a restore, before the program's threads run: the present contents of `pieces`
    /// are the ones to compare with.
    fn begin(&mut self, pieces: &[Piece]) -> Result<(), TrackError> {
        self.sweep(pieces, &mut Dirty::new())
    }

    /// As [`Tracker::begin`], after a rollback that has left memory mapped and watched by
    /// [`Tracker::descriptor`]: only what `kept` says needs a look.
    fn begin_again(&mut self, pieces: &[Piece], _: &Kept) -> Result<(), TrackError> {
        self.begin(pieces)
    }

    /// Adds to `seen` all pages of `pieces` written (or discarded, or new) since they were
    /// last swept; they are watched anew from here on. Over-reports, never under-reports:
    /// memory that is not (or no longer) watched is reported whole. A sweep whose result
    /// is thrown away makes the present contents the ones to compare with. After an error
    /// the set is of no use: the next generation must be full.
    fn sweep(&mut self, pieces: &[Piece], seen: &mut Dirty) -> Result<(), TrackError>;

    /// Pages that somebody else has seen since the last sweep, and may have stored, while the program
    /// ran: should they be discarded before the next one, that must be reported.
    fn exist(&mut self, _: &[blank::Range]) {}

    /// As [`Tracker::sweep`], but what is reported stays open and is reported again: it is
    /// about to be written over. For a rollback, by the leader, who is alone. Without it
    /// nothing can stay mapped.
    fn look(&mut self, _: &[Piece], _: &mut Dirty) -> Result<(), TrackError> {
        Err(TrackError::Call {
            call: "look at pages",
            errno: libc::ENOTSUP,
        })
    }

    /// The descriptor by which the kernel watches. As long as it is open it goes on.
    fn descriptor(&self) -> Option<i32> {
        None
    }

    /// What the rollback before has left open, if there was one since the latest sweep.
    fn left_open(&self) -> Option<&Open> {
        None
    }

    /// In another thread, with a descriptor table of its own: `fd` is [`Tracker::descriptor`]
    /// there. The old numbers are not closed.
    fn moved(&mut self, _: Option<OwnFd>) -> Result<(), TrackError> {
        Ok(())
    }
}

/// The tracker to be used: the one asked for, or the best that works here. One that was
/// asked for was tried by the constructor; should it fail now, checkpoints are full.
pub fn choose(choice: TrackerChoice, probe: &Probe) -> Box<dyn Tracker> {
    let mut taken = probe.taken(choice);
    if taken == TrackerChoice::Mprotect && !AGENT.net_installed.load(Ordering::Relaxed) {
        // What the kernel is about to write would not be seen: the calls would fail.
        log::line(format_args!(
            "no pages are tracked: mprotect needs the call-site net, which is not laid"
        ));
        taken = TrackerChoice::Full;
    }
    let made: Result<Box<dyn Tracker>, TrackError> = match taken {
        TrackerChoice::Uffd => uffd::Uffd::new().map(|t| Box::new(t) as _),
        TrackerChoice::SoftDirty => softdirty::SoftDirty::new().map(|t| Box::new(t) as _),
        TrackerChoice::Mprotect => mprotect::Mprotect::new().map(|t| Box::new(t) as _),
        _ => Ok(Box::new(full::Full::open())),
    };
    made.unwrap_or_else(|error| {
        log::line(format_args!("no pages are tracked: {error}"));
        Box::new(full::Full::open())
    })
}

/// After a rollback that has left memory mapped: watches on with the descriptor of the life
/// before, if there is one.
pub fn choose_adopting(
    choice: TrackerChoice,
    fd: Option<OwnFd>,
    probe: impl FnOnce() -> Probe,
) -> Box<dyn Tracker> {
    match fd.map(uffd::Uffd::adopt) {
        Some(Ok(tracker)) => Box::new(tracker),
        Some(Err(error)) => {
            log::line(format_args!("tracker: {error}"));
            choose(choice, &probe())
        }
        None => choose(choice, &probe()),
    }
}

/// After a restore, before anything else looks: the tables of the life before are not in
/// the image, and nothing is protected.
pub fn forget() {
    table::forget();
    store::forget();
    uffd::forget();
}
