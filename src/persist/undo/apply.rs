//! Undoing one table, record by record, and where a row's inode is now. What a record about an
//! inode takes back is in `inode`, about a name in `names`.

use super::findings::Findings;
use super::rows::{RowInfo, Rows};
use super::state::Replaced;
use super::{Fate, ForeignFile, Options, UndoError, failed, known_ids};
use crate::config::Foreign;
use crate::persist::birth::Births;
use crate::persist::exclude::{self, matches};
use crate::persist::format;
use crate::persist::kept::link_name;
use crate::persist::recorder;
use crate::persist::sys::{self, CPath, Fd, Sys, point};
use crate::persist::table::{self, Record, Table, TableFile};
use crate::persist::{Id, Identity, Stat};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// An undo under way.
pub struct Undoer<'o, 'a> {
    pub job_dir: &'o Path,
    pub options: &'o mut Options<'a>,
    /// Where the files are to be.
    pub generation: u64,
    pub replaced: Replaced,
    pub findings: Findings,
    /// An undo to another generation, which was killed, has looked for changes of others.
    pub other_goal: bool,
    /// This one has looked, and somebody else has removed a file since.
    pub look_again: bool,
    /// Directories as they were when a table began, and that table: by path.
    pub directories: BTreeMap<Vec<u8>, (Stat, u64)>,
    /// All inodes that the program had to do with.
    pub known: BTreeSet<Id>,
    /// The wall clock of the last sign of life; 0: none.
    pub alive_ns: i64,
    /// When it ended, if it has said so; 0: not known.
    pub ended_ns: i64,
    /// When this undo began, or the one that was killed and is gone on with: what is
    /// modified from then on is its own work.
    pub begun_ns: i64,
    /// All tables of the job at the beginning, with their bases: their kept links may hold
    /// an inode.
    pub all_tables: Vec<(u32, u64)>,
    /// The file that was written last: its row, its path.
    pub open: Option<(u32, Fd, Vec<u8>)>,
    /// What is done is recorded (`record`).
    pub recorded: bool,
    pub births: Cell<Births>,
    /// Names under which something was being made when the program was killed.
    pub making: Vec<u64>,
    /// Modes of files do not concern the undo.
    pub is_privileged: bool,
}

/// The table that is being undone.
pub struct Current<'t> {
    pub table: &'t Table,
    pub rows: Rows,
    /// Inode numbers made since the table began, with the last record that says so. What
    /// they say counts where no births are known.
    pub born: BTreeMap<Id, usize>,
    /// Other names of inodes that lost one, for copies with several names.
    pub gone_names: BTreeMap<Identity, Vec<Vec<u8>>>,
    journal: Fd,
    pub shadow: Option<Fd>,
    /// What the header says is undone.
    marked: u64,
}

pub fn as_path(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(bytes))
}

pub fn c(path: &[u8]) -> Result<CPath, UndoError> {
    CPath::new(&[path]).map_err(|e| failed("use", &as_path(path), e))
}

/// The result of a call on `path`.
pub fn on<T>(result: Sys<T>, verb: &'static str, path: &[u8]) -> Result<T, UndoError> {
    result.map_err(|e| failed(verb, &as_path(path), e))
}

impl<'o, 'a> Undoer<'o, 'a> {
    pub fn new(
        job_dir: &'o Path,
        options: &'o mut Options<'a>,
        tables: &[Table],
        (list, generation): (&[TableFile], u64),
    ) -> Result<Undoer<'o, 'a>, UndoError> {
        let replaced = Replaced::load(job_dir)?;
        let mut known = known_ids(tables);
        known.extend(replaced.news());
        // What one has left that came to its end, or never said that it has looked, is void.
        let (findings, current) = match tables.iter().any(|t| t.checked) {
            true => Findings::load(job_dir, generation)?,
            false => (Findings::default(), true),
        };
        Ok(Undoer {
            job_dir,
            options,
            generation,
            replaced,
            findings,
            other_goal: !current,
            look_again: false,
            directories: directories(tables),
            known,
            begun_ns: {
                let begun = tables.iter().filter(|t| t.checked && t.begun_ns != 0);
                let first = begun.map(|t| t.begun_ns).min();
                first.unwrap_or_else(sys::realtime_ns)
            },
            alive_ns: tables.iter().map(|t| t.alive_ns).max().unwrap_or(0),
            ended_ns: {
                let newest = tables.iter().max_by_key(|t| t.file.seq);
                newest.map_or(0, |t| t.ended_ns)
            },
            all_tables: list.iter().map(|t| (t.seq, t.base)).collect(),
            open: None,
            recorded: false,
            births: Cell::default(),
            making: tables
                .iter()
                .map(|t| t.making)
                .filter(|m| *m != 0)
                .collect(),
            is_privileged: sys::has_capability(sys::CAP_DAC_OVERRIDE),
        })
    }

