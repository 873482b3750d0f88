//! Is there room on the file systems for what an undo in a running program writes? Asked before
//! it begins: half of it done, there would be no way on.
//!
//! An estimate that does not refuse what would go well: written is what the tables hold of a
//! file beyond what that takes now, and freed what is removed or cut off, but for files that
//! the program has open still.

use super::super::Id;
use super::super::kept::link_name;
use super::super::table::{self, Kept, Record, Table};
use super::super::{SIZE, Stat, sys};
use super::rows::{RowInfo, Rows};
use super::{UndoError, apply};
use crate::store::generation::parse_dir_name;
use rustix::fs::{Dir, Mode, OFlags};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A block that a file system accounts in.
const BLOCK: u64 = 4096;
/// The table that begins behind it, with what the journal and directories take.
const STORE: u64 = 512 << 10;

/// What must be free of the store's before anything is removed: the notes of the undo, the
/// journal's words that newer generations are dropped.
const NOTES: u64 = 64 << 10;

/// One file system.
#[derive(Default)]
struct Budget {
    needed: BTreeMap<Id, u64>,
    freed: BTreeMap<Id, u64>,
    /// Something that lies there.
    at: Vec<u8>,
}

type Budgets = BTreeMap<u64, Budget>;

/// `open`: inodes that the program has open.
pub fn check(
    job_dir: &Path,
    to_generation: u64,
    tables: &[Table],
    open: &BTreeSet<Id>,
    excluded: impl Fn(&[u8]) -> bool,
) -> Result<(), UndoError> {
    let mut budgets = Budgets::new();
    store(job_dir, to_generation, tables, &mut budgets)?;
    for table in tables {
        of_table(job_dir, table, open, &excluded, &mut budgets);
    }
    for budget in budgets.values() {
        let needed: u64 = budget.needed.values().sum();
        let freed: u64 = budget.freed.values().sum();
        let Some(free) = free(&budget.at).filter(|_| needed > 0) else {
            continue;
        };
        if needed > free + freed {
            return Err(UndoError::NoSpace {
                path: apply::as_path(&budget.at),
                needed: (needed - freed.min(needed)).div_ceil(1024),
                free: free / 1024,
            });
        }
    }
    Ok(())
}

/// What is removed of the job: newer generations, tables.
fn store(
    job_dir: &Path,
    to_generation: u64,
    tables: &[Table],
    budgets: &mut Budgets,
) -> Result<(), UndoError> {
    let Ok(dir) = rustix::fs::lstat(job_dir) else {
        return Ok(());
    };
    let here = Id {
        dev: dir.st_dev,
        ino: dir.st_ino,
    };
    let budget = budgets.entry(here.dev).or_default();
    budget.at = job_dir.as_os_str().as_bytes().to_vec();
    budget.needed.insert(here, STORE);
    let gone = |budget: &mut Budget, path: &Path| {
        if let Ok(stat) = rustix::fs::lstat(path) {
            let id = Id {
                dev: stat.st_dev,
                ino: stat.st_ino,
            };
            budget.freed.insert(id, stat.st_blocks as u64 * 512);
        }
    };
    for name in names(job_dir) {
        if parse_dir_name(&name).is_some_and(|(number, _)| number > to_generation) {
            let dir = job_dir.join(OsStr::from_bytes(&name));
            for name in names(&dir) {
                gone(budget, &dir.join(OsStr::from_bytes(&name)));
            }
        }
    }
    let at_once: u64 = budget.freed.values().sum();
    if let Some(free) = free(&budget.at).filter(|free| free + at_once < NOTES) {
        return Err(UndoError::NoSpace {
            path: job_dir.to_owned(),
            needed: NOTES / 1024,
            free: free / 1024,
        });
    }
    for table in tables {
        gone(budget, &table.file.path);
        gone(budget, &table::shadow_path(job_dir, table.file.seq));
    }
    Ok(())
}

fn names(dir: &Path) -> Vec<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(dir, flags, Mode::empty()).and_then(Dir::new);
    let entries = opened.into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_bytes().to_vec());
    names.filter(|name| name != b"." && name != b"..").collect()
}

