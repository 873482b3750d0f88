//! Files that somebody else has removed, replaced or moved get their places back.
//!
//! Before anything is undone a file that is gone is put together in the store, of what the
//! tables keep: they go one by one. What the tables say of it is left out then, since it is
//! whole as it was at the generation. When all else is undone, and with it what the program
//! itself did to names, it gets its name; a file that was moved is moved back. What is there
//! instead is somebody else's and is put aside.

use super::apply::{Undoer, as_path, c, on};
use super::findings::{Place, Source};
use super::inode::zero;
use super::lost::{BESIDE, Lost, RowAt, under};
use super::record::split;
use super::tree::{create, dress};
use super::{Fate, ForeignFile, UndoError};
use crate::persist::sys::{self, CPath, Fd};
use crate::persist::table::{self, Name, Record, Table, Xattrs};
use crate::persist::{Id, Identity, Stat, kept};

/// A table's number no undo is at: for names that are used for a moment.
const PLACING: u32 = u32::MAX;

impl Undoer<'_, '_> {
    /// The entry about an inode, as the table being undone calls it.
    fn place_of(&self, inode: &Identity) -> Option<&Place> {
        let now = self.replaced.resolve(inode);
        let places = self.findings.places.iter();
        let mut places = places.filter(|p| !matches!(p.source, Source::Early(_)));
        places.find(|p| self.replaced.follow(&p.inode, p.table).is(&now))
    }

    /// Is what the records say of this inode to be left out: because it is put together
    /// already, or was not there at the generation?
    pub fn is_left_out(&self, inode: &Identity) -> bool {
        let now = self.replaced.resolve(inode);
        let mut needless = self.findings.needless.iter();
        needless.any(|(inode, table)| self.replaced.follow(inode, *table).is(&now))
            || matches!(self.place_of(inode), Some(place) if matches!(place.source, Source::Built(_)))
    }

    /// Does somebody else's change decide where this inode is?
    pub fn is_placed(&self, inode: &Identity) -> bool {
        self.place_of(inode).is_some() || self.is_left_out(inode)
    }

    /// Where an inode was moved to by somebody else.
    pub fn moved_to(&self, inode: &Identity) -> Option<Vec<u8>> {
        match &self.place_of(inode)?.source {
            Source::Moved(at) | Source::Stays(at) => Some(at.clone()),
            Source::Built(_) | Source::Early(_) => None,
        }
    }

    /// Does this inode wait for its place where it is?
    pub fn waits(&self, id: &Id) -> bool {
        let mut places = self.findings.places.iter();
        places.any(|place| {
            let waits = matches!(place.source, Source::Moved(_) | Source::Stays(_));
            waits && self.replaced.follow(&place.inode, place.table).id == *id
        })
    }

    /// A directory was moved back: what waits in it is found there.
    pub fn shift_places(&mut self, from: &[u8], to: &[u8]) -> Result<(), UndoError> {
        let mut shifted = false;
        for place in &mut self.findings.places {
            let (Source::Moved(at) | Source::Stays(at)) = &mut place.source else {
                continue;
            };
            if let Some(now) = under(at, from, to).filter(|now| exists(now)) {
                *at = now;
                shifted = true;
            }
        }
        match shifted {
            true => self.save_findings(),
            false => Ok(()),
        }
    }

    /// Nothing is undone yet: files that were moved get the names that the program left them
    /// under, so that they go back like all others.
    pub fn place_early(&mut self) -> Result<(), UndoError> {
        for place in self.findings.places.clone() {
            if let Source::Early(at) = &place.source {
                let now = self.replaced.follow(&place.inode, place.table);
                let at = self.where_is(&now, at, &place.path);
                self.place(&place, &at, false)?;
            }
        }
        // From here on they are files like all others.
        let all = self.findings.places.len();
        let late = |place: &Place| !matches!(place.source, Source::Early(_));
        self.findings.places.retain(late);
        self.findings.times.clear();
        match all == self.findings.places.len() {
            true => Ok(()),
            false => self.save_findings(),
        }
    }

    /// Puts a lost file together in the store, as it was at the generation.
    pub fn build(&mut self, tables: &[Table], lost: &Lost) -> Result<Vec<u8>, UndoError> {
        let at = self.built_path(lost);
        self.step("save", &as_path(&lost.path))?;
        let rows = self.rows_of(tables, &lost.inode, lost.table);
        let path = c(&at)?;
        let _ = sys::unlink(&path);
        let made = create(&path).and_then(|()| sys::open(&path, libc::O_RDWR, 0));
        let file = on(made, "make", &at)?;
        let mut xattrs = Xattrs::new();
        for row in &rows {
            if let Some(table) = tables.get(row.at) {
                self.fill(table, row, &file, &at, &mut xattrs)?;
            }
        }
        xattrs.retain(|(_, value)| !value.is_empty());
        let done = sys::ftruncate(file.0, lost.stat.size)
            .and_then(|()| dress(&path, &lost.stat, &xattrs))
            .and_then(|()| sys::fdatasync(file.0));
        on(done, "make", &at)?;
        Ok(at)
    }

