//! Memory calls that would show that a lazily restored range is a private mapping
//! of our image and not the anonymous memory the program knows.
//!
//! | call | on a file mapping | here |
//! |---|---|---|
//! | MADV_DONTNEED, MADV_FREE | brings back the image's bytes / EINVAL | replaced by an anonymous mapping: zeros |
//! | MADV_WIPEONFORK, DONTFORK, MERGEABLE | EINVAL, or lost at the next discard | copied to anonymous memory first |
//! | guard pages | the image's bytes come back when they are removed | replaced by an anonymous mapping first |
//! | mremap | EFAULT over several mappings; growth shows the image's next bytes | moved piece by piece, the tail anonymous |
//! | mprotect(PROT_EXEC) | EACCES when the store is mounted noexec | copied to anonymous memory, tried again |
//!
//! The list of ranges over-reports, so the kernel is asked what a range is before it
//! is changed. Where it cannot be asked (no /proc, no descriptor left) the call
//! fails with EAGAIN or ENOMEM, which it may. Works in forked children. Two threads
//! that write into a range while a third gives it MADV_WIPEONFORK race with the copy.
//!
//! mmap, munmap and brk need no hook: a new mapping over a listed range is seen to
//! be none of ours, and the heap grows by anonymous memory by itself.

use super::frame::{CallFrame, Verdict};
use super::maps::{Mapping, Maps};
use super::{ids, ranges, user};
use crate::agent::headroom;
use crate::agent::region;
use crate::agent::state::{InHook, is_agents_process};
use crate::agent::track::moving::Moving;
use crate::agent::track::{fault, uffd};
use crate::image::state::vma_flag;
use ckpt_sys::{raw::check, syscall};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::*};

pub use super::ranges::{set_image_files, set_image_ranges};

static SPECIAL_ADVICE: AtomicBool = AtomicBool::new(false);
/// Grows with every call that may change the flags of mappings that exist.
static ADVICE: AtomicU32 = AtomicU32::new(0);

/// As long as this number stays the same, flags that were read of a mapping are its flags.
pub fn advice_number() -> u32 {
    ADVICE.load(SeqCst)
}

/// Grows with every call after which pages may change, or cannot be written, without any
/// tracker seeing it: the kernel may take pages with MADV_FREE away later, and guarded pages
/// stay so whatever is discarded.
static UNSEEN: AtomicU32 = AtomicU32::new(0);

/// As long as this number stays the same, trackers see all there is to be seen.
pub fn unseen_number() -> u32 {
    UNSEEN.load(SeqCst)
}

/// Sticky: the program has made guard regions.
static GUARDED: AtomicBool = AtomicBool::new(false);

/// May there be guard regions (MADV_GUARD_INSTALL)?
pub fn guards_seen() -> bool {
    GUARDED.load(Relaxed)
}

/// There are some, made by a call that no hook saw.
pub fn note_guards() {
    GUARDED.store(true, Relaxed);
}

/// Sticky: the program used MADV_DONTFORK, MADV_WIPEONFORK or the mlock family, so
/// the flags of its mappings must be read from smaps.
pub fn special_advice_seen() -> bool {
    SPECIAL_ADVICE.load(Relaxed)
}

/// Sets that flag (also for a restored process whose manifest has such flags).
pub fn note_special_advice() {
    ADVICE.fetch_add(1, SeqCst);
    SPECIAL_ADVICE.store(true, Relaxed);
}

const PAGE: u64 = 4096;
const DONTNEED: i32 = libc::MADV_DONTNEED;
const DONTNEED_LOCKED: i32 = 24;
const GUARD_INSTALL: i32 = 102;
const GUARD_REMOVE: i32 = 103;
const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

fn page_end(addr: u64, len: u64) -> Option<u64> {
    let end = addr.checked_add(len)?.checked_add(PAGE - 1)? & !(PAGE - 1);
    (addr.is_multiple_of(PAGE) && end > addr).then_some(end)
}

/// A private mapping of one of our image files.
fn is_image(m: &Mapping) -> bool {
    !m.shared && m.ino != 0 && ranges::is_image_file(m.dev, m.ino)
}

