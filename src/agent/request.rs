//! Requests to the helper: the mailbox that program threads, signal handlers and
//! the clock write and the helper reads.
//!
//! All of it is async-signal-safe: atomics and futexes only. The mailbox is part of
//! the image; `resume` empties it.

use crate::agent::collect::descriptors::handed;
use crate::agent::state::{AGENT, RESERVED_BIT, awake};
use crate::agent::stop::{self, Slot};
use crate::agent::{events, helper, refusal, rollback};
use ckpt_sys::context::{CapturedContext, capture};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering};

/// Tag of a request by the `ckpt` command in `si_value`: tag, kind (16 bits), nonce (32 bits).
pub const COMMAND_TAG: u64 = 0xC4B7;

pub const CHECKPOINT: u32 = 1;
pub const REPORT: u32 = 2;
/// A bit of its own, as it is the number of the command's request.
pub const ROLLBACK: u32 = 4;

/// No child is alive now: what was put off for one is to be tried at once.
pub const CHILDLESS: u32 = 8;

/// Requests of the command at a time.
const ASKED: usize = 64;

pub struct Mailbox {
    /// Futex: grows with every request.
    pub bell: AtomicU32,
    /// Wanted things, or-ed.
    pub wanted: AtomicU32,
    /// Requests of the command that are not taken up yet: kind << 32 | nonce, 0 = free.
    asked: [AtomicU64; ASKED],
    /// The thread that waits in `ckpt_checkpoint`; null = none.
    pub inserted: AtomicPtr<InsertedCall>,
    /// Depth of `ckpt_hold`.
    pub holds: AtomicU32,
    /// Futex: 1 while a checkpoint is put off because of a child.
    childless: AtomicU32,
}

pub static MAILBOX: Mailbox = Mailbox {
    bell: AtomicU32::new(0),
    wanted: AtomicU32::new(0),
    asked: [const { AtomicU64::new(0) }; ASKED],
    inserted: AtomicPtr::new(std::ptr::null_mut()),
    holds: AtomicU32::new(0),
    childless: AtomicU32::new(0),
};

const FUTEX_WAIT_PRIVATE: i32 = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
const FUTEX_WAKE_PRIVATE: i32 = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;

/// Adds a request and wakes the helper (which must exist).
pub fn post(what: u32) {
    MAILBOX.wanted.fetch_or(what, Ordering::SeqCst);
    wake();
}

/// Wakes the helper without a request (it looks at `refusal::RETIRE` and `holds`).
pub fn wake() {
    MAILBOX.bell.fetch_add(1, Ordering::SeqCst);
    // SAFETY: a futex word of ours.
    unsafe {
        syscall!(
            libc::SYS_futex,
            &MAILBOX.bell,
            FUTEX_WAKE_PRIVATE,
            1,
            0,
            0,
            0
        )
    };
}

/// Sleeps until a request arrives or `timeout_ns` is over (`None` = for ever);
/// returns what is wanted and empties the box.
pub fn wait(timeout_ns: Option<u64>) -> u32 {
    let bell = MAILBOX.bell.load(Ordering::SeqCst);
    let wanted = MAILBOX.wanted.swap(0, Ordering::SeqCst);
    let call = !MAILBOX.inserted.load(Ordering::SeqCst).is_null();
    if wanted != 0 || call || timeout_ns == Some(0) {
        return wanted;
    }
    let ts = timeout_ns.map(|ns| [ns / 1_000_000_000, ns % 1_000_000_000]);
    let ts_ptr = ts.as_ref().map_or(std::ptr::null(), |t| t.as_ptr());
    // SAFETY: a futex word of ours, a valid timespec or null.
    unsafe {
        syscall!(
            libc::SYS_futex,
            &MAILBOX.bell,
            FUTEX_WAIT_PRIVATE,
            bell,
            ts_ptr,
            0,
            0
        )
    };
    MAILBOX.wanted.swap(0, Ordering::SeqCst)
}

/// The helper: is a moment without children waited for? Whoever waits in [`before_a_child`] goes on.
pub fn want_childless(wanted: bool) {
    let word = &MAILBOX.childless;
    if word.swap(u32::from(wanted), Ordering::SeqCst) == 0 {
        return;
    }
    // SAFETY: a futex word of ours.
    unsafe { syscall!(libc::SYS_futex, word, FUTEX_WAKE_PRIVATE, i32::MAX, 0, 0, 0) };
}

