//! What the hooks tell of modifications, before they run.
//!
//! Called in the program's threads inside hooks (the caller holds `InHook`, so that no
//! stop comes between a record and its operation). One lock, taken with all signals
//! blocked. Nothing here fails: what cannot be recorded marks the table incomplete,
//! and the program runs on.

use super::exclude;
use super::format::{
    Encoder, TAG_ABSENT, TAG_BORN, TAG_CANCELLED, TAG_GONE, TAG_INCOMPLETE, TAG_INODE,
};
use super::format::{TAG_PATH, TAG_REMOVED_DIR, TAG_RENAMED, TAG_RETURNED, TAG_XATTR};
use super::index::{BLOCK, Index, Node, Row};
use super::kept::{self, each_xattr};
use super::lock::Lock;
use super::shadow::Saving;
use super::sys::{self, CPath, Sys};
use super::writer::Writer;
use super::{Coverage, FileRef, Id, MODE, NameRef, SIZE, Stat, TIMES, Which};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, Ordering};

/// Everything behind the lock.
pub(super) struct Inner {
    pub writer: Writer,
    /// The table before, until it is closed.
    pub previous: Writer,
    index: Index,
    /// The table that the index is about.
    index_of: u32,
    /// How many rules of exclusion there were when it began.
    rules: usize,
    scratch: Encoder,
    /// Where the records of the last operation on names begin; 0: none.
    operation: u64,
    /// This table is of a recorded return, which modifies kept inodes as well.
    returning: bool,
}

pub(super) struct State {
    lock: Lock,
    inner: UnsafeCell<Inner>,
}

// SAFETY: `inner` is reached under the lock, or by the helper while all other threads
// are held outside hooks.
unsafe impl Sync for State {}

pub(super) static STATE: State = State {
    lock: Lock::new(),
    inner: UnsafeCell::new(Inner {
        writer: Writer::NONE,
        previous: Writer::NONE,
        index: Index::new(),
        index_of: 0,
        rules: 0,
        scratch: Encoder::new(),
        operation: 0,
        returning: false,
    }),
};

/// The open table's number, as hooks see it.
pub(super) static NUMBER: AtomicU32 = AtomicU32::new(0);

impl State {
    /// After a restore: nobody holds the lock.
    pub fn unlock_all(&self) {
        self.lock.reset();
    }

    /// # Safety
    /// The lock is held, or no other thread can take it.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn inner(&self) -> &mut Inner {
        // SAFETY: per contract.
        unsafe { &mut *self.inner.get() }
    }
}

/// The right to record: the recorder's lock, with signals blocked.
#[must_use = "the session holds the lock"]
pub struct Session {
    /// To be put back; `None`: the caller's business.
    mask: Option<u64>,
    inner: &'static mut Inner,
}

/// Is a table open? One load.
#[inline]
pub fn active() -> bool {
    table_number() != 0
}

/// The open table's number, the stamp of everything cached about descriptors; 0: none.
#[inline]
pub fn table_number() -> u32 {
    NUMBER.load(Ordering::Acquire)
}

/// Takes the lock. `None`: no table is open, nothing needs to be told.
pub fn enter() -> Option<Session> {
    if !active() {
        return None;
    }
    begin(Some(STATE.lock.lock()))
}

/// The same for callers that have all signals blocked until the session is over.
pub fn enter_blocked() -> Option<Session> {
    if !active() {
        return None;
    }
    STATE.lock.lock_blocked();
    begin(None)
}

fn release(mask: Option<u64>) {
    match mask {
        Some(mask) => STATE.lock.unlock(mask),
        None => STATE.lock.unlock_blocked(),
    }
}

/// The lock is held.
fn begin(mask: Option<u64>) -> Option<Session> {
    // SAFETY: the lock is held.
    let inner = unsafe { STATE.inner() };
    if inner.writer.number == 0 {
        release(mask);
        return None;
    }
    // What an earlier session told has taken place: only this one's can still fail.
    inner.operation = 0;
    if inner.index_of != inner.writer.number {
        inner.returning = false;
        inner.index = Index::new();
        inner.index_of = inner.writer.number;
        inner.rules = exclude::count();
    }
    Some(Session { mask, inner })
}

