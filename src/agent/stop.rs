//! Stopping and releasing the program's threads.
//!
//! The helper sends the reserved signal to every task; each thread's registers are
//! the kernel's signal frame on its own stack. The handler notes what only the
//! thread itself can read, reports and sleeps on the stop word until it changes.
//! A request that arrives inside a hook is put off to the hook's end (law 3).
//!
//! Here: the stop word and the handler. `slot` is what a thread reports, `pending` its own
//! queue of signals, `hold` keeps stops off an exec, `world` is all threads at once.
//!
//! Runs in: the helper thread ([`stop_all`], [`release`]) and, async-signal-safe, in
//! any thread ([`on_reserved_signal`]).

mod hold;
mod pending;
mod slot;
mod world;

pub use hold::{HeldOff, hold_off};
pub use pending::{drain, drain_if_asked};
pub use slot::{AGAIN, GONE, NEW, PARKED, Slot, report, rseq_area};
pub use world::{StopError, Stopped, emergency_release, release, reset_after_restore, stop_all};

use crate::agent::callsites;
use crate::agent::callsites::restart::{self, Clock};
use crate::agent::clock;
use crate::agent::collect::descriptors::handed;
use crate::agent::hooks;
use crate::agent::hooks::senders;
use crate::agent::request;
use crate::agent::rollback;
use crate::agent::state::{AGENT, RESERVED_SIGNAL, awake};
use crate::agent::track::{fault, touch};
use ckpt_sys::raw::check;
use ckpt_sys::{syscall, tls::thread_block};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// How often one thread may be [`AGAIN`]. A program that does nothing but read the clock is
/// mostly found there.
const MOST_TRIES: u32 = 60;

/// The part of [`StopControl::parked`] that counts; above it is how often one was [`AGAIN`].
const PARKED_MASK: u32 = 0xff_ffff;

/// The stop in progress. Written by the helper, read by the handler.
struct StopControl {
    /// Futex: the number of the stop in progress, 0 when there is none.
    word: AtomicU32,
    /// Ever growing number of stops.
    number: AtomicU32,
    /// The slot array (in the helper's region) and its length.
    slots: AtomicU64,
    nslots: AtomicU32,
    /// Futex: threads parked so far, and how many the helper waits for.
    parked: AtomicU32,
    wanted: AtomicU32,
    /// Handlers between their look at the stop word and their last use of a slot.
    inside: AtomicU32,
    /// Threads that are about to call exec or are in it ([`hold_off`]).
    leaving: AtomicU32,
}

static STOP: StopControl = StopControl {
    word: AtomicU32::new(0),
    number: AtomicU32::new(0),
    slots: AtomicU64::new(0),
    nslots: AtomicU32::new(0),
    parked: AtomicU32::new(0),
    wanted: AtomicU32::new(0),
    inside: AtomicU32::new(0),
    leaving: AtomicU32::new(0),
};

/// CLOCK_MONOTONIC of the latest stop: after a restore, "now" for what remains of
/// interrupted sleeps.
pub static STOPPED_AT_NS: AtomicU64 = AtomicU64::new(0);

/// The number's part of the stop word; the bits above are bumped to make parked
/// threads look at their slots.
const NUMBER_MASK: u32 = 0xff_ffff;

/// Is this the value of a signal of our own?
pub fn is_request(value: u64) -> bool {
    [STOP_TAG, request::COMMAND_TAG].contains(&(value >> 48))
}

/// Tag of a stop request in `si_value`: tag, number of the stop (24 bits), slot (24 bits).
const STOP_TAG: u64 = 0xC4B6;

const FUTEX_WAIT_PRIVATE: i32 = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
const FUTEX_WAKE_PRIVATE: i32 = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;

/// The first 32 bytes of a queued signal's `siginfo_t`.
#[repr(C)]
struct QueuedInfo {
    signo: i32,
    errno: i32,
    code: i32,
    pad: i32,
    pid: i32,
    uid: u32,
    value: u64,
    rest: [u64; 12],
}

const SI_QUEUE: i32 = -1;

