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
//! mmap, munmap and brk need no hook for that: a new mapping over a listed range is seen to
//! be none of ours, and the heap grows by anonymous memory by itself.

use super::frame::{CallFrame, Verdict};
use super::maps::{Mapping, Maps};
use super::{ids, ranges, user};
use crate::agent::headroom;
use crate::agent::place;
use crate::agent::region;
use crate::agent::state::{InHook, is_agents_process};
use crate::agent::track::fault;
use crate::image::state::vma_flag;
use ckpt_sys::{raw::check, syscall};
use std::sync::atomic::{AtomicU32, Ordering::*};

mod noted;
mod remap;

pub use super::ranges::{set_image_files, set_image_ranges};
pub use noted::*;
pub use remap::mremap;

const PAGE: u64 = 4096;
const DONTNEED: i32 = libc::MADV_DONTNEED;
const DONTNEED_LOCKED: i32 = 24;
const MADV_COLLAPSE: i32 = 25;
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
        let copy = place::passing(len, 3, ANONYMOUS)?;
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

/// May the call change the flags of what is mapped at some place? Once ranges have flags that
/// count (`special_advice_seen`), whatever puts a mapping where another was may.
fn changes_flags(frame: &CallFrame) -> bool {
    const NO_FLAGS: [i32; 14] = [
        libc::MADV_WILLNEED,
        DONTNEED,
        libc::MADV_FREE,
        libc::MADV_REMOVE,
        libc::MADV_COLD,
        libc::MADV_PAGEOUT,
        libc::MADV_POPULATE_READ,
        libc::MADV_POPULATE_WRITE,
        DONTNEED_LOCKED,
        MADV_COLLAPSE,
        libc::MADV_HWPOISON,
        libc::MADV_SOFT_OFFLINE,
        GUARD_INSTALL,
        GUARD_REMOVE,
    ];
    match frame.rax {
        libc::SYS_madvise => !NO_FLAGS.contains(&(frame.args[2] as i32)),
        libc::SYS_mlock | libc::SYS_mlock2 | libc::SYS_munlock => true,
        libc::SYS_mlockall | libc::SYS_munlockall => true,
        libc::SYS_mmap => {
            let flagged = libc::MAP_LOCKED | libc::MAP_GROWSDOWN;
            special_advice_seen() || frame.args[3] as i32 & flagged != 0
        }
        libc::SYS_mremap | libc::SYS_shmat => special_advice_seen(),
        _ => false,
    }
}

/// Is it made by the hook, which no stop interrupts? What changes flags, and what is handled by
/// the list of image mappings: another life has another list, so a thread that was stopped between
/// the look at it and the call would go by what is not so any more (and by the list's old place:
/// that was its death). Not on a stack that the call may take away.
pub fn is_made_here(frame: &CallFrame) -> bool {
    /// What the hook uses of the program's stack.
    const OWN_FRAMES: u64 = 16 << 10;
    let here = frame as *const CallFrame as u64;
    let [addr, len, third, flags, new, _] = frame.args;
    let under = |start: u64, len: u64| {
        start <= here && here - OWN_FRAMES.min(here) < start.saturating_add(len)
    };
    match frame.rax {
        libc::SYS_madvise => !under(addr, len),
        libc::SYS_mremap => {
            let onto = flags & libc::MREMAP_FIXED as u64 != 0 && under(new, third);
            !under(addr, len) && !onto
        }
        libc::SYS_mprotect | libc::SYS_pkey_mprotect => third & libc::PROT_EXEC as u64 != 0,
        libc::SYS_mmap => {
            let onto = flags & libc::MAP_FIXED as u64 != 0 && under(addr, len);
            changes_flags(frame) && !onto
        }
        _ => changes_flags(frame),
    }
}

/// Such a call. That flags may have changed is noted when they have: the helper may have read those
/// of before while the call was being made.
pub fn make_here(frame: &mut CallFrame, handle: fn(&mut CallFrame) -> Verdict) -> Verdict {
    let _hook = InHook::enter();
    let flags = changes_flags(frame);
    carry_out(frame, handle);
    if flags {
        note_advice();
    }
    Verdict::Done
}

/// What a thread that is stopped on its way to the kernel looks at again: it may be in another life
/// then.
pub fn looks_again(nr: i64) -> bool {
    matches!(
        nr,
        libc::SYS_madvise | libc::SYS_mremap | libc::SYS_mprotect | libc::SYS_pkey_mprotect
    )
}

/// The hook's own doing, and the call itself where it leaves that to its caller.
fn carry_out(frame: &mut CallFrame, handle: fn(&mut CallFrame) -> Verdict) {
    if handle(frame) == Verdict::Forward {
        let [a, b, c, d, e, f] = frame.args;
        // SAFETY: the program's own call.
        frame.rax = unsafe { syscall!(frame.rax, a, b, c, d, e, f) as i64 };
    }
}

/// A call that changes mappings while pages are protected: no stop comes between giving the pages
/// back and the call itself, which is therefore made here.
pub fn change_map(frame: &mut CallFrame, handle: fn(&mut CallFrame) -> Verdict) -> Verdict {
    let _hook = InHook::enter();
    release_for(frame.rax, &frame.args);
    if let Some(verdict) = marked_mmap(frame) {
        return verdict;
    }
    carry_out(frame, handle);
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
        note_unseen();
    }
    if advice == GUARD_INSTALL {
        note_guards();
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
        libc::MADV_REMOVE => {
            let _guard = InHook::enter();
            remove(frame, end)
        }
        _ => Verdict::Forward,
    }
}

/// MADV_REMOVE of a range up to `end`, where there may be memory from our image: that is anonymous
/// to the program, which cannot be removed. What lies before it is done, as the kernel does it.
fn remove(frame: &mut CallFrame, end: u64) -> Verdict {
    let [addr, _, advice, ..] = frame.args;
    let mut first = None;
    let looked = Maps::open().and_then(|mut maps| {
        let mut at = addr;
        while let Some(m) = maps.at(at)?.filter(|m| m.start < end && first.is_none()) {
            first = is_image(&m).then_some(m.start.max(addr));
            at = m.end;
        }
        Ok(())
    });
    if looked.is_err() {
        return done(frame, Err(libc::EAGAIN));
    }
    let Some(first) = first else {
        return Verdict::Forward;
    };
    if first > addr {
        // SAFETY: part of the program's own request.
        let ret = unsafe { syscall!(libc::SYS_madvise, addr, first - addr, advice) };
        if let Err(e) = check(ret) {
            return done(frame, Err(e));
        }
    }
    done(frame, Err(libc::EINVAL))
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

/// mmap: before one that grows down.
pub fn mmap(frame: &CallFrame) {
    let flags = frame.args[3] as i32;
    if flags & libc::MAP_GROWSDOWN != 0 {
        note_grows_down();
    }
    if flags & libc::MAP_LOCKED != 0 {
        note_special_advice();
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
    // SAFETY: the program's own request.
    let ret = unsafe { syscall!(frame.rax, addr, len, prot, key) };
    if ret == -(libc::EACCES as isize) && convert(addr, end).is_ok() {
        return Verdict::Forward;
    }
    frame.rax = ret as i64;
    Verdict::Done
}

#[cfg(test)]
mod tests;
