//! Names: made, removed, moved. What loses one is kept.
//!
//! In the program's threads inside hooks, under the recorder's lock.

use super::{Session, with_room};
use crate::persist::format::{
    KEPT_LINK, TAG_ABSENT, TAG_BORN, TAG_CANCELLED, TAG_GONE, TAG_REMOVED_DIR, TAG_RENAMED,
};
use crate::persist::index::{Node, Row};
use crate::persist::kept::{self, each_xattr};
use crate::persist::sys::{self, CPath, Sys};
use crate::persist::{FileRef, Id, NameRef, Stat, TIMES, exclude};

impl Session {
    /// A directory's entries are about to change: its times.
    fn directory(&mut self, dir: &Id, path: &[u8]) {
        match self.inner.index.node(dir) {
            Some(Node::Born { .. } | Node::Excluded) => return,
            Some(Node::Row(row)) if row.which & TIMES != 0 => return,
            _ => {}
        }
        match CPath::new(&[path]).and_then(|p| sys::stat(&p)) {
            Ok(stat) if stat.id == *dir => {
                let file = FileRef {
                    stat: &stat,
                    path,
                    fd: None,
                    any_fd: None,
                };
                self.ensure_row(&file, TIMES);
            }
            Ok(_) => self.inner.failed(path, libc::ESTALE),
            Err(e) => self.inner.failed(path, e),
        }
    }

    /// Is the name left alone, by its path?
    fn name_excluded(&self, name: &NameRef) -> bool {
        match CPath::join(name.dir_path, name.name) {
            Ok(path) => exclude::is_excluded(path.bytes()),
            Err(_) => false,
        }
    }

    /// A name that is absent is about to be created (open, mkdir, mknod, symlink, link).
    pub fn before_create(&mut self, name: &NameRef) {
        with_room(|| self.create_begins(name))
    }

    fn create_begins(&mut self, name: &NameRef) {
        if self.inner.index.is_born(&name.dir) || self.name_excluded(name) {
            return;
        }
        self.directory(&name.dir, name.dir_path);
        self.absent(name);
        self.inner.writer.sync();
    }

    fn absent(&mut self, name: &NameRef) {
        let inner = &mut *self.inner;
        if inner.index.is_born(&name.dir) || inner.index.is_covered(&name.dir, name.name) {
            return;
        }
        let e = inner.scratch.begin(TAG_ABSENT);
        e.name(&name.dir, name.dir_path, name.name);
        if inner.commit() {
            inner.index.cover(&name.dir, name.name);
        }
    }

    /// `target` is about to get the new name `name` (which is absent): instead of
    /// `before_create` for link and linkat.
    pub fn before_link(&mut self, target: &FileRef, name: &NameRef) {
        with_room(|| self.link_begins(target, name))
    }

    fn link_begins(&mut self, target: &FileRef, name: &NameRef) {
        // The row tells an undo what this inode was called.
        let existed = self.ensure_row(target, 0);
        self.may_leave(target.stat, name);
        if existed && self.name_excluded(name) {
            self.inner.strays(&target.stat.id, name.name);
            // What is taken back has no other names than it had, wherever they are.
            self.absent(name);
            self.inner.writer.sync();
        } else {
            self.create_begins(name);
        }
    }

    /// The inode that an operation has just made (also O_TMPFILE, also after mkdir).
    pub fn created(&mut self, id: Id, is_dir: bool) {
        let inner = &mut *self.inner;
        let was_dir = match inner.index.node(&id) {
            // A number that is used again: a program that makes and removes a file over and
            // over. The record that stands says as much, unless an undo must tell this
            // inode from a directory of this number, whose removal is recorded.
            Some(Node::Born { was_dir: false }) if !is_dir => return,
            Some(Node::Born { was_dir }) => was_dir,
            _ => false,
        };
        let was_dir = was_dir || is_dir;
        inner.index.set_born(&id, was_dir);
        inner.scratch.begin(TAG_BORN).id(&id);
        with_room(|| inner.commit());
    }

    /// Is what has this name, where files are left alone, an inode that existed and is recorded? The
    /// number of a removed directory may be another inode's by now.
    fn is_followed(&self, stat: &Stat, name: &NameRef) -> bool {
        let made = || sys::made_ns(&CPath::join(name.dir_path, name.name).ok()?);
        self.has_row(&stat.id) && made().is_none_or(|made| made <= self.inner.began_ns)
    }

    /// A name is about to be removed (unlink, rmdir).
    pub fn before_remove(&mut self, name: &NameRef, stat: &Stat) {
        with_room(|| self.remove_begins(name, stat))
    }

    fn remove_begins(&mut self, name: &NameRef, stat: &Stat) {
        let excluded = self.name_excluded(name);
        if excluded && !self.is_followed(stat, name) {
            return;
        }
        self.inner.operation = self.inner.writer.log_pos;
        if !excluded {
            self.directory(&name.dir, name.dir_path);
        }
        self.gone(name, stat);
        self.inner.writer.sync();
    }

