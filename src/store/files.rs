//! What the store knows of the user's files: which generations their tables lead back
//! to, and when tables go. Needs the job's lock for what it changes; runs in the helper
//! thread, in the constructor of a start that recovers, and in the command.

use super::fs::RawFs;
use super::generation::GenerationRecord;
use super::job::Job;
use super::journal::JournalError;
use super::{StoreError, stream};
use crate::persist::table;

impl Job<RawFs> {
    /// Why the files cannot go back to a generation; `None`: they can, as far as the
    /// tables themselves say.
    pub fn files_obstacle(&self, record: &GenerationRecord) -> Result<Option<String>, StoreError> {
        if let Some(reason) = &record.files.incomplete {
            return Ok(Some(reason.clone()));
        }
        let tables = table::list(&self.dir)?;
        let needed = tables.into_iter().filter(|t| t.base >= record.generation);
        let broken = needed.filter_map(|t| Some((t.seq, t.incomplete?))).next();
        Ok(broken.map(|(seq, reason)| format!("table {seq}: {reason}")))
    }

    /// Removes tables that lead back to before the oldest generation, and streams that
    /// no generation uses.
    pub fn prune_files(&self) -> Result<(), StoreError> {
        let generations = self.generations();
        // What a damaged journal does not show may still be there.
        let (Some(oldest), false) = (generations.first(), self.journal.is_damaged()) else {
            return Ok(());
        };
        for file in table::list(&self.dir)? {
            if file.base < oldest.generation {
                table::remove(&self.dir, file.seq)?;
            }
        }
        table::remove_leftovers(&self.dir)?;
        stream::remove_unused(&self.dir, &generations)
    }

    /// A new owner of a job without generations: what is left of tables and streams
    /// leads nowhere.
    pub fn remove_all_files(&self) -> Result<(), StoreError> {
        if !self.generations().is_empty() || self.journal.is_damaged() {
            return Ok(());
        }
        for file in table::list(&self.dir)? {
            table::remove(&self.dir, file.seq)?;
        }
        stream::remove_unused(&self.dir, &[])
    }

    /// A program that did not recover the job's generations takes it over: what it has done to
    /// files so far is not known, so they cannot go back to those generations any more.
    pub fn note_unrecorded(&self) -> Result<(), StoreError> {
        let generations = self.generations();
        let Some(newest) = generations.last() else {
            return Ok(());
        };
        let tables = table::list(&self.dir)?;
        let number = tables.iter().map(|t| t.seq).max().unwrap_or(0) + 1;
        let reason = "a fresh start (CKPT_RESUME=never) has modified files since";
        table::create_unrecorded(&self.dir, number, newest.generation, reason)
    }

    /// Before a recovery undoes the tables of generations newer than this one: they cannot
    /// be reached any more as soon as that begins. Their tables stay: they are what is
    /// undone.
    pub fn drop_newer(&mut self, generation: u64, time_ns: u64) -> Result<(), JournalError> {
        let all: Vec<u64> = self.generations().iter().map(|g| g.generation).collect();
        let newer: Vec<u64> = all.into_iter().rev().filter(|&n| n > generation).collect();
        for &newer in &newer {
            self.forget_generation(newer, time_ns, true)?;
        }
        for newer in newer {
            self.remove_directory(newer)?;
        }
        Ok(())
    }
}
