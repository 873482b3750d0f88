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
#[derive(Debug, Default)]
pub struct Replaced {
    path: PathBuf,
    map: BTreeMap<Id, Id>,
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
        let path = job_dir.join("replaced");
        let mut map = BTreeMap::new();
        for entry in read_file(&path)?.chunks_exact(32) {
            let id = |at| Id {
                dev: u64_at(entry, at),
                ino: u64_at(entry, at + 8),
            };
            map.insert(id(0), id(16));
        }
        Ok(Replaced { path, map })
    }

    /// Notes, on the disk first, that `old` is about to be `new`.
    pub fn note(&mut self, old: Id, new: Id) -> Result<(), UndoError> {
        let note = || {
            let flags = libc::O_WRONLY | libc::O_CREAT;
            let fd = sys::open(&c_path(&self.path)?, flags, 0o600)?;
            // A torn entry of a kill is overwritten.
            let at = sys::fstat(fd.0)?.size / 32 * 32;
            let mut e = Encoder::new();
            e.id(&old).id(&new);
            sys::pwrite_all(fd.0, e.bytes().ok_or(libc::ENOMEM)?, at)
        };
        note().map_err(|e| failed("write", &self.path, e))?;
        self.map.insert(old, new);
        Ok(())
    }

    /// What an inode is now.
    pub fn resolve(&self, id: &Id) -> Id {
        let mut now = *id;
        // A chain never has a ring but by the reuse of numbers.
        for _ in 0..64 {
            match self.map.get(&now) {
                Some(next) if next != id => now = *next,
                _ => break,
            }
        }
        now
    }

    /// Is `present` the inode that was `wanted`?
    pub fn is(&self, present: &Id, wanted: &Id) -> bool {
        present == wanted || *present == self.resolve(wanted)
    }

    pub fn all(&self) -> BTreeMap<Id, Id> {
        self.map.keys().map(|id| (*id, self.resolve(id))).collect()
    }

    pub fn news(&self) -> BTreeSet<Id> {
        self.map.values().copied().collect()
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
