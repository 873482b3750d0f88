//! Before anything is undone: which files did somebody else change since?
//!
//! The newest table that has a row of an inode decides. What was found is written
//! down, and the tables say that it was looked for, so that an undo that was killed
//! does not take its own work for somebody else's.

use super::apply::{Undoer, as_path};
use super::findings::{Place, Source};
use super::lost::Lost;
use super::moved::Missing;
use super::rows::{RowInfo, Rows};
use super::{Fate, ForeignFile, UndoError, failed};
use crate::config::Foreign;
use crate::persist::format;
use crate::persist::sys::{self, CPath};
use crate::persist::table::{self, Record, Table};
use crate::persist::{Id, Identity, Stat};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt;

/// A file that somebody else has changed.
#[derive(Debug)]
pub struct Found {
    pub file: ForeignFile,
    /// As it is now; of one that is gone as it was.
    stat: Stat,
    /// It is not where the program left it; nothing: and nothing is known of it.
    lost: Option<Option<Lost>>,
    /// Other contents than the program left.
    changed: bool,
    /// It is shorter than the program left it, and what it held is not known.
    cut: bool,
}

impl Found {
    /// It is gone, and with it what it held at the generation.
    fn is_unknown(&self, inside: bool) -> bool {
        match &self.lost {
            None => self.cut,
            Some(None) => true,
            // The program's descriptors would go on with the one that has no name any more.
            Some(Some(lost)) if lost.is_born => false,
            Some(Some(lost)) if lost.moved.is_some() => lost.is_reused && lost.is_tangled,
            Some(Some(lost)) => inside || !lost.is_whole,
        }
    }
}

impl Undoer<'_, '_> {
    pub fn look_for_foreign(&mut self, tables: &[Table]) -> Result<(), UndoError> {
        let checked = tables.iter().all(|t| t.checked || t.records.is_empty());
        if checked && !self.other_goal && !self.look_again {
            return Ok(());
        }
        let mut found = self.refused(tables)?;
        if checked {
            // What that undo has done to contents is not somebody else's.
            found.retain(|found| found.lost.is_some());
        }
        if self.look_again {
            found.retain(|found| !self.is_decided(found));
        }
        for found in found {
            self.decide(tables, found)?;
        }
        if self.recorded {
            return Ok(());
        }
        if !self.findings.is_empty() {
            self.save_findings()?;
        }
        for table in tables {
            self.step("write", &table.file.path)?;
            let mark = || {
                let fd = sys::open(&table::c_path(&table.file.path)?, libc::O_RDWR, 0)?;
                let begun = self.begun_ns.to_le_bytes();
                sys::pwrite_all(fd.0, &begun, format::AT_BEGUN as u64)?;
                sys::pwrite_all(fd.0, &1u32.to_le_bytes(), format::AT_CHECKED as u64)
            };
            mark().map_err(|e| failed("write", &table.file.path, e))?;
        }
        Ok(())
    }

    /// Was it found when this undo looked first?
    fn is_decided(&self, found: &Found) -> bool {
        let placed = |lost: &Lost| self.is_placed(&lost.inode);
        let lost = found.lost.as_ref().and_then(Option::as_ref);
        lost.is_some_and(placed) || self.findings.keep.contains(&found.stat.id)
    }

    /// What is to become of a file; nothing is done to it yet.
    fn decide(&mut self, tables: &[Table], found: Found) -> Result<(), UndoError> {
        let Found {
            mut file,
            stat,
            lost,
            changed,
            cut: _,
        } = found;
        let keep = self.options.foreign == Foreign::Keep;
        if changed && !keep {
            let path = match lost.as_ref().and_then(|lost| lost.as_ref()?.moved.clone()) {
                Some(moved) => moved,
                None => file.path.as_os_str().as_bytes().to_vec(),
            };
            file.aside = Some(as_path(&self.put_aside(&path, &stat)?));
        }
        match lost {
            None if keep => drop(self.findings.keep.insert(stat.id)),
            None => {}
            Some(None) => drop(self.findings.keep.insert(stat.id)),
            Some(Some(lost)) => {
                if changed && keep {
                    self.findings.keep.insert(stat.id);
                }
                if !self.decide_lost(tables, &lost, &mut file)? {
                    return Ok(());
                }
            }
        }
        self.findings.add(file);
        Ok(())
    }

