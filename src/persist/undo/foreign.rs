//! Before anything is undone: which files did somebody else change since?
//!
//! The newest table that has a row of an inode decides. What was found is written
//! down, and the tables say that it was looked for, so that an undo that was killed
//! does not take its own work for somebody else's.

use super::apply::{Undoer, as_path};
use super::rows::{RowInfo, Rows};
use super::{ForeignFile, UndoError, failed};
use crate::config::Foreign;
use crate::persist::format;
use crate::persist::sys::{self, CPath};
use crate::persist::table::{self, Table};
use crate::persist::{Identity, Stat};
use std::collections::BTreeSet;

impl Undoer<'_, '_> {
    pub fn look_for_foreign(&mut self, tables: &[Table]) -> Result<(), UndoError> {
        if tables.iter().all(|t| t.checked || t.records.is_empty()) {
            return Ok(());
        }
        let found = self.refused(tables)?;
        for (mut file, stat) in found {
            if self.options.foreign == Foreign::Keep {
                self.findings.keep.insert(stat.id);
            } else {
                use std::os::unix::ffi::OsStrExt;
                let path = file.path.as_os_str().as_bytes().to_vec();
                let aside = self.put_aside(&path, &stat)?;
                file.aside = Some(as_path(&aside));
            }
            self.findings.files.push(file);
        }
        self.findings.save(self.job_dir)?;
        if self.recorded {
            return Ok(());
        }
        for table in tables {
            self.step("write", &table.file.path)?;
            let mark = || {
                let fd = sys::open(&table::c_path(&table.file.path)?, libc::O_RDWR, 0)?;
                let begun = self.begun_ns.to_le_bytes();
                sys::pwrite_all(fd.0, &begun, format::AT_BEGUN as u64)?;
                sys::pwrite_all(fd.0, &1u32.to_le_bytes(), format::AT_CHECKED as u64)
            };
            mark().map_err(|e| failed("write", &table.file.path, e))?;
        }
        Ok(())
    }

    /// All files that somebody else has changed, if the undo may go on over them.
    fn refused(&mut self, tables: &[Table]) -> Result<Vec<(ForeignFile, Stat)>, UndoError> {
        let found = self.foreign_files(tables);
        if self.options.foreign == Foreign::Refuse && !found.is_empty() {
            let files = found.into_iter().map(|(file, _)| file).collect();
            return Err(UndoError::Foreign(files));
        }
        if self.options.foreign == Foreign::Restore {
            let lost: Vec<ForeignFile> = found
                .iter()
                .filter(|(file, _)| file.what == "removed")
                .map(|(file, _)| file.clone())
                .collect();
            if !lost.is_empty() {
                return Err(UndoError::Foreign(lost));
            }
        }
        Ok(found)
    }

    /// Is the undo to be refused? Changes nothing.
    pub fn refuse_foreign(mut self, tables: &[Table]) -> Result<(), UndoError> {
        self.refused(tables).map(drop)
    }

    /// All files that are not as the program left them, as they are now.
    pub fn foreign_files(&mut self, tables: &[Table]) -> Vec<(ForeignFile, Stat)> {
        let mut found = Vec::new();
        let mut judged: BTreeSet<Identity> = BTreeSet::new();
        // What a newer table moved is looked for where it was moved to.
        let mut rows = Rows::default();
        let undone = tables.iter().map(|table| u64::from(table.file.seq));
        let undone: BTreeSet<u64> = undone.collect();
        let begins: Vec<(u32, &Table)> = tables
            .iter()
            .rev()
            .map(|table| (rows.next_table(table), table))
            .collect();
        for (row, info) in rows.rows.iter().rev() {
            let Some((_, table)) = begins.iter().rev().find(|(begin, _)| begin <= row) else {
                continue;
            };
            self.replaced.table = u64::from(table.file.seq);
            if info.stat.is_regular()
                && judged.insert(self.replaced.resolve(&info.stat.identity()))
                // What a return has made is not as these tables left it.
                && !self.replaced.is_made_by(&info.stat.identity(), &undone)
                && !self.options.inherited.contains(&info.stat.id)
                && !self.is_excluded(&info.first_path)
            {
                found.extend(self.judge(table, info));
            }
        }
        found
    }

    fn judge(&self, table: &Table, info: &RowInfo) -> Option<(ForeignFile, Stat)> {
        let file = |path: &[u8], what| ForeignFile {
            path: as_path(path),
            aside: None,
            what,
        };
        let Some(path) = self.find(info) else {
            let path = info.path.as_ref()?;
            return Some((file(path, "removed"), info.stat));
        };
        let now = CPath::new(&[&path]).and_then(|p| sys::lstat(&p)).ok()?;
        let slot = table.slots.get(info.slot as usize).copied();
        let slot = slot.unwrap_or_default();
        let other =
            slot.known && !slot.hot && (slot.size, slot.mtime_ns) != (now.size, now.mtime_ns);
        (other || self.is_later(&now)).then(|| (file(&path, "changed"), now))
    }
}