fn anonymous(addr: u64, len: u64, prot: u32, extra: i32) -> Result<u64, i32> {
    // SAFETY: the caller owns `[addr, addr + len)` or lets the kernel choose.
    let at =
        check(unsafe { syscall!(libc::SYS_mmap, addr, len, prot, ANONYMOUS | extra, -1i32, 0) })?;
    Ok(at as u64)
}

/// Calls `act` for the part of every image mapping inside `[start, end)`.
fn pieces(
    maps: &mut Maps,
    start: u64,
    end: u64,
    mut act: impl FnMut(u64, u64, &Mapping) -> Result<(), i32>,
) -> Result<(), i32> {
    let mut at = start;
    while at < end {
        let Some(m) = maps.at(at)? else { break };
        if m.start >= end {
            break;
        }
        if is_image(&m) {
            act(m.start.max(at), m.end.min(end), &m)?;
        }
        at = m.end;
    }
    ranges::remove(start, end);
    Ok(())
}

/// Image mappings in the range become anonymous memory full of zeros.
fn discard(maps: &mut Maps, start: u64, end: u64) -> Result<(), i32> {
    pieces(maps, start, end, |from, to, m| {
        let flags = ranges::flags_at(from);
        let noreserve = if flags & vma_flag::NORESERVE != 0 {
            libc::MAP_NORESERVE
        } else {
            0
        };
        anonymous(from, to - from, m.prot, libc::MAP_FIXED | noreserve)?;
        // What the program advised for the range goes on being so.
        for (_, advice) in ADVISED.iter().filter(|(flag, _)| flags & flag != 0) {
            // SAFETY: advice for the range just mapped.
            unsafe { syscall!(libc::SYS_madvise, from, to - from, *advice) };
        }
        Ok(())
    })
}

/// Advice that a range mapped from the image may have (see `restore::tape`).
const ADVISED: &[(u32, i32)] = &[
    (vma_flag::HUGEPAGE, libc::MADV_HUGEPAGE),
    (vma_flag::NOHUGEPAGE, libc::MADV_NOHUGEPAGE),
    (vma_flag::DONTDUMP, libc::MADV_DONTDUMP),
    (vma_flag::RANDOM, libc::MADV_RANDOM),
    (vma_flag::SEQUENTIAL, libc::MADV_SEQUENTIAL),
];

/// Image mappings in the range become anonymous memory with the same contents.
fn convert(start: u64, end: u64) -> Result<(), i32> {
    let mut maps = Maps::open()?;
    pieces(&mut maps, start, end, |from, to, m| {
        let len = to - from;
        let copy = anonymous(0, len, 3, 0)?;
        // SAFETY: both ranges are mapped for `len` bytes, readable and writable once
        // the protection was lent; the copy then takes the place of the original.
        unsafe {
            if m.prot & 1 == 0 {
                check(syscall!(libc::SYS_mprotect, from, len, 1))?;
            }
            for page in (0..len).step_by(PAGE as usize) {
                let source = (from + page) as *const [u64; 512];
                if (*source).iter().any(|&w| w != 0) {
                    std::ptr::copy_nonoverlapping(source, (copy + page) as *mut [u64; 512], 1);
                }
            }
            check(syscall!(libc::SYS_mprotect, copy, len, m.prot))?;
            check(syscall!(
                libc::SYS_mremap,
                copy,
                len,
                len,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                from
            ))?;
        }
        Ok(())
    })
}

/// Is it a call that changes mappings (and not the one under the thread's own feet: a
/// thread that ends may unmap the stack that it stands on)?
pub fn changes_map(frame: &CallFrame) -> bool {
    let [addr, len, third, flags, new, _] = frame.args;
    let here = frame as *const CallFrame as u64;
    let below = |start: u64, len: u64| (start..=start.saturating_add(len)).contains(&here);
    match frame.rax {
        libc::SYS_mmap => flags & libc::MAP_FIXED as u64 != 0 && !below(addr, len),
        libc::SYS_mremap => {
            let onto = flags & libc::MREMAP_FIXED as u64 != 0 && below(new, third);
            !below(addr, len) && !onto
        }
        libc::SYS_munmap | libc::SYS_mprotect | libc::SYS_pkey_mprotect | libc::SYS_madvise => {
            !below(addr, len)
        }
        libc::SYS_brk => true,
        _ => false,
    }
}

