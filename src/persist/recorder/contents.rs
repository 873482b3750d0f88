//! What an inode is: its row, the pre-images of its blocks, its attributes.
//!
//! In the program's threads inside hooks, under the recorder's lock.

use super::{Session, errno_text, path_of, with_room};
use crate::persist::exclude;
use crate::persist::format::{TAG_INCOMPLETE, TAG_INODE, TAG_PATH, TAG_XATTR};
use crate::persist::index::{BLOCK, Node, Row};
use crate::persist::kept;
use crate::persist::shadow::Saving;
use crate::persist::sys::{self, CPath, Sys};
use crate::persist::{Coverage, FileRef, Id, MODE, OWNER, SIZE, TIMES, Which};

impl Session {
    /// Makes sure that the attributes `which` are recorded. `false`: nothing of this
    /// inode needs a record.
    pub(super) fn ensure_row(&mut self, file: &FileRef, which: Which) -> bool {
        let id = file.stat.id;
        let (old, path_known) = match self.inner.index.node(&id) {
            Some(Node::Born { .. } | Node::Excluded) => return false,
            Some(Node::Row(row)) => (Some((row.row, row.slot, row.which)), row.path_known),
            None => (None, true),
        };
        let missing = which & !old.map_or(0, |o| o.2);
        if old.is_some() && missing == 0 && path_known {
            return true;
        }
        if file.stat.nlink == 0 {
            // No name leads to it: it had none at the checkpoint either, or a copy of
            // it is kept.
            return false;
        }
        let mut buf = [0u8; sys::PATH_LEN];
        let path = path_of(file, &mut buf);
        let inner = &mut *self.inner;
        // Without a name by now, but kept.
        let kept = inner.returning && inner.writer.is_within(path);
        let (row, slot) = match old {
            Some((row, slot, _)) => (row, slot),
            None => {
                if !kept && exclude::is_excluded(path) && !inner.strays.contains_key(&id) {
                    inner.index.set_excluded(id);
                    return false;
                }
                let row = inner.writer.next_row;
                inner.writer.next_row += 1;
                let slot = inner.writer.take_slot();
                let mut new = Row::new(row, slot, file.stat.size, file.stat.nlink);
                new.birth = inner.birth_of_file(file, path);
                if !inner.index.set_row(id, new) {
                    inner.failed(path, libc::ENOMEM);
                    return false;
                }
                (row, slot)
            }
        };
        // What has no name but a kept link is found by that.
        let named = !kept && !path.is_empty() && !is_removed(path, &id);
        if kept {
            if let Err(e) = kept::keep_again(&mut inner.writer, path, &id) {
                inner.failed(path, e);
            }
        } else if !named {
            let fd = file.any_fd.or(file.fd).unwrap_or(-1);
            if kept::keep_unnamed(&mut inner.writer, fd, &id).is_err() {
                inner.incomplete(path, b"its other names are not known");
            }
        } else if !path_known {
            inner.scratch.begin(TAG_PATH).u32(row).text(path);
            inner.commit();
        }
        if old.is_none() || missing != 0 {
            let e = inner.scratch.begin(TAG_INODE);
            let path: &[u8] = if named { path } else { b"" };
            e.u32(row).u32(slot).u32(missing).stat(file.stat).text(path);
            let birth = inner.index.row(&id).map_or(0, |row| row.birth);
            inner.scratch.u64(birth);
            inner.commit();
        }
        if let Some(row) = inner.index.row_mut(&id) {
            row.which |= missing;
            row.path_known = (row.path_known && !kept) || named;
        }
        true
    }

    /// As `save`, of a file of the program's own too whose mode forbids to read it: its mode,
    /// recorded before, is lifted for the moment of opening.
    fn save_readable(&mut self, file: &FileRef, start: u64, end: u64) {
        let lifted = match (file.fd, file.any_fd) {
            (None, Some(fd)) if file.stat.mode & 0o400 == 0 => {
                self.open_lifted(file, fd, start, end)
            }
            _ => None,
        };
        match &lifted {
            Some(fd) => {
                let file = FileRef {
                    fd: Some(fd.0),
                    ..*file
                };
                self.save(&file, start, end);
            }
            None => self.save(file, start, end),
        }
    }

    fn open_lifted(&mut self, file: &FileRef, fd: i32, start: u64, end: u64) -> Option<sys::Fd> {
        let row = self.inner.index.row_mut(&file.stat.id)?;
        let end = end.min(row.size0);
        if row.all || start >= end {
            return None;
        }
        row.unsaved(start / BLOCK, end.div_ceil(BLOCK))?;
        if file.stat.uid != sys::effective_uid() || sys::has_capability(sys::CAP_DAC_OVERRIDE) {
            return None;
        }
        if !self.ensure_row(file, MODE) {
            return None;
        }
        self.inner.writer.sync();
        sys::fchmod(fd, file.stat.mode | 0o400).ok()?;
        let opened = sys::reopen_high(fd, libc::O_RDONLY);
        // What it was: nobody else may change it, but by the same user's programs.
        let _ = sys::fchmod(fd, file.stat.mode);
        opened.ok()
    }

