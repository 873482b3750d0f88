//! Locks whose word holds a thread id, in a process with translated ids: the kernel
//! compares that id with the real one of the caller, and finds owners by it.
//!
//! * **Priority-inheritance futexes** are therefore done here, on plain futexes: a word
//!   holds the id that glibc knows the thread by (`pd->tid`), and a waiter sets
//!   FUTEX_WAITERS and sleeps until the word changes. What is lost is the inheritance
//!   of priority. A thread that was inside the kernel's FUTEX_LOCK_PI at the checkpoint
//!   is sent through its site once more ([`enter_again`]).
//! * **Robust mutexes**: the kernel marks what a dying thread holds by its real id, and
//!   so does not find the words of a restored thread. There is no place to see every
//!   thread's end (glibc's last call cannot be patched), so a waiter looks: a word
//!   with FUTEX_WAITERS and the id of a thread that is gone gets FUTEX_OWNER_DIED.
//!   That is only done to a word that the waiter itself has announced in its robust list
//!   (`list_op_pending`): no other word of that look is touched. A
//!   pthread_mutex_trylock alone does not find out.
//!
//! Waits are cut into slices, to look for dead owners, and since an owner that was restored
//! under its old ids later on unlocks in the kernel, which knows nothing of our waiters.

use super::super::frame::{CallFrame, Verdict};
use super::super::maps::Maps;
use super::super::user;
use super::{own_tid, to_real};
use crate::agent::callsites;
use crate::agent::clock::{self, Clock};
use crate::agent::state::AGENT;
use ckpt_sys::syscall;
use libc::c_int;
use std::sync::atomic::{AtomicU32, Ordering::*};

/// The numbers this file acts on.
pub const NUMBERS: &[libc::c_long] = &[libc::SYS_futex];

const LOCK_PI: c_int = 6;
const UNLOCK_PI: c_int = 7;
const TRYLOCK_PI: c_int = 8;
const LOCK_PI2: c_int = 13;
const PRIVATE: c_int = libc::FUTEX_PRIVATE_FLAG;
const REALTIME: c_int = libc::FUTEX_CLOCK_REALTIME;

const WAITERS: u32 = 0x8000_0000;
const OWNER_DIED: u32 = 0x4000_0000;
const TID_MASK: u32 = 0x3fff_ffff;

const SLICE_NS: u64 = 100_000_000;

fn is_pi(op: u64) -> bool {
    let command = op as c_int & !(PRIVATE | REALTIME);
    matches!(command, LOCK_PI | UNLOCK_PI | TRYLOCK_PI | LOCK_PI2)
}

/// Does this call wait for the owner of a robust mutex? The owner may have died in a life
/// before this one, so that no table knows its id any more.
fn waits_for_owner(at: u64, op: u64, value: u64) -> bool {
    let command = op as c_int & !(PRIVATE | REALTIME);
    let value = value as u32;
    matches!(command, libc::FUTEX_WAIT | libc::FUTEX_WAIT_BITSET)
        && value & (WAITERS | OWNER_DIED) == WAITERS
        && value & TID_MASK != 0
        && announced() == Some(at)
}

/// The word of the robust mutex that the calling thread is about to lock: glibc puts it
/// into `list_op_pending` before it waits (struct robust_list_head of
/// linux/futex.h; bit 0 marks priority inheritance).
fn announced() -> Option<u64> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: the kernel fills two words.
    let ret = unsafe { syscall!(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut len) };
    if ret != 0 || head == 0 {
        return None;
    }
    let [_, offset, pending] = user::read::<[u64; 3]>(head).ok()?;
    (pending != 0).then(|| (pending & !1).wrapping_add(offset))
}

/// The kernel's id of a restored thread, if it is another one.
fn real_of(owner: u32) -> Option<i32> {
    let real = to_real(owner as i32);
    (real != owner as i32).then_some(real)
}

/// Is the owner of this lock gone?
fn is_dead(owner: u32, word: &AtomicU32) -> bool {
    const GONE: isize = -(libc::ESRCH as isize);
    let pid = AGENT.real_pid.load(Relaxed);
    let real = real_of(owner).unwrap_or(owner as i32);
    // SAFETY: signal 0 only asks.
    let (here, anywhere) = unsafe {
        (
            syscall!(libc::SYS_tgkill, pid, real, 0) != GONE,
            syscall!(libc::SYS_tkill, real, 0) != GONE,
        )
    };
    if here {
        return false;
    }
    // Nobody's, or another process's: that one owns only what it can reach.
    real_of(owner).is_some() || !anywhere || !is_shared(word)
}