/// Is a moment without children waited for?
pub fn is_childless_wanted() -> bool {
    MAILBOX.childless.load(Ordering::Relaxed) != 0
}

/// A thread of the program is about to make a child. A script that runs one command after the other
/// has next to no time without one, so the helper is let in here. The thread can be stopped as it
/// waits, and goes on after the stop, or when the helper has said no.
pub fn before_a_child() {
    const MOST: [u64; 2] = [0, 200_000_000];
    post(CHILDLESS);
    let word = &MAILBOX.childless;
    // SAFETY: a futex word of ours, a valid timespec.
    let ret = unsafe { syscall!(libc::SYS_futex, word, FUTEX_WAIT_PRIVATE, 1, &MOST, 0, 0) };
    if ret == -(libc::ETIMEDOUT as isize) {
        // Is there a helper still? It says so when it wants more.
        want_childless(false);
    }
}

/// A request of the `ckpt` command arrived by signal.
pub fn from_command(value: u64) {
    let what = match value >> 32 & 0xffff {
        1 => CHECKPOINT,
        2 => REPORT,
        4 => ROLLBACK,
        _ => return,
    };
    // Signal handler: no lock. With all places taken the request is carried out, but
    // not answered by its nonce.
    let entry = value & 0xffff_ffff_ffff;
    let free = |place: &&AtomicU64| {
        place
            .compare_exchange(0, entry, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    };
    let _ = MAILBOX.asked.iter().find(free);
    if helper::ensure().is_ok() {
        post(what);
    }
}

/// Takes up the command's requests of one kind; returns their nonces.
pub fn take_asked(what: u32) -> Vec<u32> {
    let mut nonces = Vec::new();
    for place in &MAILBOX.asked {
        let entry = place.load(Ordering::SeqCst);
        if entry >> 32 == u64::from(what) {
            place.store(0, Ordering::SeqCst);
            nonces.push(entry as u32);
        }
    }
    nonces
}

/// The command's requests that nobody has taken up yet (helper, the program stopped): they are
/// not part of the image that is gone back to.
pub fn open_asked() -> Vec<u64> {
    let places = MAILBOX.asked.iter();
    let entries = places.map(|place| place.load(Ordering::SeqCst));
    entries.filter(|&entry| entry != 0).collect()
}

/// A request that was taken up, as [`open_asked`] has it.
pub fn entry(what: u32, nonce: u32) -> u64 {
    u64::from(what) << 32 | u64::from(nonce)
}

/// In the restored helper: these requests and no others.
pub fn ask_again(entries: &[u64]) {
    let all = entries.iter().copied().chain(std::iter::repeat(0));
    for (place, entry) in MAILBOX.asked.iter().zip(all) {
        place.store(entry, Ordering::SeqCst);
    }
    let kinds = entries
        .iter()
        .fold(0, |kinds, entry| kinds | (entry >> 32) as u32);
    MAILBOX.wanted.fetch_or(kinds, Ordering::SeqCst);
}

/// The handler of the signal named in `CKPT_TRIGGER`.
pub extern "C" fn on_trigger(_signo: i32) {
    if awake() && helper::ensure().is_ok() {
        post(CHECKPOINT);
    }
}

/// Makes `signo` ask for a checkpoint, until the program takes the signal for itself.
///
/// # Safety
/// Constructor only.
pub unsafe fn install_trigger(signo: i32) {
    // SAFETY: a valid struct; the handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_trigger as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(signo, &action, std::ptr::null_mut());
    }
}

/// A thread that waits in `ckpt_checkpoint`, on its own stack.
pub struct InsertedCall {
    pub id: i32,
    pub slot: Slot,
    context: CapturedContext,
    /// Futex: 0 while waiting, then 1 (taken), [`ORDERED`] or a negated errno.
    done: AtomicI32,
}

