//! All threads at once: signalling them, waiting until every one is parked, releasing
//! them. Helper thread. What a thread itself does is [`super`]'s.

use super::hold::held_off;
use super::{
    AGAIN, FUTEX_WAIT_PRIVATE, GONE, NEW, NUMBER_MASK, PARKED, PARKED_MASK, STOP, STOP_TAG,
    STOPPED_AT_NS, Slot, now_ns, send, wake_parked,
};
use crate::agent::clock;
use crate::agent::procfs::{self, TaskList};
use crate::agent::request;
use crate::agent::state::AGENT;
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicBool, Ordering};

/// Why the threads could not be stopped.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    #[error("cannot list the threads: errno {0}")]
    List(i32),
    #[error("cannot signal thread {tid}: errno {errno} (RLIMIT_SIGPENDING of this user used up?)")]
    Signal { tid: i32, errno: i32 },
    #[error("thread {tid} ({name}) does not stop: it waits in {wchan}")]
    Stuck {
        tid: i32,
        name: String,
        wchan: String,
    },
    #[error("more than {0} threads")]
    TooMany(usize),
    #[error("the program calls exec")]
    Exec,
}

/// All threads of the program, stopped. [`release`] must follow.
pub struct Stopped {
    slots: Vec<Slot>,
    used: usize,
}

impl Stopped {
    /// The slots of the threads that are alive and parked.
    pub fn threads(&self) -> impl Iterator<Item = &Slot> {
        self.slots[..self.used]
            .iter()
            .filter(|slot| slot.state.load(Ordering::Acquire) == PARKED)
    }

    /// Where they go on.
    pub fn rips(&self) -> impl Iterator<Item = u64> {
        self.threads().map(|slot| {
            // SAFETY: the frame of a thread that is parked in its handler, or captured.
            unsafe { super::rip(slot.ucontext as *const libc::ucontext_t) }
        })
    }
}

/// How long a thread in this state may take to park before the stop is given up, ns.
/// One that waits in the kernel uninterruptibly (a disk, a vfork child) may do so for
/// long, and the whole program would stand still with it.
fn patience_ns(state: u8) -> u64 {
    if state == b'D' {
        100_000_000
    } else {
        1_000_000_000
    }
}

fn empty_slot() -> Slot {
    // SAFETY: all-zero is a valid Slot.
    unsafe { std::mem::zeroed() }
}

/// Stops every thread but the caller and `inserted` (which waits for the helper
/// with its context captured, its slot filled in).
pub fn stop_all(inserted: Option<Slot>) -> Result<Stopped, StopError> {
    // The handlers want to know where it is.
    clock::kernel_vdso();
    STOPPED_AT_NS.store(now_ns(), Ordering::SeqCst);
    // SAFETY: gettid has no arguments.
    let own_tid = unsafe { syscall!(libc::SYS_gettid) } as i32;
    let mut tasks = TaskList::new();
    let first = tasks.read().map_err(StopError::List)?;
    // Room for threads that are born while we stop the others.
    let capacity = first * 2 + 64;
    let mut slots: Vec<Slot> = Vec::with_capacity(capacity);
    slots.resize_with(capacity, empty_slot);
    let mut used = 0;
    let mut known: Vec<i32> = Vec::with_capacity(capacity);
    if let Some(slot) = inserted {
        known.push(slot.tid.load(Ordering::Relaxed) as i32);
        slot.state.store(PARKED, Ordering::Relaxed);
        slots[used] = slot;
        used += 1;
    }
    let already = used as u32;
    let number = STOP.number.fetch_add(1, Ordering::SeqCst).wrapping_add(1) & 0xff_ffff;
    let number = number.max(1);
    STOP.slots
        .store(slots.as_mut_ptr() as u64, Ordering::SeqCst);
    STOP.nslots.store(capacity as u32, Ordering::SeqCst);
    STOP.parked.store(already, Ordering::SeqCst);
    STOP.wanted.store(u32::MAX, Ordering::SeqCst);
    STOP.word.store(number, Ordering::SeqCst);

    let mut stopped = Stopped { slots, used };
    let mut pass = 0u32;
    loop {
        // The number is in the stop word: who comes to exec from here on waits for us.
        if held_off() {
            release(stopped);
            return Err(StopError::Exec);
        }
        let mut added = 0;
        let ids: &[i32] = tasks.ids();
        for &tid in ids {
            if tid == own_tid || known.binary_search(&tid).is_ok() || is_dead_leader(tid) {
                continue;
            }
            if stopped.used == capacity {
                release(stopped);
                return Err(StopError::TooMany(capacity));
            }
            let slot = &mut stopped.slots[stopped.used];
            slot.tid.store(tid as u32, Ordering::SeqCst);
            slot.state.store(NEW, Ordering::SeqCst);
            let value = request_of(number, stopped.used);
            // SAFETY: a thread of this process, or one that has just gone.
            match check(unsafe { send(tid, value) }) {
                Ok(_) => {
                    stopped.used += 1;
                    added += 1;
                }
                Err(libc::ESRCH) => {}
                Err(errno) => {
                    release(stopped);
                    return Err(StopError::Signal { tid, errno });
                }
            }
        }
        if let Err(error) = wait_parked(&mut stopped) {
            release(stopped);
            return Err(error);
        }
        // A pass that adds nothing proves that the set is stable: nobody is left who
        // could give birth. Where a thread ends while it is told the list ends early.
        if added == 0 && pass > 0 && (pass > MOST_PASSES || is_whole(&stopped, tasks.ids())) {
            return Ok(stopped);
        }
        pass += 1;
        known.clear();
        known.extend(
            stopped.slots[..stopped.used]
                .iter()
                .map(|s| s.tid.load(Ordering::Relaxed) as i32),
        );
        known.sort_unstable();
        if let Err(errno) = tasks.read() {
            release(stopped);
            return Err(StopError::List(errno));
        }
    }
}

