//! A file that is not where the program left it: where is it, what was it called at the
//! generation, is what it held known?
//!
//! Somebody else has removed it, put another in its place, or moved it. One that was moved
//! within its directory is found by its identity. One that is gone can be made again when the
//! tables keep all that it held at the generation: a file that is mapped shared and writable
//! (its mapped part is copied when a table begins), one that was cut off or written over from
//! end to end, an empty one. Reads tables and names only; `place` does what is to be done.

use super::apply::Undoer;
use super::rows::{RowInfo, Rows};
use crate::persist::sys::{self, CPath};
use crate::persist::table::{Name, Record, Table};
use crate::persist::{Identity, Stat};
use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;

/// Names that an undo uses for a moment begin with this.
pub const BESIDE: &[u8] = b".ckpt-undo-";

/// An inode that is not at its path.
#[derive(Debug, Clone)]
pub struct Lost {
    /// As that table, the newest that knows it, calls it.
    pub inode: Identity,
    pub table: u64,
    /// Its name at the generation, and the one that the program left it under.
    pub path: Vec<u8>,
    pub left: Vec<u8>,
    /// The program has used that name for something else since.
    pub is_reused: bool,
    /// The program has made, moved or removed a directory on the way to where it is.
    pub is_tangled: bool,
    /// Where it was moved to.
    pub moved: Option<Vec<u8>>,
    /// As it was at the generation.
    pub stat: Stat,
    /// All that it held then is in the tables.
    pub is_whole: bool,
    /// It was made after the generation: nothing is lost.
    pub is_born: bool,
}

/// A row of an inode in one of the tables.
#[derive(Debug, Clone, Copy)]
pub struct RowAt {
    /// The table's place in the list, which begins with the newest.
    pub at: usize,
    pub row: u32,
    /// As it was when the table began.
    pub stat: Stat,
}

impl Undoer<'_, '_> {
    /// All rows of an inode, the newest table's first. `of`: as this table calls it.
    pub fn rows_of(&mut self, tables: &[Table], of: &Identity, table: u64) -> Vec<RowAt> {
        let now = self.replaced.follow(of, table);
        let mut rows = Vec::new();
        for (at, table) in tables.iter().enumerate() {
            let mut known = BTreeSet::new();
            let number = u64::from(table.file.seq);
            for (_, record) in &table.records {
                if let Record::Inode { row, stat, .. } = record
                    && known.insert(*row)
                    && self.replaced.follow(&stat.identity(), number).is(&now)
                {
                    let (row, stat) = (*row, *stat);
                    rows.push(RowAt { at, row, stat });
                }
            }
        }
        rows
    }

    /// What is to be known of a row's inode that is not found. `info`: its row in this table;
    /// `None`: nothing can be said.
    pub fn lost_inode(&mut self, tables: &[Table], table: u64, info: &RowInfo) -> Option<Lost> {
        let inode = info.stat.identity();
        let rows = self.rows_of(tables, &inode, table);
        let oldest = rows.last()?;
        let older = tables.get(oldest.at + 1..).unwrap_or_default();
        let mut records = older.iter().flat_map(|t| &t.records);
        let born = |(_, record): &(u64, Record)| *record == Record::Born { id: oldest.stat.id };
        let is_born = records.any(born);
        let now = self.replaced.follow(&inode, table);
        let path = path_then(tables, oldest)?;
        let left = info.path.as_deref().unwrap_or(&path);
        let moved = self.look_beside(left, &now);
        Some(Lost {
            is_tangled: moved.as_ref().is_some_and(|at| is_tangled(tables, at)),
            left: left.to_vec(),
            is_reused: self.is_reused(tables, left, &now),

            inode,
            table,
            moved,
            stat: oldest.stat,
            // With another name it may live on, changed, where nobody knows of it.
            is_whole: oldest.stat.nlink <= 1
                && info.stat.nlink <= 1
                && is_whole(tables, &rows, oldest.stat.size),
            is_born,
            path,
        })
    }

