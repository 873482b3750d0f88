//! The helper thread: its birth, its loop, its end.
//!
//! Born by raw `clone` without CLONE_FILES and CLONE_FS (docs/ARCHITECTURE.md): its
//! descriptors are its own. It blocks every signal. It waits for requests and for
//! the clock, and takes the checkpoints.

use crate::agent::checkpoint::Worker;
use crate::agent::region::{self, Region};
use crate::agent::request;
use crate::agent::{log, refusal, rollback, stop};
use ckpt_sys::raw::check;
use ckpt_sys::thread::spawn_raw;
use ckpt_sys::{syscall, tls::thread_block};
use std::sync::atomic::{AtomicU32, Ordering};

const NONE: u32 = 0;
const STARTING: u32 = 1;
const RUNNING: u32 = 2;
const RETIRED: u32 = 3;

/// Futex: what becomes of the helper.
static STATE: AtomicU32 = AtomicU32::new(NONE);

const FUTEX_WAIT_PRIVATE: i32 = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
const FUTEX_WAKE_PRIVATE: i32 = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;

/// Where the helper comes from: decides what it finds in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// The program was started from the beginning.
    First,
    /// It was restored from a checkpoint.
    Restored,
}

/// Makes sure that there is a helper. Any program thread, signal handlers included.
pub fn ensure() -> Result<(), i32> {
    match STATE.load(Ordering::Acquire) {
        RUNNING => Ok(()),
        RETIRED => Err(libc::EPERM),
        _ => start(&[]),
    }
}

/// Starts the helper; `keep` are descriptors of the caller's table (the job's lock,
/// say) that it takes over: the caller may close its own afterwards.
pub fn start(keep: &[i32]) -> Result<(), i32> {
    let everything = u64::MAX;
    let mut mask = 0u64;
    // SAFETY: valid pointers. Signals stay blocked while the helper is born: it
    // inherits the mask, and a handler here could want a helper as well.
    unsafe {
        syscall!(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &everything,
            &mut mask,
            8
        )
    };
    let result = loop {
        match STATE.compare_exchange(NONE, STARTING, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => break spawn(keep),
            Err(RUNNING) => break Ok(()),
            Err(RETIRED) => break Err(libc::EPERM),
            // SAFETY: a futex word of ours.
            Err(_) => unsafe {
                syscall!(
                    libc::SYS_futex,
                    &STATE,
                    FUTEX_WAIT_PRIVATE,
                    STARTING,
                    0,
                    0,
                    0
                );
            },
        }
    };
    // SAFETY: as above.
    unsafe { syscall!(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &mask, 0, 8) };
    result
}

fn spawn(keep: &[i32]) -> Result<(), i32> {
    let result = try_spawn(keep);
    STATE.store(
        if result.is_ok() { RUNNING } else { NONE },
        Ordering::SeqCst,
    );
    // SAFETY: a futex word of ours.
    unsafe {
        syscall!(
            libc::SYS_futex,
            &STATE,
            FUTEX_WAKE_PRIVATE,
            i32::MAX,
            0,
            0,
            0
        )
    };
    result
}

/// CLONE_VM | CLONE_SIGHAND | CLONE_THREAD | CLONE_SETTLS.
const HELPER_FLAGS: u64 =
    (libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD | libc::CLONE_SETTLS) as u64;

fn try_spawn(keep: &[i32]) -> Result<(), i32> {
    let (base, len) = region::map()?;
    // SAFETY: the region is freshly mapped.
    unsafe {
        let region = base as *mut Region;
        region::lay_out(base, len)?;
        for (place, fd) in (*region).keep_fds.iter_mut().zip(keep) {
            *place = *fd;
        }
        region::publish(base);
        let born = spawn_raw(
            HELPER_FLAGS,
            (*region).stack_top,
            (*region).tls,
            first_life,
            base,
        );
        check(born)?;
        // Wait until it has dropped its copies of the program's descriptors: a pipe's
        // end must not live longer than the program wants.
        while (*region).started.load(Ordering::Acquire) == 0 {
            let word = &raw const (*region).started;
            syscall!(libc::SYS_futex, word, FUTEX_WAIT_PRIVATE, 0, 0, 0, 0);
        }
    }
    Ok(())
}