    /// False: there is nothing to tell.
    fn decide_lost(
        &mut self,
        tables: &[Table],
        lost: &Lost,
        file: &mut ForeignFile,
    ) -> Result<bool, UndoError> {
        let keep = self.options.foreign == Foreign::Keep;
        if lost.is_born {
            // Made since: where somebody else has moved it is nobody's business here.
            self.findings.needless.push((lost.inode, lost.table));
            return Ok(lost.moved.is_some());
        }
        let source = match &lost.moved {
            Some(at) if keep => {
                file.fate = Fate::Followed(as_path(at));
                Source::Stays(at.clone())
            }
            Some(at) => {
                file.fate = Fate::Back(as_path(at));
                match lost.is_reused {
                    true => Source::Moved(at.clone()),
                    false => Source::Early(at.clone()),
                }
            }
            // What has taken its place is kept, and what was removed stays so: but the program
            // cannot go on without what it has open.
            None if keep && (file.what == "replaced" || !self.is_needed(&lost.path)) => {
                self.findings.keep.insert(lost.inode.id);
                if file.what == "replaced" {
                    let taken = lost.path.clone();
                    self.findings.taken.insert(taken);
                }
                return Ok(true);
            }
            None => {
                file.fate = Fate::Again;
                Source::Built(self.build(tables, lost)?)
            }
        };
        let path = match source {
            Source::Early(_) => &lost.left,
            _ => &lost.path,
        };
        self.findings.places.push(Place {
            inode: lost.inode,
            table: lost.table,
            path: path.clone(),
            source,
        });
        Ok(true)
    }

    /// All files that somebody else has changed, if the undo may go on over them.
    fn refused(&mut self, tables: &[Table]) -> Result<Vec<Found>, UndoError> {
        let found = self.foreign_files(tables);
        let files = |of: &dyn Fn(&Found) -> bool| -> Vec<ForeignFile> {
            let files = found.iter().filter(|found| of(found));
            files.map(|found| found.file.clone()).collect()
        };
        let born = |found: &Found| matches!(&found.lost, Some(Some(lost)) if lost.is_born);
        if self.options.foreign == Foreign::Refuse {
            let files = files(&|found| !born(found));
            if !files.is_empty() {
                return Err(UndoError::Foreign(files));
            }
        }
        let inside = self.options.inside;
        if self.options.foreign == Foreign::Restore {
            let lost = files(&|found| found.is_unknown(inside));
            if !lost.is_empty() {
                let mut paths = found.iter().filter(|found| found.is_unknown(inside));
                let needed = paths.any(|found| self.is_wanted(found));
                return Err(UndoError::Lost(lost, needed));
            }
        }
        if self.options.foreign == Foreign::Keep {
            let lost = files(&|found| {
                found.file.what == "removed" && found.is_unknown(inside) && self.is_wanted(found)
            });
            if !lost.is_empty() {
                return Err(UndoError::Lost(lost, true));
            }
        }
        Ok(found)
    }

    fn is_wanted(&self, found: &Found) -> bool {
        match &found.lost {
            Some(Some(lost)) => self.is_needed(&lost.path),
            _ => self.is_needed(found.file.path.as_os_str().as_bytes()),
        }
    }

    /// Is the undo to be refused? Changes nothing.
    pub fn refuse_foreign(mut self, tables: &[Table]) -> Result<(), UndoError> {
        self.refused(tables).map(drop)
    }

    /// All files that are not as the program left them, as they are now.
    pub fn foreign_files(&mut self, tables: &[Table]) -> Vec<Found> {
        let mut found = Vec::new();
        let mut judged: BTreeSet<Identity> = BTreeSet::new();
        // What a newer table moved is looked for where it was moved to.
        let mut rows = Rows::default();
        let undone = tables.iter().map(|table| u64::from(table.file.seq));
        let undone: BTreeSet<u64> = undone.collect();
        let begins: Vec<(u32, &Table)> = tables
            .iter()
            .rev()
            .map(|table| (rows.next_table(table), table))
            .collect();
        let known = Known::of(tables);
        // An undo that has begun has made files shorter itself.
        let begun = tables.iter().any(|table| table.checked);
        for (row, info) in rows.rows.iter().rev() {
            let Some((begin, table)) = begins.iter().rev().find(|(begin, _)| begin <= row) else {
                continue;
            };
            self.replaced.table = u64::from(table.file.seq);
            let identity = info.stat.identity();
            if !info.stat.is_regular()
                || !judged.insert(self.replaced.resolve(&identity))
                || self.options.inherited.contains(&info.stat.id)
                || self.is_excluded(&info.first_path)
            {
                continue;
            }
            // What a return has made is not as these tables left it.
            if !self.replaced.is_made_by(&identity, &undone) {
                let cut = |size| !begun && known.is_cut(table, row - begin, info, size);
                found.extend(self.judge(tables, table, info, &cut));
            }
        }
        // What an undo to another generation has moved back is not where the tables say.
        if !self.other_goal {
            let missing = self.missing_moved(tables, &judged, &undone);
            found.extend(
                missing
                    .into_iter()
                    .map(|missing| of_missing(tables, missing)),
            );
        }
        found
    }