    /// Saves what of bytes `start..end` of the checkpoint's contents is not saved.
    fn save(&mut self, file: &FileRef, start: u64, end: u64) {
        let inner = &mut *self.inner;
        let Some(row) = inner.index.row_mut(&file.stat.id) else {
            return;
        };
        let end = end.min(row.size0);
        if row.all || start >= end {
            return;
        }
        let (first, last) = (start / BLOCK, end.div_ceil(BLOCK));
        let mut from = first;
        let mut buf = [0u8; sys::PATH_LEN];
        let mut path: &[u8] = file.path;
        if file.fd.is_none() && path.is_empty() {
            path = path_of(file, &mut buf);
        }
        while let Some((a, b)) = row.unsaved(from, last) {
            let mut saving = Saving {
                writer: &mut inner.writer,
                scratch: &mut inner.scratch,
                row: row.row,
                file,
                path,
            };
            let done = saving.save(a * BLOCK, (b * BLOCK).min(row.size0));
            row.mark(a, b);
            from = b;
            if let Err(e) = done {
                let reason = saving_reason(e);
                let path = path_of(file, &mut buf);
                inner.writer.set_incomplete(1, &[path, b": ", reason]);
                inner.scratch.begin(TAG_INCOMPLETE).text(path).text(reason);
                if let Some(bytes) = inner.scratch.bytes() {
                    inner.writer.append(bytes);
                }
                return;
            }
        }
    }

    /// Bytes `start..end` are about to be written (`end` may be beyond the file's end;
    /// for O_APPEND pass the size as `start`).
    pub fn before_write(&mut self, file: &FileRef, start: u64, end: u64) -> Coverage {
        with_room(|| self.write_begins(file, start, end))
    }

    fn write_begins(&mut self, file: &FileRef, start: u64, end: u64) -> Coverage {
        if !file.stat.is_regular() {
            return Coverage::Free;
        }
        let mut which = TIMES;
        if end > file.stat.size {
            which |= SIZE;
        }
        if file.stat.mode & (libc::S_ISUID | libc::S_ISGID) != 0 {
            // A write clears these.
            which |= MODE;
        }
        self.keep_capability(file);
        if !self.ensure_row(file, which) {
            return Coverage::Free;
        }
        self.save_readable(file, start, end);
        if self.inner.index.row(&file.stat.id).is_some_and(|r| r.all) {
            self.ensure_row(file, SIZE);
        }
        if let Some(row) = self.inner.index.row(&file.stat.id) {
            self.inner.writer.in_flight(row.slot);
        }
        self.inner.writer.sync();
        self.coverage(&file.stat.id)
    }

    /// What writes to this inode still need, without recording anything.
    pub fn coverage(&self, id: &Id) -> Coverage {
        match self.inner.index.node(id) {
            Some(Node::Born { .. } | Node::Excluded) => Coverage::Free,
            Some(Node::Row(row)) if row.which & (SIZE | TIMES) == SIZE | TIMES => {
                if row.all {
                    Coverage::Free
                } else {
                    Coverage::AppendOnly { size0: row.size0 }
                }
            }
            _ => Coverage::Partial,
        }
    }

    /// The size is about to be set (truncate, ftruncate, O_TRUNC).
    pub fn before_truncate(&mut self, file: &FileRef, new_size: u64) {
        with_room(|| self.truncate_begins(file, new_size))
    }

    fn truncate_begins(&mut self, file: &FileRef, new_size: u64) {
        let mut which = SIZE | TIMES;
        if file.stat.mode & (libc::S_ISUID | libc::S_ISGID) != 0 {
            which |= MODE;
        }
        if !file.stat.is_regular() {
            return;
        }
        self.keep_capability(file);
        if self.ensure_row(file, which) {
            self.save_readable(file, new_size, u64::MAX);
            if let Some(row) = self.inner.index.row(&file.stat.id) {
                self.inner.writer.in_flight(row.slot);
            }
            self.inner.writer.sync();
        }
    }

    /// Attributes are about to be set (chmod, chown, utimes).
    pub fn before_attributes(&mut self, file: &FileRef, which: Which) {
        with_room(|| self.attributes_begin(file, which))
    }

    fn attributes_begin(&mut self, file: &FileRef, which: Which) {
        // A change of owner clears set-user-ID.
        let which = which | if which & OWNER != 0 { MODE } else { 0 };
        if which & OWNER != 0 && file.stat.is_regular() {
            self.keep_capability(file);
        }
        self.ensure_row(file, which);
        self.inner.writer.sync();
    }