extern "C" fn first_life(base: u64) -> ! {
    // SAFETY: called once, by `spawn_raw`, with the published region.
    unsafe { take_over(base as *mut Region) };
    live(Life::First)
}

/// First steps in the new thread: its block, its descriptors, its name.
///
/// # Safety
/// The helper thread only, with its region published.
pub unsafe fn take_over(region: *mut Region) {
    // SAFETY: the block is this thread's own; descriptors closed here are copies.
    unsafe {
        (*thread_block()).is_helper = 1;
        let tid = syscall!(libc::SYS_gettid) as u32;
        (*region).tid.store(tid, Ordering::SeqCst);
        refusal::HELPER_ALIVE.store(tid, Ordering::SeqCst);
        syscall!(libc::SYS_set_tid_address, &refusal::HELPER_ALIVE);
        let mut keep = (*region).keep_fds;
        keep.sort_unstable();
        let mut from = 0i64;
        for fd in keep.into_iter().filter(|&fd| fd >= 0) {
            if fd as i64 > from {
                syscall!(libc::SYS_close_range, from, fd as i64 - 1, 0);
            }
            from = fd as i64 + 1;
        }
        syscall!(libc::SYS_close_range, from, u32::MAX, 0);
        occupy_standard();
        syscall!(libc::SYS_prctl, libc::PR_SET_NAME, c"ckpt-helper".as_ptr());
        // Who bore it may have forbidden that to himself; the vdso's clocks need it.
        syscall!(libc::SYS_prctl, libc::PR_SET_TSC, libc::PR_TSC_ENABLE);
        (*region).started.store(1, Ordering::Release);
        let word = &raw const (*region).started;
        syscall!(libc::SYS_futex, word, FUTEX_WAKE_PRIVATE, i32::MAX, 0, 0, 0);
    }
}

/// Numbers 0 to 2 of the helper's table lead nowhere: what anything writes there (the last words
/// of std, say) must not get into the job's lock or a table.
fn occupy_standard() {
    loop {
        let flags = libc::O_PATH | libc::O_CLOEXEC;
        // SAFETY: a constant path; a descriptor of our own.
        unsafe {
            let fd = syscall!(libc::SYS_openat, libc::AT_FDCWD, c"/".as_ptr(), flags, 0);
            if fd > 2 {
                syscall!(libc::SYS_close, fd);
            }
            if !(0..=2).contains(&fd) {
                return;
            }
        }
    }
}

/// The helper's life: requests and the clock.
pub fn live(life: Life) -> ! {
    let mut worker = Worker::new(life);
    while worker.step() {}
    retire()
}

/// Marks the (restored) helper as running.
pub fn mark_running() {
    STATE.store(RUNNING, Ordering::SeqCst);
}

/// Ends the helper thread. Its region stays mapped: nobody can unmap the stack it
/// stands on.
fn retire() -> ! {
    STATE.store(RETIRED, Ordering::SeqCst);
    request::answer(-libc::EPERM);
    rollback::call::answer(-libc::EPERM);
    leave()
}

/// Ends the calling thread, the helper, and nothing else.
pub fn leave() -> ! {
    loop {
        // SAFETY: ends this thread only.
        unsafe { syscall!(libc::SYS_exit, 0) };
    }
}

/// The panic hook: an internal error must never cost the user the program (law 7).
/// In the helper the threads are let go and the helper ends for good; elsewhere
/// nothing more can be done than to say so.
pub fn on_panic(info: &std::panic::PanicHookInfo<'_>) {
    // SAFETY: the block is this thread's own.
    let in_helper = unsafe { (*thread_block()).is_helper } != 0;
    let at = info.location().map_or(0, |l| l.line());
    let file = info.location().map_or("?", |l| l.file());
    log::line(format_args!(
        "internal error at {file}:{at}: no more checkpoints"
    ));
    if rollback::is_final() {
        rollback::leader::end(format_args!("internal error at {file}:{at}"));
    }
    if in_helper {
        refusal::disable("internal error in the checkpoint library");
        stop::emergency_release();
        retire();
    }
}
