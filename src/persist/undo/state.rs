//! What an undo remembers on the disk, so that it can be killed at any point and
//! started again: inodes that were made anew, and what was found out about changes of
//! somebody else.
//!
//! `replaced` stays for the life of the job: an image that is older than a recovery
//! still has the old numbers. `undo-foreign` goes with the last table.

use super::{ForeignFile, UndoError, failed};
use crate::persist::Id;
use crate::persist::format::Encoder;
use crate::persist::sys;
use crate::persist::table::c_path;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Inodes that were made anew, by their number at the time of the record.
///
/// Numbers are used again, so a chain is followed only forward in time, and what an
/// earlier recovery made anew says nothing of the tables that began after it: the
/// present undo has entries of its own.
#[derive(Debug, Default)]
pub struct Replaced {
    job: PathBuf,
    /// Of the present undo.
    now: Entries,
    /// Of the life of the job.
    ever: Entries,
}

#[derive(Debug, Default)]
struct Entries {
    path: PathBuf,
    /// The last entry of each old number: when, and the new one.
    map: BTreeMap<Id, (u64, Id)>,
}

impl Entries {
    fn load(path: PathBuf) -> Result<Entries, UndoError> {
        let mut map = BTreeMap::new();
        for (k, entry) in read_file(&path)?.chunks_exact(32).enumerate() {
            let id = |at| Id {
                dev: u64_at(entry, at),
                ino: u64_at(entry, at + 8),
            };
            map.insert(id(0), (k as u64 + 1, id(16)));
        }
        Ok(Entries { path, map })
    }

    /// Notes it, on the disk first.
    fn note(&mut self, old: Id, new: Id) -> Result<(), UndoError> {
        let note = || {
            let flags = libc::O_WRONLY | libc::O_CREAT;
            let fd = sys::open(&c_path(&self.path)?, flags, 0o600)?;
            // A torn entry of a kill is overwritten.
            let at = sys::fstat(fd.0)?.size / 32 * 32;
            let mut e = Encoder::new();
            e.id(&old).id(&new);
            sys::pwrite_all(fd.0, e.bytes().ok_or(libc::ENOMEM)?, at)?;
            Ok(at / 32 + 1)
        };
        let when = note().map_err(|e| failed("write", &self.path, e))?;
        self.map.insert(old, (when, new));
        Ok(())
    }

    fn resolve(&self, id: &Id) -> Id {
        let (mut now, mut when) = (*id, 0);
        while let Some((then, next)) = self.map.get(&now)
            && *then > when
        {
            (now, when) = (*next, *then);
        }
        now
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let eight = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    u64::from_le_bytes(eight.unwrap_or_default())
}

pub(super) fn read_file(path: &Path) -> Result<Vec<u8>, UndoError> {
    let read = || {
        let fd = sys::open(&c_path(path)?, libc::O_RDONLY, 0)?;
        let len = sys::fstat(fd.0)?.size as usize;
        let mut bytes = vec![0u8; len];
        let got = sys::pread_all(fd.0, bytes.as_mut_ptr(), len, 0)?;
        bytes.truncate(got);
        Ok(bytes)
    };
    match read() {
        Err(libc::ENOENT) => Ok(Vec::new()),
        other => other.map_err(|e| failed("read", path, e)),
    }
}

impl Replaced {
    pub fn load(job_dir: &Path) -> Result<Replaced, UndoError> {
        Ok(Replaced {
            job: job_dir.to_owned(),
            now: Entries::load(job_dir.join("undo-replaced"))?,
            ever: Entries::load(job_dir.join("replaced"))?,
        })
    }

    /// Notes, on the disk first, that `old` is about to be `new`.
    pub fn note(&mut self, old: Id, new: Id) -> Result<(), UndoError> {
        self.ever.note(old, new)?;
        self.now.note(old, new)
    }

    /// What an inode of the tables is now.
    pub fn resolve(&self, id: &Id) -> Id {
        self.now.resolve(id)
    }

    /// Is `present` the inode that was `wanted`?
    pub fn is(&self, present: &Id, wanted: &Id) -> bool {
        present == wanted || *present == self.resolve(wanted)
    }

    /// For images, which may be older than several recoveries.
    pub fn all(&self) -> BTreeMap<Id, Id> {
        let ids = self.ever.map.keys();
        ids.map(|id| (*id, self.ever.resolve(id))).collect()
    }

    /// What the present undo made.
    pub fn news(&self) -> BTreeSet<Id> {
        self.now.map.values().map(|(_, new)| *new).collect()
    }

    /// The undo is done.
    pub fn finish(&self) {
        if let Ok(path) = c_path(&self.job.join("undo-replaced")) {
            let _ = sys::unlink(&path);
        }
    }
}

/// What was found out about changes of somebody else.
#[derive(Debug, Default)]
pub struct Findings {
    pub files: Vec<ForeignFile>,
    /// Inodes to leave alone (`CKPT_FOREIGN=keep`).
    pub keep: BTreeSet<Id>,
}

const WHATS: [&str; 4] = ["changed", "replaced", "removed", "made"];

impl Findings {
    fn path(job_dir: &Path) -> PathBuf {
        job_dir.join("undo-foreign")
    }

    pub fn load(job_dir: &Path) -> Result<Findings, UndoError> {
        let bytes = read_file(&Findings::path(job_dir))?;
        let mut findings = Findings::default();
        let mut fields = bytes.split(|b| *b == 0);
        while let (Some(what), Some(path), Some(aside), Some(id)) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        {
            let path_of = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
            if let Some(what) = WHATS.iter().find(|w| w.as_bytes() == what) {
                findings.files.push(ForeignFile {
                    path: path_of(path),
                    aside: (!aside.is_empty()).then(|| path_of(aside)),
                    what,
                });
            }
            let id = String::from_utf8_lossy(id).into_owned();
            if let Some((dev, ino)) = id.split_once(' ')
                && let (Ok(dev), Ok(ino)) = (dev.parse(), ino.parse())
            {
                findings.keep.insert(Id { dev, ino });
            }
        }
        Ok(findings)
    }

    pub fn save(&self, job_dir: &Path) -> Result<(), UndoError> {
        if self.files.is_empty() && self.keep.is_empty() {
            return Ok(());
        }
        let mut bytes = Vec::new();
        for file in &self.files {
            bytes.extend(file.what.as_bytes());
            bytes.push(0);
            bytes.extend(file.path.as_os_str().as_bytes());
            bytes.push(0);
            if let Some(aside) = &file.aside {
                bytes.extend(aside.as_os_str().as_bytes());
            }
            bytes.extend(b"\0\0");
        }
        for id in &self.keep {
            bytes.extend(format!("\0\0\0{} {}\0", id.dev, id.ino).as_bytes());
        }
        let path = Findings::path(job_dir);
        let write = || {
            let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC;
            let fd = sys::open(&c_path(&path)?, flags, 0o600)?;
            sys::pwrite_all(fd.0, &bytes, 0)
        };
        write().map_err(|e| failed("write", &path, e))
    }

    pub fn remove(job_dir: &Path) {
        if let Ok(path) = c_path(&Findings::path(job_dir)) {
            let _ = sys::unlink(&path);
        }
    }
}
