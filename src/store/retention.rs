//! Removing: old generations (`CKPT_KEEP`), what crashes left behind, whole jobs.
//!
//! A generation is removed by a journal record first, then by a rename to `.tmp`,
//! then file by file: at no instant does half a generation look like a whole one.
//! Mapped images may be unlinked. Needs the job's lock; runs in the helper thread, at
//! the exit of a program (clean-up, FIG. 9), and in `ckpt prune`.

use super::fs::Fs;
use super::generation::{self, GenerationKind, GenerationRecord};
use super::job::Job;
use super::journal::{JournalError, Record, Removed};
use super::{Context, StoreError};
use crate::errno::Errno;
use std::path::Path;

/// Prefix of removed jobs that are not yet gone, in `jobs/`.
pub const TRASH_PREFIX: &str = ".removed-";

/// What may not go whatever `CKPT_KEEP` says.
#[derive(Debug, Clone, Default)]
pub struct Held {
    /// The newest generation known to be good: it and everything newer than it stay out of
    /// the count of what can be relied on, and it is never removed itself.
    pub valid: Option<u64>,
    /// What is about to be gone back to.
    pub wanted: Option<u64>,
    /// States that were left by going back, the newest last: that one stays, and none
    /// counts as one of those to be kept.
    pub left: Vec<u64>,
}

/// Which generations go, of `records` in the order in which the state came to them: all but
/// the newest `keep`, the newest of each id that the program has given, the last of the
/// states that were left, and what those need.
pub fn plan(records: &[&GenerationRecord], keep: u32, held: &Held) -> Vec<u64> {
    let keep = keep.max(1) as usize;
    let mut kept: Vec<u64> = records
        .iter()
        .rev()
        .map(|r| r.generation)
        .filter(|generation| !held.left.contains(generation))
        .take(keep)
        .collect();
    kept.extend(records.last().map(|r| r.generation));
    kept.extend(
        held.valid
            .iter()
            .chain(&held.wanted)
            .chain(held.left.last()),
    );
    kept.extend(named(records));
    // One whose files can go back is worth more than newer ones whose files cannot.
    let whole = records.iter().rev().find(|r| r.files.incomplete.is_none());
    kept.extend(whole.map(|r| r.generation));
    // Increments need their parents, down to a full one.
    let mut at = 0;
    while at < kept.len() {
        let record = records.iter().find(|r| r.generation == kept[at]);
        if let Some(parent) = record.and_then(|r| r.needs())
            && !kept.contains(&parent)
        {
            kept.push(parent);
        }
        at += 1;
    }
    let all = records.iter().map(|r| r.generation);
    all.filter(|generation| !kept.contains(generation))
        .collect()
}

/// Checkpoints under an id of their own that are kept, whatever `CKPT_KEEP` says.
pub const MOST_NAMED: usize = 16;

/// The newest generation of each id other than 0: the program may go back to it.
fn named(records: &[&GenerationRecord]) -> Vec<u64> {
    let mut ids: Vec<i32> = Vec::new();
    let mut kept = Vec::new();
    for record in records.iter().rev() {
        if record.id != 0 && !ids.contains(&record.id) && ids.len() < MOST_NAMED {
            ids.push(record.id);
            kept.push(record.generation);
        }
    }
    kept
}

impl<F: Fs> Job<F> {
    /// Removes all generations but the newest `keep` (see [`plan`]); returns which.
    /// `valid`: a generation that is known to be good, the one just committed.
    pub fn prune(
        &mut self,
        keep: u32,
        valid: Option<u64>,
        time_ns: u64,
    ) -> Result<Vec<u64>, JournalError> {
        self.prune_but(keep, valid, None, time_ns)
    }

