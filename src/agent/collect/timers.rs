//! Interval timers and POSIX timers: remaining time and interval.

use crate::agent::hooks;
use crate::agent::procfs;
use crate::image::state::{PosixTimer, TimerState};
use ckpt_sys::syscall;

const SIGEV_THREAD_ID: i64 = 4;

fn ns(seconds: u64, nanoseconds: u64) -> u64 {
    seconds * 1_000_000_000 + nanoseconds
}

/// Is one of them running?
pub fn any_runs(state: &TimerState) -> bool {
    let posix = state.posix.iter().any(|timer| timer.remaining_ns != 0);
    posix || state.itimers.iter().any(|timer| *timer != (0, 0))
}

/// Has a timer expired between the two readings? Between them the program could set none.
pub fn expired_between(before: &TimerState, after: &TimerState) -> bool {
    // One that starts again has more time left than before; ITIMER_REAL does so when its
    // signal is taken off the queue, and has none until then.
    let expired = |before: u64, after: u64| before != 0 && after == 0 || after > before;
    let mut itimers = before.itimers.iter().zip(&after.itimers);
    let mut posix = before.posix.iter().zip(&after.posix);
    itimers.any(|(b, a)| expired(b.0, a.0))
        || posix.any(|(b, a)| expired(b.remaining_ns, a.remaining_ns))
}

/// Reads /proc/self/timers (needs CONFIG_CHECKPOINT_RESTORE; without it: no file,
/// and a program with POSIX timers cannot be told from one without).
pub fn collect() -> TimerState {
    let mut state = TimerState::default();
    for which in 0..3usize {
        let mut value = [0u64; 4]; // struct itimerval: interval, value in (s, us)
        // SAFETY: the kernel fills the struct.
        unsafe { syscall!(libc::SYS_getitimer, which, &mut value) };
        state.itimers[which] = (ns(value[2], value[3] * 1000), ns(value[0], value[1] * 1000));
    }
    let text = procfs::read_file(b"/proc/self/timers").unwrap_or_default();
    let mut timer: Option<PosixTimer> = None;
    for line in text.split(|&b| b == b'\n') {
        let (key, value) = match line.iter().position(|&b| b == b':') {
            Some(at) => (&line[..at], line[at + 1..].trim_ascii()),
            None => continue,
        };
        match key {
            b"ID" => {
                state.posix.extend(timer.take());
                let id = procfs::number(value).unwrap_or(0) as i32;
                timer = Some(PosixTimer {
                    id,
                    ..PosixTimer::default()
                });
            }
            b"signal" => {
                // "signal: 14/0000000000000000"
                if let Some(t) = &mut timer {
                    t.signo = procfs::number(value).unwrap_or(0) as i32;
                    let slash = value
                        .iter()
                        .position(|&b| b == b'/')
                        .map_or(value.len(), |at| at + 1);
                    t.sigval = procfs::hex(&value[slash..]).unwrap_or(0);
                }
            }
            b"notify" => {
                // "notify: signal/pid.123", "thread/tid.7", "none/pid.123"
                if let Some(t) = &mut timer {
                    let dot = value
                        .iter()
                        .rposition(|&b| b == b'.')
                        .map_or(value.len(), |at| at + 1);
                    let id = procfs::number(&value[dot..]).unwrap_or(0) as i32;
                    let by_thread = value.windows(5).any(|w| w == b"/tid.");
                    t.notify = match value.split(|&b| b == b'/').next() {
                        Some(b"none") => libc::SIGEV_NONE,
                        Some(b"thread") => libc::SIGEV_THREAD,
                        _ => libc::SIGEV_SIGNAL,
                    };
                    if by_thread {
                        t.notify |= SIGEV_THREAD_ID as i32;
                        t.tid = hooks::ids::to_virtual(id);
                    }
                }
            }
            b"ClockID" => {
                if let Some(t) = &mut timer {
                    t.clock = procfs::number(value).unwrap_or(0) as i32;
                }
            }
            _ => {}
        }
    }
    state.posix.extend(timer);
    for t in &mut state.posix {
        let mut value = [0u64; 4]; // struct itimerspec: interval, value in (s, ns)
        // SAFETY: the kernel fills the struct.
        unsafe { syscall!(libc::SYS_timer_gettime, t.id, &mut value) };
        t.remaining_ns = ns(value[2], value[3]);
        t.interval_ns = ns(value[0], value[1]);
        // SAFETY: no pointers.
        t.overrun = unsafe { syscall!(libc::SYS_timer_getoverrun, t.id) } as i32;
    }
    state
}
