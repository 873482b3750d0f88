//! `ckpt_rollback` in the thread that calls it: it posts the call and waits. It is stopped
//! there like any other thread, and either its call is answered with an error or the
//! thread goes back with all the rest.
//!
//! Any thread of the program. Async-signal-safe.

use crate::agent::state::{RESERVED_BIT, awake};
use crate::agent::{events, helper, refusal, request};
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, Ordering};

/// Memory that keeps its content (`struct ckpt_region`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Region {
    pub addr: u64,
    pub len: u64,
}

/// More regions than this are an error.
pub const MOST_REGIONS: u64 = 65536;

/// The newest checkpoint, whatever its id.
pub const LATEST: i32 = -1;

/// A call that waits, on the caller's stack.
pub struct Call {
    pub id: i32,
    pub value: i32,
    /// An array of the program's memory, not looked at yet.
    pub regions: u64,
    pub nregions: u64,
    /// Futex: 0, then a negated errno.
    done: AtomicI32,
}

static CALL: AtomicPtr<Call> = AtomicPtr::new(std::ptr::null_mut());
/// Threads inside [`from_program`]. No checkpoint is taken meanwhile: it would come back
/// into the call and go back again, without end.
static INSIDE: AtomicU32 = AtomicU32::new(0);
/// Counts restores: a call that finds itself in another life was taken back (`ckpt undo`),
/// it was in the image of the state that it had left.
static LIFE: AtomicU32 = AtomicU32::new(0);

const FUTEX_WAIT_PRIVATE: i32 = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
const FUTEX_WAKE_PRIVATE: i32 = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;

/// `ckpt_rollback`: does not return on success, else a negated errno.
///
/// Errors: ENOSYS the agent is asleep here; EINVAL an argument; ENOENT no such
/// checkpoint; EFAULT a region that cannot be kept; EAGAIN not now (a child, a critical
/// section); EPERM no checkpoints here any more; EIO the checkpoint cannot be gone back
/// to; ENOTSUP the first thread has ended; ECANCELED it went back, and that was undone.
pub fn from_program(id: i32, value: i32, regions: u64, nregions: u64) -> i32 {
    if !awake() {
        return -libc::ENOSYS;
    }
    events::pay();
    if id < LATEST || value < 0 || nregions > MOST_REGIONS || (nregions > 0 && regions == 0) {
        return -libc::EINVAL;
    }
    if refusal::disabled().is_some() {
        return -libc::EPERM;
    }
    if let Err(errno) = helper::ensure() {
        return -errno;
    }
    let mut call = Call {
        id,
        value,
        regions,
        nregions,
        done: AtomicI32::new(0),
    };
    // No handler of the program in between: it could leave this frame.
    let only_ours = !RESERVED_BIT;
    let mut mask = 0u64;
    // SAFETY: valid pointers of the right size.
    unsafe {
        let set = libc::SIG_SETMASK;
        syscall!(libc::SYS_rt_sigprocmask, set, &only_ours, &mut mask, 8);
    }
    INSIDE.fetch_add(1, Ordering::SeqCst);
    let result = wait(&raw mut call);
    INSIDE.fetch_sub(1, Ordering::SeqCst);
    // SAFETY: as above.
    unsafe { syscall!(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &mask, 0, 8) };
    result
}

fn wait(call: *mut Call) -> i32 {
    let life = LIFE.load(Ordering::SeqCst);
    let taken_back = || LIFE.load(Ordering::SeqCst) != life;
    let none = std::ptr::null_mut();
    let enqueue = || CALL.compare_exchange(none, call, Ordering::SeqCst, Ordering::SeqCst);
    while enqueue().is_err() {
        let pause = [0u64, 1_000_000];
        // SAFETY: a valid timespec.
        unsafe { syscall!(libc::SYS_nanosleep, &pause, 0) };
        if taken_back() {
            return -libc::ECANCELED;
        }
    }
    request::post(request::ROLLBACK);
    loop {
        if taken_back() {
            return -libc::ECANCELED;
        }
        // SAFETY: the caller keeps `call` alive; the helper writes `done`.
        let done = unsafe { &(*call).done };
        match done.load(Ordering::Acquire) {
            // SAFETY: a futex word of ours.
            0 => unsafe {
                syscall!(libc::SYS_futex, done, FUTEX_WAIT_PRIVATE, 0, 0, 0, 0);
            },
            errno => return errno,
        }
    }
}

/// The call that waits, if any (helper thread); valid until [`answer`].
pub fn pending() -> Option<&'static Call> {
    // SAFETY: the caller sleeps in `wait` until it is answered.
    unsafe { CALL.load(Ordering::SeqCst).as_ref() }
}

/// Is any thread about to go back? (With the world stopped.)
pub fn any_inside() -> bool {
    INSIDE.load(Ordering::SeqCst) != 0
}

/// The call that waits has failed.
pub fn answer(errno: i32) {
    let call = CALL.swap(std::ptr::null_mut(), Ordering::SeqCst);
    if call.is_null() {
        return;
    }
    // SAFETY: valid until `done` is stored; only the futex address is used after.
    unsafe {
        let done = &raw const (*call).done;
        (*done).store(errno, Ordering::Release);
        syscall!(libc::SYS_futex, done, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0);
    }
}

/// After a restore nobody waits. In the image of a state that was left threads may be
/// inside: they find out, and leave by themselves.
pub fn reset_after_restore() {
    LIFE.fetch_add(1, Ordering::SeqCst);
    // The one that sleeps would go on sleeping: its system call begins again.
    answer(-libc::ECANCELED);
}
