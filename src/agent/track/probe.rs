//! What works here: each tracker is tried, not guessed from the kernel's version.
//! Helper thread, constructor (only what was asked for by name), `ckpt doctor`.

use super::{softdirty, uffd};
use crate::agent::collect::memory::PAGE;
use crate::agent::place;
use crate::config::TrackerChoice;
use ckpt_sys::syscall;

/// What each tracker says: `Err` holds why it cannot be used.
#[derive(Debug, Clone)]
pub struct Probe {
    pub uffd: Result<(), String>,
    pub soft_dirty: Result<(), String>,
    pub mprotect: Result<(), String>,
}

const NOT_TRIED: &str = "not tried";

impl Probe {
    /// Tries all of them.
    pub fn run() -> Probe {
        Probe {
            uffd: uffd::probe(),
            soft_dirty: softdirty::probe(),
            mprotect: mprotect(),
        }
    }

    /// Tries no more than `choice` needs: the best first.
    pub fn for_choice(choice: TrackerChoice) -> Probe {
        let mut probe = Probe {
            uffd: Err(NOT_TRIED.into()),
            soft_dirty: Err(NOT_TRIED.into()),
            mprotect: Err(NOT_TRIED.into()),
        };
        let auto = choice == TrackerChoice::Auto;
        if auto || choice == TrackerChoice::Uffd {
            probe.uffd = uffd::probe();
        }
        if (auto && probe.uffd.is_err()) || choice == TrackerChoice::SoftDirty {
            probe.soft_dirty = softdirty::probe();
        }
        let none = probe.uffd.is_err() && probe.soft_dirty.is_err();
        if (auto && none) || choice == TrackerChoice::Mprotect {
            probe.mprotect = mprotect();
        }
        probe
    }

    /// As [`Probe::for_choice`], but nothing is tried for `auto`: for the constructor.
    pub fn for_name(choice: TrackerChoice) -> Probe {
        match choice {
            TrackerChoice::Auto => Probe::for_choice(TrackerChoice::Full),
            named => Probe::for_choice(named),
        }
    }

    /// Why the tracker that was asked for by name cannot be used.
    pub fn objection(&self, choice: TrackerChoice) -> Option<(&'static str, &str)> {
        let (name, result) = match choice {
            TrackerChoice::Auto | TrackerChoice::Full => return None,
            TrackerChoice::Uffd => ("uffd", &self.uffd),
            TrackerChoice::SoftDirty => ("soft-dirty", &self.soft_dirty),
            TrackerChoice::Mprotect => ("mprotect", &self.mprotect),
        };
        result.as_ref().err().map(|why| (name, why.as_str()))
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

/// Calls `f` with the address of a fresh page, to be tried with.
pub(super) fn with_page<T>(f: impl FnOnce(u64) -> Result<T, String>) -> Result<T, String> {
    let (prot, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    let mapped = place::passing(PAGE, prot, flags);
    let addr = mapped.map_err(|errno| format!("mmap: errno {errno}"))?;
    let result = f(addr);
    // SAFETY: mapped above.
    unsafe { syscall!(libc::SYS_munmap, addr, PAGE) };
    result
}

/// Nothing is asked of the kernel but what every kernel has; only what the kernel itself
/// writes must be seen beforehand.
fn mprotect() -> Result<(), String> {
    Ok(())
}

/// The name of a choice.
pub fn name(choice: TrackerChoice) -> &'static str {
    match choice {
        TrackerChoice::Auto => "auto",
        TrackerChoice::Uffd => "uffd",
        TrackerChoice::SoftDirty => "soft-dirty",
        TrackerChoice::Mprotect => "mprotect",
        TrackerChoice::Full => "full",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use TrackerChoice::*;

    #[test]
    fn the_best_that_works_is_taken() {
        let no = || Err::<(), _>("no".to_owned());
        let mut probe = Probe {
            uffd: Ok(()),
            soft_dirty: no(),
            mprotect: Ok(()),
        };
        assert_eq!(probe.taken(Auto), Uffd);
        assert_eq!(probe.taken(Mprotect), Mprotect);
        assert_eq!(probe.taken(SoftDirty), Full);
        assert_eq!(probe.objection(SoftDirty), Some(("soft-dirty", "no")));
        assert_eq!(probe.objection(Auto), None);
        probe.uffd = no();
        assert_eq!(probe.taken(Auto), Mprotect);
        probe.soft_dirty = Ok(());
        assert_eq!(probe.taken(Auto), SoftDirty);
        (probe.soft_dirty, probe.mprotect) = (no(), no());
        assert_eq!(probe.taken(Auto), Full);
        assert_eq!(probe.taken(Full), Full);
    }
}
