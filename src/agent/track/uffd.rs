//! The `uffd` tracker: userfaultfd write protection that the kernel itself resolves
//! (WP_ASYNC, Linux 6.7), read and renewed by PAGEMAP_SCAN. Helper thread.
//!
//! The descriptor is in the helper's own table, so no close_range of the program hits it.
//! Nothing is ever protected by UFFDIO_WRITEPROTECT: that would fill the page tables of a
//! reservation with markers. A range is registered, and its pages are protected as they
//! are reported, only those that exist.
//!
//! What a sweep asks the page tables:
//! * which pages of *blank* memory there are: no page at all, or the mapped file's own. A
//!   page that was not blank before was discarded. And which mappings are not registered:
//!   new, moved, grown heap. Those are registered and reported whole;
//! * which anonymous pages are written; these are protected in the same walk.
//!
//! Both walks skip holes whole page tables at a time. While the program runs, a change
//! between the two walks is reported by the next sweep.

mod back;
mod marker;

use super::blank::{
    Range, clip, existing, groups, is_of_file, newly_blank, push, subtract, watchable, whole,
    without, without_file,
};
use super::lazy::{self, Lazy, both, of_images};
use super::moving;
use super::pagemap::{PageMap, Query, is};
use super::probe::with_page;
use super::{Change, Dirty, Kept, Open, TrackError, Tracker};
use crate::agent::collect::memory::{How, PAGE, Piece};
use crate::agent::procfs::OwnFd;
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

const UFFD_USER_MODE_ONLY: i32 = 1;
/// _IOWR(0xAA, 0x3F, struct uffdio_api)
const UFFDIO_API: u64 = 0xc018_aa3f;
/// _IOWR(0xAA, 0x00, struct uffdio_register)
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
/// _IOR(0xAA, 0x01, struct uffdio_range)
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
/// _IOWR(0xAA, 0x06, struct uffdio_writeprotect)
const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;
const REGISTER_MODE_WP: u64 = 2;
/// Without it the kernel does not let PAGEMAP_SCAN protect anonymous memory.
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;

/// Opens a descriptor with the features that are needed.
pub fn open() -> Result<OwnFd, TrackError> {
    let fail = |call| move |errno| TrackError::Call { call, errno };
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    // SAFETY: no pointers.
    let fd =
        check(unsafe { syscall!(libc::SYS_userfaultfd, flags) }).map_err(fail("userfaultfd"))?;
    let fd = OwnFd::from_raw(fd as i32);
    let mut api = [0xAA, FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED, 0];
    // SAFETY: struct uffdio_api is three words.
    check(unsafe { syscall!(libc::SYS_ioctl, fd.raw(), UFFDIO_API, &mut api) })
        .map_err(fail("userfaultfd with WP_ASYNC"))?;
    Ok(fd)
}

/// Registers a range with a descriptor of [`open`].
pub fn register(fd: &OwnFd, (start, end): Range) -> Result<(), i32> {
    let mut arg = [start, end - start, REGISTER_MODE_WP, 0];
    let register = || {
        // SAFETY: struct uffdio_register is four words.
        check(unsafe { syscall!(libc::SYS_ioctl, fd.raw(), UFFDIO_REGISTER, &mut arg) })
    };
    moving::registering(register)
        .unwrap_or(Err(libc::EAGAIN))
        .map(|_| ())
}

/// Asks for blank pages, and for all pages of mappings that are not registered.
const BLANK: Query = Query {
    inverted: is::PRESENT | is::WPALLOWED,
    all: 0,
    any: is::PRESENT | is::WPALLOWED | is::FILE,
    tell: is::PRESENT | is::SWAPPED | is::FILE | is::WPALLOWED,
    protect: false,
};

/// Asks for whatever is not a protected page. In just these words: others make the kernel
/// look at each page closely.
const SUSPECT: Query = Query {
    inverted: 0,
    all: is::WRITTEN,
    any: 0,
    tell: is::WRITTEN,
    protect: false,
};

