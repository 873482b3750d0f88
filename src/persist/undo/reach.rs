//! Does an undo bring a file back? For a rollback, which must know before it begins.

use super::super::table::{Name, Record};
use super::super::{Id, MODE, OWNER};
use super::{UndoError, tables};
use std::path::Path;

/// What of a file is to come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Back {
    /// Its name.
    Name,
    /// What it is, or its name.
    Any,
}

/// Do the tables that lead back to a generation say anything of this file: of its inode, or of
/// a name on its path?
pub fn concerns(
    job_dir: &Path,
    to_generation: u64,
    restore_exclude: &[Vec<u8>],
    (path, id): (&[u8], Id),
    back: Back,
) -> Result<bool, UndoError> {
    let tables = tables(job_dir, to_generation, restore_exclude, true)?;
    let mut records = tables.iter().flat_map(|table| &table.records);
    Ok(records.any(|(_, record)| match back {
        Back::Name => names(record, path, id),
        Back::Any => is_about(record, path, id),
    }))
}

/// Would the undo remove this name? It was not there at the generation.
pub fn removes(
    job_dir: &Path,
    to_generation: u64,
    restore_exclude: &[Vec<u8>],
    path: &[u8],
) -> Result<bool, UndoError> {
    let tables = tables(job_dir, to_generation, restore_exclude, true)?;
    let oldest_first = tables.iter().rev().flat_map(|table| &table.records);
    let mut told = oldest_first.filter_map(|(_, record)| was_there(record, path));
    Ok(told.next() == Some(false))
}

/// What a record says of a name before it.
fn was_there(record: &Record, path: &[u8]) -> Option<bool> {
    match record {
        Record::Absent { name } => leads(name, path).then_some(false),
        Record::Gone { name, .. } | Record::RemovedDir { name, .. } => {
            leads(name, path).then_some(true)
        }
        Record::Renamed {
            from, to, other, ..
        } => {
            let arrives = leads(to, path).then_some(other.is_some());
            leads(from, path).then_some(true).or(arrives)
        }
        _ => None,
    }
}

/// Does it lead to the name? Also a file of it that somebody else has removed, of which the tables
/// may have all, or moved.
fn names(record: &Record, path: &[u8], id: Id) -> bool {
    match record {
        Record::Inode {
            stat, path: called, ..
        } => stat.id == id && called == path,
        _ => was_there(record, path) == Some(true),
    }
}

fn is_about(record: &Record, path: &[u8], id: Id) -> bool {
    match record {
        Record::Gone { name, stat, .. } | Record::RemovedDir { name, stat, .. } => {
            stat.id == id || leads(name, path)
        }
        Record::Renamed { moved, other, .. } => {
            let mut both = std::iter::once(moved).chain(other);
            both.any(|moved| moved.inode.id == id) || was_there(record, path) == Some(true)
        }
        // A directory in which something was made or removed has other times, no more.
        Record::Inode {
            stat,
            which,
            path: called,
            ..
        } => stat.id == id || which & (MODE | OWNER) != 0 && is_on(called, path),
        _ => false,
    }
}

fn leads(name: &Name, path: &[u8]) -> bool {
    let mut whole = name.dir_path.clone();
    if whole.last() != Some(&b'/') {
        whole.push(b'/');
    }
    whole.extend_from_slice(&name.name);
    is_on(&whole, path)
}

/// Is it the path itself or a directory on it?
fn is_on(name: &[u8], path: &[u8]) -> bool {
    path.strip_prefix(name)
        .is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::persist::table::Moved;
    use crate::persist::{Identity, Stat, TIMES};

    #[test]
    fn times_of_a_directory_bring_nothing_back() {
        let of = |which| Record::Inode {
            row: 0,
            slot: 0,
            which,
            stat: Stat::default(),
            path: b"/a".into(),
        };
        let id = Id { dev: 1, ino: 1 };
        assert!(is_about(&of(MODE), b"/a/b", id));
        assert!(!is_about(&of(TIMES), b"/a/b", id));
        assert!(is_about(&of(TIMES), b"/c", Stat::default().id));
        assert!(!names(&of(MODE), b"/a", id) && !names(&of(MODE), b"/c", Stat::default().id));
        assert!(names(&of(TIMES), b"/a", Stat::default().id));
    }

    #[test]
    fn names_on_a_path() {
        let name = |dir: &str, name: &str| Name {
            dir: Id { dev: 1, ino: 1 },
            dir_path: dir.into(),
            name: name.into(),
        };
        assert!(leads(&name("/a/b", "c"), b"/a/b/c"));
        assert!(leads(&name("/", "a"), b"/a/b/c"));
        assert!(leads(&name("/a", "b"), b"/a/b/c"));
        assert!(!leads(&name("/a/b", "c"), b"/a/b/cd"));
        assert!(!leads(&name("/a/b/c", "d"), b"/a/b/c"));
        let moved = |ino| Moved {
            inode: Identity {
                id: Id { dev: 1, ino },
                birth: 0,
            },
            born: None,
        };
        let renamed = |other| Record::Renamed {
            from: name("/a", "b"),
            to: name("/a", "c"),
            moved: moved(2),
            other,
        };
        let id = |ino| Id { dev: 1, ino };
        assert!(is_about(&renamed(None), b"/a/b", id(9)));
        assert!(is_about(&renamed(None), b"/a/x", id(2)));
        assert!(!is_about(&renamed(None), b"/a/c", id(9)));
        assert!(is_about(&renamed(Some(moved(3))), b"/a/c/d", id(9)));
        assert!(is_about(&renamed(Some(moved(3))), b"/a/x", id(3)));
        let made = Record::Absent {
            name: name("/a", "b"),
        };
        assert_eq!(was_there(&made, b"/a/b/c"), Some(false));
        assert_eq!(was_there(&made, b"/a/c"), None);
    }
}
