//! Removing tables with all that belongs to them: helper thread, recovery, command.

use super::read::{all_names, listed, of_tables};
use super::{TableFile, c_path, kept_dir, numbered, on, shadow_path};
use crate::persist::sys;
use crate::persist::writer::SPARE;
use crate::store::StoreError;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Removes a table with all that belongs to it; the table itself last, so that a
/// removal that was cut short is simply done again.
pub fn remove(job_dir: &Path, seq: u32) -> Result<(), StoreError> {
    remove_parts(job_dir, seq)?;
    unlink(&numbered(job_dir, "table-", seq))
}

/// As [`remove`], but the table's file stays under another name for the next table to be made
/// of. To remove one file and to make another costs ext4 up to a millisecond: it looks for
/// an inode that was not removed in the last seconds. Only where no process has it mapped.
pub fn remove_for_reuse(job_dir: &Path, seq: u32) -> Result<(), StoreError> {
    remove_parts(job_dir, seq)?;
    sys::point();
    let path = numbered(job_dir, "table-", seq);
    let spare = job_dir.join(OsStr::from_bytes(SPARE));
    let done = c_path(&path).and_then(|from| sys::rename(&from, &c_path(&spare)?, 0));
    match done {
        Err(libc::ENOENT) => Ok(()),
        done => on(done, "remove", &path),
    }
}

fn remove_parts(job_dir: &Path, seq: u32) -> Result<(), StoreError> {
    let kept = kept_dir(job_dir, seq);
    let names = match c_path(&kept).and_then(|p| sys::list(&p)) {
        Err(libc::ENOENT) => None,
        other => Some(on(other, "list", &kept)?),
    };
    for name in names.iter().flatten() {
        unlink(&kept.join(OsStr::from_bytes(name)))?;
    }
    if names.is_some() {
        match c_path(&kept).and_then(|p| sys::rmdir(&p)) {
            Err(libc::ENOENT) => {}
            done => on(done, "remove", &kept)?,
        }
    }
    unlink(&shadow_path(job_dir, seq))
}

fn unlink(path: &Path) -> Result<(), StoreError> {
    sys::point();
    match c_path(path).and_then(|p| sys::unlink(&p)) {
        Err(libc::ENOENT) => Ok(()),
        done => on(done, "remove", path),
    }
}

/// Removes what a kill during the making of a table, or [`remove_for_reuse`], has left.
/// Returns the tables that are left, oldest first.
pub fn remove_leftovers(job_dir: &Path) -> Result<Vec<TableFile>, StoreError> {
    let names = all_names(job_dir)?;
    for name in &names {
        let new = name.starts_with(b"table-") && name.ends_with(b".new");
        if new || name == SPARE {
            let path = job_dir.join(OsStr::from_bytes(name));
            let done = c_path(&path).and_then(|p| sys::unlink(&p));
            on(done, "remove", &path)?;
        }
    }
    // One that is undone, and whose place another of its base has taken: the files are as
    // they were when that one began, and what this one tells of them is not true any more.
    let mut tables = listed(job_dir, of_tables(names))?;
    let replaced = tables.windows(2).filter_map(|pair| match pair {
        [old, new] => (old.undone && old.base == new.base).then_some(old.seq),
        _ => None,
    });
    let replaced: Vec<u32> = replaced.collect();
    for &seq in &replaced {
        remove(job_dir, seq)?;
    }
    tables.retain(|table| !replaced.contains(&table.seq));
    Ok(tables)
}