/// Asks for mappings that are not registered.
const UNREGISTERED: Query = Query {
    inverted: is::WPALLOWED,
    all: is::WPALLOWED,
    any: 0,
    tell: is::WPALLOWED,
    protect: false,
};

/// Asks for written pages that are not the mapped file's, and protects them. A hole counts
/// as written as well, and to protect one fills page tables.
const WRITTEN: Query = Query {
    inverted: is::FILE,
    all: is::FILE | is::WRITTEN,
    any: is::PRESENT | is::SWAPPED,
    tell: is::PFNZERO | is::WRITTEN,
    protect: true,
};

/// Watches by userfaultfd.
pub struct Uffd {
    fd: OwnFd,
    pagemap: PageMap,
    /// Registered since the last sweep: reported whole by the next one.
    fresh: Vec<Range>,
    /// Blank pages as of the last sweep.
    blank: Vec<Range>,
    /// Mapped from images by the restore; registered by the first sweep after it.
    lazy: Lazy,
    /// Nothing has been registered yet by this descriptor.
    new: bool,
    /// Left open by a rollback.
    open: Open,
}

/// Mappings of the program are registered, or are about to be.
static IN_USE: AtomicBool = AtomicBool::new(false);

/// Does a tracker of this kind hold the program's mappings? (An image may say so of the
/// life before.)
pub fn in_use() -> bool {
    IN_USE.load(Relaxed)
}

/// After a restore: nothing is registered.
pub fn forget() {
    IN_USE.store(false, Relaxed);
    moving::forget();
}

impl Drop for Uffd {
    fn drop(&mut self) {
        IN_USE.store(false, Relaxed);
    }
}

impl Uffd {
    pub fn new() -> Result<Uffd, TrackError> {
        let mut uffd = Uffd::adopt(open()?)?;
        uffd.new = true;
        Ok(uffd)
    }

    /// Goes on with a descriptor by which memory is registered already.
    pub fn adopt(fd: OwnFd) -> Result<Uffd, TrackError> {
        let uffd = Uffd {
            fd,
            pagemap: PageMap::open()?,
            fresh: Vec::new(),
            blank: Vec::new(),
            lazy: Lazy::default(),
            new: false,
            open: Open::default(),
        };
        IN_USE.store(true, Relaxed);
        Ok(uffd)
    }

    pub fn register_range(&self, range: Range) -> Result<(), i32> {
        register(&self.fd, range)
    }

    /// Registers anew. An mremap that joins what it moves with a registered neighbour takes the
    /// registration from both, and leaves the neighbour's pages marked as protected, though
    /// they can be written then without a trace (Linux 6.18): the marks go.
    fn register_again(&self, range: Range) -> Result<(), i32> {
        self.register_range(range)?;
        let (start, len) = (range.0, range.1 - range.0);
        let mut arg = [start, len, 0];
        // SAFETY: struct uffdio_writeprotect is three words, struct uffdio_range two.
        unsafe {
            let done = check(syscall!(
                libc::SYS_ioctl,
                self.fd.raw(),
                UFFDIO_WRITEPROTECT,
                &mut arg
            ));
            if done.is_err() {
                let mut arg = [start, len];
                syscall!(libc::SYS_ioctl, self.fd.raw(), UFFDIO_UNREGISTER, &mut arg);
            }
            done.map(|_| ())
        }
    }

