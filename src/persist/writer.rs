//! The mapped writer: a table's header, slots and journal, and its shadow file.
//!
//! No descriptor is kept: both files are mapped shared, so that what was stored is in
//! the page cache when the process is killed. Space is allocated before it is mapped,
//! so that a full disk is an error here and not a SIGBUS. Under the recorder's lock,
//! or in the helper while nobody else can reach the writer.

use super::format::{self, AT_INCOMPLETE, AT_REASON, AT_REASON_LEN, REASON_LEN};
use super::kept;
use super::sys::{self, CPath, Fd, Sys, point};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const PAGE: u64 = 4096;
const FIRST_LOG: u64 = 256 << 10;
const FIRST_SHADOW: u64 = 256 << 10;
const LARGEST: u64 = 16 << 20;

/// How many ranges tables can have mapped: three each of the one in use, the one
/// before it and the one being made, and windows in change.
pub const RANGES: usize = 12;

static MAPPED: [(AtomicU64, AtomicU64); RANGES] =
    [const { (AtomicU64::new(0), AtomicU64::new(0)) }; RANGES];

/// All ranges that are mapped, in no order; unused places are empty.
pub fn mapped() -> [(u64, u64); RANGES] {
    let mut all = [(0, 0); RANGES];
    for (place, (start, len)) in all.iter_mut().zip(&MAPPED) {
        let start = start.load(Ordering::SeqCst);
        *place = (start, start + len.load(Ordering::SeqCst));
    }
    all
}

/// After a restore: nothing of what the image remembers is mapped.
pub fn forget_mapped() {
    for (start, len) in &MAPPED {
        len.store(0, Ordering::SeqCst);
        start.store(0, Ordering::SeqCst);
    }
}

fn map(fd: i32, offset: u64, len: u64) -> Sys<*mut u8> {
    let place = MAPPED
        .iter()
        .find(|(start, _)| {
            // Reserves the place: the helper and a recorder may map at the same time.
            start
                .compare_exchange(0, 1, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
        })
        .ok_or(libc::ENOMEM)?;
    match sys::map(fd, offset, len) {
        Ok(addr) => {
            place.1.store(len, Ordering::SeqCst);
            place.0.store(addr as u64, Ordering::SeqCst);
            Ok(addr)
        }
        Err(e) => {
            place.0.store(0, Ordering::SeqCst);
            Err(e)
        }
    }
}

fn unmap(addr: *mut u8, len: u64) {
    sys::unmap(addr, len);
    for (start, size) in &MAPPED {
        if start.load(Ordering::SeqCst) == addr as u64 {
            size.store(0, Ordering::SeqCst);
            start.store(0, Ordering::SeqCst);
        }
    }
}

/// A table's file that the next one may be made of.
pub const SPARE: &[u8] = b"table-spare";

/// A part of a file that is mapped.
pub struct Window {
    addr: *mut u8,
    start: u64,
    len: u64,
}

impl Window {
    const NONE: Window = Window {
        addr: std::ptr::null_mut(),
        start: 0,
        len: 0,
    };

    fn end(&self) -> u64 {
        self.start + self.len
    }

    /// The address of file offset `at`, if `len` bytes from there are mapped.
    fn at(&self, at: u64, len: u64) -> Option<*mut u8> {
        (self.len > 0 && at >= self.start && at + len <= self.end())
            .then(|| self.addr.wrapping_add((at - self.start) as usize))
    }

    /// Maps `len` bytes from `start` (a page boundary), allocating them first.
    fn open(fd: &Fd, start: u64, len: u64) -> Sys<Window> {
        allocate(fd.0, start, len)?;
        let addr = map(fd.0, start, len)?;
        Ok(Window { addr, start, len })
    }

    fn close(&mut self) {
        if self.len > 0 {
            unmap(self.addr, self.len);
        }
        *self = Window::NONE;
    }

    fn sync(&self, from: u64, to: u64) -> Sys<()> {
        let (from, to) = (from.max(self.start) / PAGE * PAGE, to.min(self.end()));
        match self.at(from, to.saturating_sub(from)) {
            Some(addr) if to > from => sys::sync_range(addr, to - from),
            _ => Ok(()),
        }
    }
}

/// Allocates space, by writing zeros where the file system has no other way.
fn allocate(fd: i32, start: u64, len: u64) -> Sys<()> {
    match sys::fallocate(fd, 0, start, len) {
        Err(libc::EOPNOTSUPP) | Err(libc::ENOSYS) => {
            let size = sys::fstat(fd)?.size;
            let zeros = [0u8; PAGE as usize];
            // What lies below the size was written before.
            let mut at = start.max(size);
            while at < start + len {
                let n = (start + len - at).min(PAGE) as usize;
                sys::pwrite_all(fd, zeros.get(..n).unwrap_or_default(), at)?;
                at += n as u64;
            }
            Ok(())
        }
        other => other,
    }
}

/// A file of no more than `total` bytes, all of them zero.
fn blank(fd: i32, total: u64) -> Sys<()> {
    let size = sys::fstat(fd)?.size;
    if size > total {
        sys::ftruncate(fd, total)?;
    }
    let zeroed = sys::fallocate(fd, libc::FALLOC_FL_ZERO_RANGE, 0, size.min(total));
    match zeroed {
        // Not on tmpfs, say.
        Err(_) if size > 0 => sys::ftruncate(fd, 0),
        _ => Ok(()),
    }
}

/// One table being written.
pub struct Writer {
    /// 0: none.
    pub number: u32,
    power: bool,
    head: *mut u8,
    log: Window,
    pub log_pos: u64,
    /// The journal up to here is on the disk (`CKPT_SYNC=power`).
    synced: u64,
    shadow: Window,
    pub shadow_pos: u64,
    shadow_synced: u64,
    pub next_slot: u32,
    pub next_row: u32,
    pub kept_made: bool,
    pub kept_serial: u64,
    broken: bool,
    dir: [u8; sys::PATH_LEN],
    dir_len: usize,
}

// SAFETY: the pointers are to memory of the process, reached under the recorder's lock.
unsafe impl Send for Writer {}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Writer({})", self.number)
    }
}

