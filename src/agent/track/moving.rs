//! Registrations and moves keep out of each other's way.
//!
//! To register part of a mapping makes two of it, and mremap(2) moves one: since Linux 6.17
//! several as well, one after the other, but none that is registered, and then it leaves
//! those behind that it has not moved yet. So the helper registers nothing while a thread of
//! the program is in the midst of a move, and a thread begins none while it registers.
//! Neither waits for ever: what the helper cannot register now is reported whole, as all is
//! that is not registered, and a thread moves after 200 ms in any case.
//!
//! [`Moving`] in the hook of mremap, [`registering`] in the helper thread.

use super::fault::FAULT_BIT;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicU32, Ordering::*};

/// The helper registers, or is about to.
const REGISTERING: u32 = 1 << 31;

/// [`REGISTERING`], and how many threads move mappings.
static STATE: AtomicU32 = AtomicU32::new(0);

/// So often is the processor given away before the helper's wait ends.
const MOST_TRIES: u32 = 5000;
/// A thread gives it away so often, and then sleeps so often for 100 us (200 ms in all): a
/// helper that has lost its processor while it registers comes back sooner than that.
const YIELDS: u32 = 1000;
const SLEEPS: u32 = 2000;

fn give_way() {
    // SAFETY: no arguments.
    unsafe { syscall!(libc::SYS_sched_yield) };
}

fn sleep() {
    let time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 100_000,
    };
    // SAFETY: a time of ours; every signal but the one of a fault is blocked.
    unsafe { syscall!(libc::SYS_nanosleep, &time, 0) };
}

/// After a restore: nobody is at it.
pub fn forget() {
    STATE.store(0, Release);
}

/// While this lives, the mappings of the program change by its own calls alone.
pub struct Moving {
    /// The thread's signal mask. No handler may come in between: it could leave by
    /// longjmp, or move mappings itself.
    mask: u64,
}

impl Moving {
    pub fn begin() -> Moving {
        // Pages may be write-protected, our own data too.
        let all = !FAULT_BIT;
        let mut mask = 0u64;
        // SAFETY: two words of ours.
        unsafe {
            syscall!(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                &all,
                &mut mask,
                8
            )
        };
        let mut state = STATE.load(Relaxed);
        let mut waits = 0;
        while waits < YIELDS + SLEEPS {
            if state & REGISTERING != 0 {
                if waits < YIELDS {
                    give_way()
                } else {
                    sleep()
                }
                waits += 1;
                state = STATE.load(Relaxed);
                continue;
            }
            match STATE.compare_exchange_weak(state, state + 1, AcqRel, Relaxed) {
                Ok(_) => return Moving { mask },
                Err(now) => state = now,
            }
        }
        // The helper does not get on: rather side by side with it than not at all.
        STATE.fetch_add(1, AcqRel);
        Moving { mask }
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        STATE.fetch_sub(1, Release);
        // SAFETY: a word of ours.
        unsafe {
            syscall!(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                &self.mask,
                0,
                8
            )
        };
    }
}

/// Does `register` when no thread moves mappings; `None` when that does not come about.
pub fn registering<T>(register: impl FnOnce() -> T) -> Option<T> {
    let mut state = STATE.fetch_or(REGISTERING, AcqRel);
    for _ in 0..MOST_TRIES {
        if state & !REGISTERING == 0 {
            break;
        }
        give_way();
        state = STATE.load(Acquire);
    }
    let done = (state & !REGISTERING == 0).then(register);
    STATE.fetch_and(!REGISTERING, Release);
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn neither_is_in_the_midst_of_the_other() {
        in_child(|| {
            static MOVED: AtomicU32 = AtomicU32::new(0);
            static BEGUN: AtomicU32 = AtomicU32::new(0);
            static OVER: AtomicBool = AtomicBool::new(false);
            let movers: Vec<_> = (0..3)
                .map(|_| {
                    std::thread::spawn(|| {
                        while !OVER.load(Relaxed) {
                            let _moving = Moving::begin();
                            BEGUN.fetch_add(1, SeqCst);
                            give_way();
                            MOVED.fetch_add(1, SeqCst);
                        }
                    })
                })
                .collect();
            let mut done = 0;
            while done < 300 || MOVED.load(Relaxed) < 3000 {
                let alone = registering(|| {
                    let before = MOVED.load(SeqCst);
                    assert_eq!(before, BEGUN.load(SeqCst));
                    give_way();
                    assert_eq!(before, BEGUN.load(SeqCst));
                });
                done += u32::from(alone.is_some());
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
            OVER.store(true, Relaxed);
            movers.into_iter().for_each(|m| m.join().unwrap());
            assert_eq!(STATE.load(Relaxed), 0);
        });
    }

    #[test]
    fn one_that_does_not_end_is_not_waited_for() {
        in_child(|| {
            let _moving = Moving::begin();
            assert!(registering(|| ()).is_none());
            assert_eq!(STATE.load(Relaxed), 1);
        });
    }
}
