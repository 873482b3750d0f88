//! Tables: beginning and ending them (helper thread), listing and reading them
//! (command, recovery).

use super::{Id, Stat, Which};
use crate::store::StoreError;
use std::path::{Path, PathBuf};

/// A table that is made and mapped, not yet in use.
#[derive(Debug)]
pub struct Prepared {
    pub seq: u32,
}

/// A table in the job's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableFile {
    pub seq: u32,
    /// The generation that it leads back to.
    pub base: u64,
    pub path: PathBuf,
    /// Something could not be recorded: why.
    pub incomplete: Option<String>,
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
        id: Id,
        /// The other inode of an exchange.
        other: Option<Id>,
    },
    RemovedDir {
        name: Name,
        stat: Stat,
        xattrs: Xattrs,
    },
    Inode {
        row: u32,
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
}

/// A table that was read.
#[derive(Debug, Clone)]
pub struct Table {
    pub file: TableFile,
    pub power: bool,
    /// Wall clock of the helper's last round.
    pub alive_ns: i64,
    /// With their offsets in the file.
    pub records: Vec<(u64, Record)>,
}

/// Makes, preallocates and maps a table (helper thread, before the stop).
pub fn create(
    job_dir: &Path,
    seq: u32,
    base_generation: u64,
    power: bool,
) -> Result<Prepared, StoreError> {
    let _ = (job_dir, base_generation, power);
    Ok(Prepared { seq })
}

/// Puts a table in force (during the stop, or before the program's threads run). The
/// one before it ends here.
pub fn install(prepared: Prepared) {
    let _ = prepared;
}

/// The restored helper, first thing: the table that the image remembers is not
/// mapped any more; nothing is recorded until the next `install`.
pub fn forget() {}

/// Unmaps the table before the present one and cuts it to what is used (helper
/// thread, after the stop).
pub fn close_previous() {}

/// How many ranges a table in use and one being made can have.
pub const OWN_RANGES: usize = 9;

/// Mapped ranges that do not belong to the image.
pub fn own_ranges() -> [(u64, u64); OWN_RANGES] {
    [(0, 0); OWN_RANGES]
}

/// The helper's rounds: the program is alive at this wall clock time.
pub fn alive(now_ns: i64) {
    let _ = now_ns;
}

/// Why the open table does not lead back, if so.
pub fn incomplete_reason() -> Option<String> {
    None
}

/// All tables of a job, oldest first. A file that is no table is left out.
pub fn list(job_dir: &Path) -> Result<Vec<TableFile>, StoreError> {
    let _ = job_dir;
    Ok(Vec::new())
}

/// Removes a table with all that belongs to it; the table itself last.
pub fn remove(job_dir: &Path, seq: u32) -> Result<(), StoreError> {
    let _ = (job_dir, seq);
    Ok(())
}

/// Reads a table; a damaged tail is left out.
pub fn read(path: &Path) -> Result<Table, StoreError> {
    Err(StoreError {
        verb: "read",
        path: path.to_owned(),
        errno: crate::errno::Errno::ENOENT,
    })
}
