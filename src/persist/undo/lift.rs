//! Directories whose mode forbids their owner what the undo has to do in them.
//!
//! A program that is no superuser makes such a directory writable, changes it and makes it
//! read-only again. Before a table is undone the modes of all directories that it has rows of
//! are lifted; `last_of_all` gives each the mode that it had when the table began, the inner ones
//! first. Killed in between, the next undo does the same again.

use super::UndoError;
use super::apply::{Current, Undoer, as_path, c, on};
use crate::persist::sys::{self, Sys};
use crate::persist::{MODE, Stat};

/// What the owner needs to change and find entries.
const ALL: u32 = 0o700;

/// Does a directory of this mode stand in its owner's way?
pub fn is_bare(stat: &Stat) -> bool {
    stat.is_dir() && stat.mode & ALL != ALL
}

impl Undoer<'_, '_> {
    /// Lifts the modes of a table's directories, the outer ones first.
    pub fn lift_directories(&mut self, current: &Current) -> Result<(), UndoError> {
        if self.is_privileged {
            return Ok(());
        }
        let rows = current.rows.rows.iter();
        let mut dirs: Vec<(&Vec<u8>, u32)> = rows
            .filter(|(_, info)| info.stat.is_dir())
            .filter_map(|(row, info)| Some((info.path.as_ref()?, *row)))
            .collect();
        dirs.sort_unstable();
        for (_, row) in dirs {
            if let Some(path) = self.locate(current, row)? {
                self.lift(&path)?;
            }
        }
        Ok(())
    }

    /// The same for the directory that a name is in, when that was made since (then it has no
    /// row, and goes).
    pub fn lift_parent(&mut self, path: &[u8]) -> Result<(), UndoError> {
        let slash = path.iter().rposition(|byte| *byte == b'/');
        match slash {
            Some(slash) if slash > 0 => self.lift(path.get(..slash).unwrap_or_default()),
            _ => Ok(()),
        }
    }

    /// Lets the owner into a directory. Where that is somebody else the call that needs it
    /// fails and says so.
    pub fn lift(&mut self, path: &[u8]) -> Result<(), UndoError> {
        if self.is_privileged {
            return Ok(());
        }
        let at = c(path)?;
        let stat = match sys::lstat(&at) {
            Ok(stat) if is_bare(&stat) && stat.uid == sys::effective_uid() => stat,
            _ => return Ok(()),
        };
        self.step("set the mode of", &as_path(path))?;
        self.tell_file(path, |session, file| session.before_attributes(file, MODE))?;
        on(sys::chmod(&at, stat.mode | ALL), "set the mode of", path)
    }
}

/// Does what an owner may do who may write: over a mode that forbids it. `last_of_all` sets the
/// mode right if a kill comes in between.
pub fn as_writer<T>(path: &sys::CPath, what: impl Fn() -> Sys<T>) -> Sys<T> {
    match what() {
        Err(libc::EACCES) => {
            let mode = sys::lstat(path)?.mode;
            sys::chmod(path, mode | 0o200)?;
            let done = what();
            sys::chmod(path, mode)?;
            done
        }
        other => other,
    }
}