/// More are only needed where threads end all the time.
const MOST_PASSES: u32 = 100;

/// Is every thread that there is parked, or listed and dead? The caller, the only one that
/// runs, is on the list.
fn is_whole(stopped: &Stopped, listed: &[i32]) -> bool {
    let parked = |tid: i32| {
        let mut threads = stopped.threads();
        threads.any(|slot| slot.tid.load(Ordering::Relaxed) == tid as u32)
    };
    let Some(count) = procfs::thread_count() else {
        return true;
    };
    let all_parked = stopped.threads().count();
    // The usual case: nobody has ended.
    if count <= all_parked + 1 {
        return true;
    }
    let others = listed.iter().filter(|&&tid| !parked(tid));
    count
        <= all_parked
            + others
                .filter(|&&tid| procfs::task_state(tid).is_some())
                .count()
}

/// What the signal says: of which stop it is, and which slot is the thread's.
fn request_of(number: u32, slot: usize) -> u64 {
    STOP_TAG << 48 | u64::from(number) << 24 | slot as u64
}

/// Stops those again that could not be stopped where they were.
fn send_again(stopped: &Stopped) -> Result<(), StopError> {
    let number = STOP.word.load(Ordering::SeqCst) & NUMBER_MASK;
    for (index, slot) in stopped.slots[..stopped.used].iter().enumerate() {
        if slot.state.load(Ordering::Acquire) != AGAIN {
            continue;
        }
        let tid = slot.tid.load(Ordering::Relaxed) as i32;
        slot.state.store(NEW, Ordering::SeqCst);
        // SAFETY: as in `stop_all`.
        match check(unsafe { send(tid, request_of(number, index)) }) {
            // One that has ended is noticed as any other.
            Ok(_) | Err(libc::ESRCH) => {}
            Err(errno) => return Err(StopError::Signal { tid, errno }),
        }
    }
    Ok(())
}

/// A thread that has called `ckpt_checkpoint` since this stop began waits for the helper
/// with all signals blocked, and is captured already: it counts as parked.
fn adopt_caller(stopped: &mut Stopped) {
    let Some(caller) = request::inserted_call().map(request::copy_slot) else {
        return;
    };
    let tid = caller.tid.load(Ordering::Relaxed);
    let place = stopped.slots[..stopped.used].iter_mut().find(|slot| {
        slot.tid.load(Ordering::Relaxed) == tid && slot.state.load(Ordering::Acquire) == NEW
    });
    if let Some(place) = place {
        *place = caller;
        place.state.store(PARKED, Ordering::Release);
        STOP.parked.fetch_add(1, Ordering::SeqCst);
    }
}

