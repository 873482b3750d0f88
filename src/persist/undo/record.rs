//! A return that is recorded: what the undo of older tables does to files is told to the
//! recorder before it is done, as a hook tells what the program is about to do. The table
//! that it goes into leads back to the state that was left.
//!
//! In the helper while the program stands still, in the constructor, in tests.

use super::apply::{Undoer, as_path, c, on};
use super::{Report, UndoError};
use crate::persist::recorder::{self, Session};
use crate::persist::sys::{self, CPath};
use crate::persist::table::{self, Table};
use crate::persist::{FileRef, Id, NameRef, Stat};

impl<'o, 'a> Undoer<'o, 'a> {
    /// What is done from here on is recorded; no table is marked or removed.
    pub fn recorded(mut self, alive_ns: i64) -> Undoer<'o, 'a> {
        self.recorded = true;
        self.alive_ns = self.alive_ns.max(alive_ns);
        let made = self.replaced.notes();
        if let Some(mut session) = self.session() {
            session.returning(made);
        }
        self
    }

    /// Undoes these tables, the newest first.
    pub fn all(mut self, tables: &[Table], to_generation: u64) -> Result<Report, UndoError> {
        if tables.iter().any(|t| !t.records.is_empty()) {
            self.look_for_foreign(tables)?;
        }
        let first = tables.iter().find(|t| !t.records.is_empty());
        if first.is_some_and(|first| first.undone == 0) {
            self.place_early()?;
        }
        if let Some(oldest) = tables.last() {
            self.replaced.note_base(to_generation, oldest.file.seq)?;
        }
        // As `next_number` has it, from what was read already.
        let highest = self.all_tables.iter().map(|t| t.0).max().unwrap_or(0);
        let next = highest
            .max(self.replaced.highest() as u32)
            .saturating_add(1);
        let mut report = Report::default();
        for table in tables {
            self.replaced.table = u64::from(table.file.seq);
            report.records += self.table(table)?;
            report.tables += 1;
            if report.tables == tables.len() {
                self.place_all()?;
            }
            if !self.recorded {
                self.keep_the_place(to_generation, table, next)?;
                self.step("remove", &table.file.path)?;
                match self.options.reuse {
                    true => table::remove_for_reuse(self.job_dir, table.file.seq)?,
                    false => table::remove(self.job_dir, table.file.seq)?,
                }
            }
        }
        self.cut_outputs()?;
        self.findings.remove(self.job_dir);
        report.replaced = self.replaced.all(to_generation);
        report.alive_ns = self.alive_ns;
        report.moved = self.findings.moved();
        report.foreign = self.findings.files;
        Ok(report)
    }

    /// Before the last table is removed, where an older one has the same base: the files
    /// are there already, and a killed undo must not go on to that one.
    fn keep_the_place(
        &mut self,
        to_generation: u64,
        table: &Table,
        number: u32,
    ) -> Result<(), UndoError> {
        // The newest table with this base is as far as the undo goes.
        let is_last = table.file.base == to_generation;
        let mut older = self.all_tables.iter().filter(|t| t.0 < table.file.seq);
        if is_last && older.any(|t| t.1 == to_generation) {
            self.step("create", &table.file.path)?;
            table::create_empty(self.job_dir, number, to_generation, table.power)?;
        }
        Ok(())
    }

    /// The right to record, where this return is recorded.
    fn session(&self) -> Option<Session> {
        if !self.recorded {
            return None;
        }
        table::alive(sys::realtime_ns());
        recorder::enter()
    }

    /// Tells the recorder of what is about to be done to the inode at `path`.
    pub fn tell_file(
        &mut self,
        path: &[u8],
        tell: impl FnOnce(&mut Session, &FileRef),
    ) -> Result<(), UndoError> {
        if let Some(mut session) = self.session() {
            let stat = on(sys::lstat(&c(path)?), "look at", path)?;
            tell(&mut session, &file_ref(path, &stat));
            drop(session);
            self.step("record", &as_path(path))?;
        }
        Ok(())
    }

    /// Tells the recorder of what is about to be done to a name.
    pub fn tell_name(
        &mut self,
        path: &[u8],
        tell: impl FnOnce(&mut Session, &NameRef),
    ) -> Result<(), UndoError> {
        if let Some(mut session) = self.session() {
            let (dir, name) = split(path);
            let stat = on(sys::stat(&c(dir)?), "look at", dir)?;
            tell(&mut session, &name_ref(dir, &stat.id, name));
            drop(session);
            self.step("record", &as_path(path))?;
        }
        Ok(())
    }

    /// A new name at `path` for the inode that `alive` leads to.
    pub fn tell_link(&mut self, alive: &[u8], path: &[u8]) -> Result<(), UndoError> {
        if !self.recorded {
            return Ok(());
        }
        let stat = on(sys::lstat(&c(alive)?), "look at", alive)?;
        self.tell_name(path, |session, name| {
            session.before_link(&file_ref(alive, &stat), name);
        })
    }

    /// What was at `from` is about to be moved to `to`.
    pub fn tell_move(&mut self, from: &[u8], to: &[u8], exchange: bool) -> Result<(), UndoError> {
        if !self.recorded {
            return Ok(());
        }
        let stat = on(sys::lstat(&c(from)?), "look at", from)?;
        let there = sys::lstat(&c(to)?).ok();
        let (from_dir, from_name) = split(from);
        let dir = on(sys::stat(&c(from_dir)?), "look at", from_dir)?;
        self.tell_name(to, |session, to| {
            let from = name_ref(from_dir, &dir.id, from_name);
            session.before_rename(&from, &stat, to, there.as_ref(), exchange);
        })
    }

    /// An inode that was just made.
    pub fn tell_made(&mut self, path: &CPath) {
        if let Some(mut session) = self.session()
            && let Ok(stat) = sys::lstat(path)
        {
            session.created(stat.id, stat.is_dir());
        }
    }

    /// An inode that was kept without a name has one again: the table must know it, and its
    /// contents are those of an inode that existed.
    pub fn tell_back(&mut self, path: &[u8]) -> Result<(), UndoError> {
        self.tell_file(path, |session, file| session.know(file))
    }
}

pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let slash = path.iter().rposition(|b| *b == b'/').unwrap_or(0);
    let dir = path.get(..slash.max(1)).unwrap_or_default();
    (dir, path.get(slash + 1..).unwrap_or_default())
}

fn name_ref<'a>(dir_path: &'a [u8], dir: &Id, name: &'a [u8]) -> NameRef<'a> {
    NameRef {
        dir: *dir,
        dir_path,
        name,
    }
}

fn file_ref<'a>(path: &'a [u8], stat: &'a Stat) -> FileRef<'a> {
    FileRef {
        stat,
        path,
        fd: None,
        any_fd: None,
    }
}
