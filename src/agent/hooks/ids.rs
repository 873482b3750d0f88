//! Process and thread ids after a restore that could not have the old ones (an
//! ordinary user has no `set_tid`): the program goes on seeing its old pid and tids,
//! the kernel its new ones.
//!
//! * **Tables** here: old -> real and back, written once before the threads run, plus
//!   a few late entries. `ids::calls` translates arguments and results,
//!   `ids::paths` the paths below /proc. Nothing happens unless
//!   `AGENT.ids_translated`.
//! * **Own ids** are told by the kernel's answer and the thread's block, not by the
//!   table: `getpid` is the old pid where the real one is `AGENT.real_pid`, so forked
//!   and vforked children see their own. `gettid` is `ThreadBlock::virtual_tid` where
//!   positive; a thread born since the restore is marked in its first call and has the
//!   kernel's, so an id that the kernel gives again after a restored thread's
//!   death is never mistaken for it; all others are looked up.
//! * **Threads born later** have real ids, which the kernel wrote into glibc's thread
//!   descriptor (`pd->tid`). If such an id equals an old one in the table, two threads
//!   would share it, and glibc's mutexes know owners by it. So a new thread, in its first
//!   call (set_robust_list), takes an id above the kernel's limit of 2^22 instead,
//!   which no real thread can have, and writes that into `pd->tid`.
//!
//! Limits (the program can see the difference): a *child process* whose real pid
//! equals one of our old ids cannot be signalled by that pid; `waitid`/SIGCHLD at the
//! new starter, `si_pid` of signals that the process sends to its group or another thread
//! and takes by sigwaitinfo or signalfd (handlers see the right one: [`super::senders`]), message
//! queue and semaphore `*pid` fields, the contents of /proc files and listings of /proc/self/task, and
//! `SCM_CREDENTIALS` show real ids; `clock_gettime` of another thread's CPU clock goes
//! through the vdso with the old id and fails; programs that the process executes see real
//! ids. PI futexes and robust lists: `ids::locks`.

pub mod calls;
pub mod locks;
pub mod paths;

use crate::agent::place;
use crate::agent::state::{AGENT, InHook, process};
use ckpt_sys::{syscall, tls::thread_block};
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicUsize, Ordering::*};

#[derive(Clone, Copy)]
struct Pair {
    from: i32,
    to: i32,
}

static TO_REAL: AtomicPtr<Pair> = AtomicPtr::new(std::ptr::null_mut());
static TO_VIRTUAL: AtomicPtr<Pair> = AtomicPtr::new(std::ptr::null_mut());
static COUNT: AtomicUsize = AtomicUsize::new(0);
/// Bytes of the tables' one mapping.
static TABLES_LEN: AtomicUsize = AtomicUsize::new(0);

/// Threads that were born with an id of the table: (virtual, real).
static LATE: [[AtomicI32; 2]; 256] = [const { [const { AtomicI32::new(0) }; 2] }; 256];
static LATE_USED: AtomicUsize = AtomicUsize::new(0);

/// The kernel's ids end at PID_MAX_LIMIT = 2^22.
const FIRST_LATE: i32 = 1 << 22;

/// Which restore this is; `virtual_tid == -EPOCH` marks a thread born since.
static EPOCH: AtomicU32 = AtomicU32::new(1);

/// `virtual_tid` of a thread born in this life.
fn born_now() -> i32 {
    -(EPOCH.load(Relaxed) as i32)
}

/// (old, new) of the process group and the session; 0 = not translated.
static GROUP: [AtomicI32; 2] = [const { AtomicI32::new(0) }; 2];
static SESSION: [AtomicI32; 2] = [const { AtomicI32::new(0) }; 2];

fn find(table: &AtomicPtr<Pair>, id: i32) -> Option<i32> {
    // No image may hold a thread with the table's address in its registers: the next life has
    // another table at another place.
    let _hook = InHook::enter();
    let at = table.load(Acquire);
    if at.is_null() {
        return None;
    }
    // SAFETY: mapped by `set_identity` for COUNT pairs, for the process's life.
    let pairs = unsafe { std::slice::from_raw_parts(at, COUNT.load(Relaxed)) };
    let found = pairs.binary_search_by_key(&id, |p| p.from).ok()?;
    Some(pairs[found].to)
}