    /// The same, and one more stays.
    pub fn prune_but(
        &mut self,
        keep: u32,
        valid: Option<u64>,
        wanted: Option<u64>,
        time_ns: u64,
    ) -> Result<Vec<u64>, JournalError> {
        let held = Held {
            valid,
            wanted,
            left: self.journal.left(),
        };
        let going = plan(&self.journal.order(), keep, &held);
        // Increments before what they stand on: whoever is killed in between leaves nothing that
        // is listed and cannot be restored.
        for &generation in going.iter().rev() {
            self.remove_generation(generation, time_ns)?;
        }
        Ok(going)
    }

    /// Removes one generation, whatever it is.
    pub fn remove_generation(&mut self, generation: u64, time_ns: u64) -> Result<(), JournalError> {
        self.forget_generation(generation, time_ns, false)?;
        Ok(self.remove_directory(generation)?)
    }

    /// From here on the generation does not count.
    pub(super) fn forget_generation(
        &mut self,
        generation: u64,
        time_ns: u64,
        sync: bool,
    ) -> Result<(), JournalError> {
        let record = Record::Removed(Removed {
            generation,
            time_ns,
        });
        self.journal.append(&self.fs, &self.dir, record, sync)
    }

    pub(super) fn remove_directory(&self, generation: u64) -> Result<(), StoreError> {
        let dir = self.generation_dir(generation);
        let tmp = self.dir.join(generation::tmp_name(generation));
        match self.fs.rename(&dir, &tmp) {
            Err(Errno::ENOENT) => {}
            other => other.on("rename", &dir)?,
        }
        self.fs.remove_tree(&tmp).on("remove", &tmp)
    }

    /// Removes what a crash left: `.tmp` directories, and, when the journal is whole,
    /// directories that it does not know. Called by a new holder of the lock, before
    /// its first checkpoint and not earlier.
    pub fn remove_leftovers(&self) -> Result<(), StoreError> {
        let live: Vec<u64> = self.generations().iter().map(|g| g.generation).collect();
        let trusted = !self.journal.is_damaged() && !self.journal.records().is_empty();
        for (generation, tmp) in self.directories()? {
            let dir = if tmp {
                self.dir.join(generation::tmp_name(generation))
            } else if trusted && !live.contains(&generation) {
                self.generation_dir(generation)
            } else {
                continue;
            };
            self.fs.remove_tree(&dir).on("remove", &dir)?;
        }
        if trusted {
            for record in self.generations() {
                self.remove_unmerged(record)?;
            }
        }
        Ok(())
    }

    /// What an interrupted merge left: the new file, or the one whose place it has taken.
    fn remove_unmerged(&self, record: &GenerationRecord) -> Result<(), StoreError> {
        if record.kind == GenerationKind::Full {
            return Ok(());
        }
        let dir = self.generation_dir(record.generation);
        let entries = match self.fs.list(&dir) {
            Err(Errno::ENOENT) => return Ok(()),
            other => other.on("list", &dir)?,
        };
        let there = |name: &str| entries.iter().any(|e| e.name == name.as_bytes());
        for index in 0..record.members.len() {
            let (original, full) = (generation::member_name(index), generation::full_name(index));
            // One of the two must stay, whatever the journal says.
            let both = there(&original) && there(&full);
            let going = match record.merged {
                Some(_) if both => Some(original),
                None if both => Some(full),
                _ => None,
            };
            let tmp = generation::full_tmp_name(index);
            for name in going.into_iter().chain(there(&tmp).then_some(tmp)) {
                let path = dir.join(name);
                self.fs.unlink(&path).on("remove", &path)?;
            }
        }
        Ok(())
    }

    /// Removes the whole job: in one step (a rename) as far as any reader can tell.
    /// `unique` makes the name in the trash, e.g. the pid and its start time.
    pub fn remove(&self, unique: &str) -> Result<(), StoreError> {
        let name = format!("{TRASH_PREFIX}{}-{unique}", self.name());
        let trash = self.dir.with_file_name(name);
        match self.fs.rename(&self.dir, &trash) {
            Err(Errno::ENOENT) => return Ok(()),
            other => other.on("rename", &self.dir)?,
        }
        self.fs.remove_tree(&trash).on("remove", &trash)
    }
}

