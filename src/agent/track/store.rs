//! Pages to be stored before they are written: the ground of the `priority` snapshot
//! (US 5,802,267, third embodiment, priority storing queue).
//!
//! At the stop [`protect`] protects the dirty pages. The program runs; the writer (helper
//! thread) takes them one run after the other ([`Storing::take_next`]) and says when they are
//! stored ([`Storing::stored`]). A thread that writes to a page which is not stored yet
//! copies it aside when there is room in the reserve, and goes on at once; the writer
//! takes that copy later. Without room it puts the page at the head of the queue and
//! waits until the writer has stored it. Only that thread waits.
//!
//! A page's byte moves `STORE` -> `STORE|BUSY` (whoever wins: the writer, or a faulting
//! thread that copies) -> neither. Waiters sleep on one word that grows with every such
//! end, so no wake-up is lost. The faulting side allocates nothing and takes no lock.

use super::fault::Lock;
use super::table::{self, BUSY, EXEC, OPEN, STORE, WATCHED};
use super::{Change, Dirty, TrackError};
use crate::agent::collect::memory::{PAGE, Piece};
use crate::agent::headroom;
use crate::agent::hooks::user;
use crate::agent::place;
use crate::agent::state::awake;
use crate::image::state::{VmaKind, VmaState};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering::*};

/// Pages that can be copied aside in one checkpoint.
const RESERVE: usize = 4096;
/// Threads that can wait at the head of the queue.
const HEAD: usize = 256;
/// Pages taken by the writer at a time: what a waiting thread may have to sit through.
const TAKE: u64 = 64;

/// Copies, then the addresses of the copied pages.
static COPIES: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
/// Places given out, of [`RESERVE`].
static GIVEN: AtomicUsize = AtomicUsize::new(usize::MAX / 2);
/// Page address by place, 0 until the copy is complete.
static COPIED: [AtomicU64; RESERVE] = [const { AtomicU64::new(0) }; RESERVE];
/// The head of the queue: pages that threads wait for.
static WANTED: [AtomicU64; HEAD] = [const { AtomicU64::new(0) }; HEAD];
static WANTED_COUNT: AtomicU32 = AtomicU32::new(0);
/// Futex: grows whenever a page is no longer to be stored.
static ENDED: AtomicU32 = AtomicU32::new(0);
static WAITING: AtomicU32 = AtomicU32::new(0);
/// Is there a storing at all?
static RUNNING: AtomicU32 = AtomicU32::new(0);
/// A page that could not be copied aside, 0: none.
static LOST: AtomicU64 = AtomicU64::new(0);

/// The reserve's memory, no part of the image.
pub fn own_range() -> (u64, u64) {
    let at = COPIES.load(Relaxed) as u64;
    match at {
        0 => (0, 0),
        _ => (at, at + RESERVE as u64 * PAGE),
    }
}

/// After a restore: nothing is being stored (the image was taken before it began).
pub fn forget() {
    COPIES.store(std::ptr::null_mut(), SeqCst);
    GIVEN.store(usize::MAX / 2, SeqCst);
    COPIED.iter().for_each(|place| place.store(0, SeqCst));
    WANTED.iter().for_each(|place| place.store(0, SeqCst));
    for word in [&WANTED_COUNT, &WAITING, &RUNNING] {
        word.store(0, SeqCst);
    }
}

fn futex(op: i32, value: u32, timeout: *const [u64; 2]) {
    // SAFETY: a futex word of ours and a time of ours.
    unsafe {
        let op = op | libc::FUTEX_PRIVATE_FLAG;
        syscall!(libc::SYS_futex, &ENDED, op, value, timeout, 0, 0)
    };
}

/// A page (or several) is no longer to be stored.
fn ended() {
    ENDED.fetch_add(1, SeqCst);
    if WAITING.load(SeqCst) != 0 {
        futex(libc::FUTEX_WAKE, i32::MAX as u32, std::ptr::null());
    }
}

/// Moves a page from `STORE` to `STORE|BUSY`. False: somebody else has it, or it is done.
fn claim(addr: u64) -> bool {
    let Some(byte) = table::byte(addr) else {
        return false;
    };
    let claimed = byte.fetch_update(AcqRel, Acquire, |state| {
        (state & (STORE | BUSY) == STORE).then_some(state | BUSY)
    });
    claimed.is_ok()
}