/// After a restore, before the program's threads run: every thread's `(old, new)` id
/// (the main thread's included). Sets the agent's pid words and turns translation
/// on if any id differs.
pub fn set_identity(pairs: &[(i32, i32)], old_pid: i32, new_pid: i32) -> Result<(), i32> {
    let count = pairs.len() + 1;
    let half = (count * size_of::<Pair>()).next_multiple_of(4096).max(4096);
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let at = place::lasting(2 * half as u64, prot, flags)? as usize;
    // SAFETY: a fresh mapping with room for both tables, filled before it is published.
    unsafe {
        let forth = std::slice::from_raw_parts_mut(at as *mut Pair, count);
        let back = std::slice::from_raw_parts_mut((at + half) as *mut Pair, count);
        // The process's own pair too, in case its first thread is gone.
        let own = (old_pid, new_pid);
        for (i, &(old, new)) in pairs.iter().chain([&own]).enumerate() {
            forth[i] = Pair { from: old, to: new };
            back[i] = Pair { from: new, to: old };
        }
        forth.sort_unstable_by_key(|p| p.from);
        back.sort_unstable_by_key(|p| p.from);
        let old = TO_REAL.swap(std::ptr::null_mut(), AcqRel);
        TO_VIRTUAL.store(std::ptr::null_mut(), Release);
        if !old.is_null() {
            // The tables of the life before came back with the image.
            syscall!(libc::SYS_munmap, old, TABLES_LEN.load(Relaxed));
        }
        TABLES_LEN.store(2 * half, Relaxed);
        COUNT.store(count, Release);
        TO_REAL.store(forth.as_mut_ptr(), Release);
        TO_VIRTUAL.store(back.as_mut_ptr(), Release);
    }
    for late in &LATE {
        late[0].store(0, Relaxed);
        late[1].store(0, Relaxed);
    }
    LATE_USED.store(0, Relaxed);
    AGENT.pid.store(old_pid, Relaxed);
    AGENT.real_pid.store(new_pid, Relaxed);
    let differs = old_pid != new_pid || pairs.iter().any(|p| p.0 != p.1);
    EPOCH.fetch_add(1, Relaxed);
    AGENT.ids_translated.store(differs, SeqCst);
    Ok(())
}

/// The process group and session that the program knows, and those of its new starter.
pub fn set_groups(old_pgid: i32, new_pgid: i32, old_sid: i32, new_sid: i32) {
    GROUP[0].store(old_pgid, Relaxed);
    GROUP[1].store(new_pgid, Relaxed);
    SESSION[0].store(old_sid, Relaxed);
    SESSION[1].store(new_sid, Relaxed);
}

/// The program's id of a thread of ours that the kernel calls `real` (collectors).
pub fn virtual_tid(real: i32) -> i32 {
    if AGENT.ids_translated.load(Relaxed) {
        to_virtual(real)
    } else {
        real
    }
}

/// Does this call take ids, or tell any? Whether they must be translated may be another matter
/// after a restore: a thread on its way to it looks again.
pub fn names_ids(nr: i64) -> bool {
    calls::NUMBERS.contains(&nr) || paths::CALLS.iter().any(|&(call, _)| call == nr)
}

/// The kernel's id for an id that the program uses; ids that are not ours as they are.
pub fn to_real(id: i32) -> i32 {
    if id <= 0 {
        return id;
    }
    if LATE_USED.load(Relaxed) != 0
        && let Some(late) = LATE.iter().find(|l| l[0].load(Acquire) == id)
    {
        return late[1].load(Relaxed);
    }
    find(&TO_REAL, id).unwrap_or(id)
}

