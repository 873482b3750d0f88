//! At a recovery: the files that the new start gives for the old outputs get the
//! contents that the checkpoint had. Constructor, before the tables are undone (that
//! removes them, and they are needed here) and before descriptors are restored. At a
//! rollback the outputs are the program's own still: the helper, with copies of them.
//!
//! May be killed at any point and run again: the streams only get blocks of the tables,
//! always in the same order, and a file is filled from them again.

use super::{Ids, Problem, are_unseen, copy, given, open, problem, rows};
use crate::agent::{log, settings};
use crate::persist::Id;
use crate::persist::table::TableFile;
use crate::persist::undo::OutputEnd;
use crate::store::generation::StreamRecord;
use rustix::fs::{Mode, OFlags};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// What the undo and the descriptors have to know.
#[derive(Debug, Default)]
pub struct Refilled {
    /// Inodes whose contents are in streams: a shell may have truncated them.
    pub inodes: Vec<Id>,
    /// Files of the new start that hold what an old output held: their positions count.
    pub filled: Vec<Id>,
}

/// Whose outputs are filled.
pub enum Outputs<'a> {
    /// Those that the present process was started with.
    OfTheStart,
    /// Those of the running program: a copy of the descriptor with this number.
    OfTheProgram(&'a dyn Fn(i32) -> Option<OwnedFd>),
}

/// Fills the files behind the new start's descriptors. `generation` is what is to be
/// restored, `next_table` is above every table that there is.
pub fn refill(
    job: &Path,
    generation: u64,
    streams: &[StreamRecord],
    next_table: u32,
    outputs: &Outputs,
) -> Result<Refilled, Problem> {
    let mut out = Refilled::default();
    let tables = all_tables(job, streams)?;
    for record in streams {
        let ids = Ids::read(job, record.number);
        let stream = open(job, record.number, false)?;
        rows::rewind(job, &tables, generation, &ids, &stream, record.size)?;
        let old = Id {
            dev: record.dev,
            ino: record.ino,
        };
        let latest = ids.last().unwrap_or(old);
        if record.fds.is_empty() {
            let at_start = matches!(outputs, Outputs::OfTheStart);
            if at_start && fill_closed(job, record, &stream, latest)? {
                out.inodes.extend([old, latest]);
                out.filled.push(latest);
            }
            continue;
        }
        out.inodes.extend([old, latest]);
        for &fd in &record.fds {
            let copy_of = match outputs {
                Outputs::OfTheStart => None,
                Outputs::OfTheProgram(copy) => match copy(fd) {
                    Some(copy) => Some(copy),
                    None => continue,
                },
            };
            let own = copy_of.as_ref().map_or(fd, AsRawFd::as_raw_fd);
            let Some((id, size)) = given::written(own) else {
                continue;
            };
            // What the program has put at the number since is another file, to be left alone.
            if out.filled.contains(&id) || (copy_of.is_some() && id != latest) {
                continue;
            }
            // One that is as long as it was is the undo's business, if that can reach it.
            if id != latest || size < record.size || !is_at(&record.path, id) {
                fill(job, record, &stream, own, id == latest, size)?;
            }
            if id != latest {
                Ids::add(job, record.number, next_table, id)?;
            }
            out.filled.push(id);
        }
    }
    Ok(out)
}

/// Where outputs ended at the generation, for the undo to cut them off there: none where the tables
/// know of all that was written since. After [`refill`].
pub fn ends(job: &Path, streams: &[StreamRecord]) -> Vec<OutputEnd> {
    if !are_unseen(job) {
        return Vec::new();
    }
    let open = streams.iter().filter(|record| !record.fds.is_empty());
    let end = |record: &StreamRecord| OutputEnd {
        id: Ids::read(job, record.number).last().unwrap_or(Id {
            dev: record.dev,
            ino: record.ino,
        }),
        path: record.path.clone(),
        size: record.size,
    };
    open.map(end).collect()
}

/// Makes the streams what they were at the generation, and leaves the files alone.
pub fn rewind(job: &Path, generation: u64, streams: &[StreamRecord]) -> Result<(), Problem> {
    let tables = all_tables(job, streams)?;
    for record in streams {
        let ids = Ids::read(job, record.number);
        let stream = open(job, record.number, false)?;
        rows::rewind(job, &tables, generation, &ids, &stream, record.size)?;
    }
    Ok(())
}

/// The job's tables, where there is a stream that needs them.
fn all_tables(job: &Path, streams: &[StreamRecord]) -> Result<Vec<TableFile>, Problem> {
    match streams {
        [] => Ok(Vec::new()),
        _ => rows::tables(job),
    }
}