    /// Registers the pieces that `found` (ascending) touches. Those that cannot be stay
    /// unregistered, so every sweep finds them anew and reports them whole.
    fn register(&mut self, pieces: &[Piece], found: &[Range]) {
        let first = std::mem::replace(&mut self.new, false);
        let register = |range| match first {
            true => self.register_range(range),
            false => self.register_again(range),
        };
        let mut whole: Vec<Range> = Vec::new();
        let mut next = 0;
        for &range in found {
            clip(pieces, &mut next, range, |piece, _, _| {
                if whole.last().is_none_or(|last| last.1 <= piece.vma.start) {
                    push(&mut whole, (piece.vma.start, piece.vma.end));
                }
            });
        }
        let mut next = 0;
        for &range in &whole {
            if register(range).is_ok() {
                continue;
            }
            // One ioctl takes many mappings, but none of them when one is not possible.
            clip(pieces, &mut next, range, |piece, _, _| {
                let _ = register((piece.vma.start, piece.vma.end));
            });
        }
        subtract(&mut self.blank, &whole);
        self.fresh.extend(whole);
        self.fresh.sort_unstable();
        let mut joined = Vec::with_capacity(self.fresh.len());
        for &range in &self.fresh {
            push(&mut joined, range);
        }
        self.fresh = joined;
    }
}

impl Uffd {
    /// The parts of a group without files that the two walks must look at: where anything
    /// is written, blank or not registered. The kernel answers this one question several
    /// times faster than any other, and mostly there is little.
    fn suspects(
        &mut self,
        (start, end): Range,
        parts: &mut Vec<(Range, bool)>,
    ) -> Result<(), TrackError> {
        /// A gap up to this long is looked at as well.
        const NEAR: u64 = 512 * PAGE;
        /// More parts than this are no gain.
        const MOST: usize = 64;
        let mut hits: Vec<Range> = Vec::new();
        self.pagemap.scan(start, end, SUSPECT, |from, to, _| {
            hits.push((from, to));
        })?;
        // Where page tables are missing in a mapping that is not registered, that question
        // gets no answer. This one costs nothing where all is registered.
        self.pagemap.scan(start, end, UNREGISTERED, |from, to, _| {
            hits.push((from, to));
        })?;
        hits.sort_unstable();
        let first = parts.len();
        for (from, to) in hits {
            match parts[first..].last_mut() {
                Some((last, _)) if from <= last.1 + NEAR => last.1 = last.1.max(to),
                _ => parts.push(((from, to), false)),
            }
        }
        if parts.len() > first + MOST {
            parts.truncate(first);
            parts.push(((start, end), false));
        }
        Ok(())
    }
}

impl Uffd {
    /// Registers what the restore has mapped from images, as far as it is still that. It is
    /// not new: what differs from the image is anonymous, and none of that is protected yet.
    /// Returns what may be something else by now, and must be taken as new.
    fn register_lazy(&mut self, pieces: &[Piece]) -> Result<Vec<Range>, TrackError> {
        let lazy = std::mem::take(&mut self.lazy);
        if lazy.is_empty() {
            return Ok(Vec::new());
        }
        let mut doubtful = lazy.still()?;
        let mut registered = doubtful.clone();
        registered.retain(|&range| self.register_range(range).is_ok());
        // The program may have mapped something else there in between, and then that was
        // registered. What it maps from here on is not.
        let known = both(&registered, &lazy.still()?);
        let known = both(&known, &of_images(pieces));
        subtract(&mut doubtful, &known);
        Ok(doubtful)
    }

