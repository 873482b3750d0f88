//! Taking modifications back: tables newest first, records strictly in reverse.
//!
//! Runs in the constructor of a start that recovers (one thread, under the job's
//! lock) and in the command. It can be killed at any point and started again: each
//! table's header says how far it has come, each single step is idempotent, and a
//! table is removed only when all of it is undone.
//!
//! | file | owns |
//! |---|---|
//! | `rows` | where a table's inodes are called, record by record |
//! | `state` | inodes that were made anew, in this undo and before |
//! | `findings` | what was found out about others, for an undo that is gone on with |
//! | `apply` | one table, record by record; where an inode is now |
//! | `inode` | records about contents and attributes |
//! | `names` | records about names |
//! | `lift` | directories whose mode is in the way |
//! | `space` | whether there is room for it |
//! | `reach` | whether a file is brought back |
//! | `tree` | removing, putting aside, making inodes anew |
//! | `foreign` | what somebody else changed |
//! | `lost`, `place` | what somebody else removed or moved: where it is, making it again |
//! | `moved` | what the program has moved, and somebody else removed then |
//! | `record` | a return that is recorded, so that it can be taken back itself |

mod apply;
mod findings;
mod foreign;
mod inode;
mod lift;
mod lost;
mod moved;
mod names;
mod place;
pub mod reach;
mod record;
pub(super) mod rows;
mod space;
pub(super) mod state;
mod tree;

use super::Id;
use super::exclude::{is_excluded, matches};
use super::table::{self, Record, Table, TableFile};
pub use crate::config::Foreign;
use crate::errno::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// How an undo is to go.
#[derive(Default)]
pub struct Options<'a> {
    pub foreign: Foreign,
    /// Globs of paths that keep their present state.
    pub restore_exclude: &'a [Vec<u8>],
    /// Files that the process's own rules exclude keep theirs as well (rollback).
    pub by_rules: bool,
    /// The next table may be made of a file of these: no process has them mapped.
    pub reuse: bool,
    /// Paths at the generation of files that the program has open or mapped then: it cannot
    /// go on without them.
    pub needed: &'a [Vec<u8>],
    /// The program runs, and has what was removed open still: such a file is not made again.
    pub inside: bool,
    /// Files that the new start's shell has opened: not foreign even if truncated.
    pub inherited: &'a [Id],
    /// Outputs that were appended to by others than the recorder's process.
    pub ends: &'a [OutputEnd],
    /// A descriptor for writing to a file that the process was given, where it may not open that
    /// itself; for the caller to close.
    pub lend: Option<&'a dyn Fn(Id) -> Option<i32>>,
    /// Tests: called before each step; an error ends the undo there.
    pub fault: Option<&'a mut dyn FnMut() -> Result<(), i32>>,
}

/// Where a file ended at the generation that is gone back to: what is behind that goes, whoever has
/// written it. (The size in a table is that at the first modification which its process made.)
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputEnd {
    pub id: Id,
    pub path: Vec<u8>,
    pub size: u64,
}

/// A file that somebody else changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignFile {
    pub path: PathBuf,
    /// Where its version was saved, with `Foreign::Restore`.
    pub aside: Option<PathBuf>,
    /// `changed`, `cut off`, `replaced`, `removed`, `made`, `moved`.
    pub what: &'static str,
    pub fate: Fate,
}

/// What became of it in the undo.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Fate {
    /// Left as it is, or overwritten when there is a version aside.
    #[default]
    Plain,
    /// Made again as it was.
    Again,
    /// Moved back from there.
    Back(PathBuf),
    /// It stays there, and the program goes on with it.
    Followed(PathBuf),
}

/// What an undo did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    pub tables: usize,
    pub records: usize,
    pub foreign: Vec<ForeignFile>,
    /// Inodes that were made anew, now or in an earlier recovery of this job: as
    /// images and records know them, as they are now.
    pub replaced: BTreeMap<Id, Id>,
    /// Files that stay where somebody else has moved them, or for which what has taken their
    /// place is to be taken: paths at the generation and now.
    pub moved: Vec<(Vec<u8>, Vec<u8>)>,
    /// The wall clock of the last sign of life in the tables; 0: none.
    pub alive_ns: i64,
    /// Why what was to be recorded is not: it cannot be taken back.
    pub unrecorded: Option<String>,
}

fn foreign_text(files: &[ForeignFile]) -> String {
    let Some(first) = files.first() else {
        return "files were changed by somebody else".into();
    };
    let more = match files.len() {
        1 => String::new(),
        n => format!(" (and {} more)", n - 1),
    };
    let path = first.path.display();
    format!("{path} was {} by somebody else{more}", first.what)
}

/// What can be done about files that are gone. `needed`: the program cannot go on without.
fn lost_text(files: &[ForeignFile], needed: bool) -> &'static str {
    let what = files.first().map_or("removed", |file| file.what);
    match (what, needed) {
        ("moved", _) => "; move it back",
        ("replaced" | "cut off", _) => {
            ", and what it held at the checkpoint is not known: CKPT_FOREIGN=keep takes what is there now"
        }
        (_, true) => {
            ", and what it held at the checkpoint is not known: put a file there and start with CKPT_FOREIGN=keep"
        }
        (_, false) => {
            ", and what it held at the checkpoint is not known: CKPT_FOREIGN=keep goes on without it"
        }
    }
}

