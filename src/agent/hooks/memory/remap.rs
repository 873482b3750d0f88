//! mremap of what are several mappings to the kernel and one to the program, and where a tracker
//! watches what is moved.
//!
//! Called by the hook, in any thread; takes no lock of the program's.

use super::{PAGE, anonymous, discard, done, is_image, page_end};
use crate::agent::hooks::frame::{CallFrame, Verdict};
use crate::agent::hooks::maps::{Mapping, Maps};
use crate::agent::hooks::ranges;
use crate::agent::state::{AGENT, InHook, is_agents_process};
use crate::agent::track::fault;
use crate::agent::track::moving::Moving;
use crate::agent::track::uffd;
use ckpt_sys::{raw::check, syscall};
use std::sync::atomic::Ordering::Relaxed;

/// mremap(old, old_len, new_len, flags, new).
pub fn mremap(frame: &mut CallFrame) -> Verdict {
    let [old, old_len, new_len, flags, new, ..] = frame.args;
    let flags = flags as i32;
    let known = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    let (Some(old_end), Some(new_end)) = (page_end(old, old_len), page_end(old, new_len)) else {
        return Verdict::Forward;
    };
    let moves = flags & (libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP) != 0;
    // A tracker may have registered part of a mapping, or have protected it for a while: for the
    // kernel these are two then. They still are after a restore, whatever tracks in this life.
    let split = ranges::active() || uffd::in_use() || fault::active();
    let in_parts = split || AGENT.has_store.load(Relaxed);
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
            return self.several(&mut maps);
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
        if !keep {
            // Before the place is left: then it is another thread's.
            ranges::remove(self.old, self.old + self.old_len);
        }
        if let Err(e) = move_pieces(&mut maps, self.old, moved, target, mode) {
            if ours && !keep {
                ranges::add_moved(self.old, self.old + self.old_len);
            }
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
        if ours {
            ranges::add_moved(target, target + moved);
        }
        Ok(target)
    }

    /// What is not one mapping to the program either. Since Linux 6.17 several are moved at once, but
    /// none that is registered with userfaultfd: the kernel stopped there, with half of them moved.
    fn several(&self, maps: &mut Maps) -> Result<u64, i32> {
        let just_moved = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let (mut at, end, mut count) = (self.old, self.old + self.old_len, 0);
        let mut ours = false;
        while at < end
            && let Some(m) = maps.at(at).map_err(|_| libc::ENOMEM)?
            && m.start <= at
        {
            (at, count) = (m.end, count + 1);
            ours |= is_image(&m);
        }
        if at < end || count < 2 || self.old_len != self.new_len || self.flags != just_moved {
            return self.native();
        }
        let target = self.reserve(true)?;
        ranges::remove(self.old, end);
        let moved = move_pieces(maps, self.old, self.old_len, target, 0);
        if ours {
            let at = moved.map_or(self.old, |()| target);
            ranges::add_moved(at, at + self.old_len);
        }
        moved.map(|()| target)
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

pub(super) fn unmap(addr: u64, len: u64) {
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