    /// Everything that has changed. `protect`: what was written is watched anew; `leave`: what
    /// is mapped from images is not to be registered yet.
    fn walk(
        &mut self,
        pieces: &[Piece],
        seen: &mut Dirty,
        protect: bool,
        leave: &[Range],
    ) -> Result<(), TrackError> {
        if protect {
            self.open.closed();
        }
        let doubtful = match leave {
            [] => self.register_lazy(pieces)?,
            _ => Vec::new(),
        };
        let groups = groups(pieces);
        let mut now = Dirty::new();
        let (mut blank, mut found): (Vec<Range>, Vec<Range>) = (Vec::new(), Vec::new());
        let mut next = 0;
        let mut parts: Vec<(Range, bool)> = Vec::with_capacity(groups.len());
        let mut strange: Vec<Range> = Vec::new();
        let mut swapped: Vec<Range> = Vec::new();
        for (group, of_file) in groups {
            match (of_file, protect) {
                (true, _) => parts.push((group, true)),
                (false, true) => self.suspects(group, &mut parts)?,
                (false, false) => self.take_suspects(group, &mut now, &mut strange)?,
            }
        }
        for &((start, end), of_file) in &parts {
            let query = if of_file { BLANK } else { without_file(BLANK) };
            self.pagemap.scan(start, end, query, |from, to, what| {
                let exists = what & (is::PRESENT | is::SWAPPED) != 0;
                let of_file = what & is::PRESENT != 0 && what & is::FILE != 0;
                if what & is::WPALLOWED == 0 {
                    push(&mut found, (from, to));
                }
                clip(pieces, &mut next, (from, to), |piece, from, to| {
                    if !exists || (of_file && is_of_file(piece)) {
                        push(&mut blank, (from, to));
                    } else if what & is::PRESENT == 0 && is_of_file(piece) {
                        // Swapped out, or the kernel's marker that a protected page was
                        // discarded here: the two look alike.
                        push(&mut swapped, (from, to));
                    }
                });
            })?;
        }
        if !swapped.is_empty() {
            let there = marker::clear(&self.fd, &mut self.pagemap, &swapped)?;
            let mut all = std::mem::take(&mut blank);
            without(&swapped, &there, |from, to| all.push((from, to)));
            all.sort_unstable();
            all.into_iter().for_each(|range| push(&mut blank, range));
            for (from, to) in there {
                now.insert(from, to, Change::Present);
            }
        }
        subtract(&mut found, leave);
        if !doubtful.is_empty() || !strange.is_empty() {
            found.extend(doubtful);
            found.extend(strange);
            found.sort_unstable();
        }
        self.register(pieces, &found);
        newly_blank(pieces, &blank, &self.blank, &mut now);
        if protect {
            self.blank = blank;
        }
        let mut next = 0;
        for (start, end) in std::mem::take(&mut self.fresh) {
            let mut parts = Vec::new();
            clip(pieces, &mut next, (start, end), |piece, from, to| {
                parts.push((piece, from, to));
            });
            let mut fresh = Dirty::new();
            for (piece, from, to) in parts {
                whole(&mut self.pagemap, piece, (from, to), &mut fresh)?;
                // While the program runs it may have moved one there since `pieces` were read.
                for (from, to) in lazy::images_in((from, to))? {
                    fresh.insert(from, to, Change::Present);
                }
            }
            now.unite(&fresh);
        }
        for piece in pieces.iter().filter(|p| !watchable(p)) {
            if matches!(piece.how, How::Scan | How::All | How::Readable) {
                let range = (piece.vma.start, piece.vma.end);
                whole(&mut self.pagemap, piece, range, &mut now)?;
            }
        }
        if protect {
            // Seen to exist after they were found blank, by the program's own doing.
            subtract(&mut self.blank, &existing(pieces, &now));
        }
        seen.unite(&now);
        // Not clipped: what was protected here must be reported, also where a mapping has
        // grown since `pieces` were read.
        let mut written = Dirty::new();
        for ((start, end), of_file) in parts {
            let query = if of_file {
                WRITTEN
            } else {
                without_file(WRITTEN)
            };
            let query = Query { protect, ..query };
            self.pagemap.scan(start, end, query, |from, to, what| {
                let change = match what & is::PFNZERO {
                    0 => Change::Present,
                    _ => Change::Absent,
                };
                written.insert(from, to, change);
            })?;
        }
        // A page that was blank when the first walk saw it and is written by now: should it be
        // discarded before the next sweep, that must be reported.
        let ranges: Vec<Range> = written
            .runs()
            .iter()
            .map(|run| (run.start, run.end))
            .collect();
        if !both(&self.blank, &ranges).is_empty() {
            subtract(&mut self.blank, &ranges);
        }
        seen.unite(&written);
        Ok(())
    }
}