/// So often an undo begins, when files vanish under it.
const VANISHED: u32 = 4;

/// Why the files cannot go back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UndoError {
    #[error("the files cannot go back to generation {base}: {reason}")]
    Incomplete { base: u64, reason: String },
    /// Nothing was changed, or not further than up to there.
    #[error("{}; CKPT_FOREIGN=keep leaves such files as they are", foreign_text(.0))]
    Foreign(Vec<ForeignFile>),
    /// The same, of files whose contents at the generation are not known.
    #[error("{}{}", foreign_text(.0), lost_text(.0, *.1))]
    Lost(Vec<ForeignFile>, bool),
    /// The undo has begun, and this was there then. Callers get [`UndoError::Lost`].
    #[error("{}", foreign_text(std::slice::from_ref(.0)))]
    Vanished(ForeignFile),
    #[error("cannot {verb} {}: {errno}", path.display())]
    Failed {
        verb: &'static str,
        path: PathBuf,
        errno: Errno,
    },
    #[error("{} is damaged", .0.display())]
    Damaged(PathBuf),
    /// Nothing was changed.
    #[error(
        "no space left on device: {needed} KiB are needed to put the files back where {} is, {free} are free",
        path.display()
    )]
    NoSpace {
        path: PathBuf,
        needed: u64,
        free: u64,
    },
}

impl UndoError {
    /// As callers get it, when it is not tried again.
    fn in_the_end(self) -> UndoError {
        match self {
            UndoError::Vanished(file) => UndoError::Lost(vec![file], false),
            other => other,
        }
    }
}

pub(super) fn failed(verb: &'static str, path: &Path, errno: i32) -> UndoError {
    UndoError::Failed {
        verb,
        path: path.to_owned(),
        errno: Errno(errno),
    }
}

impl From<crate::store::StoreError> for UndoError {
    fn from(e: crate::store::StoreError) -> UndoError {
        UndoError::Failed {
            verb: e.verb,
            path: e.path,
            errno: e.errno,
        }
    }
}

/// Can the files go back, as far as the tables say? Changes nothing.
pub fn check(
    job_dir: &Path,
    to_generation: u64,
    restore_exclude: &[Vec<u8>],
) -> Result<(), UndoError> {
    tables(job_dir, to_generation, restore_exclude, false).map(drop)
}

/// The same for a rollback, from which the process's own rules take files out. `open`: inodes
/// that the program, which stands still, has open; then it is asked as well whether there is
/// room for what is written.
pub fn check_by_rules(
    job_dir: &Path,
    to_generation: u64,
    restore_exclude: &[Vec<u8>],
    open: Option<&BTreeSet<Id>>,
) -> Result<(), UndoError> {
    let tables = tables(job_dir, to_generation, restore_exclude, true)?;
    let Some(open) = open else {
        return Ok(());
    };
    let by_option = |path: &[u8]| restore_exclude.iter().any(|glob| matches(glob, path));
    let excluded = |path: &[u8]| by_option(path) || is_excluded(path);
    space::check(job_dir, to_generation, &tables, open, excluded)
}

/// The tables that lead from now back to a generation, newest first, whole and
/// complete.
pub(super) fn tables(
    job_dir: &Path,
    to_generation: u64,
    restore_exclude: &[Vec<u8>],
    by_rules: bool,
) -> Result<Vec<Table>, UndoError> {
    tables_of(
        &table::list_back(job_dir, to_generation)?,
        to_generation,
        restore_exclude,
        by_rules,
    )
}

/// The same of a list that was made already.
fn tables_of(
    list: &[TableFile],
    to_generation: u64,
    restore_exclude: &[Vec<u8>],
    by_rules: bool,
) -> Result<Vec<Table>, UndoError> {
    let mut tables = Vec::new();
    for file in table::leading_back(list, to_generation).iter().rev() {
        let table = table::read(&file.path)?.ok_or(UndoError::Damaged(file.path.clone()))?;
        if table.damaged {
            return Err(UndoError::Damaged(file.path.clone()));
        }
        let excluded = |path: &[u8]| {
            let path: &[u8] = if path.is_empty() { b"/" } else { path };
            restore_exclude.iter().any(|glob| matches(glob, path)) || by_rules && is_excluded(path)
        };
        let missing = table.records.iter().find_map(|(_, record)| match record {
            Record::Incomplete { path, reason } if !excluded(path) => {
                Some(String::from_utf8_lossy(reason).into_owned())
            }
            _ => None,
        });
        let reason = file.incomplete.clone().unwrap_or_default();
        let whole = missing.is_some() || table.broken;
        if whole {
            let reason = if reason.is_empty() {
                missing.unwrap_or_default()
            } else {
                reason
            };
            let base = table.file.base;
            return Err(UndoError::Incomplete { base, reason });
        }
        tables.push(table);
    }
    Ok(tables)
}