/// `ckpt_checkpoint`: `caller_sp` is where the caller's stack ends. Returns 0 when taken, the return value (> 0) when resumed
/// from the checkpoint, a negated errno on failure.
///
/// Errors: ENOSYS the agent is asleep here, EINVAL a negative id, EBUSY inside `ckpt_hold` or a handler, EPERM refused
/// for good (see `ckpt status`), EAGAIN refused for now, EIO the store failed.
pub fn checkpoint_from_program(id: i32, caller_sp: u64) -> i32 {
    if !awake() {
        return -libc::ENOSYS;
    }
    events::pay();
    // `ckpt_rollback` could not mean it: -1 is the latest of any id there.
    if id < 0 {
        return -libc::EINVAL;
    }
    if events::in_handler() || MAILBOX.holds.load(Ordering::SeqCst) != 0 {
        return -libc::EBUSY;
    }
    if refusal::disabled().is_some() {
        return -libc::EPERM;
    }
    if let Err(errno) = helper::ensure() {
        return -errno;
    }
    events::run(events::BEFORE);
    // While this thread counts as stopped it must not run handlers of the program.
    let everything = u64::MAX;
    let mut mask = 0u64;
    let mut altstack = [0u64; 3];
    // SAFETY: valid pointers of the right size.
    unsafe {
        syscall!(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &everything,
            &mut mask,
            8
        );
        syscall!(libc::SYS_sigaltstack, 0, &mut altstack);
    }
    let result = inserted((id, caller_sp), mask, altstack);
    // SAFETY: as above.
    unsafe { syscall!(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &mask, 0, 8) };
    events::run(if result > 0 {
        events::RESTORED
    } else {
        events::AFTER
    });
    result
}

/// Returns twice: the compiler does not know that of `capture`, so nothing is done in this frame
/// behind it that could change a part of the frame which the second return relies on.
#[inline(never)]
fn inserted((id, caller_sp): (i32, u64), mask: u64, altstack: [u64; 3]) -> i32 {
    // SAFETY: all-zero is a valid Slot.
    let slot: Slot = unsafe { std::mem::zeroed() };
    let mut call = InsertedCall {
        id,
        slot,
        context: CapturedContext::new(),
        done: AtomicI32::new(0),
    };
    call.context.prepare(mask, altstack);
    call.context.set_caller(caller_sp);
    call.slot.ucontext = call.context.ucontext();
    call.slot.inserted = true;
    let pointer = &raw mut call;
    // SAFETY: `call` lives in this frame, which stays alive: this function does not
    // return before the helper has answered or the image is resumed here.
    if unsafe { capture(&raw mut (*pointer).context) } != 0 {
        return resumed();
    }
    ask_and_wait(pointer)
}

/// What the call returns when it comes back from its checkpoint.
#[inline(never)]
fn resumed() -> i32 {
    AGENT.return_value.load(Ordering::SeqCst).max(1)
}