    /// The removal or renaming that was told last in this session has failed: names
    /// are what they were.
    pub fn failed(&mut self) {
        let inner = &mut *self.inner;
        if inner.operation != 0 && inner.operation != inner.writer.log_pos {
            inner.scratch.begin(TAG_CANCELLED).u64(inner.operation);
            with_room(|| inner.commit());
        }
        inner.operation = 0;
    }

    /// Keeps the inode that `name` leads to, if it existed.
    fn gone(&mut self, name: &NameRef, stat: &Stat) {
        // A directory that was made since may have been on the way of what was not.
        if self.inner.index.is_born(&stat.id) && !stat.is_dir() {
            return;
        }
        if let Err(e) = self.try_gone(name, stat) {
            let path = CPath::join(name.dir_path, name.name);
            let path = path.as_ref().map_or(name.name, CPath::bytes);
            match e {
                libc::EPERM => self.inner.incomplete(
                    path,
                    b"it belongs to somebody else and could not be made again",
                ),
                e => self.inner.failed(path, e),
            }
        }
        if let Some(row) = self.inner.index.row_mut(&stat.id) {
            row.path_known = false;
        }
    }

    fn try_gone(&mut self, name: &NameRef, stat: &Stat) -> Sys<()> {
        let inner = &mut *self.inner;
        let path = CPath::join(name.dir_path, name.name)?;
        let mut text = [0u8; sys::PATH_LEN];
        if stat.is_dir() && !kept::may_own(stat) {
            return Err(libc::EPERM);
        }
        let with_xattrs = if stat.is_dir() {
            let e = inner.scratch.begin(TAG_REMOVED_DIR);
            e.name(&name.dir, name.dir_path, name.name).stat(stat);
            true
        } else {
            let keep = kept::keep(&mut inner.writer, &path, stat, &mut text)?;
            let e = inner.scratch.begin(TAG_GONE);
            e.name(&name.dir, name.dir_path, name.name).stat(stat);
            e.u8(keep.kind).text(keep.text);
            keep.kind != KEPT_LINK
        };
        let mut count = 0;
        if with_xattrs {
            each_xattr(&path, |_, _| count += 1)?;
        }
        inner.scratch.u32(count);
        if count > 0 {
            let scratch = &mut inner.scratch;
            each_xattr(&path, |name, value| {
                scratch.text(name).text(value);
            })?;
        }
        // A link in the store keeps the number from being used again.
        let birth = match with_xattrs {
            true => inner.birth(stat, &path),
            false => stat.birth,
        };
        inner.scratch.u64(birth);
        if inner.commit() {
            inner.index.cover(&name.dir, name.name);
        }
        // What was done to it is to be undone where it lives on.
        let lives_on = |row: &Row| row.nlink0 > 1;
        if with_xattrs && !stat.is_dir() && inner.index.row(&stat.id).is_some_and(lives_on) {
            inner.incomplete(path.bytes(), b"its other names are not known");
        }
        Ok(())
    }

    /// `from` is about to be renamed to `to`, whose present inode is `to_stat`.
    pub fn before_rename(
        &mut self,
        from: &NameRef,
        from_stat: &Stat,
        to: &NameRef,
        to_stat: Option<&Stat>,
        exchange: bool,
    ) {
        with_room(|| self.rename_begins(from, from_stat, to, to_stat, exchange));
    }

    fn rename_begins(
        &mut self,
        from: &NameRef,
        from_stat: &Stat,
        to: &NameRef,
        to_stat: Option<&Stat>,
        exchange: bool,
    ) {
        if to_stat.is_some_and(|t| t.id == from_stat.id) {
            return;
        }
        let outside = (self.name_excluded(from), self.name_excluded(to));
        // What has a row is followed wherever it goes.
        let from_counts = !outside.0 || self.is_followed(from_stat, from);
        let to_counts = !outside.1 || to_stat.is_some_and(|t| self.is_followed(t, to));
        if !from_counts && !to_counts {
            return;
        }
        self.inner.operation = self.inner.writer.log_pos;
        if !outside.0 {
            self.directory(&from.dir, from.dir_path);
        }
        if !outside.1 {
            self.directory(&to.dir, to.dir_path);
        }
        self.crosses(from, from_stat, to, outside);
        let other = to_stat.filter(|_| exchange);
        if let Some(other) = other {
            self.crosses(to, other, from, (outside.1, outside.0));
        }
        if from_counts {
            self.joins(from, from_stat, &to.dir);
        }
        if let Some(other) = other.filter(|_| to_counts) {
            self.joins(to, other, &from.dir);
        }
        let index = &self.inner.index;
        let matters = |s: &Stat| s.is_dir() || !index.is_born(&s.id);
        let moves = matters(from_stat);
        let either = moves || other.is_some_and(matters);
        if moves {
            self.may_leave(from_stat, to);
        }
        if let Some(other) = other {
            self.may_leave(other, from);
            // XFS changes the times of the directories themselves.
            self.exchanged(from, from_stat);
            self.exchanged(to, other);
            if either {
                self.renamed(from, to, from_stat, Some(other));
            }
        } else {
            match to_stat {
                Some(stat) if to_counts => self.gone(to, stat),
                None if !outside.1 => self.absent(to),
                _ => {}
            }
            if moves {
                self.renamed(from, to, from_stat, None);
            }
        }
        self.inner.writer.sync();
    }