/// Such a call while pages are protected: no stop comes between giving the pages back and
/// the call itself, which is therefore made here.
pub fn change_map(frame: &mut CallFrame, handle: fn(&mut CallFrame) -> Verdict) -> Verdict {
    let _hook = InHook::enter();
    release_for(frame.rax, &frame.args);
    if let Some(verdict) = marked_mmap(frame) {
        return verdict;
    }
    if handle(frame) == Verdict::Forward {
        let [a, b, c, d, e, f] = frame.args;
        // SAFETY: the program's own call.
        frame.rax = unsafe { syscall!(frame.rax, a, b, c, d, e, f) as i64 };
    }
    Verdict::Done
}

/// A call that changes mappings: what is write-protected for the tracker is given back
/// first, so that the kernel finds the protections that the program knows.
pub fn release_for(nr: i64, args: &[u64; 6]) {
    let [addr, len, third, flags, new, _] = *args;
    match nr {
        libc::SYS_munmap | libc::SYS_mprotect | libc::SYS_pkey_mprotect => {
            fault::release(addr, len)
        }
        libc::SYS_mmap if flags & libc::MAP_FIXED as u64 != 0 => fault::release(addr, len),
        libc::SYS_mremap => {
            fault::release(addr, len);
            if flags & libc::MREMAP_FIXED as u64 != 0 {
                fault::release(new, third);
            }
        }
        libc::SYS_madvise => match third as i32 {
            libc::MADV_WILLNEED => {}
            libc::MADV_DONTNEED | libc::MADV_FREE | libc::MADV_REMOVE => fault::release(addr, len),
            _ => {
                fault::release(addr, len);
                fault::mark_borders(addr, len);
            }
        },
        libc::SYS_mlock | libc::SYS_mlock2 | libc::SYS_munlock => fault::mark_borders(addr, len),
        libc::SYS_brk if addr != 0 => {
            // SAFETY: asks where the heap ends.
            let end = unsafe { syscall!(libc::SYS_brk, 0) } as u64;
            if addr < end {
                fault::release(addr, end - addr);
            }
        }
        _ => {}
    }
}

/// While pages are protected: a new private mapping with flags of its own is a mapping of
/// its own, whatever lies beside it.
pub fn marked_mmap(frame: &mut CallFrame) -> Option<Verdict> {
    const USUAL: i32 = libc::MAP_PRIVATE
        | libc::MAP_ANONYMOUS
        | libc::MAP_FIXED
        | libc::MAP_FIXED_NOREPLACE
        | libc::MAP_POPULATE
        | libc::MAP_STACK
        | libc::MAP_DENYWRITE;
    let [addr, len, prot, flags, fd, offset] = frame.args;
    let private = flags as i32 & libc::MAP_TYPE == libc::MAP_PRIVATE;
    if frame.rax != libc::SYS_mmap || !private || flags as i32 & !USUAL == 0 {
        return None;
    }
    // SAFETY: the program's own request.
    let ret = check(unsafe { syscall!(libc::SYS_mmap, addr, len, prot, flags, fd, offset) });
    if let Ok(at) = ret {
        fault::mark_borders(at as u64, len);
    }
    Some(done(frame, ret.map(|at| at as u64)))
}

fn done(frame: &mut CallFrame, result: Result<u64, i32>) -> Verdict {
    frame.rax = match result {
        Ok(value) => value as i64,
        Err(e) => -i64::from(e),
    };
    Verdict::Done
}