    /// After an inode got this name, has the program made or moved something else there?
    fn is_reused(&self, tables: &[Table], path: &[u8], inode: &Identity) -> bool {
        let there = CPath::new(&[path]).and_then(|path| sys::lstat(&path));
        // One of somebody else's that the program has modified counts as well: it is to be
        // undone first.
        if there.is_ok_and(|there| self.known.contains(&there.id)) {
            return true;
        }
        let mut reused = false;
        for table in tables.iter().rev() {
            let number = u64::from(table.file.seq);
            for (_, record) in &table.records {
                match record {
                    Record::Absent { name } if name.path() == path => reused = true,
                    Record::Renamed { to, moved, .. } if to.path() == path => {
                        reused = !self.replaced.follow(&moved.inode, number).is(inode);
                    }
                    _ => {}
                }
            }
        }
        reused
    }

    /// Looks for an inode under another name in the directory of this path. Only where inodes
    /// have births: by a number alone it may be another.
    pub fn look_beside(&self, path: &[u8], inode: &Identity) -> Option<Vec<u8>> {
        if inode.birth == 0 {
            return None;
        }
        let slash = path.iter().rposition(|b| *b == b'/')?;
        let dir = path.get(..slash.max(1))?;
        let names = sys::list(&CPath::new(&[dir]).ok()?).ok()?;
        let found = names.iter().find_map(|name| {
            let there = CPath::join(dir, name).ok()?;
            let same = !name.starts_with(BESIDE)
                && sys::lstat(&there).ok()?.id == inode.id
                && self.lstat(&there).ok()?.identity() == *inode;
            same.then_some(there)
        });
        found.map(|path| path.bytes().to_vec())
    }

    /// Does the image have a file of this name open or mapped?
    pub fn is_needed(&self, path: &[u8]) -> bool {
        let needed = self.options.needed.iter();
        needed.map(Vec::as_slice).any(|needed| needed == path)
    }

    /// The file of the store that a lost inode is put together in.
    pub fn built_path(&self, lost: &Lost) -> Vec<u8> {
        let name = format!("remade-{:06}-{:x}", lost.table, lost.inode.id.ino);
        self.job_dir.join(name).as_os_str().as_bytes().to_vec()
    }
}

/// Is there a record about the name of a directory on this path?
fn is_tangled(tables: &[Table], path: &[u8]) -> bool {
    let is_on = |name: &Name| {
        let rest = path.strip_prefix(name.path().as_slice());
        rest.is_some_and(|rest| rest.first() == Some(&b'/'))
    };
    let mut records = tables.iter().flat_map(|table| &table.records);
    records.any(|(_, record)| match record {
        Record::Absent { name } | Record::RemovedDir { name, .. } | Record::Gone { name, .. } => {
            is_on(name)
        }
        Record::Renamed { from, to, .. } => is_on(from) || is_on(to),
        _ => false,
    })
}

/// What the inode of a row was called when the oldest table began.
fn path_then(tables: &[Table], oldest: &RowAt) -> Option<Vec<u8>> {
    let table = tables.get(oldest.at)?;
    let mut rows = Rows::of(table.records.iter().map(|(_, record)| record));
    for (_, record) in table.records.iter().rev() {
        rows.back(record);
    }
    let mut path = rows.rows.get(&oldest.row)?.path.clone()?;
    for table in tables.get(oldest.at + 1..)? {
        for (_, record) in table.records.iter().rev() {
            if let Record::Renamed {
                from, to, other, ..
            } = record
            {
                let (from, to) = (from.path(), to.path());
                let moved = under(&path, &to, &from);
                let other = || under(&path, &from, &to).filter(|_| other.is_some());
                if let Some(back) = moved.or_else(other) {
                    path = back;
                }
            }
        }
    }
    Some(path)
}

