//! What the hooks tell of modifications, before they run.
//!
//! Called in the program's threads inside hooks (the caller holds `InHook`).

use super::{Coverage, FileRef, Id, NameRef, Stat, Which};

/// The right to record: the recorder's lock, with signals blocked.
#[must_use = "the session holds the lock"]
pub struct Session(());

/// Is a table open? One load.
#[inline]
pub fn active() -> bool {
    false
}

/// The open table's number, the stamp of everything cached about descriptors; 0: none.
#[inline]
pub fn table_number() -> u32 {
    0
}

/// Takes the lock. `None`: no table is open, nothing needs to be told.
pub fn enter() -> Option<Session> {
    None
}

impl Session {
    /// Is this path left alone?
    pub fn is_excluded(&self, _path: &[u8]) -> bool {
        false
    }

    /// Bytes `start..end` are about to be written (`end` may be beyond the file's end;
    /// for O_APPEND pass the size as `start`).
    pub fn before_write(&mut self, _file: &FileRef, _start: u64, _end: u64) -> Coverage {
        Coverage::Partial
    }

    /// What writes to this inode still need, without recording anything.
    pub fn coverage(&self, _id: &Id) -> Coverage {
        Coverage::Partial
    }

    /// The size is about to be set (truncate, ftruncate, O_TRUNC).
    pub fn before_truncate(&mut self, _file: &FileRef, _new_size: u64) {}

    /// Attributes are about to be set (chmod, chown, utimes).
    pub fn before_attributes(&mut self, _file: &FileRef, _which: Which) {}

    /// Everything from `from` on is about to move (fallocate collapse, insert).
    pub fn before_range_shift(&mut self, _file: &FileRef, _from: u64) {}

    /// An extended attribute is about to be set or removed.
    pub fn before_xattr(&mut self, _file: &FileRef, _name: &[u8]) {}

    /// A name that is absent is about to be created (open, mkdir, mknod, symlink, link).
    pub fn before_create(&mut self, _name: &NameRef) {}

    /// `target` is about to get the new name `name` (which is absent): instead of
    /// `before_create` for link and linkat.
    pub fn before_link(&mut self, _target: &FileRef, _name: &NameRef) {}

    /// The inode that an operation has just made (also O_TMPFILE, also after mkdir).
    pub fn created(&mut self, _id: Id) {}

    /// Was this inode made since the table began?
    pub fn is_born(&self, _id: &Id) -> bool {
        false
    }

    /// A name is about to be removed (unlink, rmdir).
    pub fn before_remove(&mut self, _name: &NameRef, _stat: &Stat) {}

    /// `from` is about to be renamed to `to`, whose present inode is `to_stat`.
    pub fn before_rename(
        &mut self,
        _from: &NameRef,
        _from_stat: &Stat,
        _to: &NameRef,
        _to_stat: Option<&Stat>,
        _exchange: bool,
    ) {
    }

    /// The inode as it is after an operation of ours (or at a close).
    pub fn touched(&mut self, _stat: &Stat) {}

    /// A word that the fast path sets to 1 when it writes to this inode; valid as
    /// long as this table is open.
    pub fn hot(&mut self, _id: &Id) -> Option<*mut u32> {
        None
    }

    /// Something cannot be recorded: the table will not lead back any more. `reason`
    /// is a clause for people, as "/a/b: no space left".
    pub fn incomplete(&mut self, _reason: &[u8]) {}
}