/// madvise(addr, len, advice).
pub fn madvise(frame: &mut CallFrame) -> Verdict {
    let [addr, len, advice, ..] = frame.args;
    let advice = advice as i32;
    if matches!(advice, libc::MADV_DONTFORK | libc::MADV_WIPEONFORK) {
        note_special_advice();
    } else if !matches!(
        advice,
        DONTNEED | DONTNEED_LOCKED | libc::MADV_FREE | libc::MADV_WILLNEED
    ) {
        ADVICE.fetch_add(1, SeqCst);
    }
    // No stop between the number and the call.
    let unseen = matches!(advice, libc::MADV_FREE | GUARD_INSTALL | GUARD_REMOVE);
    let _guard = unseen.then(InHook::enter);
    let make_it = |frame: &mut CallFrame| {
        if !unseen {
            return Verdict::Forward;
        }
        // SAFETY: the program's own request.
        let ret = check(unsafe { syscall!(libc::SYS_madvise, addr, len, advice) });
        done(frame, ret.map(|n| n as u64))
    };
    if unseen {
        UNSEEN.fetch_add(1, SeqCst);
    }
    if advice == GUARD_INSTALL {
        GUARDED.store(true, Relaxed);
    }
    let Some(end) = page_end(addr, len) else {
        return make_it(frame);
    };
    if !ranges::may_overlap(addr, end) {
        return make_it(frame);
    }
    match advice {
        DONTNEED | libc::MADV_FREE | DONTNEED_LOCKED | GUARD_INSTALL => {
            let _guard = InHook::enter();
            let drop_first = match advice {
                libc::MADV_FREE | GUARD_INSTALL => DONTNEED,
                other => other,
            };
            let Ok(mut maps) = Maps::open() else {
                return done(frame, Err(libc::EAGAIN));
            };
            // The kernel judges first (locked ranges, holes) and forgets the pages.
            // SAFETY: the program's own request.
            let ret = check(unsafe { syscall!(libc::SYS_madvise, addr, len, drop_first) });
            if let Err(e) = ret
                && e != libc::ENOMEM
            {
                return done(frame, Err(e));
            }
            if discard(&mut maps, addr, end).is_err() {
                return done(frame, Err(libc::EAGAIN));
            }
            if advice == GUARD_INSTALL {
                return make_it(frame);
            }
            done(frame, ret.map(|v| v as u64))
        }
        libc::MADV_WIPEONFORK | libc::MADV_DONTFORK | libc::MADV_MERGEABLE => {
            let _guard = InHook::enter();
            match convert(addr, end) {
                Ok(()) => Verdict::Forward,
                Err(_) => done(frame, Err(libc::EAGAIN)),
            }
        }
        libc::MADV_REMOVE => done(frame, Err(libc::EINVAL)),
        _ => Verdict::Forward,
    }
}

/// What mlockall has said of memory to come (MCL_FUTURE, MCL_ONFAULT); 0: nothing.
static FUTURE: AtomicU32 = AtomicU32::new(0);

/// The flags for mlockall under which new memory is locked, or 0.
pub fn locked_in_future() -> u32 {
    FUTURE.load(SeqCst)
}

/// mlockall, munlockall: each call decides anew about memory to come. No stop between the call
/// and the note of it.
pub fn mlockall(frame: &mut CallFrame) -> Verdict {
    let _guard = InHook::enter();
    note_special_advice();
    let flags = if frame.rax == libc::SYS_mlockall {
        frame.args[0]
    } else {
        0
    };
    let now = flags as u32 & libc::MCL_CURRENT as u32 != 0;
    if now {
        // All of it counts against RLIMIT_MEMLOCK, what is only reserved as well.
        headroom::make_room(headroom::lockable());
    }
    // SAFETY: the program's own request.
    let ret = check(unsafe { syscall!(frame.rax, flags) });
    if ret.is_ok() {
        if now && is_agents_process() {
            for (start, end) in region::own_ranges() {
                // SAFETY: memory of ours need not be locked.
                unsafe { syscall!(libc::SYS_munlock, start, end - start) };
            }
        }
        let future = flags as u32 & libc::MCL_FUTURE as u32 != 0;
        let kept = (libc::MCL_FUTURE | libc::MCL_ONFAULT) as u32;
        FUTURE.store(if future { flags as u32 & kept } else { 0 }, SeqCst);
    }
    done(frame, ret.map(|v| v as u64))
}

/// Sticky: the program has mappings that grow down. The kernel's list of mappings does not tell,
/// so that VmFlags must be read at each look.
static GROWS_DOWN: AtomicBool = AtomicBool::new(false);

pub fn grows_down_seen() -> bool {
    GROWS_DOWN.load(Relaxed)
}

/// There is one, made by a call that no hook saw.
pub fn note_grows_down() {
    GROWS_DOWN.store(true, Relaxed);
}

/// mmap: before one that grows down.
pub fn mmap(frame: &CallFrame) {
    if frame.args[3] as i32 & libc::MAP_GROWSDOWN != 0 {
        note_grows_down();
        ADVICE.fetch_add(1, SeqCst);
    }
}

