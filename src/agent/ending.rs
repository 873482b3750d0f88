//! The end that nobody announces: the program's last thread leaves by a plain exit(2),
//! not by exit_group. The process would live on for as long as our helper does, so the
//! helper looks for that now and then, and ends the process as the kernel would have: with
//! the status that the last thread gave.
//!
//! [`thread_exits`] runs in the program's threads, everything else in the helper.

use crate::agent::procfs::{self, TaskList};
use crate::agent::state::AGENT;
use crate::agent::{exit, request};
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// What a look has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// The first thread lives.
    Running,
    /// It has ended, others go on.
    LeaderGone,
    /// Nobody is left; the process's status.
    Gone(i32),
}

/// Status of the latest exit(2) of a thread that was seen; -1 before.
static LAST: AtomicI32 = AtomicI32::new(-1);
/// A thread has said that it goes: it may have been the last.
static SOON: AtomicBool = AtomicBool::new(false);

/// A thread is about to leave by exit(2). Any thread of the program; lock-free.
pub fn thread_exits(status: i32) {
    LAST.store(status & 0xff, Ordering::SeqCst);
    SOON.store(true, Ordering::SeqCst);
    request::wake();
}

/// In how many nanoseconds to look at the latest, after a thread has said good-bye.
pub fn hint() -> Option<u64> {
    const SOON_NS: u64 = 5_000_000;
    SOON.swap(false, Ordering::SeqCst).then_some(SOON_NS)
}

const OFTEN_NS: u64 = 50_000_000;
const RARELY_NS: u64 = 1_000_000_000;

/// Ends the process if no thread of the program is left. Otherwise: in how many
/// nanoseconds to look again.
pub fn look() -> u64 {
    match see() {
        Seen::Running => RARELY_NS,
        Seen::LeaderGone => OFTEN_NS,
        Seen::Gone(status) => {
            exit::on_exit(status);
            loop {
                // SAFETY: ends the process, of which only this thread is left.
                unsafe { syscall!(libc::SYS_exit_group, status) };
            }
        }
    }
}

fn is_dead(state: Option<u8>) -> bool {
    matches!(state, None | Some(b'Z' | b'X'))
}

fn see() -> Seen {
    let Ok(stat) = procfs::read_file(b"/proc/self/stat") else {
        return Seen::Running;
    };
    let fields = procfs::stat_fields(&stat);
    if !is_dead(fields.first().and_then(|f| f.first()).copied()) {
        return Seen::Running;
    }
    let leader = AGENT.real_pid.load(Ordering::Relaxed);
    // SAFETY: no arguments.
    let own = unsafe { syscall!(libc::SYS_gettid) } as i32;
    let mut tasks = TaskList::new();
    if tasks.read().is_err() {
        return Seen::LeaderGone;
    }
    let lives = |&tid: &i32| tid != own && tid != leader && !is_dead(procfs::task_state(tid));
    if tasks.ids().iter().any(lives) {
        return Seen::LeaderGone;
    }
    let told = LAST.load(Ordering::SeqCst);
    if told >= 0 {
        return Seen::Gone(told);
    }
    // Field 52 of proc(5), ours count from the third: the first thread's, as wait(2)
    // would tell it.
    let code = fields.get(49).and_then(|f| procfs::number(f)).unwrap_or(0);
    Seen::Gone((code >> 8) as i32 & 0xff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_living_process_is_left_alone() {
        assert_eq!(see(), Seen::Running);
        assert_eq!(look(), RARELY_NS);
    }
}