/// Can another process reach this word? Where that is not known, yes.
fn is_shared(word: &AtomicU32) -> bool {
    let at = word as *const AtomicU32 as u64;
    let mapping = Maps::open().and_then(|mut maps| maps.at(at));
    !matches!(mapping, Ok(Some(mapping)) if !mapping.shared)
}

/// One call; `None` = nothing to do with this file.
pub fn dispatch(f: &mut CallFrame) -> Option<Verdict> {
    if f.rax != libc::SYS_futex {
        return None;
    }
    let [at, op, value, ..] = f.args;
    let robust = waits_for_owner(at, op, value);
    if !robust && !is_pi(op) {
        return None;
    }
    f.rax = match word_at(at) {
        Err(errno) => -i64::from(errno),
        Ok(word) if robust => wait_for_owner(word, &f.args),
        Ok(word) => pi(word, &f.args).map_or_else(|errno| -i64::from(errno), |()| 0),
    };
    Some(Verdict::Done)
}

fn word_at(at: u64) -> Result<&'static AtomicU32, i32> {
    if !at.is_multiple_of(4) {
        return Err(libc::EINVAL);
    }
    user::read::<u32>(at)?;
    // SAFETY: aligned and readable just now; a lock's word is writable, or the
    // program would fault in its own attempt as well.
    Ok(unsafe { &*(at as *const AtomicU32) })
}

/// FUTEX_WAIT or FUTEX_WAIT_BITSET on a robust mutex, in slices.
fn wait_for_owner(word: &AtomicU32, args: &[u64; 6]) -> i64 {
    let [_, op, value, time, _, bits] = *args;
    let (op, value) = (op as c_int, value as u32);
    let wait = match absolute(op, time) {
        Ok(wait) => wait,
        Err(errno) => return -i64::from(errno),
    };
    loop {
        if is_dead(value & TID_MASK, word) {
            let _ = word.compare_exchange(value, WAITERS | OWNER_DIED, SeqCst, SeqCst);
            return 0;
        }
        let Some(slice) = slice_of(wait) else {
            return -i64::from(libc::ETIMEDOUT);
        };
        let bits = if op & !(PRIVATE | REALTIME) == libc::FUTEX_WAIT {
            ALL_BITS
        } else {
            bits
        };
        let ret = sleep(word, op & PRIVATE, value, slice, bits);
        if ret != -i64::from(libc::ETIMEDOUT) && ret != -i64::from(libc::EINTR) {
            return ret;
        }
    }
}

const ALL_BITS: u64 = 0xffff_ffff;

/// Sleeps for a slice of time while the word has this value.
fn sleep(word: &AtomicU32, scope: c_int, value: u32, slice: u64, bits: u64) -> i64 {
    // Where it is possible a duration: the clock may be another one behind a restore.
    let (op, begin) = if bits as u32 == u32::MAX {
        (libc::FUTEX_WAIT | scope, 0)
    } else {
        let now = clock::kernel()[Clock::Monotonic as usize];
        (libc::FUTEX_WAIT_BITSET | scope, now)
    };
    let end = begin + slice;
    let time = [end / 1_000_000_000, end % 1_000_000_000];
    // SAFETY: a word of the program's and a time of ours.
    unsafe { syscall!(libc::SYS_futex, word, op, value, &raw const time, 0, bits) as i64 }
}

/// How long to sleep next; `None` = the time is over.
fn slice_of(wait: Wait) -> Option<u64> {
    match wait {
        Wait::Never => None,
        Wait::Forever => Some(SLICE_NS),
        Wait::Until(deadline, id) => {
            let left = deadline.saturating_sub(now_ns(id));
            (left > 0).then(|| left.min(SLICE_NS))
        }
    }
}

/// The time of a FUTEX_WAIT (a duration) or FUTEX_WAIT_BITSET (a deadline).
fn absolute(op: c_int, time: u64) -> Result<Wait, i32> {
    let clock = if op & REALTIME != 0 {
        libc::CLOCK_REALTIME
    } else {
        libc::CLOCK_MONOTONIC
    };
    let Some(ns) = nanoseconds(time)? else {
        return Ok(Wait::Forever);
    };
    let relative = op & !(PRIVATE | REALTIME) == libc::FUTEX_WAIT;
    let base = if relative { now_ns(clock) } else { 0 };
    Ok(Wait::Until(base.saturating_add(ns), clock))
}