fn done(addr: u64) {
    if let Some(byte) = table::byte(addr) {
        byte.fetch_and(!(STORE | BUSY), AcqRel);
    }
}

/// Copies a claimed page aside. False: there is no room.
fn copy_aside(addr: u64) -> bool {
    if GIVEN.load(Relaxed) >= RESERVE {
        return false;
    }
    let place = GIVEN.fetch_add(1, AcqRel);
    let copies = COPIES.load(Acquire);
    if place >= RESERVE || copies.is_null() {
        return false;
    }
    // SAFETY: a place of the reserve that is this call's.
    let to = unsafe {
        let to = copies.add(place * PAGE as usize);
        std::slice::from_raw_parts_mut(to, PAGE as usize)
    };
    // The page may have gone behind our back: better no image than no program.
    if user::read_bytes(addr, to) != Ok(PAGE as usize) {
        LOST.store(addr, SeqCst);
    }
    COPIED[place].store(addr, Release);
    true
}

/// Is this a forked child of the process whose pages are stored? Its pages are its own, and
/// nobody stores them. (A vfork child shares its parent's.)
fn in_fork() -> bool {
    // SAFETY: no arguments.
    let pid = unsafe { syscall!(libc::SYS_getpid) } as u32;
    RUNNING.load(SeqCst) != pid && !awake()
}

/// A thread is about to write to a page that is to be stored; returns when it may.
pub fn before_write(addr: u64) {
    if in_fork() {
        done(addr);
        return;
    }
    if claim(addr) {
        if copy_aside(addr) {
            done(addr);
            ended();
            return;
        }
        // Back to the queue, at its head.
        if let Some(byte) = table::byte(addr) {
            byte.fetch_and(!BUSY, AcqRel);
        }
        let free = |place: &&AtomicU64| place.compare_exchange(0, addr, AcqRel, Relaxed).is_ok();
        if WANTED.iter().find(free).is_some() {
            WANTED_COUNT.fetch_add(1, SeqCst);
        }
    }
    WAITING.fetch_add(1, SeqCst);
    loop {
        let word = ENDED.load(SeqCst);
        if table::get(addr) & STORE == 0 || RUNNING.load(SeqCst) == 0 {
            break;
        }
        // The timeout is for a writer that died.
        let second = [1u64, 0];
        futex(libc::FUTEX_WAIT, word, &second);
    }
    WAITING.fetch_sub(1, SeqCst);
}

/// The pages of a range are about to go: they are copied aside, or waited for.
pub fn settle(start: u64, end: u64) {
    if RUNNING.load(Relaxed) == 0 {
        return;
    }
    table::runs(start, end, |from, to, state| {
        if state & STORE != 0 {
            (from..to)
                .step_by(PAGE as usize)
                .filter(|&page| table::get(page) & STORE != 0)
                .for_each(before_write);
        }
    });
}

/// What the writer is to store next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// Where the pages belong.
    pub addr: u64,
    pub npages: u64,
    /// Where their contents are: the same address, or a copy in the reserve.
    pub at: u64,
}

/// A storing in progress. Helper thread.
pub struct Storing {
    /// What was protected for it, to be opened in the end.
    guarded: Vec<(u64, u64)>,
    /// What is to be stored, and how far the writer has come.
    runs: Vec<(u64, u64)>,
    next: usize,
    /// Copies that the writer has taken.
    copies: usize,
    /// A tracker watches the same pages by protection: they stay closed.
    watched: bool,
}

/// A gap up to this long is protected as well: mappings are dear.
const GAP: u64 = 16 * PAGE;

fn guard(vma: &VmaState, (start, end): (u64, u64)) -> bool {
    let prot = vma.prot as i32 & !libc::PROT_WRITE;
    // SAFETY: memory of the program, which is stopped.
    check(unsafe { syscall!(libc::SYS_mprotect, start, end - start, prot) }).is_ok()
}

