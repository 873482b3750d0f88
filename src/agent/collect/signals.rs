//! Signal actions, pending signals, and the timers that send them.
//!
//! Pending signals carry data that can only be read by taking them off the queue:
//! the helper takes those of the process, each thread (in its stop handler, at the
//! helper's request) those of its own; all are put back in the same order at once.

use super::timers;
use crate::agent::hooks::sent::Sent;
use crate::agent::procfs;
use crate::agent::state::{AGENT, RESERVED_BIT, RESERVED_SIGNAL};
use crate::agent::stop::{self, Stopped};
use crate::image::state::{KernelSigaction, PendingSignal, SignalState, ThreadState, TimerState};
use ckpt_sys::syscall;
use std::sync::atomic::Ordering;

/// The kernel's `siginfo_t`.
pub const SIGINFO_LEN: usize = 128;

/// Takes one signal of `set` off the calling thread's queues; `None` when empty.
///
/// # Safety
/// All signals of `set` are blocked in the calling thread.
pub unsafe fn take(set: u64) -> Option<PendingSignal> {
    let mut info = [0u8; SIGINFO_LEN];
    let at_once = [0u64; 2];
    // SAFETY: a siginfo buffer, a set of 8 bytes and a zero timeout.
    let signo = unsafe {
        syscall!(
            libc::SYS_rt_sigtimedwait,
            &set,
            info.as_mut_ptr(),
            &at_once,
            8
        )
    };
    (signo > 0).then(|| PendingSignal {
        signo: signo as i32,
        info: info.to_vec(),
    })
}

/// Which timer of timer_create has sent this: signal, timer and value.
fn timer_of(info: &[u8]) -> Option<(i32, i32, u64)> {
    let word = |at: usize| i32::from_ne_bytes(info[at..at + 4].try_into().unwrap_or_default());
    let value = u64::from_ne_bytes(info[24..32].try_into().unwrap_or_default());
    (word(CODE) == libc::SI_TIMER).then(|| (word(0), word(TIMER), value))
}

/// Places in a siginfo.
const CODE: usize = 8;
const TIMER: usize = 16;
const OVERRUN: usize = 20;

/// Counts another signal of the same timer in the first one's overruns.
fn count_in(first: &mut [u8], other: &[u8]) {
    let overrun = |info: &[u8]| {
        let bytes = info[OVERRUN..OVERRUN + 4].try_into().unwrap_or_default();
        i32::from_ne_bytes(bytes).max(0)
    };
    let all = overrun(first)
        .saturating_add(overrun(other))
        .saturating_add(1);
    first[OVERRUN..OVERRUN + 4].copy_from_slice(&all.to_ne_bytes());
}

/// A signal of a timer that waits is one, however often the timer expires. Taken by us it is
/// the timer's no more, which sends another: each checkpoint added one, until there was no
/// room for signals any more. They are one again here; how many are left.
pub fn joined(infos: &mut [[u8; SIGINFO_LEN]]) -> usize {
    let mut kept = 0;
    for next in 0..infos.len() {
        let (before, rest) = infos.split_at_mut(next);
        let info = &rest[0];
        let timer = timer_of(info);
        let same = |other: &&mut [u8; SIGINFO_LEN]| timer_of(&other[..]) == timer;
        match timer.and_then(|_| before[..kept].iter_mut().find(same)) {
            Some(first) => count_in(first, info),
            None => {
                infos[kept] = infos[next];
                kept += 1;
            }
        }
    }
    kept
}

/// Puts a signal back on the process's queue, with the sender's information as it was.
///
/// The kernel lets nobody but the *thread* `pid` itself queue a signal that claims to come
/// from kill(2) (si_code SI_USER), the process's other threads included. But any
/// thread's id names the process here, so the calling thread gives its own.
pub fn put_back(signal: &PendingSignal) -> isize {
    // SAFETY: a full siginfo; no other pointers.
    unsafe {
        let own = syscall!(libc::SYS_gettid);
        syscall!(
            libc::SYS_rt_sigqueueinfo,
            own,
            signal.signo,
            signal.info.as_ptr()
        )
    }
}

/// Puts a signal back on the calling thread's own queue; for the same reason nobody
/// else can do it for signals of tgkill(2).
pub fn put_back_own(signal: &PendingSignal) -> isize {
    let pid = AGENT.real_pid.load(Ordering::Relaxed);
    // SAFETY: as above.
    unsafe {
        let own = syscall!(libc::SYS_gettid);
        syscall!(
            libc::SYS_rt_tgsigqueueinfo,
            pid,
            own,
            signal.signo,
            signal.info.as_ptr()
        )
    }
}

fn actions() -> Vec<KernelSigaction> {
    (1..=64)
        .map(|signo| {
            let mut action = KernelSigaction::default();
            // SAFETY: the kernel fills the struct.
            unsafe { syscall!(libc::SYS_rt_sigaction, signo, 0, &mut action, 8) };
            action
        })
        .collect()
}

/// So many readings until no timer expires in between: one that does again and again loses or
/// gains a tick.
const READINGS: usize = 16;

/// With so few threads all are looked at, whoever may have sent them something. One alone has
/// parked last, and has reported all.
const FEW: std::ops::RangeInclusive<usize> = 2..=4;

