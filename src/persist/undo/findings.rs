//! What an undo has found out about changes of somebody else, on the disk, so that one that
//! was killed is gone on with and does not take its own work for somebody else's.
//!
//! `undo-foreign` in the job's directory goes with the last table; so does what was put
//! together of files that are gone (`remade-*`).

use super::state::read_file;
use super::{Fate, ForeignFile, UndoError, failed};
use crate::persist::format::{Decoder, Encoder};
use crate::persist::sys;
use crate::persist::table::c_path;
use crate::persist::{Id, Identity};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Of a file; others begin otherwise and are not read.
const MAGIC: &[u8] = b"ckptfnd1";
const TAG_FILE: u8 = 1;
const TAG_KEEP: u8 = 2;
const TAG_PLACE: u8 = 3;
const TAG_NEEDLESS: u8 = 4;
const TAG_TAKEN: u8 = 5;
const TAG_TIMES: u8 = 6;

const WHATS: [&str; 5] = ["changed", "replaced", "removed", "made", "moved"];

/// How a file is to be had again that is not where the program left it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// It is whole at this path of the store: made of what the tables keep.
    Built(Vec<u8>),
    /// It was moved there, and goes back to the name that the program left it under, before
    /// anything is undone.
    Early(Vec<u8>),
    /// The same where the program has used that name for another since: it goes back when all
    /// else is undone.
    Moved(Vec<u8>),
    /// It was moved there, and stays (`CKPT_FOREIGN=keep`).
    Stays(Vec<u8>),
}

/// A file that gets its place when all else is undone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// As that table calls it.
    pub inode: Identity,
    pub table: u64,
    /// Its name at the generation, or now (`Early`).
    pub path: Vec<u8>,
    pub source: Source,
}

/// What was found out about changes of somebody else.
#[derive(Debug, Default)]
pub struct Findings {
    pub files: Vec<ForeignFile>,
    /// Inodes to leave alone (`CKPT_FOREIGN=keep`).
    pub keep: BTreeSet<Id>,
    pub places: Vec<Place>,
    /// Inodes that are gone and were not there at the generation: by table.
    pub needless: Vec<(Identity, u64)>,
    /// Names, at the generation, for which what somebody else has put there is taken.
    pub taken: BTreeSet<Vec<u8>>,
    /// Directories that files are being placed in: their access and modification times.
    pub times: BTreeMap<Vec<u8>, (i64, i64)>,
}

fn file_path(job_dir: &Path) -> PathBuf {
    job_dir.join("undo-foreign")
}

fn path_of(bytes: Vec<u8>) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(&bytes))
}

fn identity(d: &mut Decoder) -> Option<Identity> {
    Some(Identity {
        id: d.id()?,
        birth: d.u64()?,
    })
}

impl Findings {
    /// Of an undo to this generation. One to another has found files missing as well, but as
    /// they were then: what is to become of them must be found out again, so this is not
    /// `current`.
    pub fn load(job_dir: &Path, generation: u64) -> Result<(Findings, bool), UndoError> {
        let path = file_path(job_dir);
        let bytes = read_file(&path)?;
        let mut findings = Findings::default();
        let Some(rest) = bytes.strip_prefix(MAGIC) else {
            return Ok((findings, bytes.is_empty()));
        };
        let mut d = Decoder(rest);
        let current = d.u64() == Some(generation);
        while !d.0.is_empty() {
            if findings.entry(&mut d).is_none() {
                return Err(UndoError::Damaged(path));
            }
        }
        if !current {
            findings.places.clear();
            findings.needless.clear();
            findings.taken.clear();
            findings.times.clear();
        }
        Ok((findings, current))
    }

    fn entry(&mut self, d: &mut Decoder) -> Option<()> {
        match d.u8()? {
            TAG_FILE => {
                let what = *WHATS.get(usize::from(d.u8()?))?;
                let path = path_of(d.text()?);
                let aside = d.text()?;
                let (fate, other) = (d.u8()?, d.text()?);
                self.files.push(ForeignFile {
                    path,
                    aside: (!aside.is_empty()).then(|| path_of(aside)),
                    what,
                    fate: match fate {
                        1 => Fate::Again,
                        2 => Fate::Back(path_of(other)),
                        3 => Fate::Followed(path_of(other)),
                        _ => Fate::Plain,
                    },
                });
            }
            TAG_KEEP => drop(self.keep.insert(d.id()?)),
            TAG_PLACE => {
                let (inode, table, path) = (identity(d)?, d.u64()?, d.text()?);
                let (kind, text) = (d.u8()?, d.text()?);
                self.places.push(Place {
                    inode,
                    table,
                    path,
                    source: match kind {
                        0 => Source::Built(text),
                        1 => Source::Moved(text),
                        3 => Source::Early(text),
                        _ => Source::Stays(text),
                    },
                });
            }
            TAG_TIMES => {
                let (dir, atime, mtime) = (d.text()?, d.u64()?, d.u64()?);
                self.times.insert(dir, (atime as i64, mtime as i64));
            }
            TAG_TAKEN => drop(self.taken.insert(d.text()?)),
            TAG_NEEDLESS => self.needless.push((identity(d)?, d.u64()?)),
            _ => return None,
        }
        Some(())
    }