/// A path at `from` or below it, with `to` in its place.
pub fn under(path: &[u8], from: &[u8], to: &[u8]) -> Option<Vec<u8>> {
    let rest = path.strip_prefix(from)?;
    let is_under = rest.is_empty() || rest[0] == b'/';
    is_under.then(|| [to, rest].concat())
}

/// Do the tables keep every byte of the inode up to this size?
fn is_whole(tables: &[Table], rows: &[RowAt], size: u64) -> bool {
    let mut kept: Vec<(u64, u64)> = Vec::new();
    for of in rows {
        let records = tables.get(of.at).map_or(&[][..], |table| &table.records);
        kept.extend(records.iter().filter_map(|(_, record)| match record {
            Record::Blocks {
                row, offset, len, ..
            } if *row == of.row => Some((*offset, offset + len)),
            _ => None,
        }));
    }
    kept.sort_unstable();
    let reach = kept.iter().fold(0, |reach: u64, (start, end)| {
        if *start <= reach {
            reach.max(*end)
        } else {
            reach
        }
    });
    reach >= size
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::persist::Id;
    use crate::persist::table::{Moved, TableFile};

    fn table(records: Vec<Record>) -> Table {
        let records = records.into_iter().enumerate();
        Table {
            file: TableFile {
                seq: 1,
                base: 1,
                path: "/table".into(),
                incomplete: None,
                undone: false,
            },
            power: false,
            alive_ns: 0,
            ended_ns: 0,
            begun_ns: 0,
            making: 0,
            broken: false,
            damaged: false,
            undone: 0,
            checked: false,
            slots: Vec::new(),
            records: records.map(|(at, record)| (at as u64, record)).collect(),
        }
    }

    fn blocks(row: u32, offset: u64, len: u64) -> Record {
        Record::Blocks {
            row,
            offset,
            len,
            shadow: None,
        }
    }

    fn inode(row: u32, path: &str) -> Record {
        Record::Inode {
            row,
            slot: row,
            which: 0,
            stat: Stat::default(),
            path: path.into(),
        }
    }

    fn renamed(from: &str, to: &str) -> Record {
        let name = |path: &str| {
            let (dir, name) = path.rsplit_once('/').unwrap();
            Name {
                dir: Id::default(),
                dir_path: if dir.is_empty() { "/" } else { dir }.into(),
                name: name.into(),
            }
        };
        let moved = Moved {
            inode: Identity::default(),
            born: None,
        };
        Record::Renamed {
            from: name(from),
            to: name(to),
            moved,
            other: None,
        }
    }

    fn row(at: usize, row: u32) -> RowAt {
        let stat = Stat::default();
        RowAt { at, row, stat }
    }

    #[test]
    fn whole_is_what_all_tables_cover_together() {
        let tables = [
            table(vec![blocks(0, 4096, 4096), blocks(1, 0, 9000)]),
            table(vec![blocks(3, 0, 4096), blocks(3, 8192, 100)]),
        ];
        let rows = [row(0, 0), row(1, 3)];
        assert!(is_whole(&tables, &rows, 8292));
        assert!(!is_whole(&tables, &rows, 8293));
        assert!(!is_whole(&tables, &rows[1..], 8192));
        assert!(is_whole(&tables, &rows[1..], 4096));
        assert!(!is_whole(&tables, &rows[..1], 1));
        assert!(is_whole(&tables, &[], 0));
    }

    #[test]
    fn a_name_is_followed_back_over_all_tables() {
        let tables = [
            table(vec![renamed("/c", "/d")]),
            table(vec![
                renamed("/b", "/c"),
                inode(0, "/c/x"),
                renamed("/c/x", "/c/y"),
            ]),
            table(vec![renamed("/a", "/b"), renamed("/bb", "/cc")]),
        ];
        assert_eq!(path_then(&tables, &row(1, 0)), Some(b"/a/x".to_vec()));
    }
}
