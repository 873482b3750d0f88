//! What the hooks tell of modifications, before they run.
//!
//! Called in the program's threads inside hooks (the caller holds `InHook`, so that no
//! stop comes between a record and its operation). One lock, taken with all signals
//! blocked. Nothing here fails: what cannot be recorded marks the table incomplete,
//! and the program runs on.
//!
//! | file | owns |
//! |---|---|
//! | `recorder` | the lock, what is known of inodes and names |
//! | `recorder/contents` | what an inode is: contents, size, attributes |
//! | `recorder/names` | names: made, removed, moved |
//! | `recorder/room` | the stack that all of it runs on |

mod contents;
mod names;
mod room;

use super::exclude;
use super::format::{self, Encoder, TAG_INCOMPLETE, TAG_RETURNED};
use super::index::{self, Index, Map, Node};
use super::lock::Lock;
use super::sys::{self, CPath, Sys};
use super::writer::Writer;
use super::{FileRef, Id, Stat};
pub use room::with_room;
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
    /// The clock of the file systems when it began.
    began_ns: i64,
    /// How many rules of exclusion there were when it began.
    rules: usize,
    scratch: Encoder,
    /// Where the records of the last operation on names begin; 0: none.
    operation: u64,
    /// The table says that something is being made.
    is_making: bool,
    /// This table is of a recorded return, which modifies kept inodes as well.
    returning: bool,
    /// Inodes that were moved or linked to where files are left alone, in any table of this job: an
    /// older one takes them back out of there, or they have names elsewhere.
    strays: Map<Id, ()>,
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
        began_ns: 0,
        rules: 0,
        scratch: Encoder::new(),
        operation: 0,
        is_making: false,
        returning: false,
        strays: index::empty(),
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
        inner.began_ns = sys::file_time_ns();
        inner.rules = exclude::count();
    }
    Some(Session { mask, inner })
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.inner.is_making {
            self.made_nothing();
        }
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

    /// This inode gets a name, at `path`, where files are left alone: it is followed from now on.
    fn strays(&mut self, id: &Id, path: &[u8]) {
        if self.strays.try_reserve(1).is_err() {
            return self.failed(path, libc::ENOMEM);
        }
        self.strays.insert(*id, ());
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

/// Has this inode come to where files are left alone from elsewhere? For the helper of the program,
/// while all other threads are held outside hooks.
pub fn is_stray(id: &Id) -> bool {
    // SAFETY: nobody else is in there (the caller's promise).
    unsafe { STATE.inner() }.strays.contains_key(id)
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

    /// Does this inode have a row, or was it made since: is it one that is not left alone? One that
    /// existed stays so whatever rules were made since: half of its modifications cannot be undone.
    pub fn is_known(&self, id: &Id) -> bool {
        match self.inner.index.node(id) {
            Some(Node::Row(_)) => true,
            Some(Node::Born { .. }) => self.same_rules(),
            Some(Node::Excluded) | None => self.inner.strays.contains_key(id),
        }
    }

    /// Did this inode exist, and is it recorded? Then it is followed wherever its names go.
    pub fn has_row(&self, id: &Id) -> bool {
        self.inner.index.row(id).is_some() || self.inner.strays.contains_key(id)
    }

    /// The link by which the job keeps an inode of this number that has lost a name. An error: it
    /// is not known whether there is one.
    pub fn kept_link(&self, ino: u64) -> Sys<Option<CPath>> {
        with_room(|| self.inner.writer.kept_link(ino))
    }

    /// Does whatever is made under this name need no record: because one leads the name
    /// back already, or because its directory was made since?
    pub fn is_led_back(&self, dir: &Id, name: &[u8]) -> bool {
        let index = &self.inner.index;
        self.same_rules() && (index.is_born(dir) || index.is_covered(dir, name))
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

    /// Something is about to be made under this name, in this session: should a kill come before
    /// it is told, an undo knows by this word alone that nobody else has made it.
    pub fn making(&mut self, dir: &Id, name: &[u8]) {
        self.inner.is_making = true;
        self.inner.writer.making(format::making(dir, name));
    }

    /// What was about to be made was there.
    pub fn made_nothing(&mut self) {
        self.inner.is_making = false;
        self.inner.writer.making(0);
    }

    /// Stores that nobody sees modify this inode from here on: what is noted of it is not to be
    /// judged by.
    pub fn mapped(&mut self, id: &Id) {
        if let Some(mark) = self.hot(id) {
            // SAFETY: a word of the open table.
            unsafe { mark.write_volatile(1) };
        }
    }

    /// What follows is a recorded return.
    pub fn returning(&mut self, made: u64) {
        with_room(|| {
            self.inner.scratch.begin(TAG_RETURNED).u64(made);
            self.inner.commit();
            self.inner.writer.sync();
        });
    }

    /// Makes sure that the table knows this inode, whatever becomes of it.
    pub fn know(&mut self, file: &FileRef) {
        with_room(|| self.ensure_row(file, 0));
    }

    /// Something cannot be recorded: the table will not lead back any more. `reason`
    /// is a clause for people, as "/a/b: no space left".
    pub fn incomplete(&mut self, reason: &[u8]) {
        with_room(|| {
            self.inner.writer.set_incomplete(1, &[reason]);
            let record = self.inner.scratch.begin(TAG_INCOMPLETE);
            record.text(b"").text(reason);
            self.inner.commit();
        });
    }
}
