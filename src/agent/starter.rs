//! The program's tie to its starter: a program that was restored with its old process id is a
//! child of the process that was started (`restore::proxy`), and dies with it.
//!
//! The tie is a parent death signal (prctl(2), PR_SET_PDEATHSIG; each thread has its own). It is
//! the helper's: the program's threads keep theirs, and what the kernel takes away with changed
//! credentials (setuid) is theirs only. Where the helper ends before the program (exec, sandbox)
//! a thread of the program takes the tie over.
//!
//! Called by the restored helper, by hooks and `resume` in program threads, and by `rollback`, which
//! hands it on.

use crate::agent::state::AGENT;
use ckpt_sys::syscall;
use std::sync::atomic::Ordering;

/// The starter's process id; 0: the program is no starter's child.
pub fn id() -> i32 {
    AGENT.starter.load(Ordering::Relaxed)
}

/// The helper of a restored program: it dies with process `starter`, unless that is 0.
pub fn die_with(starter: i32) {
    AGENT.starter.store(starter, Ordering::SeqCst);
    if starter == 0 {
        return;
    }
    set_death_signal(libc::SIGKILL);
    // SAFETY: no pointers.
    unsafe {
        if syscall!(libc::SYS_getppid) as i32 != starter {
            let own = syscall!(libc::SYS_getpid);
            syscall!(libc::SYS_kill, own, libc::SIGKILL);
        }
    }
}

/// The helper is about to end before the program: the calling thread is tied instead, unless
/// the program has set a signal for it. True: it was.
pub fn hand_over() -> bool {
    let needed = id() != 0 && death_signal() == 0;
    if needed {
        set_death_signal(libc::SIGKILL);
    }
    needed
}

/// The helper lives on (an exec failed).
pub fn take_back() {
    set_death_signal(0);
}

fn death_signal() -> i32 {
    let mut signo = 0i32;
    // SAFETY: a word of ours.
    unsafe { syscall!(libc::SYS_prctl, libc::PR_GET_PDEATHSIG, &raw mut signo) };
    signo
}

/// The calling thread gets `signo` when its parent dies; 0: nothing.
pub fn set_death_signal(signo: i32) {
    // SAFETY: no pointers.
    unsafe { syscall!(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, signo) };
}
