//! Records about an inode: contents, attributes, times. By [`super::apply`], in its context.

use super::apply::{Current, Undoer, as_path, c, on};
use super::lift::{as_writer, is_bare};
use super::{UndoError, failed};
use crate::persist::sys::{self, CPath, Fd, Sys};
use crate::persist::table;
use crate::persist::{Id, MODE, OWNER, SIZE, Stat, TIMES};

impl Undoer<'_, '_> {
    /// Opens for writing, over a mode that forbids it to the owner. What the process may not open
    /// it may have been given.
    fn open_for_writing(&self, path: &CPath, id: Id) -> Sys<Fd> {
        let own = as_writer(path, || {
            sys::open(path, libc::O_WRONLY | libc::O_NONBLOCK, 0)
        });
        own.or_else(|errno| {
            let lend = self.options.lend.filter(|_| is_forbidden(errno));
            let lent = lend.and_then(|lend| lend(id));
            lent.map(Fd).ok_or(errno)
        })
    }

    pub fn attributes(
        &mut self,
        current: &Current,
        row: u32,
        which: u32,
        stat: &Stat,
    ) -> Result<(), UndoError> {
        if which & (SIZE | MODE | OWNER) == 0 {
            return Ok(());
        }
        let Some(path) = self.locate(current, row)? else {
            return Ok(());
        };
        let at = c(&path)?;
        let now = on(sys::lstat(&at), "look at", &path)?;
        if which & SIZE != 0 && stat.is_regular() && now.size != stat.size {
            self.step("truncate", &as_path(&path))?;
            self.tell_file(&path, |session, file| {
                session.before_truncate(file, stat.size);
            })?;
            let opened = self.open_for_writing(&at, now.id);
            let done = opened.and_then(|fd| sys::ftruncate(fd.0, stat.size));
            on(done, "truncate", &path)?;
        }
        let owner = which & OWNER != 0 && (now.uid, now.gid) != (stat.uid, stat.gid);
        if owner {
            self.step("set the owner of", &as_path(&path))?;
            self.tell_file(&path, |session, file| {
                session.before_attributes(file, OWNER);
            })?;
            on(
                sys::chown(&at, stat.uid, stat.gid),
                "set the owner of",
                &path,
            )?;
        }
        let is_link = stat.mode & libc::S_IFMT == libc::S_IFLNK;
        if which & MODE != 0 && !is_link && (owner || now.mode != stat.mode) {
            self.step("set the mode of", &as_path(&path))?;
            self.tell_file(&path, |session, file| session.before_attributes(file, MODE))?;
            // A directory has its mode when nothing has to be done in it any more.
            let lifted = !self.is_privileged && is_bare(stat);
            let mode = stat.mode | if lifted { 0o700 } else { 0 };
            on(sys::chmod(&at, mode), "set the mode of", &path)?;
        }
        Ok(())
    }

    /// When all tables are undone: outputs end where they ended at the generation.
    pub fn cut_outputs(&mut self) -> Result<(), UndoError> {
        for end in self.options.ends {
            let at = c(&end.path)?;
            let named = sys::lstat(&at).ok().filter(|now| now.id == end.id);
            let fd = match &named {
                Some(now) if now.size <= end.size => continue,
                Some(_) => on(self.open_for_writing(&at, end.id), "open", &end.path)?,
                // By a descriptor that the process was given. (A return that is recorded cannot be
                // told of a file without its name.)
                None => {
                    let lend = self.options.lend.filter(|_| !self.recorded);
                    match lend.and_then(|lend| lend(end.id)) {
                        Some(fd) => Fd(fd),
                        None => continue,
                    }
                }
            };
            let now = on(sys::fstat(fd.0), "look at", &end.path)?;
            if !now.is_regular() || now.size <= end.size || self.findings.keep.contains(&end.id) {
                continue;
            }
            self.step("truncate", &as_path(&end.path))?;
            if named.is_some() {
                self.tell_file(&end.path, |session, file| {
                    session.before_truncate(file, end.size);
                })?;
            }
            on(sys::ftruncate(fd.0, end.size), "truncate", &end.path)?;
            if named.is_some() {
                // As far as that is permitted.
                let _ = sys::set_times(&at, now.atime_ns, now.mtime_ns);
            }
        }
        Ok(())
    }

    pub fn blocks(
        &mut self,
        current: &Current,
        row: u32,
        offset: u64,
        len: u64,
        shadow: Option<u64>,
    ) -> Result<(), UndoError> {
        if self.open.as_ref().is_none_or(|(open, ..)| *open != row) {
            let Some(path) = self.locate(current, row)? else {
                return Ok(());
            };
            // Before its mode is changed for a moment.
            self.tell_back(&path)?;
            let at = c(&path)?;
            let now = on(sys::lstat(&at), "look at", &path)?;
            let fd = on(self.open_for_writing(&at, now.id), "open", &path)?;
            self.open = Some((row, fd, path));
        }
        let info = current.rows.rows.get(&row);
        let name = as_path(info.map(|i| i.first_path.as_slice()).unwrap_or_default());
        self.step("write", &name)?;
        if let Some((_, _, path)) = &self.open
            && self.recorded
        {
            let path = path.clone();
            self.tell_file(&path, |session, file| {
                session.before_write(file, offset, offset + len);
            })?;
        }
        let Some((_, to, _)) = &self.open else {
            return Ok(());
        };
        // One that was lent may append wherever it is told to write.
        let appends = sys::flags(to.0).is_ok_and(|flags| flags & libc::O_APPEND != 0);
        if appends && sys::fstat(to.0).is_ok_and(|now| now.size != offset) {
            return Err(failed("write", &name, libc::EACCES));
        }
        let done = match shadow {
            Some(at) => match &current.shadow {
                Some(from) if sys::fstat(from.0).is_ok_and(|s| s.size >= at + len) => {
                    sys::copy_sparse(from.0, at, at + len, to.0, offset)
                        .and_then(|()| fill_holes(from.0, at, at + len, to.0, offset))
                }
                _ => {
                    let seq = current.table.file.seq;
                    let path = table::shadow_path(self.job_dir, seq);
                    return Err(UndoError::Damaged(path));
                }
            },
            None => zero(to.0, offset, len),
        };
        done.map_err(|e| failed("write", &name, e))
    }