fn nanoseconds(time: u64) -> Result<Option<u64>, i32> {
    if time == 0 {
        return Ok(None);
    }
    let [seconds, rest] = user::read::<[u64; 2]>(time)?;
    // One that was given to the kernel in the life before.
    let more = match super::super::clock::is_kernel_time(time) {
        true => clock::offset(Clock::Monotonic),
        false => 0,
    };
    if seconds > i64::MAX as u64 || rest >= 1_000_000_000 {
        return Err(libc::EINVAL);
    }
    Ok(Some(
        seconds
            .saturating_mul(1_000_000_000)
            .saturating_add(rest)
            .saturating_add(more),
    ))
}

fn pi(word: &AtomicU32, args: &[u64; 6]) -> Result<(), i32> {
    let [_, op, _, deadline, ..] = *args;
    let op = op as c_int;
    let me = own_tid() as u32;
    let scope = op & PRIVATE;
    match op & !(PRIVATE | REALTIME) {
        UNLOCK_PI => unlock(word, me, scope),
        TRYLOCK_PI => lock(word, me, scope, Wait::Never),
        command => {
            let realtime = command == LOCK_PI || op & REALTIME != 0;
            let clock = if realtime {
                libc::CLOCK_REALTIME
            } else {
                libc::CLOCK_MONOTONIC
            };
            let wait = nanoseconds(deadline)?.map_or(Wait::Forever, |ns| Wait::Until(ns, clock));
            lock(word, me, scope, wait)
        }
    }
}

/// How long a locker waits.
#[derive(Clone, Copy)]
enum Wait {
    Never,
    Forever,
    /// Until that time, in nanoseconds, of the clock.
    Until(u64, c_int),
}

/// As the program sees it: a deadline of its own stays right over restores.
fn now_ns(id: c_int) -> u64 {
    let mut time = [0u64; 2];
    // SAFETY: the kernel fills two words.
    unsafe { syscall!(libc::SYS_clock_gettime, id, &raw mut time) };
    time[0] * 1_000_000_000 + time[1] + clock::of(id).map_or(0, clock::offset)
}

fn lock(word: &AtomicU32, me: u32, scope: c_int, wait: Wait) -> Result<(), i32> {
    loop {
        let value = word.load(SeqCst);
        let owner = value & TID_MASK;
        if owner == me {
            return Err(libc::EDEADLK);
        }
        if owner == 0 {
            // Others may wait as well: the next unlock comes to us.
            let taken = me | WAITERS | (value & OWNER_DIED);
            if word.compare_exchange(value, taken, SeqCst, SeqCst).is_ok() {
                return Ok(());
            }
            continue;
        }
        if matches!(wait, Wait::Never) {
            return Err(libc::EAGAIN);
        }
        if is_dead(owner, word) {
            let _ = word.compare_exchange(value, WAITERS | OWNER_DIED, SeqCst, SeqCst);
            continue;
        }
        let slice = slice_of(wait).ok_or(libc::ETIMEDOUT)?;
        let waited = value | WAITERS;
        if value != waited
            && word
                .compare_exchange(value, waited, SeqCst, SeqCst)
                .is_err()
        {
            continue;
        }
        // EINTR is no reason to return: the kernel's own call is restarted too.
        sleep(word, scope, waited, slice, ALL_BITS);
    }
}

fn unlock(word: &AtomicU32, me: u32, scope: c_int) -> Result<(), i32> {
    loop {
        let value = word.load(SeqCst);
        if value & TID_MASK != me {
            return Err(libc::EPERM);
        }
        if word.compare_exchange(value, 0, SeqCst, SeqCst).is_ok() {
            wake(word, scope);
            return Ok(());
        }
    }
}

fn wake(word: &AtomicU32, scope: c_int) {
    // SAFETY: only an address.
    unsafe { syscall!(libc::SYS_futex, word, libc::FUTEX_WAKE | scope, 1) };
}