/// Collects actions, pending signals and timers; fills in `pending` of each thread.
///
/// All of it as of one moment: a timer that expires goes from the one list to the other, and
/// must not be missed by both.
pub fn collect(stopped: &Stopped, threads: &mut [ThreadState]) -> (SignalState, TimerState) {
    let mut sent = Sent::take();
    let actions = actions();
    let mut readings = READINGS;
    loop {
        readings -= 1;
        let mut timers = timers::collect();
        for timer in timers.posix.iter().filter(|t| t.tid != 0) {
            sent.add(timer.tid);
        }
        let pending = pending(stopped, threads, &sent);
        if timers::any_runs(&timers)
            && readings > 0
            && timers::expired_between(&timers, &timers::collect())
        {
            continue;
        }
        let real = &mut timers.itimers[0];
        if real.0 == 0 {
            // The kernel starts it when its signal is taken; whoever restores must.
            real.0 = real.1;
        }
        let state = SignalState { actions, pending };
        return (state, timers);
    }
}

/// The helper's own pending signals: what the kernel says to whoever writes beyond RLIMIT_FSIZE
/// (SIGXFSZ) or to a pipe without readers. Given to the program they would end it.
fn discard_own() {
    let status = procfs::read_file(b"/proc/thread-self/status").unwrap_or_default();
    let own = procfs::field(&status, "SigPnd").and_then(procfs::hex);
    let own = own.unwrap_or(0) & !RESERVED_BIT;
    for bit in (0..64).map(|n| 1u64 << n).filter(|bit| own & bit != 0) {
        // SAFETY: the helper blocks every signal; a thread's own come before the process's.
        unsafe { take(bit) };
    }
}

/// The process's pending signals; each thread's into its state.
fn pending(stopped: &Stopped, threads: &mut [ThreadState], sent: &Sent) -> Vec<PendingSignal> {
    let waiting = || {
        let mut set = 0u64;
        // SAFETY: the kernel fills the set. The helper blocks every signal.
        unsafe { syscall!(libc::SYS_rt_sigpending, &raw mut set, 8) };
        set
    };
    let mut shared = waiting();
    if shared != 0 {
        discard_own();
        shared = waiting();
    }
    let mut process: Vec<PendingSignal> = Vec::new();
    if shared != 0 {
        // SAFETY: the helper has none of its own: what it takes is the process's.
        while let Some(signal) = unsafe { take(shared) } {
            let timer = timer_of(&signal.info);
            let same = |other: &&mut PendingSignal| timer_of(&other.info) == timer;
            match timer.and_then(|_| process.iter_mut().find(same)) {
                Some(first) => count_in(&mut first.info, &signal.info),
                None => process.push(signal),
            }
        }
    }
    let few = FEW.contains(&threads.len());
    for (slot, thread) in stopped.threads().zip(threads.iter_mut()) {
        thread.pending.clear();
        let tid = slot.tid.load(Ordering::Relaxed) as i32;
        // What it has reported was the process's as well, and may be older than the last signal
        // that a thread sent before it was parked itself.
        let look = few
            || slot.inserted
            || slot.pending != 0
            || sent.contains(tid)
            || sent.contains(thread.tid);
        if !look {
            continue;
        }
        let status = procfs::task_file(tid, "status").unwrap_or_default();
        let own = procfs::field(&status, "SigPnd")
            .and_then(procfs::hex)
            .unwrap_or(0);
        if own != 0 {
            thread.pending = stop::drain(slot, own);
            thread.pending.retain(|signal| !is_request(signal));
        }
    }
    for signal in &process {
        put_back(signal);
    }
    process.retain(|signal| !is_request(signal));
    process
}

/// A request to stop, or of the command: of this process, not of the program. A signal of the
/// same number that the program has sent is the program's: one that came with the stop's was in
/// no image.
fn is_request(signal: &PendingSignal) -> bool {
    let value = signal
        .info
        .get(24..32)
        .and_then(|value| value.try_into().ok());
    signal.signo == RESERVED_SIGNAL
        && stop::is_request(u64::from_ne_bytes(value.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(signo: i32, code: i32, timer: i32, overrun: i32) -> [u8; SIGINFO_LEN] {
        let mut info = [0; SIGINFO_LEN];
        for (at, word) in [(0, signo), (CODE, code), (TIMER, timer), (OVERRUN, overrun)] {
            info[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        }
        info
    }

    #[test]
    fn signals_of_one_timer_are_one() {
        let queued = info(40, libc::SI_QUEUE, 1, 2);
        let mut infos = [
            info(40, libc::SI_TIMER, 1, 2),
            queued,
            info(40, libc::SI_TIMER, 0, 0),
            queued,
            info(40, libc::SI_TIMER, 1, 0),
            info(41, libc::SI_TIMER, 1, 0),
            info(40, libc::SI_TIMER, 1, i32::MAX),
        ];
        let kept = joined(&mut infos);
        let left = [
            info(40, libc::SI_TIMER, 1, i32::MAX),
            queued,
            info(40, libc::SI_TIMER, 0, 0),
            queued,
            info(41, libc::SI_TIMER, 1, 0),
        ];
        assert_eq!(infos[..kept], left);
        assert_eq!(joined(&mut infos[..kept]), kept);
        assert_eq!(joined(&mut []), 0);
    }
}