    pub fn xattr(
        &mut self,
        current: &Current,
        row: u32,
        name: &[u8],
        value: Option<&[u8]>,
    ) -> Result<(), UndoError> {
        let Some(path) = self.locate(current, row)? else {
            return Ok(());
        };
        let (at, text) = (c(&path)?, name);
        let name = c(name)?;
        // A call that failed has changed nothing, and what it was about may be forbidden.
        if same_xattr(&at, &name, value) {
            return Ok(());
        }
        self.step("set an attribute of", &as_path(&path))?;
        self.tell_file(&path, |session, file| session.before_xattr(file, text))?;
        let done = match value {
            Some(value) => as_writer(&at, || sys::set_xattr(&at, &name, value)),
            None => match as_writer(&at, || sys::remove_xattr(&at, &name)) {
                Err(libc::ENODATA) => Ok(()),
                other => other,
            },
        };
        on(done, "set an attribute of", &path)
    }

    /// When all records are undone: times, and modes that were in the way.
    pub fn last_of_all(&mut self, current: &Current) -> Result<(), UndoError> {
        let mut last = Vec::new();
        for (row, info) in &current.rows.rows {
            let is_link = info.stat.mode & libc::S_IFMT == libc::S_IFLNK;
            let bare = match info.stat.is_dir() {
                true => !self.is_privileged && is_bare(&info.stat),
                false => info.stat.mode & 0o200 == 0 && !is_link,
            };
            if (info.times.is_some() || bare)
                && let Some(path) = self.locate(current, *row)?
            {
                last.push((path, bare, info));
            }
        }
        // What is in a directory before the directory, which may then not be searched any more.
        last.sort_by(|a, b| b.0.cmp(&a.0));
        for (path, bare, info) in last {
            let at = c(&path)?;
            let now = on(sys::lstat(&at), "look at", &path)?;
            if bare && now.mode != info.stat.mode {
                self.step("set the mode of", &as_path(&path))?;
                self.tell_file(&path, |session, file| session.before_attributes(file, MODE))?;
                on(sys::chmod(&at, info.stat.mode), "set the mode of", &path)?;
            }
            if let Some((atime, mtime)) = info.times
                && (now.atime_ns, now.mtime_ns) != (atime, mtime)
            {
                self.step("set the times of", &as_path(&path))?;
                self.tell_file(&path, |session, file| {
                    session.before_attributes(file, TIMES);
                })?;
                match sys::set_times(&at, atime, mtime) {
                    // Written by leave of its group, owned by somebody else.
                    Err(libc::EPERM) | Err(libc::EACCES) => {}
                    other => on(other, "set the times of", &path)?,
                }
            }
        }
        Ok(())
    }
}

/// Is the attribute what it is to be?
fn same_xattr(path: &CPath, name: &CPath, value: Option<&[u8]>) -> bool {
    let mut now = vec![0u8; 1 << 16];
    match (sys::get_xattr(path, name, &mut now), value) {
        (Ok(len), Some(value)) => now.get(..len) == Some(value),
        (Err(libc::ENODATA | libc::EOPNOTSUPP), None) => true,
        _ => false,
    }
}

fn is_forbidden(errno: i32) -> bool {
    matches!(errno, libc::EACCES | libc::EPERM)
}

/// Makes bytes zero, as a hole where the file system has holes. Beyond the end there
/// is nothing to do: the size comes later.
pub fn zero(fd: i32, offset: u64, len: u64) -> Sys<()> {
    let size = sys::fstat(fd)?.size;
    let end = (offset + len).min(size);
    if offset >= end {
        return Ok(());
    }
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    match sys::fallocate(fd, mode, offset, end - offset) {
        Err(libc::EOPNOTSUPP) | Err(libc::ENOSYS) => {
            let zeros = [0u8; 4096];
            let mut at = offset;
            while at < end {
                let n = (end - at).min(4096);
                sys::pwrite_all(fd, zeros.get(..n as usize).unwrap_or_default(), at)?;
                at += n;
            }
            Ok(())
        }
        other => other,
    }
}

/// `copy_sparse` leaves alone what is a hole in the source: here these are zeros.
fn fill_holes(from: i32, start: u64, end: u64, to: i32, at: u64) -> Sys<()> {
    let mut pos = start;
    while pos < end {
        let hole = match sys::seek(from, pos, libc::SEEK_HOLE) {
            Ok(hole) if hole < end => hole,
            _ => return Ok(()),
        };
        let data = match sys::seek(from, hole, libc::SEEK_DATA) {
            Ok(data) => data.min(end),
            Err(_) => end,
        };
        zero(to, at + (hole - start), data - hole)?;
        pos = data.max(hole + 1);
    }
    Ok(())
}