impl Writer {
    pub const NONE: Writer = Writer {
        number: 0,
        power: false,
        head: std::ptr::null_mut(),
        log: Window::NONE,
        log_pos: format::RECORDS,
        synced: format::RECORDS,
        shadow: Window::NONE,
        shadow_pos: 0,
        shadow_synced: 0,
        next_slot: 0,
        next_row: 0,
        kept_made: false,
        kept_serial: 0,
        broken: false,
        dir: [0; sys::PATH_LEN],
        dir_len: 0,
    };

    /// Makes the table's file (which must not exist) and maps it. Only when all of it
    /// is there does it get its name.
    pub fn create(&mut self, job_dir: &[u8], seq: u32, base: u64, power: bool) -> Sys<()> {
        *self = Writer::NONE;
        let dir = self.dir.get_mut(..job_dir.len());
        dir.ok_or(libc::ENAMETOOLONG)?.copy_from_slice(job_dir);
        self.dir_len = job_dir.len();
        let name = self.path(b"table-", seq)?;
        let mut new = CPath::new(&[name.bytes()])?;
        new.add(b".new")?;
        let spare = CPath::join(job_dir, SPARE)?;
        let reused = sys::rename(&spare, &new, 0).is_ok();
        let made = self.make(&new, reused, seq, base, power);
        let made = made.and_then(|()| sys::rename(&new, &name, libc::RENAME_NOREPLACE));
        if let Err(e) = made {
            let _ = sys::unlink(&new);
            self.close();
            return Err(e);
        }
        self.number = seq;
        Ok(())
    }

    /// `reused`: a table that is of no use any more is there, to be overwritten.
    fn make(&mut self, new: &CPath, reused: bool, seq: u32, base: u64, power: bool) -> Sys<()> {
        let total = format::RECORDS + FIRST_LOG;
        let fd = match reused {
            true => {
                let fd = sys::open(new, libc::O_RDWR, 0)?;
                blank(fd.0, total)?;
                fd
            }
            false => {
                let flags = libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC;
                sys::open(new, flags, 0o600)?
            }
        };
        allocate(fd.0, 0, total)?;
        sys::pwrite_all(fd.0, &format::header(seq, base, power), 0)?;
        if power {
            sys::fdatasync(fd.0)?;
        }
        self.power = power;
        self.head = map(fd.0, 0, format::RECORDS)?;
        self.log = Window::open(&fd, format::RECORDS, FIRST_LOG)?;
        Ok(())
    }

    /// `<job dir>/<prefix><seq, six digits>`.
    pub fn path(&self, prefix: &[u8], seq: u32) -> Sys<CPath> {
        let dir = self.dir.get(..self.dir_len).unwrap_or_default();
        numbered(dir, prefix, seq)
    }

    /// The link by which the job's tables keep an inode of this number. An error: it is not known
    /// whether there is one.
    pub fn kept_link(&self, ino: u64) -> Sys<Option<CPath>> {
        let dir = self.dir.get(..self.dir_len).unwrap_or_default();
        for name in sys::list(&CPath::new(&[dir])?)? {
            if name.starts_with(b"kept-")
                && let Some(link) = kept::link_to(&CPath::join(dir, &name)?, ino)?
            {
                return Ok(Some(link));
            }
        }
        Ok(None)
    }