/// The program's id for one that the kernel shows.
pub fn to_virtual(id: i32) -> i32 {
    if id <= 0 {
        return id;
    }
    if LATE_USED.load(Relaxed) != 0
        && let Some(late) = LATE.iter().find(|l| l[1].load(Acquire) == id)
    {
        return late[0].load(Relaxed);
    }
    find(&TO_VIRTUAL, id).unwrap_or(id)
}

fn pair(of: &[AtomicI32; 2]) -> (i32, i32) {
    (of[0].load(Relaxed), of[1].load(Relaxed))
}

/// A process group or session id that the program uses.
pub fn group_to_real(id: i32) -> i32 {
    for (old, new) in [pair(&GROUP), pair(&SESSION)] {
        if id > 0 && id == old {
            return new;
        }
    }
    to_real(id)
}

fn shown(id: i32, first: &[AtomicI32; 2], second: &[AtomicI32; 2]) -> i32 {
    for (old, new) in [pair(first), pair(second)] {
        if id > 0 && id == new {
            return old;
        }
    }
    to_virtual(id)
}

/// A process group id as the program knows it.
pub fn group_to_virtual(id: i32) -> i32 {
    shown(id, &GROUP, &SESSION)
}

/// A session id as the program knows it.
pub fn session_to_virtual(id: i32) -> i32 {
    shown(id, &SESSION, &GROUP)
}

/// The process made itself a leader: groups now follow its own id.
fn forget_groups(session_too: bool) {
    GROUP[1].store(0, Relaxed);
    GROUP[0].store(0, Relaxed);
    if session_too {
        SESSION[1].store(0, Relaxed);
        SESSION[0].store(0, Relaxed);
    }
}

/// What getpid returns to the program.
pub fn own_pid() -> i32 {
    let (pid, ours) = process();
    if ours { AGENT.pid.load(Relaxed) } else { pid }
}

/// What gettid returns to the program.
pub fn own_tid() -> i32 {
    // SAFETY: no arguments; the thread's own block.
    unsafe {
        let tid = syscall!(libc::SYS_gettid) as i32;
        let known = (*thread_block()).virtual_tid;
        if !AGENT.ids_translated.load(Relaxed) || known == born_now() {
            tid
        } else if tid == AGENT.real_pid.load(Relaxed) {
            AGENT.pid.load(Relaxed)
        } else if !process().1 {
            tid
        } else if known > 0 {
            known
        } else {
            to_virtual(tid)
        }
    }
}

/// A new thread's first call: sees to it that its id is nobody else's.
fn at_birth() {
    let block = thread_block();
    let (pid, ours) = process();
    // SAFETY: the thread's own block; the kernel writes the address to our variable;
    // `pd->tid` is the thread's own and holds the id that the kernel wrote.
    unsafe {
        let tid = syscall!(libc::SYS_gettid) as i32;
        if !ours || tid == pid {
            return;
        }
        const PR_GET_TID_ADDRESS: i32 = 40;
        let mut at: u64 = 0;
        let ret = syscall!(libc::SYS_prctl, PR_GET_TID_ADDRESS, &raw mut at);
        let known = ret == 0 && at != 0;
        if known && *(at as *const i32) != tid {
            // A restored thread whose birth the checkpoint fell into: it has an old id.
            return;
        }
        (*block).virtual_tid = born_now();
        if !known || find(&TO_REAL, tid).is_none_or(|real| real == tid) {
            return;
        }
        let dead = |real: i32| {
            real == tid || syscall!(libc::SYS_tgkill, pid, real, 0) == -(libc::ESRCH as isize)
        };
        for (i, late) in LATE.iter().enumerate() {
            let real = late[1].load(Relaxed);
            if (real == 0 || dead(real))
                && late[1].compare_exchange(real, tid, AcqRel, Relaxed).is_ok()
            {
                let id = FIRST_LATE + 1 + i as i32;
                late[0].store(id, Release);
                LATE_USED.store(1, Release);
                (*block).virtual_tid = id;
                (*(at as *const AtomicI32)).store(id, SeqCst);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
