//! Where a table's inodes are called at any point of its records.
//!
//! Pure code: a forward pass over the records follows the renames; on the way back
//! each undone rename moves the paths back. So a row that was recorded under one name
//! is found under the name that it has at the record which is being undone, and, when
//! all are undone, under its name at the checkpoint.

use crate::persist::table::{Name, Record, Table};
use crate::persist::{Id, Identity, Stat, Which};
use std::collections::BTreeMap;

/// Longest list of former paths that is kept for a row.
const SEEN: usize = 16;

/// One row.
#[derive(Debug, Clone)]
pub struct RowInfo {
    /// As it was at the first record: at the checkpoint, in all that `which` of a later
    /// record does not say was still unmodified.
    pub stat: Stat,
    pub slot: u32,
    /// All attributes that some record has.
    pub which: Which,
    /// Access and modification time, when recorded.
    pub times: Option<(i64, i64)>,
    /// The path of the first record.
    pub first_path: Vec<u8>,
    /// Now; `None`: its name was removed.
    pub path: Option<Vec<u8>>,
    /// Paths before each `Path` record, for the way back.
    before: Vec<Option<Vec<u8>>>,
    /// Other paths that it had: where to look when an operation had failed.
    pub seen: Vec<Vec<u8>>,
}

/// All rows of one table.
#[derive(Debug, Default)]
pub struct Rows {
    pub rows: BTreeMap<u32, RowInfo>,
    by_id: BTreeMap<Id, u32>,
    by_path: BTreeMap<Vec<u8>, Vec<u32>>,
    /// Added to the row numbers of the present table.
    base: u32,
}