    /// Before each call that changes something: tests end the undo here.
    pub fn step(&mut self, verb: &'static str, path: &Path) -> Result<(), UndoError> {
        point();
        match &mut self.options.fault {
            Some(fault) => fault().map_err(|e| failed(verb, path, e)),
            None => Ok(()),
        }
    }

    /// What is at the path itself, with its birth.
    pub fn lstat(&self, path: &CPath) -> Sys<Stat> {
        let mut stat = sys::lstat(path)?;
        let mut births = self.births.get();
        stat.birth = births.of_path(path, stat.id.dev);
        self.births.set(births);
        Ok(stat)
    }

    pub fn is_excluded(&self, path: &[u8]) -> bool {
        let by_rule = || self.options.by_rules && exclude::is_excluded(path);
        self.is_excluded_by_option(path) || by_rule()
    }

    pub fn is_excluded_by_option(&self, path: &[u8]) -> bool {
        let globs = self.options.restore_exclude;
        globs.iter().any(|glob| matches(glob, path))
    }

    /// Undoes all records of a table that are not undone yet; returns how many.
    pub fn table(&mut self, table: &Table) -> Result<usize, UndoError> {
        if table.records.is_empty() {
            return Ok(0);
        }
        let path = &table.file.path;
        let journal = table::c_path(path).and_then(|p| sys::open(&p, libc::O_RDWR, 0));
        let shadow = table::shadow_path(self.job_dir, table.file.seq);
        let mut current = Current {
            table,
            rows: Rows::of(table.records.iter().map(|(_, record)| record)),
            born: BTreeMap::new(),
            gone_names: BTreeMap::new(),
            journal: journal.map_err(|e| failed("open", path, e))?,
            shadow: match table::c_path(&shadow).and_then(|p| sys::open(&p, libc::O_RDONLY, 0)) {
                Ok(fd) => Some(fd),
                Err(libc::ENOENT) => None,
                Err(e) => return Err(failed("open", &shadow, e)),
            },
            marked: match table.undone {
                0 => u64::MAX,
                at => at,
            },
        };
        for (k, (_, record)) in table.records.iter().enumerate() {
            match record {
                Record::Born { id } => drop(current.born.insert(*id, k)),
                Record::Gone { name, stat, .. } => {
                    let names = current.gone_names.entry(stat.identity()).or_default();
                    names.push(name.path());
                }
                _ => {}
            }
        }
        self.lift_directories(&current)?;
        let mut undone = 0;
        for (k, (offset, record)) in table.records.iter().enumerate().rev() {
            if *offset < current.marked {
                let done = self.record(&mut current, k, *offset, record);
                done.map_err(|error| self.or_vanished(&current, error))?;
                undone += 1;
            }
            current.rows.back(record);
        }
        self.open = None;
        self.mark(&mut current, format::RECORDS)?;
        let done = self.last_of_all(&current);
        done.map_err(|error| self.or_vanished(&current, error))?;
        Ok(undone)
    }

    /// Notes in the header that records from `offset` on are undone.
    pub fn mark(&mut self, current: &mut Current, offset: u64) -> Result<(), UndoError> {
        // A recorded return that is killed is taken back, not finished.
        if self.recorded || current.marked == offset {
            return Ok(());
        }
        let path = &current.table.file.path;
        self.step("write", path)?;
        let bytes = offset.to_le_bytes();
        let mut done = sys::pwrite_all(current.journal.0, &bytes, format::AT_UNDONE as u64);
        if current.table.power {
            done = done.and_then(|()| sys::fdatasync(current.journal.0));
        }
        done.map_err(|e| failed("write", path, e))?;
        current.marked = offset;
        Ok(())
    }

    fn record(
        &mut self,
        current: &mut Current,
        k: usize,
        offset: u64,
        record: &Record,
    ) -> Result<(), UndoError> {
        match record {
            Record::Inode {
                row, which, stat, ..
            } => self.attributes(current, *row, *which, stat),
            Record::Blocks {
                row,
                offset,
                len,
                shadow,
            } => self.blocks(current, *row, *offset, *len, *shadow),
            Record::Xattr { row, name, value } => self.xattr(current, *row, name, value.as_deref()),
            Record::Returned { made } => self.replaced.void_since(self.job_dir, *made),
            Record::Path { .. }
            | Record::Born { .. }
            | Record::Cancelled { .. }
            | Record::Incomplete { .. } => Ok(()),
            _ => {
                // Paths change: what was done under the present ones must not be done
                // again, nor this step once the next has begun.
                let next = current.table.records.get(k + 1).map(|r| r.0);
                if let Some(next) = next {
                    self.mark(current, next)?;
                }
                self.open = None;
                self.name_record(current, k, record)?;
                self.mark(current, offset)
            }
        }
    }