impl Drop for Session {
    fn drop(&mut self) {
        release(self.mask);
    }
}

fn errno_text(e: i32) -> &'static str {
    crate::errno::Errno(e).name().unwrap_or("error")
}

impl Inner {
    /// Forgets what is recorded already, without giving its memory back.
    pub fn start_afresh(&mut self) {
        std::mem::forget(std::mem::replace(&mut self.index, Index::new()));
        std::mem::forget(std::mem::take(&mut self.scratch));
        self.index_of = self.writer.number;
        self.operation = 0;
        self.returning = true;
    }

    /// Appends what `scratch` holds.
    fn commit(&mut self) -> bool {
        match self.scratch.bytes() {
            Some(bytes) => self.writer.append(bytes),
            None => {
                self.writer.set_incomplete(2, &[b"no memory"]);
                false
            }
        }
    }

    /// What tells the inode from others of its number.
    fn birth(&mut self, stat: &Stat, path: &CPath) -> u64 {
        if stat.birth != 0 {
            return stat.birth;
        }
        match self.index.row(&stat.id) {
            Some(row) if row.birth != 0 => row.birth,
            _ => self.index.births.of_path(path, stat.id.dev),
        }
    }

    /// The same of a file, at `path` where there is no descriptor.
    fn birth_of_file(&mut self, file: &FileRef, path: &[u8]) -> u64 {
        let dev = file.stat.id.dev;
        match file.any_fd.or(file.fd) {
            _ if file.stat.birth != 0 => file.stat.birth,
            Some(fd) => self.index.births.of_fd(fd, dev),
            None => CPath::new(&[path]).map_or(0, |path| self.index.births.of_path(&path, dev)),
        }
    }

    fn incomplete(&mut self, path: &[u8], reason: &[u8]) {
        self.writer.set_incomplete(1, &[path, b": ", reason]);
        self.scratch.begin(TAG_INCOMPLETE).text(path).text(reason);
        self.commit();
    }

    fn failed(&mut self, path: &[u8], e: i32) {
        self.incomplete(path, errno_text(e).as_bytes());
    }
}

/// The path of a file; asks the kernel when the caller does not know it.
fn path_of<'a>(file: &FileRef<'a>, buf: &'a mut [u8; sys::PATH_LEN]) -> &'a [u8] {
    if !file.path.is_empty() {
        return file.path;
    }
    match file.any_fd.or(file.fd).map(|fd| sys::fd_path(fd, buf)) {
        Some(Ok(len)) => buf.get(..len).unwrap_or_default(),
        _ => b"",
    }
}

impl Session {
    /// Is this path left alone?
    pub fn is_excluded(&self, path: &[u8]) -> bool {
        exclude::is_excluded(path)
    }

    /// Makes sure that the attributes `which` are recorded. `false`: nothing of this
    /// inode needs a record.
    fn ensure_row(&mut self, file: &FileRef, which: Which) -> bool {
        let id = file.stat.id;
        let (old, path_known) = match self.inner.index.nodes.get(&id) {
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
                if !kept && exclude::is_excluded(path) {
                    inner.index.set(id, Node::Excluded);
                    return false;
                }
                let row = inner.writer.next_row;
                inner.writer.next_row += 1;
                let slot = inner.writer.take_slot();
                let mut new = Row::new(row, slot, file.stat.size);
                new.birth = inner.birth_of_file(file, path);
                if !inner.index.set(id, Node::Row(new)) {
                    inner.failed(path, libc::ENOMEM);
                    return false;
                }
                (row, slot)
            }
        };
        // What has no name but a kept link is found by that.
        let named = !kept && !path.is_empty() && !path.ends_with(b" (deleted)");
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
        if !self.ensure_row(file, which) {
            return Coverage::Free;
        }
        self.save(file, start, end);
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
        match self.inner.index.nodes.get(id) {
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
        let mut which = SIZE | TIMES;
        if file.stat.mode & (libc::S_ISUID | libc::S_ISGID) != 0 {
            which |= MODE;
        }
        if file.stat.is_regular() && self.ensure_row(file, which) {
            self.save(file, new_size, u64::MAX);
            if let Some(row) = self.inner.index.row(&file.stat.id) {
                self.inner.writer.in_flight(row.slot);
            }
            self.inner.writer.sync();
        }
    }