impl Rows {
    /// Follows all records of a table.
    pub fn of<'a>(records: impl IntoIterator<Item = &'a Record>) -> Rows {
        let mut rows = Rows::default();
        for record in records {
            rows.forward(record);
        }
        rows
    }

    pub fn of_inode(&self, inode: &Identity) -> Option<&RowInfo> {
        let row = self.by_id.get(&inode.id)?;
        let info = self.rows.get(row)?;
        info.stat.identity().is(inode).then_some(info)
    }

    /// Goes on with the records of the next newer table, whose rows get numbers above
    /// all others; returns the first of them.
    pub fn next_table(&mut self, table: &Table) -> u32 {
        self.base = self.rows.keys().next_back().map_or(0, |last| last + 1);
        for (_, record) in &table.records {
            self.forward(record);
        }
        self.base
    }

    fn set_path(&mut self, row: u32, path: Option<Vec<u8>>) {
        let Some(info) = self.rows.get_mut(&row) else {
            return;
        };
        if info.path == path {
            return;
        }
        if let Some(old) = std::mem::replace(&mut info.path, path.clone()) {
            if let Some(list) = self.by_path.get_mut(&old) {
                list.retain(|r| *r != row);
                if list.is_empty() {
                    self.by_path.remove(&old);
                }
            }
            if !info.seen.contains(&old) {
                if info.seen.len() == SEEN {
                    info.seen.remove(0);
                }
                info.seen.push(old);
            }
        }
        if let Some(path) = path {
            self.by_path.entry(path).or_default().push(row);
        }
    }

    /// All rows at `path` or below it.
    fn under(&self, path: &[u8]) -> Vec<u32> {
        let mut below = path.to_vec();
        below.push(b'/');
        let mut found = self.by_path.get(path).cloned().unwrap_or_default();
        let tree = self
            .by_path
            .range(below.clone()..)
            .take_while(|(p, _)| p.starts_with(&below));
        found.extend(tree.flat_map(|(_, rows)| rows));
        found
    }

    /// Gives all of `rows`, which are at or below `from`, the paths at or below `to`.
    fn shift(&mut self, rows: &[u32], from: &[u8], to: &[u8]) {
        for row in rows {
            let path = self.rows.get(row).and_then(|r| r.path.as_ref());
            let rest = path.and_then(|p| p.strip_prefix(from)).map(<[u8]>::to_vec);
            if let Some(rest) = rest {
                self.set_path(*row, Some([to, &rest].concat()));
            }
        }
    }

    fn rename(&mut self, from: &[u8], to: &[u8], exchange: bool) {
        let moved = self.under(from);
        let other = if exchange { self.under(to) } else { Vec::new() };
        self.shift(&moved, from, to);
        self.shift(&other, to, from);
    }

    fn forward(&mut self, record: &Record) {
        match record {
            Record::Inode {
                row,
                slot,
                which,
                stat,
                path,
            } => self.inode(row + self.base, *slot, *which, stat, path),
            Record::Path { row, path } => {
                let row = row + self.base;
                if let Some(info) = self.rows.get_mut(&row) {
                    info.before.push(info.path.clone());
                    self.set_path(row, Some(path.clone()));
                }
            }
            Record::Gone { name, .. } | Record::RemovedDir { name, .. } => {
                // By path, not by number: an older table's row may know the inode by
                // the number that it had before a recovery.
                let there = self.by_path.get(&name.path()).cloned();
                for row in there.unwrap_or_default() {
                    self.set_path(row, None);
                }
            }
            Record::Renamed {
                from, to, other, ..
            } => self.rename(&from.path(), &to.path(), other.is_some()),
            _ => {}
        }
    }

    fn inode(&mut self, row: u32, slot: u32, which: Which, stat: &Stat, path: &[u8]) {
        let times = (which & crate::persist::TIMES != 0).then_some((stat.atime_ns, stat.mtime_ns));
        if let Some(info) = self.rows.get_mut(&row) {
            info.which |= which;
            info.times = info.times.or(times);
            return;
        }
        let info = RowInfo {
            stat: *stat,
            slot,
            which,
            times,
            first_path: path.to_vec(),
            path: None,
            before: Vec::new(),
            seen: Vec::new(),
        };
        self.rows.insert(row, info);
        self.by_id.insert(stat.id, row);
        // Without a name from the beginning: an older table's kept link has it.
        self.set_path(row, (!path.is_empty()).then(|| path.to_vec()));
    }

    /// A record is being undone: paths become what they were before it.
    pub fn back(&mut self, record: &Record) {
        match record {
            Record::Path { row, .. } => {
                let before = self.rows.get_mut(row).and_then(|info| info.before.pop());
                // A removed name that the row's path still tells is better than none.
                if let Some(Some(before)) = before {
                    self.set_path(*row, Some(before));
                }
            }
            Record::Gone { name, stat, .. } | Record::RemovedDir { name, stat, .. } => {
                self.back_at(name, stat);
            }
            Record::Renamed {
                from, to, other, ..
            } => self.rename(&to.path(), &from.path(), other.is_some()),
            _ => {}
        }
    }

    fn back_at(&mut self, name: &Name, stat: &Stat) {
        if self.of_inode(&stat.identity()).is_some()
            && let Some(row) = self.by_id.get(&stat.id).copied()
        {
            self.set_path(row, Some(name.path()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::persist::table::Moved;

    fn name(path: &str) -> Name {
        let (dir, name) = path.rsplit_once('/').unwrap();
        Name {
            dir: Id::default(),
            dir_path: if dir.is_empty() { "/" } else { dir }.into(),
            name: name.into(),
        }
    }

    fn moved() -> Moved {
        Moved {
            inode: Identity::default(),
            born: None,
        }
    }

    fn inode(row: u32, path: &str) -> Record {
        let mut stat = Stat::default();
        stat.id.ino = u64::from(row) + 1;
        Record::Inode {
            row,
            slot: row,
            which: 0,
            stat,
            path: path.into(),
        }
    }

    fn renamed(from: &str, to: &str, exchange: bool) -> Record {
        Record::Renamed {
            from: name(from),
            to: name(to),
            moved: moved(),
            other: exchange.then(moved),
        }
    }

    #[test]
    fn rows_follow_renames_forth_and_back() {
        let records = [
            inode(0, "/a/x"),
            renamed("/a", "/b", false),
            inode(1, "/b/y"),
            inode(2, "/c"),
            renamed("/c", "/b/z", true),
        ];
        let mut rows = Rows::of(&records);
        let path = |rows: &Rows, row: u32| rows.rows[&row].path.clone().unwrap();
        assert_eq!(path(&rows, 0), b"/b/x");
        assert_eq!(path(&rows, 2), b"/b/z");
        for record in records.iter().rev() {
            rows.back(record);
        }
        assert_eq!(path(&rows, 0), b"/a/x");
        assert_eq!(path(&rows, 1), b"/a/y");
        assert_eq!(path(&rows, 2), b"/c");
    }
}