/// What the program had closed by the checkpoint and the new start was given again: `>` has
/// truncated it. Another file in its place is not its output any more, and stays as it is. False:
/// it was not given.
fn fill_closed(
    job: &Path,
    record: &StreamRecord,
    stream: &OwnedFd,
    latest: Id,
) -> Result<bool, Problem> {
    let inherited = settings::get().map_or(&[][..], |s| &s.inherited);
    for &(fd, ..) in inherited {
        match given::written(fd) {
            Some((id, size)) if id == latest => {
                if size < record.size {
                    fill(job, record, stream, fd, true, size)?;
                }
                return Ok(true);
            }
            _ => {}
        }
    }
    Ok(false)
}

/// Does the path lead to this inode?
fn is_at(path: &[u8], id: Id) -> bool {
    rustix::fs::lstat(path).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (id.dev, id.ino))
}

/// The stream's first `record.size` bytes become the contents of what is open at `fd`.
fn fill(
    job: &Path,
    record: &StreamRecord,
    stream: &OwnedFd,
    fd: i32,
    same: bool,
    size: u64,
) -> Result<(), Problem> {
    let link = format!("/proc/thread-self/fd/{fd}");
    let path = Path::new(&link);
    let (file, appends) = open_given(fd).map_err(|e| problem("write", path, e))?;
    // Another file with other contents: they may be somebody's.
    if !same && size > 0 {
        let reading = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
        let old = rustix::fs::open(path, reading, Mode::empty());
        let old = old.map_err(|e| problem("read", path, e))?;
        let more = size > record.size;
        if more || !begins_alike(&old, stream, size) {
            save_aside(job, &old, fd, size)?;
        }
    }
    if appends {
        rustix::fs::ftruncate(&file, 0).map_err(|e| problem("truncate", path, e))?;
    }
    let end = copy(stream, &file, 0, record.size).map_err(|e| problem("write", path, e))?;
    if end < record.size {
        return Err(format!(
            "stream {} is too short: {end} of {} bytes",
            record.number, record.size
        ));
    }
    rustix::fs::ftruncate(&file, record.size).map_err(|e| problem("truncate", path, e))?;
    log::line(format_args!(
        "descriptor {fd}: {} bytes of output put back",
        record.size
    ));
    Ok(())
}

/// A description that can be written at any place, or a duplicate of the given one (`true`), which
/// may append wherever it is told to write: of a file that only whoever gave it could open.
fn open_given(fd: i32) -> rustix::io::Result<(OwnedFd, bool)> {
    let link = format!("/proc/thread-self/fd/{fd}");
    let cloexec = OFlags::CLOEXEC | OFlags::NOCTTY;
    let own = rustix::fs::open(&link, OFlags::RDWR | cloexec, Mode::empty());
    let own = own.or_else(|_| rustix::fs::open(&link, OFlags::WRONLY | cloexec, Mode::empty()));
    match own {
        Ok(own) => Ok((own, false)),
        Err(e) => {
            let given = given::duplicate(fd).ok_or(e)?;
            let appends = rustix::fs::fcntl_getfl(&given)?.contains(OFlags::APPEND);
            Ok((given, appends))
        }
    }
}

fn begins_alike(file: &OwnedFd, stream: &OwnedFd, len: u64) -> bool {
    let (mut a, mut b) = (vec![0u8; 1 << 16], vec![0u8; 1 << 16]);
    let mut at = 0;
    while at < len {
        let want = ((len - at) as usize).min(a.len());
        let (Ok(n), Ok(m)) = (
            rustix::io::pread(file, &mut a[..want], at),
            rustix::io::pread(stream, &mut b[..want], at),
        ) else {
            return false;
        };
        if n == 0 || n != m || a[..n] != b[..n] {
            return false;
        }
        at += n as u64;
    }
    true
}

fn save_aside(job: &Path, file: &OwnedFd, fd: i32, size: u64) -> Result<(), Problem> {
    let aside = job.join("aside");
    match rustix::fs::mkdir(&aside, Mode::from(0o700)) {
        Err(rustix::io::Errno::EXIST) | Ok(()) => {}
        Err(e) => return Err(problem("create", &aside, e)),
    }
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mut number = 1;
    let (path, copy_of) = loop {
        let path = aside.join(format!("output-{number:04}"));
        match rustix::fs::open(&path, flags, Mode::from(0o600)) {
            Ok(copy_of) => break (path, copy_of),
            Err(rustix::io::Errno::EXIST) => number += 1,
            Err(e) => return Err(problem("create", &path, e)),
        }
    };
    copy(file, &copy_of, 0, size).map_err(|e| problem("copy to", &path, e))?;
    log::line(format_args!(
        "descriptor {fd} leads to another file with contents of its own: saved as {}",
        path.display()
    ));
    Ok(())
}