impl Uffd {
    /// As [`Uffd::walk`] where nothing is registered and nobody wants to know what has
    /// changed: all but `leave` is registered, what is blank is noted, what exists is
    /// protected.
    fn walk_first(&mut self, pieces: &[Piece], leave: &[Range]) -> Result<(), TrackError> {
        let mut all: Vec<Range> = Vec::new();
        for piece in pieces.iter().filter(|piece| watchable(piece)) {
            push(&mut all, (piece.vma.start, piece.vma.end));
        }
        subtract(&mut all, leave);
        self.register(pieces, &all);
        self.fresh.clear();
        self.blank = self.take_as_clean(pieces, &groups(pieces))?;
        Ok(())
    }
}

impl Tracker for Uffd {
    fn name(&self) -> &'static str {
        "uffd"
    }

    fn live(&self) -> bool {
        true
    }

    fn arm(&mut self, pieces: &[Piece]) -> Result<(), TrackError> {
        let mut found = Vec::new();
        for ((start, end), _) in groups(pieces) {
            self.pagemap.scan(start, end, UNREGISTERED, |from, to, _| {
                push(&mut found, (from, to))
            })?;
        }
        self.register(pieces, &found);
        Ok(())
    }

    fn begin(&mut self, pieces: &[Piece]) -> Result<(), TrackError> {
        let lazy = Lazy::find(pieces, &mut self.pagemap)?;
        match self.new {
            true => self.walk_first(pieces, &lazy.ranges())?,
            false => self.walk(pieces, &mut Dirty::new(), true, &lazy.ranges())?,
        }
        self.lazy = lazy;
        Ok(())
    }

    fn exist(&mut self, seen: &[Range]) {
        subtract(&mut self.blank, seen);
    }

    fn begin_again(&mut self, pieces: &[Piece], kept: &Kept) -> Result<(), TrackError> {
        self.go_on(pieces, kept)
    }

    fn sweep(&mut self, pieces: &[Piece], seen: &mut Dirty) -> Result<(), TrackError> {
        self.walk(pieces, seen, true, &[])
    }

    fn look(&mut self, pieces: &[Piece], seen: &mut Dirty) -> Result<(), TrackError> {
        self.walk(pieces, seen, false, &[])
    }

    fn descriptor(&self) -> Option<i32> {
        Some(self.fd.raw())
    }

    fn left_open(&self) -> Option<&Open> {
        Some(&self.open)
    }

    fn moved(&mut self, fd: Option<OwnFd>) -> Result<(), TrackError> {
        let fd = fd.ok_or(TrackError::Call {
            call: "take the userfaultfd over",
            errno: libc::EBADF,
        })?;
        std::mem::forget(std::mem::replace(&mut self.fd, fd));
        self.pagemap.reopen()
    }
}

/// Does it work in this process? Really watches a page.
pub fn probe() -> Result<(), String> {
    let mut uffd = Uffd::new().map_err(|error| error.to_string())?;
    with_page(|addr| watch_a_page(&mut uffd, addr))
}

fn watch_a_page(uffd: &mut Uffd, addr: u64) -> Result<(), String> {
    let word = addr as *mut u64;
    let range = (addr, addr + PAGE);
    // SAFETY: the page is ours.
    unsafe { word.write_volatile(1) };
    uffd.register_range(range)
        .map_err(|errno| format!("UFFDIO_REGISTER: errno {errno}"))?;
    let mut pages = || {
        let mut n = 0;
        let scanned = uffd.pagemap.scan(range.0, range.1, WRITTEN, |from, to, _| {
            n += (to - from) / PAGE;
        });
        scanned.map(|()| n).map_err(|error| error.to_string())
    };
    let (first, idle) = (pages()?, pages()?);
    // SAFETY: as above.
    unsafe { word.write_volatile(2) };
    match (first, idle, pages()?) {
        (1, 0, 1) => Ok(()),
        counts => Err(format!("a watched page was seen {counts:?} times")),
    }
}

#[cfg(test)]
mod tests;