/// Protects the pages of `dirty` that can be; the others are returned and must be copied
/// during the stop. The world is stopped. `open`: ranges that must not be protected
/// (`mprotect::windows`), ascending. `watched`: the tracker is `mprotect`.
pub fn protect(
    pieces: &[Piece],
    dirty: &Dirty,
    open: &[(u64, u64)],
    watched: bool,
) -> Result<(Storing, Vec<(u64, u64)>), TrackError> {
    let fail = |call| move |errno| TrackError::Call { call, errno };
    if !table::exists() {
        table::create().map_err(fail("mmap"))?;
        // As for `mprotect`: areas with flags of their own (of the program, and our page that
        // a fork wipes) must not be taken as one with their neighbours.
        for piece in pieces {
            table::mark_border(piece.vma.start);
            table::mark_border(piece.vma.end);
        }
    }
    super::mprotect::switch_on().map_err(fail("rt_sigaction"))?;
    // The program would miss it: threads can wait as well.
    if COPIES.load(Relaxed).is_null() && headroom::ample(RESERVE as u64 * PAGE) {
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        );
        let len = RESERVE as u64 * PAGE;
        let at = place::lasting(len, prot, flags).map_err(fail("mmap"))?;
        COPIES.store(at as *mut u8, SeqCst);
    }
    COPIED.iter().for_each(|place| place.store(0, Relaxed));
    WANTED.iter().for_each(|place| place.store(0, Relaxed));
    WANTED_COUNT.store(0, Relaxed);
    let room = !COPIES.load(Relaxed).is_null();
    GIVEN.store(if room { 0 } else { usize::MAX / 2 }, SeqCst);
    LOST.store(0, SeqCst);
    // SAFETY: no arguments.
    RUNNING.store(unsafe { syscall!(libc::SYS_getpid) } as u32, SeqCst);

    let mut storing = Storing {
        guarded: Vec::new(),
        runs: Vec::new(),
        next: 0,
        copies: 0,
        watched,
    };
    let mut rest = Vec::new();
    for piece in pieces {
        let vma = &piece.vma;
        let private = !matches!(
            vma.kind,
            VmaKind::Shared { .. } | VmaKind::FileShared { .. }
        );
        let rw = (libc::PROT_READ | libc::PROT_WRITE) as u32;
        let can = private && vma.prot & rw == rw && vma.kind != VmaKind::Stack;
        let mut wanted: Vec<(u64, u64)> = Vec::new();
        for run in dirty.within(vma.start, vma.end) {
            if run.change == Change::Present {
                wanted.push((run.start, run.end));
            }
        }
        if !can || !table::prepare(vma.start, vma.end) {
            rest.extend(wanted);
            continue;
        }
        let mut kept = Vec::new();
        super::blank::without(&wanted, open, |from, to| kept.push((from, to)));
        super::blank::without(&wanted, &kept, |from, to| rest.push((from, to)));
        let exec = match vma.prot & libc::PROT_EXEC as u32 {
            0 => 0,
            _ => EXEC,
        };
        // Joined over small gaps, never over what must stay open.
        let mut at = 0;
        while at < kept.len() {
            let (start, mut end) = kept[at];
            let mut last = at;
            while let Some(&(from, to)) = kept.get(last + 1)
                && from - end <= GAP
                && !open.iter().any(|w| w.0 < from && end < w.1)
            {
                end = to;
                last += 1;
            }
            if guard(vma, (start, end)) {
                table::runs(start, end, |from, to, state| {
                    table::set(from, to, state & !OPEN | WATCHED | exec);
                });
                for &(from, to) in &kept[at..=last] {
                    table::set(from, to, WATCHED | STORE | exec);
                }
                storing.guarded.push((start, end));
                storing.runs.extend_from_slice(&kept[at..=last]);
            } else {
                rest.extend_from_slice(&kept[at..=last]);
            }
            at = last + 1;
        }
    }
    rest.sort_unstable();
    Ok((storing, rest))
}

