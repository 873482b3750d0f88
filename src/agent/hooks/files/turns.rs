//! Whose turn it is to write at a position that several threads may share.
//!
//! A write at the descriptor's own position is recorded for the place that the position has, and
//! another thread's write through the same open file would move it before the call is made. So
//! while the program has more than one thread, such writes to one regular file take turns: a lock
//! an inode (or a few of them), held from the look at the position to the end of the call. The kernel lets
//! them wait for each other anyway. Any thread, inside a hook with all signals blocked, so that no
//! handler of the program finds the lock held by its own thread; never taken with the
//! recorder's lock held.
//!
//! Writes that stage 1 decides need no turn: what they need holds wherever the position goes,
//! unless it goes back (`lseek`, which ends that knowledge).

use super::guard::Unlocked;
use super::{cache, paths};
use crate::persist::Id;
use crate::persist::lock::Lock;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

const LOCKS: usize = 64;
static ALL: [Lock; LOCKS] = [const { Lock::new() }; LOCKS];

/// The program has several threads, or may have.
static SEVERAL: AtomicBool = AtomicBool::new(true);

/// The helper, while the world is stopped in a running program: there are the program's
/// threads and the helper.
pub fn begin() {
    SEVERAL.store(!is_alone(), Relaxed);
}

/// Is there one thread of the program, beside the helper?
pub fn is_alone() -> bool {
    let Some(path) = paths::Path::of(&[b"/proc/self/task"]) else {
        return false;
    };
    // Two of them are the directory's own.
    let count = |stat: crate::persist::Stat| (2 + 1..=2 + 2).contains(&stat.nlink);
    paths::stat_at(paths::CWD, &path, 0).is_ok_and(count)
}

/// A thread is about to be born, or it is not known how many there are.
pub fn expect_several() {
    SEVERAL.store(true, Relaxed);
}

/// Do writes at a position need a turn?
pub fn needed() -> bool {
    SEVERAL.load(Relaxed)
}

/// The turn of this thread, and the hook's extent.
pub struct Turn {
    lock: &'static Lock,
    _extent: Unlocked,
}

impl Drop for Turn {
    // Before the signals come back.
    fn drop(&mut self) {
        self.lock.unlock_blocked();
    }
}

/// Waits for the turn to write at the position of `fd`. `None`: no regular file, or nothing is
/// recorded at all.
pub fn take(fd: i32) -> Option<Turn> {
    if cache::flags(fd) & cache::PASS != 0 {
        return None;
    }
    let extent = Unlocked::begin()?;
    let id = match cache::saved(fd) {
        Some((map, _)) => map.id(),
        None => paths::stat_fd(fd).ok().filter(|s| s.is_regular())?.id,
    };
    let lock = &ALL[number(&id)];
    lock.lock_blocked();
    Some(Turn {
        lock,
        _extent: extent,
    })
}

fn number(id: &Id) -> usize {
    (id.ino ^ id.ino >> 6 ^ id.dev) as usize % LOCKS
}