/// `struct kernel_sigaction`.
#[repr(C)]
struct KernelAction {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

const SA_RESTORER: u64 = 0x0400_0000;

/// Installs the handler of the reserved signal and unblocks it.
///
/// # Safety
/// Constructor only.
pub unsafe fn install_handler() -> Result<(), i32> {
    let action = KernelAction {
        handler: on_reserved_signal as *const () as u64,
        flags: libc::SA_SIGINFO as u64
            | libc::SA_RESTART as u64
            | libc::SA_ONSTACK as u64
            | SA_RESTORER,
        restorer: ckpt_sys::thread::restorer as *const () as u64,
        // Pages may be write-protected (`track::fault`), our own data too.
        mask: !fault::FAULT_BIT,
    };
    let set = crate::agent::state::RESERVED_BIT;
    // SAFETY: valid structs; the handler is async-signal-safe.
    unsafe {
        check(syscall!(
            libc::SYS_rt_sigaction,
            RESERVED_SIGNAL,
            &action,
            0,
            8
        ))?;
        check(syscall!(
            libc::SYS_rt_sigprocmask,
            libc::SIG_UNBLOCK,
            &set,
            0,
            8
        ))?;
    }
    Ok(())
}

/// The handler of the reserved signal.
unsafe extern "C" fn on_reserved_signal(
    signo: i32,
    info: *mut libc::siginfo_t,
    uc: *mut libc::ucontext_t,
) {
    // SAFETY: the kernel passes a valid siginfo.
    let queued = unsafe { &*(info as *const QueuedInfo) };
    let value = queued.value;
    if queued.code == SI_QUEUE && value >> 48 == STOP_TAG {
        // SAFETY: only our own process sends this tag (checked in `park`).
        unsafe { on_stop_request(value, uc) };
    } else if queued.code == SI_QUEUE && value >> 48 == request::COMMAND_TAG && awake() {
        // SAFETY: same frame.
        let interrupted = unsafe { restart::prepare(uc) };
        request::from_command(value);
        // SAFETY: as above.
        unsafe { restart::finish(uc, &interrupted, Clock::Runs) };
    } else {
        // SAFETY: the handler's own arguments. A signal that the program does not see
        // (ignored, blocked) must not end its call either.
        unsafe {
            let interrupted = restart::prepare(uc);
            if !hooks::foreign::deliver_foreign(signo, info, uc) {
                restart::finish(uc, &interrupted, Clock::Runs);
            }
        }
    }
}

/// Where the code that `uc` is a frame of goes on.
///
/// # Safety
/// `uc` is a frame.
unsafe fn rip(uc: *const libc::ucontext_t) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { (*uc).uc_mcontext.gregs[libc::REG_RIP as usize] as u64 }
}

/// A stop request was put off by a hook: raise it again, now that the hook is over.
///
/// # Safety
/// Called by the outermost hook guard's end, in the thread concerned.
pub unsafe fn park_put_off() {
    // SAFETY: the block is this thread's own; the signal goes to this very thread.
    unsafe {
        let block = thread_block();
        let value = (*block).put_off_value;
        (*block).stop_pending = 0;
        send(syscall!(libc::SYS_gettid) as i32, value);
    }
}

/// CLOCK_MONOTONIC in nanoseconds, by system call (the vdso may be foreign).
pub fn now_ns() -> u64 {
    let mut ts = [0u64; 2];
    // SAFETY: the kernel fills two words.
    unsafe { syscall!(libc::SYS_clock_gettime, libc::CLOCK_MONOTONIC, &mut ts) };
    ts[0] * 1_000_000_000 + ts[1]
}

unsafe fn on_stop_request(value: u64, uc: *mut libc::ucontext_t) {
    let number = (value >> 24) as u32 & 0xff_ffff;
    STOP.inside.fetch_add(1, Ordering::SeqCst);
    if STOP.word.load(Ordering::SeqCst) & NUMBER_MASK == number && number != 0 && awake() {
        // SAFETY: forwarded.
        unsafe { park(value, uc) };
    } // else stale: that stop is over, or this is a forked child
    STOP.inside.fetch_sub(1, Ordering::SeqCst);
}

unsafe fn park(value: u64, uc: *mut libc::ucontext_t) {
    let number = (value >> 24) as u32 & 0xff_ffff;
    let index = value as u32 & 0xff_ffff;
    // SAFETY: the block is this thread's own.
    let block = unsafe { &mut *thread_block() };
    // SAFETY: the frame of this very handler.
    if block.in_hook != 0 && unsafe { left_by_longjmp(block.hook_sp, uc) } {
        block.in_hook = 0;
    }
    if block.in_hook != 0 {
        block.put_off_value = value;
        block.stop_pending = 1;
        return;
    }
    if index >= STOP.nslots.load(Ordering::Acquire) {
        return;
    }
    // SAFETY: the slot array stays mapped while the stop word holds this number,
    // and the helper does not touch a slot in state NEW that it has signalled.
    let slot =
        unsafe { &mut *(STOP.slots.load(Ordering::Acquire) as *mut Slot).add(index as usize) };
    // SAFETY: gettid has no arguments.
    let tid = unsafe { syscall!(libc::SYS_gettid) } as u32;
    if slot.tid.load(Ordering::Acquire) != tid || slot.state.load(Ordering::Acquire) != NEW {
        return;
    }
    // SAFETY: the frame of this very handler.
    if clock::amid(unsafe { rip(uc) }) && slot.tries < MOST_TRIES {
        // SAFETY: the same frame.
        if unsafe { clock::put_off(uc, value) } {
            return;
        }
        slot.tries += 1;
        slot.state.store(AGAIN, Ordering::Release);
        STOP.parked.fetch_add(PARKED_MASK + 1, Ordering::SeqCst);
        wake_helper();
        return;
    }
    // SAFETY: the frame of this very handler.
    let interrupted = unsafe { restart::prepare(uc) };
    if !interrupted.is_something() {
        // SAFETY: the same frame.
        unsafe { callsites::rewind(uc) };
    }
    // SAFETY: the same frame.
    unsafe { senders::correct_at_entry(uc) };
    slot.ucontext = uc as u64;
    slot.interrupted = &raw const interrupted as u64;
    slot.resume_stack = free_stack_below(slot.ucontext.min(slot.interrupted));
    report(slot);
    slot.state.store(PARKED, Ordering::Release);
    let parked = STOP.parked.fetch_add(1, Ordering::SeqCst) + 1;
    if parked & PARKED_MASK >= STOP.wanted.load(Ordering::SeqCst) {
        wake_helper();
    }
    loop {
        let word = STOP.word.load(Ordering::Acquire);
        if word & NUMBER_MASK != number {
            break;
        }
        if drain_if_asked(slot, tid as i32) {
            continue;
        }
        handed::hand_if_asked();
        rollback::leader::obey(slot, tid as i32);
        // SAFETY: a futex word of ours.
        unsafe {
            syscall!(
                libc::SYS_futex,
                &STOP.word,
                FUTEX_WAIT_PRIVATE,
                word,
                0,
                0,
                0
            )
        };
    }
    // SAFETY: the frame of this very handler, prepared above.
    unsafe {
        restart::finish(uc, &interrupted, Clock::Runs);
        go_on(uc);
    }
}