    /// Blocks and attributes as one table keeps them; an older table's come later.
    fn fill(
        &self,
        table: &Table,
        of: &RowAt,
        to: &Fd,
        at: &[u8],
        xattrs: &mut Xattrs,
    ) -> Result<(), UndoError> {
        let path = table::shadow_path(self.job_dir, table.file.seq);
        let damaged = || UndoError::Damaged(path.clone());
        let from = table::c_path(&path).and_then(|p| sys::open(&p, libc::O_RDONLY, 0));
        let from = from.ok();
        for (_, record) in &table.records {
            match record {
                Record::Blocks {
                    row,
                    offset,
                    len,
                    shadow,
                } if *row == of.row => {
                    // A hole in the shadow file is one here, too.
                    let grown = sys::fstat(to.0).and_then(|now| {
                        sys::ftruncate(to.0, now.size.max(offset + len))?;
                        zero(to.0, *offset, *len)
                    });
                    on(grown, "write", at)?;
                    let Some(start) = shadow else { continue };
                    let from = from.as_ref().ok_or_else(damaged)?;
                    let end = start + len;
                    if sys::fstat(from.0).is_ok_and(|s| s.size < end) {
                        return Err(damaged());
                    }
                    let copied = sys::copy_sparse(from.0, *start, end, to.0, *offset);
                    on(copied, "write", at)?;
                }
                Record::Xattr { row, name, value } if *row == of.row => {
                    xattrs.retain(|(known, _)| known != name);
                    xattrs.push((name.clone(), value.clone().unwrap_or_default()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// All else is undone: what was moved goes back, what is gone is made again.
    pub fn place_all(&mut self) -> Result<(), UndoError> {
        let places = self.findings.places.clone();
        // Those that were moved first: one may be where another is to be made.
        for place in &places {
            if let Source::Moved(at) = &place.source {
                let now = self.replaced.follow(&place.inode, place.table);
                let at = self.where_is(&now, at, &place.path);
                self.place(place, &at, false)?;
            }
        }
        for place in &places {
            if let Source::Built(at) = &place.source {
                self.place(place, at, true)?;
            }
        }
        Ok(())
    }

    /// Where an inode that was moved is by now: it may have made room for another.
    fn where_is(&self, inode: &Identity, at: &[u8], path: &[u8]) -> Vec<u8> {
        let there = CPath::new(&[at]).and_then(|at| self.lstat(&at));
        if there.is_ok_and(|stat| stat.identity().is(inode)) {
            return at.to_vec();
        }
        let beside = self.look_beside(at, inode);
        let found = beside.or_else(|| self.look_beside(path, inode));
        found.unwrap_or_else(|| at.to_vec())
    }

    fn place(&mut self, place: &Place, at: &[u8], build: bool) -> Result<(), UndoError> {
        let now = self.replaced.follow(&place.inode, place.table);
        let path = c(&place.path)?;
        let there = self.lstat(&path);
        let (dir, name) = split(&place.path);
        if matches!(&there, Ok(stat) if now.is(&stat.identity())) {
            return self.times_of_directories();
        }
        let like = on(sys::lstat(&c(at)?), "look at", at)?;
        self.make_directory(dir, &like)?;
        self.remember_times(dir)?;
        if !build {
            self.remember_times(split(at).0)?;
        }
        if let Ok(there) = there
            && !self.give_way(place, at, &there)?
        {
            return self.times_of_directories();
        }
        if build {
            let (id, birth) = (place.inode.id, place.inode.birth);
            let stat = Stat { id, birth, ..like };
            let mut xattrs = Xattrs::new();
            let read = kept::each_xattr(&c(at)?, |name, value| {
                xattrs.push((name.to_vec(), value.to_vec()));
            });
            on(read, "look at", at)?;
            let name = Name {
                dir: Id::default(),
                dir_path: dir.to_vec(),
                name: name.to_vec(),
            };
            let table = std::mem::replace(&mut self.replaced.table, place.table);
            let beside = (PLACING, place.inode.id.ino as usize);
            let made = self.make_anew(beside, &name, &stat, Some(at), None, &xattrs);
            self.replaced.table = table;
            made?;
        } else {
            self.step("move back", &as_path(&place.path))?;
            self.tell_move(at, &place.path, false)?;
            on(sys::rename(&c(at)?, &path, 0), "move back", &place.path)?;
        }
        self.times_of_directories()
    }

    /// What is in the place of a file makes room. True: the place is free; false: the file is
    /// there already.
    fn give_way(&mut self, place: &Place, at: &[u8], there: &Stat) -> Result<bool, UndoError> {
        let path = c(&place.path)?;
        let mut moved = self.findings.places.iter();
        let other = moved.any(|other| {
            matches!(other.source, Source::Moved(_) | Source::Early(_))
                && self
                    .replaced
                    .follow(&other.inode, other.table)
                    .is(&there.identity())
        });
        if other && matches!(place.source, Source::Moved(_) | Source::Early(_)) {
            // Two that have changed places, or three.
            self.step("move back", &as_path(&place.path))?;
            self.tell_move(at, &place.path, true)?;
            let done = sys::rename(&c(at)?, &path, libc::RENAME_EXCHANGE);
            return on(done, "move back", &place.path).map(|()| false);
        }
        let aside = match there.mode & libc::S_IFMT {
            libc::S_IFDIR => return on(Err(libc::EISDIR), "put back", &place.path),
            libc::S_IFREG if there.size > 0 => Some(self.put_aside(&place.path, there)?),
            _ => None,
        };
        if let Some(aside) = aside {
            let about = |f: &&mut ForeignFile| f.path == as_path(&place.path);
            if let Some(file) = self.findings.files.iter_mut().find(about) {
                file.aside = Some(as_path(&aside));
            }
            self.save_findings()?;
        }
        self.step("remove", &as_path(&place.path))?;
        self.tell_name(&place.path, |session, name| {
            session.before_remove(name, there)
        })?;
        on(sys::unlink(&path), "remove", &place.path)?;
        Ok(true)
    }

    /// Makes a directory that is missing, with those above it. `like`: a file in it.
    pub fn make_directory(&mut self, dir: &[u8], like: &Stat) -> Result<(), UndoError> {
        if sys::stat(&c(dir)?).is_ok() || dir == b"/" {
            return Ok(());
        }
        let (above, name) = split(dir);
        self.make_directory(above, like)?;
        let name = Name {
            dir: Id::default(),
            dir_path: above.to_vec(),
            name: name.to_vec(),
        };
        let now = sys::realtime_ns();
        let known = self.directories.get(dir).copied();
        let (stat, number) = known.unwrap_or_else(|| {
            let stat = Stat {
                // Open to those who could read the file.
                mode: libc::S_IFDIR | 0o700 | ((like.mode & 0o044) / 4 * 5),
                uid: like.uid,
                gid: like.gid,
                nlink: 2,
                atime_ns: now,
                mtime_ns: now,
                ..Stat::default()
            };
            (stat, self.replaced.table)
        });
        let table = std::mem::replace(&mut self.replaced.table, number);
        let beside = (PLACING, self.findings.files.len());
        let made = self.make_anew(beside, &name, &stat, None, None, &Xattrs::new());
        self.replaced.table = table;
        made?;
        self.findings.add(ForeignFile {
            path: as_path(dir),
            aside: None,
            what: "removed",
            fate: Fate::Again,
        });
        self.save_findings()
    }

    fn remember_times(&mut self, dir: &[u8]) -> Result<(), UndoError> {
        if self.findings.times.contains_key(dir) {
            return Ok(());
        }
        let before = on(sys::stat(&c(dir)?), "look at", dir)?;
        let times = (before.atime_ns, before.mtime_ns);
        self.findings.times.insert(dir.to_vec(), times);
        self.save_findings()
    }

    /// What was done here to directories' names is nobody's modification.
    fn times_of_directories(&mut self) -> Result<(), UndoError> {
        for (dir, (atime, mtime)) in self.findings.times.clone() {
            self.step("set the times of", &as_path(&dir))?;
            match sys::set_times(&c(&dir)?, atime, mtime) {
                Err(libc::EPERM) | Err(libc::EACCES) => {}
                other => on(other, "set the times of", &dir)?,
            }
        }
        Ok(())
    }

    pub fn save_findings(&mut self) -> Result<(), UndoError> {
        // A recorded return that is killed is taken back, not gone on with.
        if self.recorded {
            return Ok(());
        }
        self.findings.save(self.job_dir, self.generation)
    }
}

fn exists(path: &[u8]) -> bool {
    CPath::new(&[path]).is_ok_and(|path| sys::lstat(&path).is_ok())
}

/// A name that an undo uses for a moment.
pub fn beside(mark: (u32, usize)) -> Vec<u8> {
    let (seq, k) = mark;
    [BESIDE, format!("{seq}-{k}").as_bytes()].concat()
}