    /// Attributes are about to be set (chmod, chown, utimes).
    pub fn before_attributes(&mut self, file: &FileRef, which: Which) {
        // A change of owner clears set-user-ID.
        let which = which | if which & super::OWNER != 0 { MODE } else { 0 };
        self.ensure_row(file, which);
        self.inner.writer.sync();
    }

    /// Everything from `from` on is about to move (fallocate collapse, insert).
    pub fn before_range_shift(&mut self, file: &FileRef, from: u64) {
        self.before_truncate(file, from);
    }

    /// An extended attribute is about to be set or removed.
    pub fn before_xattr(&mut self, file: &FileRef, name: &[u8]) {
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
        let got = sys::get_xattr(&CPath::new(&[path])?, &CPath::new(&[name])?, &mut value);
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

    /// A directory's entries are about to change: its times.
    fn directory(&mut self, dir: &Id, path: &[u8]) {
        match self.inner.index.nodes.get(dir) {
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
        // The row tells an undo what this inode was called.
        self.ensure_row(target, 0);
        self.before_create(name);
    }

    /// The inode that an operation has just made (also O_TMPFILE, also after mkdir).
    pub fn created(&mut self, id: Id, is_dir: bool) {
        let inner = &mut *self.inner;
        let was_dir = match inner.index.nodes.get(&id) {
            // A number that is used again: a program that makes and removes a file over and
            // over. The record that stands says as much, unless an undo must tell this
            // inode from a directory of this number, whose removal is recorded.
            Some(Node::Born { was_dir: false }) if !is_dir => return,
            Some(Node::Born { was_dir }) => *was_dir,
            _ => false,
        };
        let was_dir = was_dir || is_dir;
        // Without memory for it, the worst is a record too many.
        inner.index.set(id, Node::Born { was_dir });
        inner.scratch.begin(TAG_BORN).id(&id);
        inner.commit();
    }

    /// Was this inode made since the table began?
    pub fn is_born(&self, id: &Id) -> bool {
        self.inner.index.is_born(id)
    }

    /// Has what was decided about paths been decided by the present rules?
    fn same_rules(&self) -> bool {
        self.inner.rules == exclude::count()
    }

    /// Was this inode, no directory, made since the table began, so that nothing done to it
    /// needs a record, nor the removal of its name? (A name of it was recorded, with
    /// the times of its directory, when it was made, linked or moved there.)
    pub fn needs_nothing(&self, stat: &Stat) -> bool {
        !stat.is_dir() && self.inner.index.is_born(&stat.id) && self.same_rules()
    }

    /// Does this inode have a row, or was it made since: is it one that is not left alone?
    pub fn is_known(&self, id: &Id) -> bool {
        let node = self.inner.index.nodes.get(id);
        matches!(node, Some(Node::Born { .. } | Node::Row(_))) && self.same_rules()
    }

    /// Does whatever is made under this name need no record: because one leads the name
    /// back already, or because its directory was made since?
    pub fn is_led_back(&self, dir: &Id, name: &[u8]) -> bool {
        let index = &self.inner.index;
        self.same_rules() && (index.is_born(dir) || index.is_covered(dir, name))
    }

    /// A name is about to be removed (unlink, rmdir).
    pub fn before_remove(&mut self, name: &NameRef, stat: &Stat) {
        if self.name_excluded(name) {
            return;
        }
        self.inner.operation = self.inner.writer.log_pos;
        self.directory(&name.dir, name.dir_path);
        self.gone(name, stat);
        self.inner.writer.sync();
    }

    /// The removal or renaming that was told last in this session has failed: names
    /// are what they were.
    pub fn failed(&mut self) {
        let inner = &mut *self.inner;
        if inner.operation != 0 && inner.operation != inner.writer.log_pos {
            inner.scratch.begin(TAG_CANCELLED).u64(inner.operation);
            inner.commit();
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
            match CPath::join(name.dir_path, name.name) {
                Ok(path) => self.inner.failed(path.bytes(), e),
                Err(_) => self.inner.failed(name.name, e),
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
        let with_xattrs = if stat.is_dir() {
            let e = inner.scratch.begin(TAG_REMOVED_DIR);
            e.name(&name.dir, name.dir_path, name.name).stat(stat);
            true
        } else {
            let keep = kept::keep(&mut inner.writer, &path, stat, &mut text)?;
            let e = inner.scratch.begin(TAG_GONE);
            e.name(&name.dir, name.dir_path, name.name).stat(stat);
            e.u8(keep.kind).text(keep.text);
            keep.kind != super::format::KEPT_LINK
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
        if to_stat.is_some_and(|t| t.id == from_stat.id)
            || self.name_excluded(from) && self.name_excluded(to)
        {
            return;
        }
        self.inner.operation = self.inner.writer.log_pos;
        self.directory(&from.dir, from.dir_path);
        self.directory(&to.dir, to.dir_path);
        let index = &self.inner.index;
        let matters = |s: &Stat| s.is_dir() || !index.is_born(&s.id);
        let moves = matters(from_stat);
        let other = to_stat.filter(|_| exchange);
        if let Some(other) = other {
            let either = moves || matters(other);
            // XFS changes the times of the directories themselves.
            self.exchanged(from, from_stat);
            self.exchanged(to, other);
            if either {
                self.renamed(from, to, from_stat, Some(other));
            }
        } else {
            match to_stat {
                Some(stat) => self.gone(to, stat),
                None => self.absent(to),
            }
            if moves {
                self.renamed(from, to, from_stat, None);
            }
        }
        self.inner.writer.sync();
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

    /// The inode as it is after an operation of ours (or at a close).
    pub fn touched(&mut self, stat: &Stat) {
        if let Some(row) = self.inner.index.row(&stat.id) {
            let slot = row.slot;
            self.inner.writer.touched(slot, stat.size, stat.mtime_ns);
        }
    }

    /// A word that the fast path sets to 1 when it writes to this inode; valid as
    /// long as this table is open.
    pub fn hot(&mut self, id: &Id) -> Option<*mut u32> {
        let slot = self.inner.index.row(id)?.slot;
        self.inner.writer.hot(slot)
    }

    /// What follows is a recorded return.
    pub fn returning(&mut self, made: u64) {
        self.inner.scratch.begin(TAG_RETURNED).u64(made);
        self.inner.commit();
        self.inner.writer.sync();
    }

    /// Makes sure that the table knows this inode, whatever becomes of it.
    pub fn know(&mut self, file: &FileRef) {
        self.ensure_row(file, 0);
    }

    /// Something cannot be recorded: the table will not lead back any more. `reason`
    /// is a clause for people, as "/a/b: no space left".
    pub fn incomplete(&mut self, reason: &[u8]) {
        self.inner.writer.set_incomplete(1, &[reason]);
        self.inner
            .scratch
            .begin(TAG_INCOMPLETE)
            .text(b"")
            .text(reason);
        self.inner.commit();
    }
}

/// Why a pre-image could not be saved, for people.
fn saving_reason(e: i32) -> &'static [u8] {
    match e {
        libc::EACCES | libc::EPERM => b"its contents may not be read",
        libc::ENOSPC | libc::EDQUOT => b"no space left for what is overwritten",
        e => errno_text(e).as_bytes(),
    }
}