/// Has the checkpoint taken. `pointer` leads to the caller's frame, which stays alive.
#[inline(never)]
fn ask_and_wait(pointer: *mut InsertedCall) -> i32 {
    // SAFETY: as promised.
    unsafe {
        (*pointer).slot.resume_stack = stop::free_stack_below((*pointer).context.stack_pointer());
        stop::report(&mut (*pointer).slot);
    }
    // One caller at a time; others queue here and can be stopped as they wait.
    let enqueue = || {
        // The kernel's id, looked up again each time: a restore while this thread queued has
        // given it another. Between this and the answer it cannot be stopped.
        // SAFETY: no arguments; as above.
        unsafe {
            let tid = syscall!(libc::SYS_gettid) as u32;
            (*pointer).slot.tid.store(tid, Ordering::Relaxed);
        }
        let none = std::ptr::null_mut();
        MAILBOX
            .inserted
            .compare_exchange(none, pointer, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    };
    while !enqueue() {
        let pause = [0u64, 1_000_000];
        let only_ours = !RESERVED_BIT;
        // SAFETY: valid pointers; the mask is set back right after.
        unsafe {
            let mut was = 0u64;
            syscall!(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                &only_ours,
                &mut was,
                8
            );
            syscall!(libc::SYS_nanosleep, &pause, 0);
            syscall!(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &was, 0, 8);
        }
    }
    // Not a wish beside the call: the helper may have seen the call already, and would take
    // a second checkpoint, behind it.
    wake();
    loop {
        // SAFETY: `call` is alive; the helper writes `done` through the pointer.
        let done = unsafe { &(*pointer).done };
        match done.load(Ordering::Acquire) {
            // SAFETY: a futex word of ours.
            0 => unsafe {
                syscall!(libc::SYS_futex, done, FUTEX_WAIT_PRIVATE, 0, 0, 0, 0);
            },
            1 => return 0,
            ORDERED => {
                // First, so that another order meanwhile is not lost.
                let _ = done.compare_exchange(ORDERED, 0, Ordering::SeqCst, Ordering::SeqCst);
                // SAFETY: as above.
                let slot = unsafe { &(*pointer).slot };
                let tid = slot.tid.load(Ordering::Relaxed) as i32;
                stop::drain_if_asked(slot, tid);
                handed::hand_if_asked();
                rollback::leader::obey(slot, tid);
            }
            errno => return errno,
        }
    }
}

/// [`InsertedCall::done`]: look at the orders of a rollback, and for signals to be read.
const ORDERED: i32 = 2;

/// Makes the thread that waits in `ckpt_checkpoint` look at the orders: it is not in the
/// stop handler.
pub fn order_inserted() {
    if let Some(call) = inserted_call() {
        call.done.store(ORDERED, Ordering::SeqCst);
        // SAFETY: a futex word of ours.
        unsafe {
            let done = &call.done;
            syscall!(libc::SYS_futex, done, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0)
        };
    }
}

/// The call that waits, if any (helper thread). It stays valid until [`answer`].
pub fn inserted_call() -> Option<&'static InsertedCall> {
    // SAFETY: the caller sleeps in `inserted` until answered.
    unsafe { MAILBOX.inserted.load(Ordering::SeqCst).as_ref() }
}

/// A copy of the caller's slot for `stop::stop_all`.
pub fn copy_slot(call: &InsertedCall) -> Slot {
    // SAFETY: plain data and atomics without owners.
    unsafe { std::ptr::read(&call.slot) }
}

/// Answers whoever waits in `ckpt_checkpoint` (a negated errno).
pub fn answer(result: i32) {
    answer_call(MAILBOX.inserted.load(Ordering::SeqCst), result);
}

/// Wakes the thread that waits in this call of `ckpt_checkpoint` with `result` (1 = taken,
/// or a negated errno). One that came later goes on waiting.
pub fn answer_call(call: *const InsertedCall, result: i32) {
    let waiting = MAILBOX.inserted.load(Ordering::SeqCst);
    let none = std::ptr::null_mut();
    if !waiting.is_null()
        && std::ptr::eq(waiting, call)
        && MAILBOX
            .inserted
            .compare_exchange(waiting, none, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    {
        // SAFETY: valid until `done` is stored; only the futex address is used after.
        unsafe {
            let done = &raw const (*waiting).done;
            (*done).store(result, Ordering::Release);
            let _ = check(syscall!(
                libc::SYS_futex,
                done,
                FUTEX_WAKE_PRIVATE,
                1,
                0,
                0,
                0
            ));
        }
    }
}

/// After a restore: nobody waits, nothing is wanted.
pub fn reset_after_restore() {
    let caller = MAILBOX
        .inserted
        .swap(std::ptr::null_mut(), Ordering::SeqCst);
    // A caller that comes back runs the handlers itself.
    events::owe(caller.is_null());
    MAILBOX.wanted.store(0, Ordering::SeqCst);
    MAILBOX.childless.store(0, Ordering::SeqCst);
}

/// `ckpt_hold` / `ckpt_release`: no checkpoint in between; they nest.
pub fn hold() -> i32 {
    if !awake() {
        return -libc::ENOSYS;
    }
    events::pay();
    MAILBOX.holds.fetch_add(1, Ordering::SeqCst);
    0
}

pub fn release() -> i32 {
    if !awake() {
        return -libc::ENOSYS;
    }
    let was = MAILBOX
        .holds
        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
    match was {
        Ok(1) => {
            // A checkpoint may have been put off meanwhile: let the helper look.
            wake();
            events::pay();
            0
        }
        Ok(_) => 0,
        Err(_) => -libc::EINVAL,
    }
}
