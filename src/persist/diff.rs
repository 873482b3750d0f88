//! Tables for people: what an undo would change now (`ckpt diff`), and the rows of one
//! generation (`ckpt show --files`, FIG. 4). The command; changes nothing.

use super::sys::{self, CPath};
use super::table::{self, Kept, Record, Table};
use super::undo::rows::{RowInfo, Rows};
use super::undo::{self, UndoError};
use super::{Id, MODE, OWNER, SIZE, Stat};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// One line of `ckpt diff`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub path: Vec<u8>,
    /// `removed`, `put back`, `moved back to ...`, `contents`, `size`, `mode`, ...
    pub what: String,
    /// Somebody else changed it since.
    pub foreign: bool,
}

/// One row of the persistent checkpoint table (FIG. 4); `None`: not modified.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Row {
    pub path: Vec<u8>,
    pub mtime_ns: Option<i64>,
    pub mode: Option<u32>,
    pub owner: Option<(u32, u32)>,
    pub size: Option<u64>,
    /// `did not exist`, `link`, `copy`, `3 ranges, 12288 bytes`, `moved to ...`, or empty.
    pub kept: String,
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What the tables say of one inode that existed at the generation.
#[derive(Debug, Default)]
struct Inode {
    row: Row,
    ranges: u64,
    bytes: u64,
    xattrs: Vec<String>,
    /// As the newest table calls it; `None`: its name was removed.
    now: Option<Vec<u8>>,
    /// As the program left it, where that is known: size and time.
    left: Option<(u64, i64)>,
}

impl Inode {
    /// What an older table does not say was not modified before this one.
    fn take(&mut self, info: &RowInfo, table: &Table) {
        let row = &mut self.row;
        if row.path.is_empty() {
            row.path.clone_from(&info.first_path);
        }
        let has = |which| info.which & which != 0;
        row.mtime_ns = row.mtime_ns.or(info.times.map(|times| times.1));
        row.mode = row.mode.or(has(MODE).then_some(info.stat.mode));
        let owner = (info.stat.uid, info.stat.gid);
        row.owner = row.owner.or(has(OWNER).then_some(owner));
        row.size = row.size.or(has(SIZE).then_some(info.stat.size));
        self.now.clone_from(&info.path);
        let slot = table.slots.get(info.slot as usize);
        let slot = slot.filter(|slot| slot.known && !slot.hot);
        self.left = slot.map(|slot| (slot.size, slot.mtime_ns));
    }

    fn kept(&self) -> String {
        let mut words = self.xattrs.clone();
        if self.ranges > 0 {
            let plural = if self.ranges == 1 { "" } else { "s" };
            words.insert(
                0,
                format!("{} range{plural}, {} bytes", self.ranges, self.bytes),
            );
        }
        words.join(", ")
    }
}

/// What happened to names, in the order of the records.
#[derive(Debug)]
enum Named {
    Absent,
    Gone(Id, &'static str),
    Dir,
    Moved(Vec<u8>),
}

/// All that the tables say, oldest first.
#[derive(Debug, Default)]
struct Summary {
    inodes: BTreeMap<Id, Inode>,
    names: Vec<(Vec<u8>, Named)>,
    /// Paths in `names`.
    known: BTreeSet<Vec<u8>>,
}

impl Summary {
    fn of(tables: &[Table]) -> Summary {
        let mut summary = Summary::default();
        // The tables come newest first.
        for table in tables.iter().rev() {
            let rows = Rows::of(table.records.iter().map(|(_, record)| record));
            for info in rows.rows.values() {
                let inode = summary.inodes.entry(info.stat.id).or_default();
                inode.take(info, table);
            }
            for (_, record) in &table.records {
                summary.record(record, &rows);
            }
        }
        summary
    }