/// setrlimit, prlimit64: before a limit of the program's own address space, which what we reserve
/// counts against. (What is reserved and not used counts against no other.) The limit itself stays
/// the program's: children inherit it, and /proc/self/limits shows it.
pub fn limited(frame: &CallFrame) {
    let [resource, limits] = match frame.rax {
        libc::SYS_setrlimit => [frame.args[0], frame.args[1]],
        _ if is_own(frame.args[0] as i32) => [frame.args[1], frame.args[2]],
        _ => return,
    };
    if resource as u32 == libc::RLIMIT_AS
        && limits != 0
        && let Ok([soft, _]) = user::read::<[u64; 2]>(limits)
    {
        let _guard = InHook::enter();
        headroom::make_room(soft);
    }
}

/// Does a call mean the calling process?
fn is_own(pid: i32) -> bool {
    // SAFETY: no arguments.
    pid == 0 || ids::to_real(pid) == unsafe { syscall!(libc::SYS_getpid) } as i32
}

/// mlock, mlock2, munlock.
pub fn mlock(_: &mut CallFrame) -> Verdict {
    note_special_advice();
    Verdict::Forward
}

/// mprotect(addr, len, prot), pkey_mprotect(addr, len, prot, key).
pub fn mprotect(frame: &mut CallFrame) -> Verdict {
    let [addr, len, prot, key, ..] = frame.args;
    let Some(end) = page_end(addr, len) else {
        return Verdict::Forward;
    };
    if prot & libc::PROT_EXEC as u64 == 0 || !ranges::may_overlap(addr, end) {
        return Verdict::Forward;
    }
    let _guard = InHook::enter();
    // SAFETY: the program's own request.
    let ret = unsafe { syscall!(frame.rax, addr, len, prot, key) };
    if ret == -(libc::EACCES as isize) && convert(addr, end).is_ok() {
        return Verdict::Forward;
    }
    frame.rax = ret as i64;
    Verdict::Done
}

/// mremap(old, old_len, new_len, flags, new).
pub fn mremap(frame: &mut CallFrame) -> Verdict {
    let [old, old_len, new_len, flags, new, ..] = frame.args;
    let flags = flags as i32;
    let known = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    let (Some(old_end), Some(new_end)) = (page_end(old, old_len), page_end(old, new_len)) else {
        return Verdict::Forward;
    };
    let moves = flags & (libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP) != 0;
    // A tracker may have registered part of a mapping: for the kernel these are two then.
    let in_parts = ranges::active() || uffd::in_use();
    if !in_parts || flags & !known != 0 || (new_end <= old_end && !moves) {
        return Verdict::Forward;
    }
    let _guard = InHook::enter();
    let _moving = (uffd::in_use() && is_agents_process()).then(Moving::begin);
    let request = Remap {
        old,
        old_len: old_end - old,
        new_len: new_end - old,
        flags,
        new,
    };
    // A kernel that moves several mappings at once may stop halfway.
    if !ranges::may_overlap(old, old_end) && (new_end > old_end || request.is_one()) {
        let ret = request.native();
        // A range that was converted in parts is several mappings.
        if ret != Err(libc::EFAULT) {
            return done(frame, ret);
        }
    }
    let ret = request.by_pieces();
    done(frame, ret)
}

/// A request to mremap, lengths rounded to pages.
struct Remap {
    old: u64,
    old_len: u64,
    new_len: u64,
    flags: i32,
    new: u64,
}

impl Remap {
    fn native(&self) -> Result<u64, i32> {
        // SAFETY: the program's own request.
        let ret = check(unsafe {
            syscall!(
                libc::SYS_mremap,
                self.old,
                self.old_len,
                self.new_len,
                self.flags,
                self.new
            )
        });
        ret.map(|v| v as u64)
    }

    /// Is the range one mapping, or part of one, as far as can be known?
    fn is_one(&self) -> bool {
        let end = self.old + self.old_len;
        match Maps::open().and_then(|mut maps| maps.at(self.old)) {
            Ok(found) => found.is_some_and(|m| m.start <= self.old && end <= m.end),
            Err(_) => true,
        }
    }

