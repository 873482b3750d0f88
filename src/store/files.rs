//! What the store knows of the user's files: which generations their tables lead back
//! to, and when tables go. Needs the job's lock for what it changes; runs in the helper
//! thread, in the constructor of a start that recovers, and in the command.

use super::fs::RawFs;
use super::generation::GenerationRecord;
use super::job::Job;
use super::journal::{JournalError, Record, Returned};
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
        let needed = table::leading_back(&tables, record.generation).iter();
        let broken = needed.filter_map(|t| Some((t.seq, t.incomplete.as_ref()?)));
        let broken = broken.map(|(seq, reason)| (seq, reason.clone())).next();
        Ok(broken.map(|(seq, reason)| format!("table {seq}: {reason}")))
    }

    /// Removes tables that lead back to before all generations, and streams that
    /// no generation uses.
    pub fn prune_files(&self) -> Result<(), StoreError> {
        let generations = self.generations();
        // What a damaged journal does not show may still be there.
        if generations.is_empty() || self.journal.is_damaged() {
            return Ok(());
        }
        let numbers: Vec<u64> = generations.iter().map(|g| g.generation).collect();
        let tables = table::list(&self.dir)?;
        for file in table::unneeded(&tables, &numbers) {
            table::remove(&self.dir, file.seq)?;
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

    /// Before a recovery to this generation undoes tables: what cannot be reached any more as
    /// soon as that begins leaves the journal. Its tables stay: they are what is
    /// undone. The generation is the latest from here on.
    pub fn drop_newer(&mut self, generation: u64, time_ns: u64) -> Result<(), JournalError> {
        let order: Vec<u64> = self.journal.order().iter().map(|g| g.generation).collect();
        let place = order.iter().position(|&g| g == generation);
        let is_later = |at: usize, number: u64| match place {
            Some(place) => at > place,
            None => number > generation,
        };
        let later = order.iter().enumerate().rev();
        let later = later.filter(|(at, number)| is_later(*at, **number));
        let mut lost: Vec<u64> = later.map(|(_, g)| *g).collect();
        if !lost.is_empty() {
            let tables = table::list(&self.dir)?;
            lost.retain(|g| !table::outlives(&tables, generation, *g));
        }
        for &lost in &lost {
            self.forget_generation(lost, time_ns, true)?;
        }
        self.note_return(generation, None, time_ns)?;
        for lost in lost {
            self.remove_directory(lost)?;
        }
        Ok(())
    }

    /// The generation is the latest from here on, however many come behind it. `left`: the
    /// state that was left, which stays.
    pub fn note_return(
        &mut self,
        to: u64,
        left: Option<u64>,
        time_ns: u64,
    ) -> Result<(), JournalError> {
        let latest = self.journal.order().last().map(|g| g.generation);
        if left.is_none() && latest.is_none_or(|latest| latest == to) {
            return Ok(());
        }
        let record = Record::Returned(Returned { to, left, time_ns });
        self.journal.append(&self.fs, &self.dir, record, true)
    }
}