    /// One that is killed in it has written all or nothing.
    pub fn save(&self, job_dir: &Path, generation: u64) -> Result<(), UndoError> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(generation.to_le_bytes());
        let mut e = Encoder::new();
        let mut add = |e: &Encoder| bytes.extend(e.bytes().unwrap_or_default());
        for file in &self.files {
            let what = WHATS.iter().position(|w| *w == file.what).unwrap_or(0);
            let aside = file.aside.as_deref().unwrap_or(Path::new(""));
            let (fate, other) = match &file.fate {
                Fate::Plain => (0, Path::new("")),
                Fate::Again => (1, Path::new("")),
                Fate::Back(from) => (2, from.as_path()),
                Fate::Followed(to) => (3, to.as_path()),
            };
            e.begin(TAG_FILE).u8(what as u8);
            e.text(file.path.as_os_str().as_bytes());
            e.text(aside.as_os_str().as_bytes());
            e.u8(fate).text(other.as_os_str().as_bytes());
            add(&e);
        }
        for id in &self.keep {
            e.begin(TAG_KEEP).id(id);
            add(&e);
        }
        for place in &self.places {
            let (kind, text) = match &place.source {
                Source::Built(at) => (0, at),
                Source::Moved(at) => (1, at),
                Source::Early(at) => (3, at),
                Source::Stays(at) => (2, at),
            };
            e.begin(TAG_PLACE).id(&place.inode.id);
            e.u64(place.inode.birth).u64(place.table).text(&place.path);
            e.u8(kind).text(text);
            add(&e);
        }
        for (inode, table) in &self.needless {
            e.begin(TAG_NEEDLESS).id(&inode.id);
            e.u64(inode.birth).u64(*table);
            add(&e);
        }
        for (dir, (atime, mtime)) in &self.times {
            e.begin(TAG_TIMES).text(dir);
            e.u64(*atime as u64).u64(*mtime as u64);
            add(&e);
        }
        for path in &self.taken {
            e.begin(TAG_TAKEN).text(path);
            add(&e);
        }
        let path = file_path(job_dir);
        let new = job_dir.join("undo-foreign.new");
        let write = || {
            let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC;
            let fd = sys::open(&c_path(&new)?, flags, 0o600)?;
            sys::pwrite_all(fd.0, &bytes, 0)?;
            sys::fdatasync(fd.0)?;
            sys::rename(&c_path(&new)?, &c_path(&path)?, 0)
        };
        write().map_err(|e| failed("write", &path, e))
    }

    /// With what was put together for files that have their places by now.
    pub fn remove(&self, job_dir: &Path) {
        if let Ok(path) = c_path(&file_path(job_dir)) {
            let _ = sys::unlink(&path);
        }
        for place in &self.places {
            if let Source::Built(at) = &place.source
                && let Ok(at) = sys::CPath::new(&[at])
            {
                let _ = sys::unlink(&at);
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
            && self.keep.is_empty()
            && self.places.is_empty()
            && self.needless.is_empty()
    }

    /// Where files are that stay where somebody else has moved them or put another.
    pub fn moved(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let stays = self.places.iter().filter_map(|place| match &place.source {
            Source::Stays(at) => Some((place.path.clone(), at.clone())),
            _ => None,
        });
        let taken = self.taken.iter().map(|path| (path.clone(), path.clone()));
        stays.chain(taken).collect()
    }

    /// A finding is told once, however often it was found.
    pub fn add(&mut self, file: ForeignFile) {
        let same = |f: &&mut ForeignFile| f.path == file.path && f.what == file.what;
        match self.files.iter_mut().find(same) {
            Some(known) => *known = file,
            None => self.files.push(file),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_is_read_as_it_was_written() {
        let dir = std::env::temp_dir().join(format!("ckpt-findings-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).unwrap();
        let inode = Identity {
            id: Id { dev: 1, ino: 2 },
            birth: 3,
        };
        let file = |what, aside: Option<&str>, fate| ForeignFile {
            path: "/a b/c\n".into(),
            aside: aside.map(PathBuf::from),
            what,
            fate,
        };
        let place = |source| Place {
            inode,
            table: 9,
            path: b"/p".to_vec(),
            source,
        };
        let findings = Findings {
            files: vec![
                file("changed", Some("/aside"), Fate::Plain),
                file("removed", None, Fate::Again),
                file("moved", None, Fate::Back("/from".into())),
                file("moved", None, Fate::Followed("/to".into())),
            ],
            keep: [Id { dev: 4, ino: 5 }].into(),
            places: vec![
                place(Source::Built(b"/store/x".to_vec())),
                place(Source::Moved(b"/q".to_vec())),
                place(Source::Early(b"/q".to_vec())),
                place(Source::Stays(b"/q".to_vec())),
            ],
            needless: vec![(inode, 7)],
            taken: [b"/t".to_vec()].into(),
            times: [(b"/d".to_vec(), (-1, 2))].into(),
        };
        assert!(Findings::load(&dir, 6).unwrap().1, "there is none");
        findings.save(&dir, 6).unwrap();
        let (read, current) = Findings::load(&dir, 6).unwrap();
        assert!(current);
        assert_eq!(read.files, findings.files);
        assert_eq!(read.keep, findings.keep);
        assert_eq!(read.places, findings.places);
        assert_eq!(read.needless, findings.needless);
        assert_eq!(read.taken, findings.taken);
        assert_eq!(read.times, findings.times);
        // What is to become of files is another matter for another generation.
        let (read, current) = Findings::load(&dir, 5).unwrap();
        assert!(!current && read.places.is_empty() && read.needless.is_empty());
        assert_eq!(read.keep, findings.keep);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