    /// Is this a path in the job's directory?
    pub fn is_within(&self, path: &[u8]) -> bool {
        let dir = self.dir.get(..self.dir_len).unwrap_or_default();
        let rest = path.strip_prefix(dir).filter(|_| !dir.is_empty());
        rest.is_some_and(|rest| rest.first() == Some(&b'/'))
    }

    /// Unmaps everything.
    pub fn close(&mut self) {
        if !self.head.is_null() {
            unmap(self.head, format::RECORDS);
        }
        self.log.close();
        self.shadow.close();
        self.head = std::ptr::null_mut();
        self.number = 0;
    }

    /// Cuts the files to what is used (helper: its own descriptor table), then closes.
    pub fn close_and_trim(&mut self) {
        let (seq, log, shadow) = (self.number, self.log_pos, self.shadow_pos);
        let had_shadow = self.shadow.len > 0 || shadow > 0;
        let paths = (self.path(b"table-", seq), self.path(b"shadow-", seq));
        self.close();
        let trim = |path: Sys<CPath>, len: u64| {
            let fd = sys::open(&path?, libc::O_RDWR, 0)?;
            sys::ftruncate(fd.0, len)
        };
        // What stays too long is cut nowhere else, and does no harm.
        let _ = trim(paths.0, log);
        if had_shadow {
            let _ = trim(paths.1, shadow);
        }
    }

    fn word(&self, at: usize) -> Option<&AtomicU32> {
        if self.head.is_null() || at + 4 > format::RECORDS as usize {
            return None;
        }
        // SAFETY: inside the mapped header, aligned; shared with nobody but atomically.
        Some(unsafe { AtomicU32::from_ptr(self.head.add(at).cast()) })
    }

    fn wide(&self, at: usize) -> Option<&AtomicU64> {
        if self.head.is_null() || at + 8 > format::RECORDS as usize {
            return None;
        }
        // SAFETY: as in `word`.
        Some(unsafe { AtomicU64::from_ptr(self.head.add(at).cast()) })
    }

    pub fn alive(&self, now_ns: i64) {
        if let Some(place) = self.wide(format::AT_ALIVE) {
            place.store(now_ns as u64, Ordering::Relaxed);
        }
    }

    pub fn ended(&self, now_ns: i64) {
        if let Some(place) = self.wide(format::AT_ENDED) {
            place.store(now_ns as u64, Ordering::Relaxed);
        }
    }

    /// Something is about to be made under a name (`format::making`); 0: it is made and told.
    pub fn making(&self, name: u64) {
        if let Some(place) = self.wide(format::AT_MAKING) {
            place.store(name, Ordering::Release);
        }
    }

    /// A row's slot; `format::NO_SLOT` when all are used.
    pub fn take_slot(&mut self) -> u32 {
        if self.next_slot >= format::SLOTS {
            return format::NO_SLOT;
        }
        self.next_slot += 1;
        self.next_slot - 1
    }

    fn slot_at(slot: u32, field: u64) -> usize {
        (format::HEADER + u64::from(slot) * format::SLOT + field) as usize
    }

    pub fn hot(&self, slot: u32) -> Option<*mut u32> {
        if slot >= format::SLOTS {
            return None;
        }
        Some(self.word(Writer::slot_at(slot, format::SLOT_HOT))?.as_ptr())
    }

    /// Notes size and time of a row's inode after an operation of ours.
    pub fn touched(&self, slot: u32, size: u64, mtime_ns: i64) {
        if slot >= format::SLOTS {
            return;
        }
        let fields = (
            self.word(Writer::slot_at(slot, format::SLOT_KNOWN)),
            self.wide(Writer::slot_at(slot, format::SLOT_SIZE)),
            self.wide(Writer::slot_at(slot, format::SLOT_MTIME)),
        );
        if let (Some(known), Some(to_size), Some(to_time)) = fields {
            // A kill in between must not leave half of a pair.
            known.store(0, Ordering::Release);
            to_size.store(size, Ordering::Release);
            to_time.store(mtime_ns as u64, Ordering::Release);
            known.store(1, Ordering::Release);
        }
    }

    /// The next operation is in flight: what was noted is not to be judged by.
    pub fn in_flight(&self, slot: u32) {
        if slot < format::SLOTS
            && let Some(known) = self.word(Writer::slot_at(slot, format::SLOT_KNOWN))
        {
            known.store(0, Ordering::Release);
        }
    }

