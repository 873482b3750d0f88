//! Removing what was made since, putting aside what is somebody else's, making anew
//! what is gone.

use super::apply::{Current, Undoer, as_path, c, on};
use super::place::beside;
use super::{Fate, ForeignFile, UndoError, failed};
use crate::config::Foreign;
use crate::persist::format;
use crate::persist::sys::{self, CPath, Sys};
use crate::persist::table::{self, Name, Xattrs};
use crate::persist::{Id, Stat};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The clock of files and the helper's rounds may differ by this much, where the program's end is
/// not known.
pub const MARGIN_NS: i64 = 3_000_000_000;
/// File systems take the time of the latest clock tick.
const TICK_NS: i64 = 20_000_000;

impl Undoer<'_, '_> {
    pub fn kept_path(&self, current: &Current, name: &[u8]) -> Vec<u8> {
        let mut path = table::kept_dir(self.job_dir, current.table.file.seq)
            .as_os_str()
            .as_bytes()
            .to_vec();
        path.push(b'/');
        path.extend_from_slice(name);
        path
    }

    /// Was this inode made, or modified since the program's last sign of life, by
    /// somebody else?
    pub fn is_strange(&self, path: &[u8], stat: &Stat) -> bool {
        !self.known.contains(&stat.id) || stat.is_regular() && self.is_later(path, stat)
    }

    /// Modified after the program's last sign of life, and not by this undo?
    pub fn is_later(&self, path: &[u8], stat: &Stat) -> bool {
        // Files of other machines have these machines' times.
        let ended = self.ended_ns != 0 && self.births.get().is_here(stat.id.dev);
        let end_ns = match ended {
            true => self.ended_ns,
            false => self.alive_ns.saturating_add(MARGIN_NS),
        };
        (ended || self.alive_ns != 0)
            && stat.mtime_ns < self.begun_ns.saturating_sub(TICK_NS)
            && stat.mtime_ns > end_ns
            && !self.options.inherited.contains(&stat.id)
            // A time that the program has set itself lies where it likes; this one cannot be set.
            && c(path).is_ok_and(|path| sys::changed_ns(&path).is_ok_and(|ns| ns > end_ns))
    }

    /// Removes an inode's name, a directory with all that is in it. What somebody else
    /// made is put aside, or left: then false. `sure`: it is ours even if unknown.
    pub fn remove(&mut self, path: &[u8], stat: &Stat, sure: bool) -> Result<bool, UndoError> {
        if stat.is_dir() {
            let mut all = true;
            self.lift(path)?;
            let names = on(sys::list(&c(path)?), "list", path)?;
            for name in names {
                let inner = on(CPath::join(path, &name), "use", path)?;
                if let Ok(there) = sys::lstat(&inner) {
                    all &= self.remove(inner.bytes(), &there, false)?;
                }
            }
            if all {
                self.step("remove", &as_path(path))?;
                self.tell_name(path, |session, name| session.before_remove(name, stat))?;
                on(sys::rmdir(&c(path)?), "remove", path)?;
            }
            return Ok(all);
        }
        if self.waits(&stat.id) {
            return Ok(false);
        }
        let kept = self.findings.keep.contains(&stat.id);
        let strange = || !sure && stat.is_regular() && self.is_strange(path, stat);
        if kept || strange() && (self.is_later(path, stat) || !self.was_being_made(path)) {
            if kept || self.options.foreign == Foreign::Keep {
                if self.findings.keep.insert(stat.id) {
                    self.found(path, None, "made")?;
                }
                return Ok(false);
            }
            let aside = self.put_aside(path, stat)?;
            self.found(path, Some(aside), "made")?;
        }
        self.step("remove", &as_path(path))?;
        self.tell_name(path, |session, name| session.before_remove(name, stat))?;
        on(sys::unlink(&c(path)?), "remove", path)?;
        Ok(true)
    }

    /// Was the program killed while it made something under this name? Then nothing tells of
    /// the inode, but it is its own.
    fn was_being_made(&self, path: &[u8]) -> bool {
        let Some(slash) = path.iter().rposition(|byte| *byte == b'/') else {
            return false;
        };
        let (dir, name) = path.split_at(slash);
        let dir: &[u8] = if dir.is_empty() { b"/" } else { dir };
        let dir = CPath::new(&[dir]).and_then(|dir| sys::stat(&dir));
        let making = dir.map(|dir| format::making(&dir.id, name.get(1..).unwrap_or_default()));
        making.is_ok_and(|making| self.making.contains(&making))
    }

    fn found(
        &mut self,
        path: &[u8],
        aside: Option<Vec<u8>>,
        what: &'static str,
    ) -> Result<(), UndoError> {
        let file = ForeignFile {
            path: as_path(path),
            aside: aside.map(|a| as_path(&a)),
            what,
            fate: Fate::Plain,
        };
        if !self.findings.files.contains(&file) {
            self.findings.files.push(file);
            self.save_findings()?;
        }
        Ok(())
    }

