//! Tables: what one says, where its files lie, and which of them lead back to a generation.
//!
//! `live` makes tables, puts them in force and ends them, `read` lists and reads them, `remove`
//! removes them.

mod live;
mod read;
mod remove;

pub use live::{
    OWN_RANGES, Prepared, alive, close_previous, create, create_empty, create_unrecorded, ended,
    forget, incomplete_reason, install, own_ranges,
};
pub(super) use live::{end_return, install_for_return};
pub use read::{highest, list, list_back, read};
pub use remove::{remove, remove_for_reuse, remove_leftovers};

use super::sys::{CPath, Sys};
use super::{Id, Identity, Stat, Which};
use crate::errno::Errno;
use crate::store::StoreError;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A table in the job's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableFile {
    pub seq: u32,
    /// The generation that it leads back to.
    pub base: u64,
    pub path: PathBuf,
    /// Something could not be recorded: why.
    pub incomplete: Option<String>,
    /// All its records have been taken back.
    pub undone: bool,
}

/// What a record's removed inode is put back from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// A hard link of this name in the `kept-` directory.
    Link(Vec<u8>),
    /// A copy of this name in the `kept-` directory.
    Copy(Vec<u8>),
    /// A symbolic link to this target.
    Symlink(Vec<u8>),
    /// A FIFO, socket or device: its attributes say all.
    Node,
}

/// A directory's path, a name in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    pub dir: Id,
    pub dir_path: Vec<u8>,
    pub name: Vec<u8>,
}

impl Name {
    /// The whole path.
    pub fn path(&self) -> Vec<u8> {
        let mut path = self.dir_path.clone();
        if !path.ends_with(b"/") {
            path.push(b'/');
        }
        path.extend_from_slice(&self.name);
        path
    }
}

/// Extended attributes with their values.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// An inode that was moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    pub inode: Identity,
    /// It was made since the table began; `None`: the record does not say.
    pub born: Option<bool>,
}

/// One record, as read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    Absent {
        name: Name,
    },
    Gone {
        name: Name,
        stat: Stat,
        kept: Kept,
        xattrs: Xattrs,
    },
    Renamed {
        from: Name,
        to: Name,
        moved: Moved,
        /// The other inode of an exchange.
        other: Option<Moved>,
    },
    RemovedDir {
        name: Name,
        stat: Stat,
        xattrs: Xattrs,
    },
    Inode {
        row: u32,
        /// Its slot in the table, or `format::NO_SLOT`.
        slot: u32,
        which: Which,
        stat: Stat,
        path: Vec<u8>,
    },
    /// A row's inode is called otherwise from here on.
    Path {
        row: u32,
        path: Vec<u8>,
    },
    Blocks {
        row: u32,
        offset: u64,
        len: u64,
        /// Where the pre-image lies in the shadow file; `None`: zeros.
        shadow: Option<u64>,
    },
    Xattr {
        row: u32,
        name: Vec<u8>,
        value: Option<Vec<u8>>,
    },
    /// An inode that was made since the table began.
    Born {
        id: Id,
    },
    /// The operation whose records begin at this offset failed. Its records read as
    /// this, too.
    Cancelled {
        from: u64,
    },
    /// From here on the records are of a recorded return (`undo::go_back_recorded`), before
    /// which so many notes had been made of inodes made anew.
    Returned {
        made: u64,
    },
    /// Something about this path could not be recorded (empty: anything).
    Incomplete {
        path: Vec<u8>,
        reason: Vec<u8>,
    },
}

/// What is known of a row's inode since.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Slot {
    /// Written by the fast path, which notes nothing else.
    pub hot: bool,
    /// Size and time are those after our last operation.
    pub known: bool,
    pub size: u64,
    pub mtime_ns: i64,
}

/// A table that was read.
#[derive(Debug, Clone)]
pub struct Table {
    pub file: TableFile,
    pub power: bool,
    /// Wall clock of the helper's last round.
    pub alive_ns: i64,
    /// Wall clock of the program's end; 0: not known.
    pub ended_ns: i64,
    /// When its undo began, if that is `checked`; 0: not known.
    pub begun_ns: i64,
    /// The name under which something was being made (`format::making`); 0: none.
    pub making: u64,
    /// The journal ends before the modifications do.
    pub broken: bool,
    /// There are bytes behind the last whole record that a kill does not explain.
    pub damaged: bool,
    /// An undo has come down to this offset; 0: none has begun.
    pub undone: u64,
    /// An undo has looked for changes of somebody else.
    pub checked: bool,
    /// What is known of rows' inodes, by slot; nothing of those that are missing at the end.
    pub slots: Vec<Slot>,
    /// With their offsets in the file.
    pub records: Vec<(u64, Record)>,
}

fn on<T>(result: Sys<T>, verb: &'static str, path: &Path) -> Result<T, StoreError> {
    result.map_err(|e| StoreError {
        verb,
        path: path.to_owned(),
        errno: Errno(e),
    })
}

fn numbered(job_dir: &Path, prefix: &str, seq: u32) -> PathBuf {
    job_dir.join(format!("{prefix}{seq:06}"))
}

/// The directory of removed files that a table keeps.
pub fn kept_dir(job_dir: &Path, seq: u32) -> PathBuf {
    numbered(job_dir, "kept-", seq)
}

/// The pre-images that a table's records refer to.
pub fn shadow_path(job_dir: &Path, seq: u32) -> PathBuf {
    numbered(job_dir, "shadow-", seq)
}

/// The tables that lead back to a generation, of all tables of the job, oldest first. At
/// the beginning of each of them whose base it is, the files were as they were at the generation: the
/// newest such table is as far as an undo has to go. Where there is none, all is undone
/// but what leads back further.
pub fn leading_back(tables: &[TableFile], generation: u64) -> &[TableFile] {
    let own = tables.iter().rposition(|t| t.base == generation);
    let newer = || tables.iter().position(|t| t.base > generation);
    own.or_else(newer)
        .and_then(|first| tables.get(first..))
        .unwrap_or_default()
}

/// Can a generation still be reached when all that leads back to `to` has been undone?
pub fn outlives(tables: &[TableFile], to: u64, generation: u64) -> bool {
    let undone = leading_back(tables, to).len();
    let mut left = tables.iter().take(tables.len() - undone);
    generation == to || left.any(|t| t.base == generation)
}

/// The tables that none of these generations needs: they lead back further.
pub fn unneeded<'t>(tables: &'t [TableFile], generations: &[u64]) -> &'t [TableFile] {
    let own = |g: &u64| tables.iter().rposition(|t| t.base == *g);
    let oldest = generations.iter().min();
    let first = match generations.iter().filter_map(own).min() {
        Some(first) => first,
        // None has any: what leads back to before the oldest.
        None => tables
            .iter()
            .position(|t| oldest.is_none_or(|oldest| t.base >= *oldest))
            .unwrap_or(tables.len()),
    };
    tables.get(..first).unwrap_or_default()
}

pub(super) fn c_path(path: &Path) -> Sys<CPath> {
    CPath::new(&[path.as_os_str().as_bytes()])
}

#[cfg(test)]
mod tests;
