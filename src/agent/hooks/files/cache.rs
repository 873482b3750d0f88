//! What is known of descriptors since the table began, one word each (`ckpt_fd_state`): the
//! table's number and flags. Stage 1 of the call-site net reads it to send writes that need
//! nothing straight on; only hooks of the agent's process write it.
//!
//! An entry dies with its table (the number), and whenever its number may come to mean
//! another open file ([`forget`], stage 1 itself at close). Setting happens inside a
//! `Recording`. A program that writes to a descriptor in one thread while another closes that
//! very number, unsynchronised, may leave an entry behind: it has no way to know what it writes to.

use super::saved::Map;
use crate::agent::state::AGENT;
use ckpt_sys::callsite::{FD_CACHE, fd_changes, fd_entry, fd_saved, table_word};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::*};

/// No regular file, not open for writing, or left alone.
pub const PASS: u32 = 1;
/// Nothing in this inode needs a pre-image, whatever the offset.
pub const FREE: u32 = 2;
/// Open with O_APPEND: writes go to the end, wherever they were meant to go.
pub const APPEND: u32 = 4;
/// The position is at or behind the size that the file had at the checkpoint.
pub const FORWARD: u32 = 8;
/// A regular file that is not left alone (no help to stage 1).
pub const KNOWN: u32 = 16;
const FLAGS: u32 = 31;
const SHIFT: u32 = 5;

/// Where writes leave their mark that nobody asks for.
static NO_MARK: AtomicU32 = AtomicU32::new(0);
/// Children share open files, and with them positions.
static SHARED: AtomicBool = AtomicBool::new(false);
/// Threads have descriptor tables of their own.
static SEPARATE: AtomicBool = AtomicBool::new(false);
/// Entries from here on are unused.
static END: AtomicUsize = AtomicUsize::new(0);

/// A table has begun (or, with 0, none is open): all entries are void. World stopped.
pub fn begin(number: u32) {
    table_word().store(number << SHIFT, Relaxed);
    SHARED.store(false, Relaxed);
    END.store(0, Relaxed);
}

/// The flags of `fd`; 0: nothing is known.
pub fn flags(fd: i32) -> u32 {
    let entry = usize::try_from(fd).ok().and_then(fd_entry);
    let Some((state, _)) = entry else { return 0 };
    let value = state.load(Relaxed) ^ table_word().load(Relaxed);
    if value <= FLAGS { value } else { 0 }
}

/// To be asked before a descriptor is looked at; [`set`] does nothing when descriptors have
/// changed their meaning since.
pub fn stamp() -> u32 {
    fd_changes().load(Acquire)
}

/// The saved blocks of the inode behind a descriptor; valid where the entry has [`KNOWN`].
/// Stage 1 reads the pointer too: a [`Map`] begins with what that wants.
fn map_of(fd: usize) -> *const Map {
    fd_saved(fd).map_or(std::ptr::null(), |map| map.load(Acquire).cast())
}

/// What is saved of the inode behind `fd`, and where a write leaves its mark. To be called, and
/// its result used, inside an `InHook`.
pub fn saved(fd: i32) -> Option<(&'static Map, &'static AtomicU32)> {
    if flags(fd) & KNOWN == 0 {
        return None;
    }
    let index = usize::try_from(fd).ok()?;
    let map = map_of(index);
    let mark = fd_entry(index)?.1.load(Relaxed);
    if map.is_null() || mark.is_null() || flags(fd) & KNOWN == 0 {
        return None;
    }
    // SAFETY: set for the open table, and both live as long as that, which is no
    // shorter than the caller's `InHook`.
    Some(unsafe { (&*map, AtomicU32::from_ptr(mark)) })
}

/// Was the inode behind `fd` made since the table began, so that nothing done through it
/// needs a record? Such a call may be sent on: should a checkpoint come before it is executed,
/// it comes here again.
pub fn is_born(fd: i32) -> bool {
    let Ok(index) = usize::try_from(fd) else {
        return false;
    };
    flags(fd) & KNOWN != 0
        && std::ptr::eq(map_of(index), super::saved::born())
        && flags(fd) & KNOWN != 0
}

/// Notes what is known of `fd`; `mark` is the inode's, where writes that pass by leave
/// word. Inside a `Recording`.
pub fn set(fd: i32, flags: u32, mark: Option<*mut u32>, stamp: u32) {
    set_with_map(fd, flags, mark, std::ptr::null(), stamp);
}

/// The same, with the inode's saved blocks.
pub fn set_with_map(fd: i32, flags: u32, mark: Option<*mut u32>, map: *const Map, stamp: u32) {
    let word = table_word().load(Relaxed);
    // Without the net a close would not be seen.
    if word == 0 || !AGENT.net_installed.load(Relaxed) || SEPARATE.load(Relaxed) {
        return;
    }
    let Ok(index) = usize::try_from(fd) else {
        return;
    };
    let Some((state, hot)) = fd_entry(index) else {
        return;
    };
    let flags = if SHARED.load(Relaxed) {
        flags & !FORWARD
    } else {
        flags
    };
    hot.store(mark.unwrap_or(NO_MARK.as_ptr()), Relaxed);
    if let Some(place) = fd_saved(index) {
        place.store(map.cast_mut().cast(), Release);
    }
    END.fetch_max(index + 1, Relaxed);
    if fd_changes().load(Acquire) == stamp {
        state.store(word | (flags & FLAGS), SeqCst);
        if fd_changes().load(SeqCst) != stamp {
            state.store(0, Relaxed);
        }
    }
}

/// `fd` may mean something else from now on.
pub fn forget(fd: i32) {
    if let Some((state, _)) = usize::try_from(fd).ok().and_then(fd_entry) {
        state.store(0, SeqCst);
        fd_changes().fetch_add(1, SeqCst);
    }
}

/// The same for a range of descriptors.
pub fn forget_range(first: u32, last: u32) {
    let end = (last as usize).saturating_add(1).min(FD_CACHE);
    for fd in first as usize..end {
        forget(fd as i32);
    }
}

/// Some open file's position may go back: descriptors may share it.
pub fn forget_positions() {
    for fd in 0..END.load(Relaxed) {
        if let Some((state, _)) = fd_entry(fd)
            && state.load(Relaxed) & FORWARD != 0
        {
            state.fetch_and(!FORWARD, Relaxed);
        }
    }
}

/// A child is about to be born that shares open files.
pub fn child() {
    SHARED.store(true, Relaxed);
    forget_positions();
}

/// Has the program had children since its first table? What they write nobody sees.
pub fn has_had_children() -> bool {
    SHARED.load(Relaxed)
}

/// A thread gets a descriptor table of its own: a number means different things.
pub fn tables_differ() {
    SEPARATE.store(true, Relaxed);
    forget_all();
}

/// The rules have changed: every descriptor is looked at again.
pub fn forget_all() {
    forget_range(0, FD_CACHE as u32);
}