    /// Is the error that somebody else has removed an inode since it was located?
    fn or_vanished(&self, current: &Current, error: UndoError) -> UndoError {
        let at = match &error {
            UndoError::Failed { errno, path, .. } if errno.0 == libc::ENOENT => path,
            _ => return error,
        };
        let at = at.as_os_str().as_bytes();
        let mut rows = current.rows.rows.values();
        match rows.find(|info| info.path.as_deref() == Some(at)) {
            Some(info) if self.find(info).is_none() => UndoError::Vanished(removed(at)),
            _ => error,
        }
    }

    /// Where a row's inode can be reached now; `None`: leave it alone.
    pub fn locate(&mut self, current: &Current, row: u32) -> Result<Option<Vec<u8>>, UndoError> {
        let Some(info) = current.rows.rows.get(&row) else {
            return Ok(None);
        };
        let kept = |id: &Id| self.findings.keep.contains(id);
        let now = self.replaced.resolve(&info.stat.identity());
        let left_alone = kept(&info.stat.id) || kept(&now.id);
        // (A rollback; another process knows no rules of the program's.)
        let strays = || self.options.by_rules && recorder::is_stray(&info.stat.id);
        let excluded = self.is_excluded_by_option(&info.first_path)
            || self.is_excluded(&info.first_path) && !strays();
        if left_alone || excluded || self.is_left_out(&info.stat.identity()) {
            return Ok(None);
        }
        match self.find(info) {
            Some(path) => Ok(Some(path)),
            // Its name is removed and its copy not yet put back: what was done to it in
            // between is gone with it. A directory's times are not worth more.
            None if info.path.is_none() || info.stat.is_dir() => Ok(None),
            // An output in a directory that may not be searched: its stream has filled it.
            None if self.options.inherited.contains(&info.stat.id) => Ok(None),
            None => self.lost(&info.path.clone().unwrap_or_default(), info.stat.id),
        }
    }

    /// An inode that should be there is not. Leaving it is the user's decision.
    pub fn lost<T>(&mut self, path: &[u8], id: Id) -> Result<Option<T>, UndoError> {
        if self.options.foreign != Foreign::Keep {
            return Err(UndoError::Vanished(removed(path)));
        }
        self.findings.keep.insert(id);
        self.findings.add(removed(path));
        self.save_findings()?;
        Ok(None)
    }

    /// Looks for an inode at its path, among kept links, at former paths.
    pub fn find(&self, info: &RowInfo) -> Option<Vec<u8>> {
        let here = |path: &&Vec<u8>| {
            let there = CPath::new(&[path]).and_then(|p| self.lstat(&p));
            there.is_ok_and(|s| self.replaced.is(&s.identity(), &info.stat.identity()))
        };
        info.path
            .iter()
            .find(here)
            .cloned()
            .or_else(|| self.moved_to(&info.stat.identity()).filter(|at| here(&at)))
            .or_else(|| self.find_kept(&info.stat.identity()))
            .or_else(|| match info.path {
                Some(_) => info.seen.iter().rev().find(here).cloned(),
                // Its last known name was removed: its number may be another's by now.
                None => None,
            })
    }

    /// As `find`, of an inode whose number was not used again: under all names that
    /// were ever known of it.
    pub fn find_former(&self, info: &RowInfo) -> Option<Vec<u8>> {
        let here = |path: &&Vec<u8>| {
            let there = CPath::new(&[path]).and_then(|p| self.lstat(&p));
            there.is_ok_and(|s| self.replaced.is(&s.identity(), &info.stat.identity()))
        };
        let former = || info.seen.iter().rev().find(here).cloned();
        self.find(info).or_else(former)
    }

    /// The kept link of an inode, if any table has one.
    pub fn find_kept(&self, inode: &Identity) -> Option<Vec<u8>> {
        self.all_tables.iter().rev().find_map(|(seq, _)| {
            let mut path = table::c_path(&table::kept_dir(self.job_dir, *seq)).ok()?;
            link_name(&mut path, &inode.id).ok()?;
            let there = self.lstat(&path).ok()?;
            let same = there.identity().is(inode);
            same.then(|| path.bytes().to_vec())
        })
    }
}

fn removed(path: &[u8]) -> ForeignFile {
    ForeignFile {
        path: as_path(path),
        aside: None,
        what: "removed",
        fate: Fate::Plain,
    }
}

/// All directories that the tables know something of, by path; the oldest table counts.
fn directories(tables: &[Table]) -> BTreeMap<Vec<u8>, (Stat, u64)> {
    let mut all = BTreeMap::new();
    for table in tables {
        let number = u64::from(table.file.seq);
        // The first record of one is the state when the table began.
        for (_, record) in table.records.iter().rev() {
            if let Record::Inode { stat, path, .. } = record
                && stat.is_dir()
            {
                all.insert(path.clone(), (*stat, number));
            }
        }
    }
    all
}