    fn record(&mut self, record: &Record, rows: &Rows) {
        let inode = |row: &u32| rows.rows.get(row).map(|info| info.stat.id);
        match record {
            Record::Absent { name } => self.name(name.path(), Named::Absent),
            Record::Gone {
                name, stat, kept, ..
            } => {
                let kept = match kept {
                    Kept::Link(_) => "link",
                    Kept::Copy(_) => "copy",
                    Kept::Symlink(_) => "symbolic link",
                    Kept::Node => "kind and attributes",
                };
                self.name(name.path(), Named::Gone(stat.id, kept));
            }
            Record::RemovedDir { name, .. } => self.name(name.path(), Named::Dir),
            Record::Renamed { from, to, .. } => {
                self.names.push((from.path(), Named::Moved(to.path())));
            }
            Record::Blocks { row, len, .. } => {
                if let Some(inode) = inode(row).and_then(|id| self.inodes.get_mut(&id)) {
                    inode.ranges += 1;
                    inode.bytes += len;
                }
            }
            Record::Xattr { row, name, .. } => {
                if let Some(inode) = inode(row).and_then(|id| self.inodes.get_mut(&id)) {
                    inode.xattrs.push(format!("attribute {}", text(name)));
                }
            }
            _ => {}
        }
    }

    /// The first word about a name is what was there at the generation.
    fn name(&mut self, path: Vec<u8>, what: Named) {
        if self.known.insert(path.clone()) {
            self.names.push((path, what));
        }
    }
}

fn look(path: &[u8]) -> Option<Stat> {
    CPath::new(&[path]).and_then(|path| sys::lstat(&path)).ok()
}

/// What an undo to this generation would change now.
pub fn diff(job_dir: &Path, to_generation: u64) -> Result<Vec<Change>, UndoError> {
    let tables = undo::tables(job_dir, to_generation, &[], false)?;
    let summary = Summary::of(&tables);
    let mut changes = Vec::new();
    for (path, what) in &summary.names {
        let there = look(path);
        let what = match (what, &there) {
            (Named::Absent, Some(_)) => "removed".to_owned(),
            (Named::Gone(id, _), _) if there.is_none_or(|s| s.id != *id) => "put back".to_owned(),
            (Named::Dir, None) => "put back".to_owned(),
            (Named::Moved(to), _) if look(to).is_some() => {
                format!("moved back from {}", text(to))
            }
            _ => continue,
        };
        changes.push(Change {
            path: path.clone(),
            what,
            foreign: false,
        });
    }
    for inode in summary.inodes.values() {
        let (path, row) = (inode.now.as_ref().unwrap_or(&inode.row.path), &inode.row);
        let Some(now) = look(path) else { continue };
        let mut words = Vec::new();
        if inode.ranges > 0 {
            words.push(format!("contents ({} bytes)", inode.bytes));
        }
        if let Some(size) = row.size.filter(|size| *size != now.size) {
            words.push(format!("size {} -> {size}", now.size));
        }
        if let Some(mode) = row.mode.filter(|mode| *mode != now.mode) {
            words.push(format!(
                "mode {:o} -> {:o}",
                now.mode & 0o7777,
                mode & 0o7777
            ));
        }
        if let Some((uid, gid)) = row.owner.filter(|owner| *owner != (now.uid, now.gid)) {
            words.push(format!("owner {}:{} -> {uid}:{gid}", now.uid, now.gid));
        }
        words.extend(inode.xattrs.iter().cloned());
        if words.is_empty() && inode.row.mtime_ns.is_some_and(|ns| ns != now.mtime_ns) {
            words.push("times".to_owned());
        }
        if words.is_empty() {
            continue;
        }
        let foreign = inode
            .left
            .is_some_and(|left| left != (now.size, now.mtime_ns));
        changes.push(Change {
            path: path.clone(),
            what: words.join(", "),
            foreign: foreign && now.is_regular(),
        });
    }
    changes.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(changes)
}

/// The rows of the tables that lead back to this generation.
pub fn rows(job_dir: &Path, generation: u64) -> Result<Vec<Row>, UndoError> {
    let mut tables = Vec::new();
    let list = table::list(job_dir)?;
    for file in table::leading_back(&list, generation).iter().rev() {
        tables.extend(table::read(&file.path)?);
    }
    let summary = Summary::of(&tables);
    let mut rows = Vec::new();
    for (path, what) in summary.names {
        let kept = match what {
            Named::Absent => "did not exist".to_owned(),
            Named::Gone(_, kept) => kept.to_owned(),
            Named::Dir => "directory".to_owned(),
            Named::Moved(to) => format!("moved to {}", text(&to)),
        };
        rows.push(Row {
            path,
            kept,
            ..Row::default()
        });
    }
    for inode in summary.inodes.into_values() {
        let kept = inode.kept();
        rows.push(Row { kept, ..inode.row });
    }
    rows.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(rows)
}
