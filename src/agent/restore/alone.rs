//! Ending the threads that a library has started before main.
//!
//! A library's constructor runs before ours and may have started threads (a linear
//! algebra library its pool, say). The memory that they run in is about to be
//! replaced: they end first. A thread that cannot be made to (it blocks all signals)
//! is left behind in the starter, which becomes a proxy, as a fork does not take it
//! along.
//!
//! Constructor of the new process. Nothing of the program has run.

use super::proxy;
use crate::agent::procfs::TaskList;
use crate::agent::state::RESERVED_SIGNAL;
use ckpt_sys::syscall;
use std::time::{Duration, Instant};

/// A thread that runs at all is gone within microseconds.
const PATIENCE: Duration = Duration::from_secs(1);

/// `struct kernel_sigaction`.
#[repr(C)]
struct KernelAction {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

const SA_RESTORER: u64 = 0x0400_0000;

/// Ends the thread that it runs in, and nothing else: no destructors, no clean-up.
unsafe extern "C" fn leave(_signo: i32) {
    // SAFETY: this thread's stack and data are never looked at again.
    unsafe { syscall!(libc::SYS_exit, 0) };
}

/// Returns in a process of one thread: this one, or a child of it.
pub fn be_alone() {
    // SAFETY: no arguments.
    let own = unsafe { syscall!(libc::SYS_gettid) } as i32;
    if others(own).is_empty() {
        return;
    }
    let action = KernelAction {
        handler: leave as *const () as u64,
        flags: SA_RESTORER,
        restorer: ckpt_sys::thread::restorer as *const () as u64,
        mask: u64::MAX,
    };
    // SAFETY: a valid struct. The image's actions replace this one.
    unsafe { syscall!(libc::SYS_rt_sigaction, RESERVED_SIGNAL, &action, 0, 8) };
    let until = Instant::now() + PATIENCE;
    let mut told: Vec<i32> = Vec::new();
    loop {
        let left = others(own);
        if left.is_empty() {
            return;
        }
        // A thread that starts another one may have been faster.
        for tid in left {
            if told.contains(&tid) {
                continue;
            }
            told.push(tid);
            // SAFETY: no pointers; ids that are gone by now are an error.
            unsafe {
                let pid = syscall!(libc::SYS_getpid);
                syscall!(libc::SYS_tgkill, pid, tid, RESERVED_SIGNAL);
            }
        }
        if Instant::now() > until {
            return proxy::leave_threads();
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// The other threads of this process.
fn others(own: i32) -> Vec<i32> {
    let mut list = TaskList::small();
    let _ = list.read();
    list.ids()
        .iter()
        .copied()
        .filter(|&tid| tid != own)
        .collect()
}