    /// Everything from `from` on is about to move (fallocate collapse, insert).
    pub fn before_range_shift(&mut self, file: &FileRef, from: u64) {
        self.before_truncate(file, from);
    }

    /// An extended attribute is about to be set or removed.
    pub fn before_xattr(&mut self, file: &FileRef, name: &[u8]) {
        with_room(|| self.xattr_begins(file, name))
    }

    fn xattr_begins(&mut self, file: &FileRef, name: &[u8]) {
        // An access list shows in the mode.
        let which = if name.starts_with(b"system.") {
            MODE
        } else {
            0
        };
        if !self.ensure_row(file, which) {
            return;
        }
        let known = self.inner.index.row(&file.stat.id);
        if known.is_none_or(|row| row.has_xattr(name)) {
            return;
        }
        let mut buf = [0u8; sys::PATH_LEN];
        let path = path_of(file, &mut buf);
        if let Err(e) = self.save_xattr(file, path, name) {
            self.inner.failed(path, e);
        }
        if let Some(row) = self.inner.index.row_mut(&file.stat.id) {
            row.add_xattr(name);
        }
        self.inner.writer.sync();
    }

    /// A write, a change of the size or of the owner takes a file's capabilities away. They are
    /// recorded before anything else of it: what an undo does to the file takes them away as well,
    /// and what was recorded first is undone last.
    fn keep_capability(&mut self, file: &FileRef) {
        const NAME: &[u8] = b"security.capability";
        let looked = match self.inner.index.node(&file.stat.id) {
            Some(Node::Born { .. } | Node::Excluded) => true,
            Some(Node::Row(row)) => row.capability_known,
            None => false,
        };
        if looked {
            return;
        }
        let mut buf = [0u8; sys::PATH_LEN];
        let mut value = [0u8; 64];
        let got = CPath::new(&[NAME]).and_then(|name| {
            let open = file.any_fd.or(file.fd);
            match open.map(|fd| sys::get_xattr_fd(fd, &name, &mut value)) {
                // O_PATH.
                None | Some(Err(libc::EBADF)) => {
                    let path = CPath::new(&[path_of(file, &mut buf)])?;
                    sys::get_xattr(&path, &name, &mut value)
                }
                Some(got) => got,
            }
        });
        // Most have none.
        if let Ok(len) = got
            && self.ensure_row(file, 0)
        {
            self.xattr_begins(file, NAME);
            // Who may take them away need not be allowed to give them back.
            let path = path_of(file, &mut buf);
            let value = value.get(..len).unwrap_or_default();
            let back = CPath::new(&[NAME])
                .and_then(|name| sys::set_xattr(&CPath::new(&[path])?, &name, value));
            if back.is_err() {
                self.inner
                    .incomplete(path, b"its capabilities cannot be given back");
            }
        }
        if let Some(row) = self.inner.index.row_mut(&file.stat.id) {
            row.capability_known = true;
        }
    }

    fn save_xattr(&mut self, file: &FileRef, path: &[u8], name: &[u8]) -> Sys<()> {
        let inner = &mut *self.inner;
        let row = inner
            .index
            .row(&file.stat.id)
            .map(|r| r.row)
            .unwrap_or_default();
        let mut value = Vec::new();
        value.try_reserve(1 << 16).map_err(|_| libc::ENOMEM)?;
        value.resize(1 << 16, 0u8);
        let name_z = CPath::new(&[name])?;
        // It may have lost its name.
        let got = match file.any_fd.or(file.fd) {
            Some(fd) => sys::get_xattr_fd(fd, &name_z, &mut value),
            None => Err(libc::EBADF),
        };
        let got = match got {
            Err(libc::EBADF) => sys::get_xattr(&CPath::new(&[path])?, &name_z, &mut value),
            got => got,
        };
        let e = inner.scratch.begin(TAG_XATTR).u32(row).text(name);
        match got {
            Ok(len) => e.u8(1).text(value.get(..len).unwrap_or_default()),
            Err(libc::ENODATA) => e.u8(0),
            // Then it cannot be set either.
            Err(libc::EOPNOTSUPP) => return Ok(()),
            Err(e) => return Err(e),
        };
        inner.commit();
        Ok(())
    }
}

/// Does the kernel mean by this path that the name was removed? (There are files called so.)
fn is_removed(path: &[u8], id: &Id) -> bool {
    path.ends_with(b" (deleted)")
        && !CPath::new(&[path])
            .and_then(|path| sys::lstat(&path))
            .is_ok_and(|there| there.id == *id)
}

/// Why a pre-image could not be saved, for people.
fn saving_reason(e: i32) -> &'static [u8] {
    match e {
        libc::EACCES | libc::EPERM => b"its contents may not be read",
        libc::ENOSPC | libc::EDQUOT => b"no space left for what is overwritten",
        e => errno_text(e).as_bytes(),
    }
}