    /// Why the table does not lead back; `level` as in [`format::AT_INCOMPLETE`]. The
    /// first reason stays.
    pub fn set_incomplete(&mut self, level: u32, pieces: &[&[u8]]) {
        let Some(state) = self.word(AT_INCOMPLETE) else {
            return;
        };
        let before = state.load(Ordering::Acquire);
        if before == 0 {
            let mut at = 0;
            for byte in pieces.iter().flat_map(|p| p.iter()).take(REASON_LEN) {
                // SAFETY: inside the header page.
                unsafe { self.head.add(AT_REASON + at).write(*byte) };
                at += 1;
            }
            if let Some(len) = self.word(AT_REASON_LEN) {
                len.store(at as u32, Ordering::Release);
            }
        }
        state.store(level.max(before), Ordering::Release);
        if self.power {
            let _ = sys::sync_range(self.head, PAGE);
        }
    }

    /// The reason, copied; `None`: complete.
    pub fn reason(&self) -> Option<Vec<u8>> {
        if self.word(AT_INCOMPLETE)?.load(Ordering::Acquire) == 0 {
            return None;
        }
        let len = self.word(AT_REASON_LEN)?.load(Ordering::Acquire) as usize;
        // SAFETY: inside the header page; written before the length.
        let text =
            unsafe { std::slice::from_raw_parts(self.head.add(AT_REASON), len.min(REASON_LEN)) };
        Some(text.to_vec())
    }

    /// Appends a record. False: it could not be, and the table says so.
    pub fn append(&mut self, payload: &[u8]) -> bool {
        if self.broken {
            return false;
        }
        let len = format::record_len(payload.len()) as u64;
        // The word behind it must be there too, as the journal's end.
        if self.log.at(self.log_pos, len + 8).is_none()
            && let Err(e) = self.extend_log(len + 8)
        {
            self.broken = true;
            let text = crate::errno::Errno(e).name().unwrap_or("error");
            self.set_incomplete(2, &[b"the table cannot be extended: ", text.as_bytes()]);
            return false;
        }
        let Some(at) = self.log.at(self.log_pos, len + 8) else {
            return false;
        };
        point();
        // SAFETY: `len` bytes from `at` are mapped and ours; 8-aligned.
        unsafe {
            std::ptr::copy_nonoverlapping(payload.as_ptr(), at.add(8), payload.len());
            at.add(4).cast::<u32>().write(crc32c::crc32c(payload));
            AtomicU32::from_ptr(at.cast()).store(payload.len() as u32, Ordering::Release);
        }
        self.log_pos += len;
        point();
        true
    }

    fn extend_log(&mut self, need: u64) -> Sys<()> {
        let path = self.path(b"table-", self.number)?;
        let fd = sys::open_high(&path, libc::O_RDWR, 0)?;
        self.sync();
        let start = self.log_pos / PAGE * PAGE;
        let room = (self.log.len * 2).min(LARGEST).max(need + PAGE);
        let new = Window::open(&fd, start, room.next_multiple_of(PAGE))?;
        self.log.close();
        self.log = new;
        Ok(())
    }

    /// Room for `len` bytes (whole pages) of pre-images, mapped and zero or anything.
    pub fn shadow_room(&mut self, len: u64) -> Sys<*mut u8> {
        if let Some(at) = self.shadow.at(self.shadow_pos, len) {
            return Ok(at);
        }
        let fd = self.shadow_file()?;
        self.sync();
        let room = (self.shadow.len * 2).clamp(FIRST_SHADOW, LARGEST).max(len);
        let new = Window::open(&fd, self.shadow_pos, room)?;
        self.shadow.close();
        self.shadow = new;
        self.shadow.at(self.shadow_pos, len).ok_or(libc::ENOMEM)
    }

    /// The shadow file, opened for a moment.
    pub fn shadow_file(&self) -> Sys<Fd> {
        let path = self.path(b"shadow-", self.number)?;
        sys::open_high(&path, libc::O_RDWR | libc::O_CREAT, 0o600)
    }

    /// With `CKPT_SYNC=power`: what was written up to now is on the disk when this
    /// returns; pre-images before the records that speak of them.
    pub fn sync(&mut self) {
        if !self.power || self.log_pos == self.synced {
            return;
        }
        let done = self
            .shadow
            .sync(self.shadow_synced, self.shadow_pos)
            .and_then(|()| self.log.sync(self.synced, self.log_pos));
        match done {
            Ok(()) => {
                self.synced = self.log_pos;
                self.shadow_synced = self.shadow_pos;
            }
            Err(_) => self.set_incomplete(2, &[b"the table cannot be synced"]),
        }
    }

    pub fn is_power(&self) -> bool {
        self.power
    }
}

/// `<dir>/<prefix><number, six digits or more>`.
pub fn numbered(dir: &[u8], prefix: &[u8], number: u32) -> Sys<CPath> {
    let mut path = CPath::join(dir, prefix)?;
    let mut limit = 100_000;
    while number < limit && limit > 1 {
        path.add(b"0")?;
        limit /= 10;
    }
    path.number(u64::from(number), 10);
    Ok(path)
}