    /// The protection of the range if all of it is private memory, anonymous or ours
    /// (`ours`: at least one mapping is).
    fn survey(&self, maps: &mut Maps) -> Result<Option<(u32, bool)>, i32> {
        let (mut at, end) = (self.old, self.old + self.old_len);
        let (mut prot, mut ours) = (0, false);
        let mut before: Option<Mapping> = None;
        while at < end {
            let Some(m) = maps.at(at)?.filter(|m| m.start <= at) else {
                return Ok(None);
            };
            if !m.is_anonymous() && !is_image(&m) {
                // Parts of one mapping of a file, which is not to grow.
                let follows = before.is_none_or(|b| {
                    (b.dev, b.ino, b.shared) == (m.dev, m.ino, m.shared)
                        && b.offset + (b.end - b.start) == m.offset
                });
                if !follows || self.new_len > self.old_len {
                    return Ok(None);
                }
            }
            ours |= is_image(&m);
            prot = m.prot;
            at = m.end;
            before = Some(m);
        }
        Ok(Some((prot, ours)))
    }

    fn by_pieces(&self) -> Result<u64, i32> {
        let fixed = self.flags & libc::MREMAP_FIXED != 0;
        let keep = self.flags & libc::MREMAP_DONTUNMAP != 0;
        let may_move = self.flags & libc::MREMAP_MAYMOVE != 0;
        let mut maps = Maps::open().map_err(|_| libc::ENOMEM)?;
        let Some((prot, ours)) = self.survey(&mut maps).map_err(|_| libc::ENOMEM)? else {
            return self.native();
        };
        if ((fixed || keep) && !may_move) || (keep && self.old_len != self.new_len) {
            return Err(libc::EINVAL);
        }
        let grown = self.new_len.saturating_sub(self.old_len);
        if !fixed && !keep {
            let tail = self.old + self.old_len;
            match anonymous(tail, grown, prot, libc::MAP_FIXED_NOREPLACE) {
                Ok(at) if at == tail => return Ok(self.old),
                // A kernel that does not know the flag took it for a hint.
                Ok(at) => unmap(at, grown),
                Err(_) => {}
            }
            if !may_move {
                return Err(libc::ENOMEM);
            }
        }
        let target = self.reserve(fixed)?;
        let moved = self.old_len.min(self.new_len);
        let mode = if keep { libc::MREMAP_DONTUNMAP } else { 0 };
        if let Err(e) = move_pieces(&mut maps, self.old, moved, target, mode) {
            if !fixed {
                unmap(target, self.new_len);
            }
            return Err(e);
        }
        if grown != 0 {
            anonymous(target + moved, grown, prot, libc::MAP_FIXED)?;
        }
        if self.old_len > moved {
            unmap(self.old + moved, self.old_len - moved);
        }
        if keep && ours {
            // What stays behind must be empty, not the image's again.
            discard(&mut maps, self.old, self.old + self.old_len)?;
        }
        ranges::remove(self.old, self.old + self.old_len);
        if ours {
            ranges::add_moved(target, target + moved);
        }
        Ok(target)
    }

    /// An empty place of the new length.
    fn reserve(&self, fixed: bool) -> Result<u64, i32> {
        if !fixed {
            return anonymous(0, self.new_len, 0, libc::MAP_NORESERVE);
        }
        let end = self.new.checked_add(self.new_len).ok_or(libc::EINVAL)?;
        if !self.new.is_multiple_of(PAGE) || (self.new < self.old + self.old_len && self.old < end)
        {
            return Err(libc::EINVAL);
        }
        anonymous(
            self.new,
            self.new_len,
            0,
            libc::MAP_FIXED | libc::MAP_NORESERVE,
        )
    }
}

fn unmap(addr: u64, len: u64) {
    // SAFETY: a range of the caller's.
    unsafe { syscall!(libc::SYS_munmap, addr, len) };
}

/// Moves every mapping of `[from, from + len)` to `to`; on failure they are all back.
fn move_pieces(maps: &mut Maps, from: u64, len: u64, to: u64, mode: i32) -> Result<(), i32> {
    let mut at = from;
    while at < from + len {
        let step = match maps.at(at)? {
            Some(m) if m.start <= at => m.end.min(from + len) - at,
            _ => return Err(libc::EFAULT),
        };
        // SAFETY: the target is a reservation of ours.
        let ret = check(unsafe {
            syscall!(
                libc::SYS_mremap,
                at,
                step,
                step,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | mode,
                to + (at - from)
            )
        });
        if let Err(e) = ret {
            if mode == 0 && at > from {
                let _ = move_pieces(maps, to, at - from, from, 0);
            }
            return Err(e);
        }
        at += step;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