/// Above all tables that the job has, and above those that notes of inodes made anew are
/// of: these go by the numbers.
pub fn next_number(job_dir: &Path) -> Result<u32, UndoError> {
    let highest = table::highest(job_dir)?;
    let noted = state::Replaced::load(job_dir)?.highest();
    Ok(highest.max(noted as u32).saturating_add(1))
}

/// Would a return be refused because of what somebody else has changed? Changes nothing.
pub fn check_foreign(
    job_dir: &Path,
    to_generation: u64,
    options: &mut Options,
) -> Result<(), UndoError> {
    let (exclude, by_rules) = (options.restore_exclude, options.by_rules);
    let list = table::list(job_dir)?;
    let tables = tables_of(&list, to_generation, exclude, by_rules)?;
    apply::Undoer::new(job_dir, options, &tables, (&list, to_generation))?.refuse_foreign(&tables)
}

/// What undos so far have made anew of the inodes that an image of this generation knows.
pub fn made_anew(job_dir: &Path, generation: u64) -> Result<BTreeMap<Id, Id>, UndoError> {
    Ok(state::Replaced::load(job_dir)?.all(generation))
}

/// Takes back every table that leads back to the generation, removing each one.
pub fn undo(
    job_dir: &Path,
    to_generation: u64,
    options: &mut Options,
) -> Result<Report, UndoError> {
    let mut list = table::remove_leftovers(job_dir)?;
    let (exclude, by_rules) = (options.restore_exclude, options.by_rules);
    let mut tries = VANISHED;
    loop {
        let tables = tables_of(&list, to_generation, exclude, by_rules)?;
        let mut undoer = apply::Undoer::new(job_dir, options, &tables, (&list, to_generation))?;
        undoer.look_again = tries < VANISHED;
        tries -= 1;
        match undoer.all(&tables, to_generation) {
            // Somebody else has removed it just now: it may be put together of what is kept.
            Err(UndoError::Vanished(_)) if tries > 0 => list = table::list(job_dir)?,
            done => return done.map_err(UndoError::in_the_end),
        }
    }
}

/// Saves what somebody else has put at a path, before that is overwritten; `None`: there is
/// nothing, or nothing in it.
pub fn set_aside(job_dir: &Path, path: &[u8]) -> Result<Option<PathBuf>, UndoError> {
    let c_path = apply::c(path)?;
    match crate::persist::sys::lstat(&c_path) {
        Ok(stat) if stat.is_regular() && stat.size > 0 => {
            let aside = tree::copy_aside(job_dir, path, &stat)?;
            Ok(Some(apply::as_path(&aside)))
        }
        Ok(stat) if stat.is_dir() => Err(failed("overwrite", &apply::as_path(path), libc::EISDIR)),
        _ => Ok(None),
    }
}

/// As [`undo`], from the state of generation `left`, where the files are: no table is
/// removed, and what is done to files is recorded in a new one, `seq`, like modifications
/// of the program. So the way to `left` and to all others stays open; an undo that is killed
/// is taken back by the next recovery. Afterwards a table of `to_generation` must begin.
///
/// With the right to record: no thread of the program is in a hook.
pub fn go_back_recorded(
    job_dir: &Path,
    (left, to_generation): (u64, u64),
    (seq, power): (u32, bool),
    alive_ns: i64,
    options: &mut Options,
) -> Result<Report, UndoError> {
    let (exclude, by_rules) = (options.restore_exclude, options.by_rules);
    let list = table::list(job_dir)?;
    let tables = tables_of(&list, to_generation, exclude, by_rules)?;
    table::install_for_return(table::create(job_dir, seq, left, power)?);
    // With the new one: what this return removes is kept there, and may be needed again.
    let list = table::list(job_dir).map_err(UndoError::from);
    let undoer =
        list.and_then(|list| apply::Undoer::new(job_dir, options, &tables, (&list, to_generation)));
    let mut report = undoer.and_then(|undoer| {
        let undoer = undoer.recorded(alive_ns);
        undoer.all(&tables, to_generation)
    });
    if let Ok(report) = &mut report {
        report.unrecorded = table::incomplete_reason();
    }
    table::end_return();
    report.map_err(UndoError::in_the_end)
}

/// All inodes that the program is known to have had to do with.
fn known_ids(tables: &[Table]) -> BTreeSet<Id> {
    let mut known = BTreeSet::new();
    for (_, record) in tables.iter().flat_map(|t| &t.records) {
        match record {
            Record::Born { id } => known.insert(*id),
            Record::Inode { stat, .. }
            | Record::Gone { stat, .. }
            | Record::RemovedDir { stat, .. } => known.insert(stat.id),
            Record::Renamed { moved, other, .. } => {
                known.extend(other.iter().map(|other| other.inode.id));
                known.insert(moved.inode.id)
            }
            _ => false,
        };
    }
    known
}