/// Missing threads that are looked at one by one every millisecond.
const FEW: u32 = 16;

/// The first thread has ended while others go on: it stays as a zombie that takes
/// signals and never handles them. Sticky: it does not come back.
static LEADER_GONE: AtomicBool = AtomicBool::new(false);

fn is_dead_leader(tid: i32) -> bool {
    tid == AGENT.real_pid.load(Ordering::Relaxed) && LEADER_GONE.load(Ordering::Relaxed)
}

fn wait_parked(stopped: &mut Stopped) -> Result<(), StopError> {
    let started = now_ns();
    let mut again = 0;
    loop {
        adopt_caller(stopped);
        let word = STOP.parked.load(Ordering::SeqCst);
        if word & !PARKED_MASK != again {
            again = word & !PARKED_MASK;
            send_again(stopped)?;
        }
        let gone = stopped.slots[..stopped.used]
            .iter()
            .filter(|slot| slot.state.load(Ordering::Relaxed) == GONE)
            .count() as u32;
        let wanted = stopped.used as u32 - gone;
        STOP.wanted.store(wanted, Ordering::SeqCst);
        let parked = word & PARKED_MASK;
        if parked >= wanted {
            return Ok(());
        }
        // Threads that end before they see the signal are noticed by looking; that is
        // only cheap when few are missing.
        let few = wanted - parked <= FEW;
        let timeout = [0u64, if few { 1_000_000 } else { 10_000_000 }];
        // SAFETY: a futex word of ours and a valid timespec.
        let ret = unsafe {
            syscall!(
                libc::SYS_futex,
                &STOP.parked,
                FUTEX_WAIT_PRIVATE,
                word,
                &timeout,
                0,
                0
            )
        };
        // It does not park: the stop is given up, and exec goes on.
        if held_off() {
            return Err(StopError::Exec);
        }
        if ret != -(libc::ETIMEDOUT as isize) {
            continue;
        }
        let waited = now_ns() - started;
        for slot in &stopped.slots[..stopped.used] {
            if slot.state.load(Ordering::Acquire) != NEW {
                continue;
            }
            let tid = slot.tid.load(Ordering::Relaxed) as i32;
            match procfs::task_state(tid) {
                None | Some(b'Z') | Some(b'X') => {
                    slot.state.store(GONE, Ordering::Release);
                    if tid == AGENT.real_pid.load(Ordering::Relaxed) {
                        LEADER_GONE.store(true, Ordering::Relaxed);
                    }
                }
                Some(state) if waited > patience_ns(state) => {
                    return Err(StopError::Stuck {
                        tid,
                        name: procfs::task_text(tid, "comm"),
                        wchan: procfs::task_text(tid, "wchan"),
                    });
                }
                Some(_) => {}
            }
        }
    }
}

/// Lets all stopped threads go on; returns when they could.
pub fn release(stopped: Stopped) -> u64 {
    STOP.word.store(0, Ordering::SeqCst);
    wake_parked();
    let released = now_ns();
    // The slots may only go when no handler is left that could write to one (a late
    // thread of a stop that was given up). They leave as soon as they see the word.
    for _ in 0..2000 {
        if STOP.inside.load(Ordering::SeqCst) == 0 {
            drop(stopped);
            return released;
        }
        let pause = [0u64, 500_000];
        // SAFETY: a valid timespec.
        unsafe { syscall!(libc::SYS_nanosleep, &pause, 0) };
    }
    std::mem::forget(stopped);
    released
}

/// Lets the threads go after a panic in the helper: no list, no memory.
pub fn emergency_release() {
    if STOP.word.swap(0, Ordering::SeqCst) != 0 {
        wake_parked();
    }
}

/// After a restore: no stop is in progress (the image was taken during one).
pub fn reset_after_restore() {
    STOP.word.store(0, Ordering::SeqCst);
    STOP.inside.store(0, Ordering::SeqCst);
    STOP.nslots.store(0, Ordering::SeqCst);
    STOP.slots.store(0, Ordering::SeqCst);
    STOP.leaving.store(0, Ordering::SeqCst);
    LEADER_GONE.store(false, Ordering::SeqCst);
}