impl Storing {
    /// The next run: what a thread waits for, else copies, else the next in order. `None`:
    /// nothing is left to take.
    pub fn take_next(&mut self) -> Option<Taken> {
        loop {
            if WANTED_COUNT.load(SeqCst) != 0
                && let Some(taken) = self.wanted()
            {
                return Some(taken);
            }
            if let Some(taken) = self.in_order() {
                return Some(taken);
            }
            if let Some(taken) = self.copy() {
                return Some(taken);
            }
            // A thread may be in the middle of copying a page aside.
            let given = GIVEN.load(SeqCst).min(RESERVE);
            if self.copies >= given && !self.any_busy() {
                // No copy can begin any more: nothing is to be stored.
                if self.copies >= GIVEN.load(SeqCst).min(RESERVE) {
                    return None;
                }
            }
            let pause = [0u64, 20_000];
            // SAFETY: a time of ours.
            unsafe { syscall!(libc::SYS_nanosleep, &raw const pause, 0) };
        }
    }

    fn wanted(&mut self) -> Option<Taken> {
        for place in &WANTED {
            let addr = place.load(Acquire);
            if addr == 0 {
                continue;
            }
            place.store(0, Release);
            WANTED_COUNT.fetch_sub(1, SeqCst);
            if claim(addr) {
                return Some(Taken {
                    addr,
                    npages: 1,
                    at: addr,
                });
            }
        }
        None
    }

    fn in_order(&mut self) -> Option<Taken> {
        while let Some((start, end)) = self.runs.get_mut(self.next) {
            while *start < *end {
                let addr = *start;
                *start += PAGE;
                if !claim(addr) {
                    continue;
                }
                let mut npages = 1;
                while npages < TAKE && *start < *end && claim(*start) {
                    *start += PAGE;
                    npages += 1;
                }
                return Some(Taken {
                    addr,
                    npages,
                    at: addr,
                });
            }
            self.next += 1;
        }
        None
    }

    fn copy(&mut self) -> Option<Taken> {
        let addr = COPIED.get(self.copies)?.load(Acquire);
        if addr == 0 {
            return None;
        }
        let at = COPIES.load(Relaxed) as u64 + self.copies as u64 * PAGE;
        self.copies += 1;
        Some(Taken {
            addr,
            npages: 1,
            at,
        })
    }

    /// Is a page claimed by a thread that has not finished, or went back to the queue?
    fn any_busy(&mut self) -> bool {
        let mut busy = false;
        for &(start, end) in &self.guarded {
            table::runs(start, end, |from, _, state| {
                if state & STORE != 0 {
                    busy = true;
                    // Given back after the writer had passed it.
                    if state & BUSY == 0 {
                        self.runs.push((from, from + PAGE));
                    }
                }
            });
        }
        busy
    }

    /// A page whose content could not be saved before it changed.
    pub fn lost(&self) -> Option<u64> {
        Some(LOST.load(SeqCst)).filter(|&addr| addr != 0)
    }

    /// The contents are on their way into the image: the pages may be written.
    pub fn stored(&mut self, taken: Taken) {
        if taken.at == taken.addr {
            for k in 0..taken.npages {
                done(taken.addr + k * PAGE);
            }
            ended();
        }
    }

    /// All is stored (or given up): what is still protected is opened, unless a tracker
    /// watches it. The program runs.
    pub fn finish(self) {
        for &(start, end) in &self.guarded {
            table::runs(start, end, |from, to, state| {
                if state & STORE != 0 {
                    (from..to).step_by(PAGE as usize).for_each(done);
                }
            });
        }
        RUNNING.store(0, SeqCst);
        ended();
        if !self.watched {
            for &(start, end) in &self.guarded {
                // One at a time: a thread that faults meanwhile waits for the lock.
                let _lock = Lock::take();
                open_again(start, end);
            }
        }
    }
}

/// Gives pages back as the program believes them to be. Under the lock.
fn open_again(start: u64, end: u64) {
    table::runs(start, end, |from, to, state| {
        if state & WATCHED != 0 {
            let exec = if state & EXEC != 0 {
                libc::PROT_EXEC
            } else {
                0
            };
            let prot = libc::PROT_READ | libc::PROT_WRITE | exec;
            // SAFETY: pages that we have protected and nobody has changed since (their
            // bytes say so).
            unsafe { syscall!(libc::SYS_mprotect, from, to - from, prot) };
        }
        table::set(from, to, 0);
    });
}

#[cfg(test)]
mod tests;