    /// Copies a file into `aside/`; doing it again overwrites the copy.
    pub fn put_aside(&mut self, path: &[u8], stat: &Stat) -> Result<Vec<u8>, UndoError> {
        self.step("save", &as_path(path))?;
        copy_aside(self.job_dir, path, stat)
    }

    /// Makes an inode that is gone for good: under a name beside, then moved into
    /// place, so that its name is there only when all of it is. `mark`: a table's number
    /// and a record's.
    pub fn make_anew(
        &mut self,
        mark: (u32, usize),
        name: &Name,
        stat: &Stat,
        source: Option<&[u8]>,
        target: Option<&[u8]>,
        xattrs: &Xattrs,
    ) -> Result<(), UndoError> {
        let path = name.path();
        let temporary = on(CPath::join(&name.dir_path, &beside(mark)), "use", &path)?;
        self.step("make", &as_path(&path))?;
        let _ = sys::unlink(&temporary);
        let _ = sys::rmdir(&temporary);
        self.tell_name(temporary.bytes(), |session, name| {
            session.before_create(name);
        })?;
        let made = match (source, target) {
            (Some(source), _) => (|| {
                let from = sys::open(&CPath::new(&[source])?, libc::O_RDONLY, 0)?;
                create(&temporary)?;
                self.tell_made(&temporary);
                copy_to(from.0, &temporary, stat)
            })(),
            (_, Some(target)) => {
                CPath::new(&[target]).and_then(|target| sys::symlink(&target, &temporary))
            }
            _ if stat.is_dir() => sys::mkdir(&temporary, 0o700),
            _ => sys::mknod(&temporary, stat.mode & libc::S_IFMT | 0o600, stat.rdev),
        };
        self.tell_made(&temporary);
        let made = made.and_then(|()| dress(&temporary, stat, xattrs));
        let made = made.and_then(|()| self.lstat(&temporary));
        let new = on(made, "make", &path)?.identity();
        self.step("make", &as_path(&path))?;
        if stat.id != Id::default() {
            self.replaced.note(stat.identity(), new)?;
        }
        self.known.insert(new.id);
        self.step("make", &as_path(&path))?;
        self.tell_move(temporary.bytes(), &path, false)?;
        on(sys::rename(&temporary, &c(&path)?, 0), "put back", &path)
    }
}

/// A copy of a file in the job's `aside`, where it is told from other versions.
pub fn copy_aside(job_dir: &Path, path: &[u8], stat: &Stat) -> Result<Vec<u8>, UndoError> {
    let dir = job_dir.join("aside");
    match table::c_path(&dir).and_then(|d| sys::mkdir(&d, 0o700)) {
        Ok(()) | Err(libc::EEXIST) => {}
        Err(e) => return Err(failed("make", &dir, e)),
    }
    let mut base = path.rsplit(|b| *b == b'/').next().unwrap_or_default();
    base = base.get(..200).unwrap_or(base);
    let mut to = dir.as_os_str().as_bytes().to_vec();
    to.push(b'/');
    to.extend_from_slice(base);
    to.extend(format!(".{:x}.{:x}", stat.mtime_ns, stat.id.ino).as_bytes());
    let copied = (|| {
        let from = sys::open(&CPath::new(&[path])?, libc::O_RDONLY | libc::O_NONBLOCK, 0)?;
        copy_to(from.0, &CPath::new(&[&to])?, stat)
    })();
    on(copied, "save a copy of", path)?;
    Ok(to)
}

pub fn create(path: &CPath) -> Sys<()> {
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
    sys::open(path, flags, 0o600).map(drop)
}

fn copy_to(from: i32, to: &CPath, stat: &Stat) -> Sys<()> {
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC;
    let out = sys::open(to, flags, 0o600)?;
    sys::ftruncate(out.0, stat.size)?;
    sys::copy_sparse(from, 0, stat.size, out.0, 0)
}

/// Owner, mode, attributes, times.
pub fn dress(path: &CPath, stat: &Stat, xattrs: &Xattrs) -> Sys<()> {
    let now = sys::lstat(path)?;
    if (now.uid, now.gid) != (stat.uid, stat.gid) {
        sys::chown(path, stat.uid, stat.gid)?;
    }
    // What its directory has handed down.
    for inherited in [&b"system.posix_acl_access"[..], b"system.posix_acl_default"] {
        if !xattrs.iter().any(|(name, _)| name == inherited) {
            let _ = sys::remove_xattr(path, &CPath::new(&[inherited])?);
        }
    }
    for (name, value) in xattrs {
        sys::set_xattr(path, &CPath::new(&[name])?, value)?;
    }
    if stat.mode & libc::S_IFMT != libc::S_IFLNK {
        sys::chmod(path, stat.mode)?;
    }
    sys::set_times(path, stat.atime_ns, stat.mtime_ns)
}