/// The count of parked threads has changed.
fn wake_helper() {
    // SAFETY: a futex word of ours.
    unsafe {
        syscall!(
            libc::SYS_futex,
            &STOP.parked,
            FUTEX_WAKE_PRIVATE,
            1,
            0,
            0,
            0
        )
    };
}

/// Pages may be protected since the stop: the thread gets what it needs to run into them.
///
/// # Safety
/// In the handler whose frame `uc` is, last thing before it returns.
pub unsafe fn go_on(uc: *mut libc::ucontext_t) {
    if !fault::installed() {
        return;
    }
    // SAFETY: the handler's own frame; the thread's own block.
    unsafe {
        fault::keep_open_in(uc);
        hooks::altstack::provide(uc);
        touch::before_release(uc);
    }
}

/// Calls `f` for every thread that is parked at present. Helper thread, world stopped.
pub fn parked(mut f: impl FnMut(&Slot)) {
    if STOP.word.load(Ordering::SeqCst) == 0 {
        return;
    }
    let slots = STOP.slots.load(Ordering::SeqCst) as *const Slot;
    for k in 0..STOP.nslots.load(Ordering::SeqCst) as usize {
        // SAFETY: the array lives as long as the stop word is set.
        let slot = unsafe { &*slots.add(k) };
        if slot.state.load(Ordering::Acquire) == PARKED {
            f(slot);
        }
    }
}

/// Has one of the program's signal handlers jumped out of the hook (siglongjmp)? Then the
/// thread's stack pointer lies above the hook's frame. On an alternate stack nothing is known.
///
/// # Safety
/// `uc` is the present handler's own frame.
unsafe fn left_by_longjmp(hook_sp: u64, uc: *const libc::ucontext_t) -> bool {
    const STACK: u64 = 8 << 20;
    // SAFETY: per contract.
    let (sp, flags) = unsafe {
        let sp = (*uc).uc_mcontext.gregs[libc::REG_RSP as usize] as u64;
        (sp, (*uc).uc_stack.ss_flags)
    };
    let on_alternate = flags & libc::SS_ONSTACK != 0;
    hook_sp != 0 && !on_alternate && sp > hook_sp + 1024 && sp - hook_sp < STACK
}

/// A stack pointer below `address` and its red zone, aligned.
pub fn free_stack_below(address: u64) -> u64 {
    (address - 256) & !63
}

/// Helper thread: makes all parked threads look at their slots and at the orders of a
/// rollback.
pub fn look_again() {
    STOP.word.fetch_add(NUMBER_MASK + 1, Ordering::SeqCst);
    wake_parked();
}

/// The stop word has changed.
fn wake_parked() {
    // SAFETY: a futex word of ours.
    unsafe {
        syscall!(
            libc::SYS_futex,
            &STOP.word,
            FUTEX_WAKE_PRIVATE,
            i32::MAX,
            0,
            0,
            0
        )
    };
}

/// Asks a thread to stop.
unsafe fn send(tid: i32, value: u64) -> isize {
    let pid = AGENT.real_pid.load(Ordering::Relaxed);
    let info = QueuedInfo {
        signo: RESERVED_SIGNAL,
        errno: 0,
        code: SI_QUEUE,
        pad: 0,
        pid,
        uid: 0,
        value,
        rest: [0; 12],
    };
    // SAFETY: a full siginfo; the target is a thread of this process.
    unsafe {
        syscall!(
            libc::SYS_rt_tgsigqueueinfo,
            pid,
            tid,
            RESERVED_SIGNAL,
            &info
        )
    }
}
