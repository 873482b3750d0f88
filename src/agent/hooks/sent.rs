//! Which threads were sent a signal of their own (tgkill(2), tkill(2), rt_tgsigqueueinfo(2):
//! pthread_kill, pthread_cancel) since the last checkpoint.
//!
//! A thread reports its pending signals when it parks. Threads that run on for a moment may
//! send it another one, which is part of the checkpoint as well: those are looked at again, and
//! with 1,500 threads only those.
//!
//! Written by hooks in any thread and context, before the call; read by the helper when all
//! threads are parked, so that no call is under way.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

const WORDS: usize = 64;

/// One bit for all ids that are equal modulo 4096; an id too many costs a look.
static SENT: [AtomicU64; WORDS] = [const { AtomicU64::new(0) }; WORDS];

/// The calls, with the argument that names the thread.
pub const CALLS: &[(libc::c_long, usize)] = &[
    (libc::SYS_tkill, 0),
    (libc::SYS_tgkill, 1),
    (libc::SYS_rt_tgsigqueueinfo, 1),
];

fn place(id: i32) -> (usize, u64) {
    let bit = id as u32 as usize % (64 * WORDS);
    (bit / 64, 1 << (bit % 64))
}

/// A thread is about to be sent a signal; `id` as the program or as the kernel knows it.
pub fn note(id: i32) {
    let (word, bit) = place(id);
    if SENT[word].load(SeqCst) & bit == 0 {
        SENT[word].fetch_or(bit, SeqCst);
    }
}

/// What was noted until a moment when nobody could note anything.
#[derive(Debug, Default)]
pub struct Sent(Vec<u64>);

impl Sent {
    /// Takes everything: what is asked for next time has been noted since.
    pub fn take() -> Sent {
        Sent(SENT.iter().map(|word| word.swap(0, SeqCst)).collect())
    }

    pub fn add(&mut self, id: i32) {
        let (word, bit) = place(id);
        if let Some(bits) = self.0.get_mut(word) {
            *bits |= bit;
        }
    }

    pub fn contains(&self, id: i32) -> bool {
        let (word, bit) = place(id);
        self.0.get(word).is_some_and(|bits| bits & bit != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::{call, in_child};

    #[test]
    fn each_way_to_signal_a_thread_is_noted() {
        in_child(|| {
            // SAFETY: signal 0 and invalid ids: nothing is sent.
            let (pid, tid) = unsafe { (libc::getpid() as u64, libc::gettid() as u64) };
            assert_eq!(call(libc::SYS_tgkill, &[pid, tid, 0]), None);
            let mut sent = Sent::take();
            assert!(sent.contains(tid as i32) && !sent.contains(tid as i32 + 1));
            assert!(!Sent::take().contains(tid as i32));
            sent.add(7);
            assert!(sent.contains(7));
            for (nr, at) in CALLS {
                let mut args = [pid, pid, 0];
                args[*at] = 77;
                call(*nr, &args);
                assert!(Sent::take().contains(77), "{nr}");
            }
        });
    }
}