/// Removes what interrupted removals left in `jobs`; for the command.
pub fn empty_trash<F: Fs>(fs: &F, jobs: &Path) -> Result<usize, StoreError> {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let mut removed = 0;
    let entries = match fs.list(jobs) {
        Err(Errno::ENOENT) => return Ok(0),
        other => other.on("list", jobs)?,
    };
    for entry in entries {
        if entry.dir && entry.name.starts_with(TRASH_PREFIX.as_bytes()) {
            let path = jobs.join(OsStr::from_bytes(&entry.name));
            fs.remove_tree(&path).on("remove", &path)?;
            removed += 1;
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::super::generation::Merged;
    use super::*;

    fn record(generation: u64, needs: Option<u64>) -> GenerationRecord {
        GenerationRecord {
            generation,
            parent: needs,
            kind: match needs {
                Some(_) => GenerationKind::Increment,
                None => GenerationKind::Full,
            },
            ..Default::default()
        }
    }

    fn going(records: &[GenerationRecord], keep: u32, valid: Option<u64>) -> Vec<u64> {
        let held = Held {
            valid,
            ..Held::default()
        };
        plan(&records.iter().collect::<Vec<_>>(), keep, &held)
    }

    #[test]
    fn the_last_state_that_was_left_stays() {
        let records: Vec<_> = [1, 4, 5, 6, 2, 7].map(|g| record(g, None)).to_vec();
        let records: Vec<_> = records.iter().collect();
        let held = |left: &[u64]| Held {
            left: left.to_vec(),
            ..Held::default()
        };
        assert_eq!(plan(&records, 2, &held(&[4, 5])), [1, 4, 6]);
        assert_eq!(plan(&records, 1, &held(&[7])), [1, 4, 5, 6]);
        let wanted = Held {
            wanted: Some(1),
            ..held(&[6])
        };
        assert_eq!(plan(&records, 1, &wanted), [4, 5, 2]);
    }

    #[test]
    fn the_newest_stay() {
        let records: Vec<_> = (1..=5).map(|g| record(g, None)).collect();
        assert_eq!(going(&records, 2, None), [1, 2, 3]);
        assert_eq!(going(&records, 0, None), [1, 2, 3, 4]);
        assert_eq!(going(&records, 9, None), [] as [u64; 0]);
        // The latest valid one is older than the newest two.
        assert_eq!(going(&records, 2, Some(2)), [1, 3]);
    }

    #[test]
    fn named_ones_stay() {
        let named = |generation, id| GenerationRecord {
            id,
            ..record(generation, None)
        };
        let records = [
            named(1, 3),
            named(2, 4),
            named(3, 3),
            named(4, 0),
            named(5, 0),
            named(6, 0),
        ];
        assert_eq!(going(&records, 1, None), [1, 4, 5]);
        let many: Vec<_> = (1..=20).map(|k| named(k, k as i32)).collect();
        assert_eq!(going(&many, 2, None), [1, 2, 3, 4]);
    }

    #[test]
    fn the_last_with_whole_files_stays() {
        let mut records: Vec<_> = (1..=5).map(|g| record(g, None)).collect();
        for record in &mut records[2..] {
            record.files.incomplete = Some("no space".into());
        }
        assert_eq!(going(&records, 2, Some(5)), [1, 3]);
    }

    #[test]
    fn parents_of_increments_stay() {
        let records = [
            record(1, None),
            record(2, None),
            record(3, Some(2)),
            record(4, Some(3)),
        ];
        assert_eq!(going(&records, 1, None), [1]);
    }

    #[test]
    fn a_merged_increment_needs_nobody() {
        let mut records = [record(2, None), record(3, Some(2)), record(4, Some(3))];
        records[1].merged = Some(Merged::default());
        assert_eq!(going(&records, 1, None), [2]);
        assert_eq!(going(&records, 1, Some(2)), [] as [u64; 0]);
    }
}