fn of_table(
    job_dir: &Path,
    table: &Table,
    open: &BTreeSet<Id>,
    excluded: &impl Fn(&[u8]) -> bool,
    budgets: &mut Budgets,
) {
    let rows = Rows::of(table.records.iter().map(|(_, record)| record));
    let mut held: BTreeMap<u32, u64> = BTreeMap::new();
    for (_, record) in &table.records {
        match record {
            Record::Blocks {
                row,
                len,
                shadow: Some(_),
                ..
            } => *held.entry(*row).or_default() += len,
            Record::Gone {
                name,
                stat,
                kept: Kept::Copy(copy),
                ..
            } if !excluded(&name.path()) => {
                let copy = table::kept_dir(job_dir, table.file.seq).join(OsStr::from_bytes(copy));
                if let Ok(found) = rustix::fs::lstat(copy) {
                    let bytes = found.st_blocks as u64 * 512;
                    need(budgets, stat.id, &name.path(), bytes);
                }
            }
            Record::Absent { name } if !excluded(&name.path()) => {
                let path = name.path();
                if let Some((stat, bytes)) = look(&path)
                    && stat.is_regular()
                    && stat.nlink == 1
                    && !open.contains(&stat.id)
                {
                    let budget = budgets.entry(stat.id.dev).or_default();
                    budget.freed.insert(stat.id, bytes);
                }
            }
            _ => {}
        }
    }
    let shadow = rustix::fs::lstat(table::shadow_path(job_dir, table.file.seq));
    let most = shadow.map_or(0, |stat| stat.st_blocks as u64 * 512);
    for (row, info) in &rows.rows {
        let wanted = held.get(row).copied().unwrap_or(0).min(most);
        let shorter = info.which & SIZE != 0;
        if wanted == 0 && !shorter || excluded(&info.first_path) {
            continue;
        }
        // One that cannot be found is made anew, or left alone.
        let Some(now) = now(job_dir, table, info) else {
            continue;
        };
        let whole = info.stat.size.next_multiple_of(BLOCK);
        need(
            budgets,
            info.stat.id,
            &info.first_path,
            wanted.min(whole).saturating_sub(now),
        );
        if shorter && now > whole {
            let budget = budgets.entry(info.stat.id.dev).or_default();
            budget.freed.entry(info.stat.id).or_insert(now - whole);
        }
    }
}

fn need(budgets: &mut Budgets, id: Id, path: &[u8], bytes: u64) {
    let budget = budgets.entry(id.dev).or_default();
    if budget.at.is_empty() {
        let end = path.iter().rposition(|&b| b == b'/').unwrap_or(0);
        budget.at = path[..end.max(1)].to_vec();
    }
    let needed = budget.needed.entry(id).or_default();
    *needed = bytes.max(*needed);
}

/// What an inode takes now, wherever it is.
fn now(job_dir: &Path, table: &Table, info: &RowInfo) -> Option<u64> {
    let paths = info.path.iter().chain(info.seen.iter().rev());
    let mut found = paths
        .chain([&info.first_path])
        .filter_map(|path| look(path));
    if let Some((_, bytes)) = found.find(|(stat, _)| stat.id == info.stat.id) {
        return Some(bytes);
    }
    let mut kept = table::c_path(&table::kept_dir(job_dir, table.file.seq)).ok()?;
    link_name(&mut kept, &info.stat.id).ok()?;
    let (stat, bytes) = look(kept.bytes())?;
    (stat.id == info.stat.id).then_some(bytes)
}

fn look(path: &[u8]) -> Option<(Stat, u64)> {
    let stat = sys::lstat(&apply::c(path).ok()?).ok()?;
    let found = rustix::fs::lstat(OsStr::from_bytes(path)).ok()?;
    Some((stat, found.st_blocks as u64 * 512))
}

/// Bytes that can still be written there; `None`: not known, or not limited.
fn free(at: &[u8]) -> Option<u64> {
    let stat = rustix::fs::statvfs(OsStr::from_bytes(at)).ok()?;
    let privileged = sys::has_capability(sys::CAP_SYS_RESOURCE);
    let blocks = if privileged {
        stat.f_bfree
    } else {
        stat.f_bavail
    };
    (stat.f_blocks > 0).then(|| blocks * stat.f_frsize)
}