/// A restored thread that is about to repeat such a call in the kernel, which
/// restarts both kinds, goes through its call site instead.
///
/// # Safety
/// In the restored thread (or while it is held), before rt_sigreturn of `uc`.
pub unsafe fn enter_again(uc: *mut libc::ucontext_t) {
    // SAFETY: the frame is the thread's own; rip points at an instruction of the program's.
    unsafe {
        let regs = &mut (*uc).uc_mcontext.gregs;
        let rip = regs[libc::REG_RIP as usize] as usize;
        let number = regs[libc::REG_RAX as usize];
        let op = regs[libc::REG_RSI as usize] as u64;
        let value = regs[libc::REG_RDX as usize] as u64;
        let at = regs[libc::REG_RDI as usize] as u64;
        if number != libc::SYS_futex || !(is_pi(op) || waits_for_owner(at, op, value)) {
            return;
        }
        if (rip as *const [u8; 2]).read() != [0x0f, 0x05] {
            return;
        }
        if let Some(slot) = callsites::slot_data_of(rip + 2) {
            regs[libc::REG_R11 as usize] = slot as i64;
            regs[libc::REG_RIP as usize] = ckpt_sys::callsite::stage1() as i64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::{frame, in_child};

    fn call(word: &AtomicU32, op: c_int, deadline: Option<&[u64; 2]>) -> i64 {
        let time = deadline.map_or(0, |t| t.as_ptr() as u64);
        let args = [
            word as *const _ as u64,
            (op | PRIVATE) as u64,
            0,
            time,
            0,
            0,
        ];
        pi(word, &args).map_or_else(|errno| -i64::from(errno), |()| 0)
    }

    fn me() -> u32 {
        own_tid() as u32
    }

    #[test]
    fn a_free_lock_is_taken_and_given_back() {
        let word = AtomicU32::new(0);
        assert_eq!(call(&word, LOCK_PI, None), 0);
        assert_eq!(word.load(SeqCst) & TID_MASK, me());
        assert_eq!(call(&word, LOCK_PI, None), -i64::from(libc::EDEADLK));
        assert_eq!(call(&word, UNLOCK_PI, None), 0);
        assert_eq!(word.load(SeqCst), 0);
        assert_eq!(call(&word, UNLOCK_PI, None), -i64::from(libc::EPERM));
    }

    #[test]
    fn an_owner_who_died_is_told() {
        let word = AtomicU32::new(OWNER_DIED | WAITERS);
        assert_eq!(call(&word, TRYLOCK_PI, None), 0);
        assert_eq!(word.load(SeqCst), me() | WAITERS | OWNER_DIED);
    }

    #[test]
    fn waiting_ends_with_the_time_or_the_unlock() {
        let word = AtomicU32::new(1);
        assert_eq!(call(&word, TRYLOCK_PI, None), -i64::from(libc::EAGAIN));
        let past = [1, 0];
        assert_eq!(
            call(&word, LOCK_PI, Some(&past)),
            -i64::from(libc::ETIMEDOUT)
        );
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| call(&word, LOCK_PI, None));
            while word.load(SeqCst) != 1 | WAITERS {
                std::thread::yield_now();
            }
            assert_eq!(unlock(&word, 1, PRIVATE), Ok(()));
            assert_eq!(waiter.join().unwrap(), 0);
        });
        assert_ne!(word.load(SeqCst) & TID_MASK, 0);
    }

    /// The owner of a robust lock, known by its old id, has ended without unlocking.
    #[test]
    fn a_dead_owner_is_found_by_the_waiter() {
        in_child(|| {
            // SAFETY: no arguments.
            let pid = unsafe { syscall!(libc::SYS_getpid) } as i32;
            const GONE: i32 = 0x3f_fffe;
            super::super::set_identity(&[(1000, pid), (1001, GONE)], 1000, pid).unwrap();
            let held = WAITERS | 1001;
            for op in [libc::FUTEX_WAIT, LOCK_PI] {
                let word = AtomicU32::new(held);
                // As glibc does before it waits.
                let list = [0u64, 0, &raw const word as u64];
                // SAFETY: the list is taken back below, while it is alive.
                unsafe { syscall!(libc::SYS_set_robust_list, list.as_ptr(), 24) };
                let args = [
                    &raw const word as u64,
                    (op | PRIVATE) as u64,
                    u64::from(held),
                    0,
                    0,
                    0,
                ];
                let mut frame = frame(libc::SYS_futex, &args);
                assert_eq!(dispatch(&mut frame), Some(Verdict::Done));
                assert_eq!(frame.rax, 0);
                let owner = if op == LOCK_PI { 1000 } else { 0 };
                assert_eq!(word.load(SeqCst), WAITERS | OWNER_DIED | owner);
                // SAFETY: no list.
                unsafe { syscall!(libc::SYS_set_robust_list, 0, 24) };
                // A word that was not announced is nobody's mutex.
                let (wait, at) = (libc::FUTEX_WAIT as u64, &raw const word as u64);
                assert!(!waits_for_owner(at, wait, u64::from(held)));
                assert!(!is_dead(1000, &word));
                // An owner who died in the life before: no table knows its id. It kept a
                // waiter asleep for ever.
                assert!(is_dead(GONE as u32 - 1, &word));
            }
            assert!(real_of(1000).is_some());
        });
    }
}