    /// What is at `name` is about to be moved to `to`, maybe over the border of what is left alone.
    fn crosses(
        &mut self,
        name: &NameRef,
        stat: &Stat,
        to: &NameRef,
        (from_outside, to_outside): (bool, bool),
    ) {
        if stat.is_dir() && (from_outside == to_outside || self.inner.index.is_born(&stat.id)) {
            return self.moves_files(name, stat, to);
        }
        let leaves = stat.is_dir() && to_outside;
        if from_outside == to_outside || !leaves && self.inner.index.node(&stat.id).is_some() {
            return;
        }
        let Ok(path) = CPath::join(name.dir_path, name.name) else {
            return;
        };
        if from_outside {
            // What was made there since the table began has no record of it.
            if sys::made_ns(&path).is_some_and(|made| made > self.inner.began_ns) {
                self.created(stat.id, stat.is_dir());
            }
        } else if stat.is_dir() {
            // What is done to the files in it, there, is not seen.
            let reason = b"a directory was moved to where files are left alone";
            self.inner.incomplete(path.bytes(), reason);
        } else {
            let file = FileRef {
                stat,
                path: path.bytes(),
                fd: None,
                any_fd: None,
            };
            if self.ensure_row(&file, 0) {
                self.inner.strays(&stat.id, path.bytes());
            }
        }
    }

    /// A directory is about to be moved, and with it what it holds.
    fn moves_files(&mut self, name: &NameRef, stat: &Stat, to: &NameRef) {
        // What was made since goes with it; single files that existed have rows (`joins`).
        if self.inner.index.is_born(&stat.id) && !self.inner.index.holds_old {
            return;
        }
        let path = CPath::join(name.dir_path, name.name);
        let Ok((path, to)) = path.and_then(|path| Ok((path, CPath::join(to.dir_path, to.name)?)))
        else {
            return;
        };
        if exclude::excludes_more_below(path.bytes(), to.bytes()) {
            let reason = b"a directory was moved, and other files in it are left alone there";
            self.inner.incomplete(path.bytes(), reason);
        }
    }

    /// What is at `name` is about to be moved into a directory, which may be one that was made since
    /// and will be moved on to where files are left alone.
    fn joins(&mut self, name: &NameRef, stat: &Stat, dir: &Id) {
        let index = &mut self.inner.index;
        if !index.is_born(dir) || index.is_born(&stat.id) || exclude::count() == 0 {
            return;
        }
        if stat.is_dir() {
            index.holds_old = true;
        } else if let Ok(path) = CPath::join(name.dir_path, name.name) {
            let file = FileRef {
                stat,
                path: path.bytes(),
                fd: None,
                any_fd: None,
            };
            if self.ensure_row(&file, 0) {
                self.inner.strays(&stat.id, path.bytes());
            }
        }
    }

    /// Can what gets this name be taken away again?
    fn may_leave(&mut self, stat: &Stat, name: &NameRef) {
        if !kept::may_leave(stat, name.dir_path)
            && let Ok(path) = CPath::join(name.dir_path, name.name)
        {
            let reason = b"what is somebody else's cannot be moved out of this directory again";
            self.inner.incomplete(path.bytes(), reason);
        }
    }

    fn exchanged(&mut self, name: &NameRef, stat: &Stat) {
        if stat.is_dir()
            && let Ok(path) = CPath::join(name.dir_path, name.name)
        {
            self.directory(&stat.id, path.bytes());
        }
    }

    fn renamed(&mut self, from: &NameRef, to: &NameRef, stat: &Stat, other: Option<&Stat>) {
        let inner = &mut *self.inner;
        let mut births = [(0, false); 2];
        let moved = [Some((from, stat)), other.map(|other| (to, other))];
        for (place, (name, stat)) in births.iter_mut().zip(moved.into_iter().flatten()) {
            let path = CPath::join(name.dir_path, name.name);
            let birth = path.map_or(0, |path| inner.birth(stat, &path));
            *place = (birth, inner.index.is_born(&stat.id));
        }
        let e = inner.scratch.begin(TAG_RENAMED);
        e.name(&from.dir, from.dir_path, from.name);
        e.name(&to.dir, to.dir_path, to.name).id(&stat.id);
        match other {
            Some(other) => e.u8(1).id(&other.id),
            None => e.u8(0),
        };
        let count = 1 + usize::from(other.is_some());
        for (birth, born) in births.iter().take(count) {
            e.u64(*birth).u8(u8::from(*born));
        }
        if inner.commit() {
            inner.index.cover(&from.dir, from.name);
            inner.index.cover(&to.dir, to.name);
        }
    }
}