    /// `cut`: would its being so short be somebody else's doing?
    fn judge(
        &mut self,
        tables: &[Table],
        table: &Table,
        info: &RowInfo,
        cut: &dyn Fn(u64) -> bool,
    ) -> Option<Found> {
        let number = u64::from(table.file.seq);
        let file = |path: &[u8], what| ForeignFile {
            path: as_path(path),
            aside: None,
            what,
            fate: Fate::Plain,
        };
        let Some(path) = self.find(info) else {
            let path = info.path.as_ref()?;
            let lost = self.lost_inode(tables, number, info);
            let moved = lost.as_ref().and_then(|lost| lost.moved.clone());
            let what = match moved {
                Some(_) => "moved",
                None => what_is_at(tables, path),
            };
            let at = moved.as_deref().unwrap_or(path);
            let now = moved.as_ref();
            let now = now.and_then(|at| sys::lstat(&CPath::new(&[at]).ok()?).ok());
            return Some(Found {
                file: file(path, what),
                stat: now.unwrap_or(info.stat),
                lost: Some(lost),
                changed: now.is_some_and(|now| self.is_changed(table, info, at, &now)),
                cut: false,
            });
        };
        let now = CPath::new(&[&path]).and_then(|p| sys::lstat(&p)).ok()?;
        let changed = self.is_changed(table, info, &path, &now);
        let cut = cut(now.size);
        (changed || cut).then(|| Found {
            file: file(&path, if cut { "cut off" } else { "changed" }),
            stat: now,
            lost: None,
            changed,
            cut,
        })
    }

    /// Is it not as the program left it?
    fn is_changed(&self, table: &Table, info: &RowInfo, path: &[u8], now: &Stat) -> bool {
        let slot = table.slots.get(info.slot as usize).copied();
        let slot = slot.unwrap_or_default();
        let is_last = slot.known && !slot.hot;
        match is_last {
            // Whatever time the program has given it.
            true => (slot.size, slot.mtime_ns) != (now.size, now.mtime_ns),
            false => self.is_later(path, now),
        }
    }
}

/// An inode that the program has moved, and that no row says more of.
fn of_missing(tables: &[Table], missing: Missing) -> Found {
    let Missing {
        path,
        inode,
        table,
        is_born,
    } = missing;
    let stat = Stat {
        id: inode.id,
        birth: inode.birth,
        ..Stat::default()
    };
    Found {
        file: ForeignFile {
            path: as_path(&path),
            aside: None,
            what: what_is_at(tables, &path),
            fate: Fate::Plain,
        },
        stat,
        lost: Some(is_born.then(|| Lost {
            inode,
            table,
            left: path.clone(),
            path,
            is_reused: false,
            is_tangled: false,
            moved: None,
            stat,
            is_whole: false,
            is_born,
        })),
        changed: false,
        cut: false,
    }
}

/// What the tables hold of the ends of files.
struct Known {
    /// Pre-images, by the table's number and the row.
    blocks: BTreeMap<(u32, u32), Vec<(u64, u64)>>,
    /// Inodes that were made since.
    born: BTreeSet<Id>,
}

impl Known {
    fn of(tables: &[Table]) -> Known {
        let (mut blocks, mut born) = (BTreeMap::new(), BTreeSet::new());
        for table in tables {
            for (_, record) in &table.records {
                match record {
                    Record::Blocks {
                        row, offset, len, ..
                    } => {
                        let of: &mut Vec<_> = blocks.entry((table.file.seq, *row)).or_default();
                        of.push((*offset, offset + len));
                    }
                    Record::Born { id } => drop(born.insert(*id)),
                    _ => {}
                }
            }
        }
        Known { blocks, born }
    }

    /// Before the program makes a file shorter the table gets what is cut off. So whose end is
    /// neither there nor in the table was cut off by somebody else.
    fn is_cut(&self, table: &Table, row: u32, info: &RowInfo, size: u64) -> bool {
        let goal = info.stat.size;
        if size >= goal || self.born.contains(&info.stat.id) {
            return false;
        }
        let mut kept = self.blocks.get(&(table.file.seq, row)).cloned();
        let kept = kept.get_or_insert_default();
        kept.sort_unstable();
        let ends = kept.iter().filter(|(_, end)| *end > size);
        let reach = ends.fold(size, |reach, (start, end)| match *start <= reach {
            true => reach.max(*end),
            false => reach,
        });
        reach < goal
    }
}

/// What is at the path of a file that is gone: nothing, or something else of somebody else?
fn what_is_at(tables: &[Table], path: &[u8]) -> &'static str {
    let there = CPath::new(&[path]).and_then(|path| sys::lstat(&path));
    let Ok(there) = there else {
        return "removed";
    };
    let own = |record: &Record| match record {
        Record::Born { id } => *id == there.id,
        Record::Renamed { moved, .. } => moved.inode.id == there.id,
        _ => false,
    };
    let mut records = tables.iter().flat_map(|table| &table.records);
    match records.any(|(_, record)| own(record)) {
        true => "removed",
        false => "replaced",
    }
}
