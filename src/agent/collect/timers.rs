//! Interval timers and POSIX timers: remaining time and interval.

use crate::agent::hooks;
use crate::agent::procfs;
use crate::image::state::{PosixTimer, TimerState};
use ckpt_sys::syscall;

const SIGEV_THREAD_ID: i64 = 4;

fn ns(seconds: u64, nanoseconds: u64) -> u64 {
    seconds * 1_000_000_000 + nanoseconds
}

/// Clocks of CPU time (timer_create(2), clock_gettime(2)) are negative and hold the inverted id
/// of a process or thread; 0 stands for the caller.
const CPU_CLOCK_KINDS: i32 = 0b111;
/// Not CPU time: of a device that is open.
const OF_DESCRIPTOR: i32 = 3;
const OF_THREAD: i32 = 4;
const SCHEDULED: i32 = 2;

/// The clock of the CPU time of a thread.
pub fn thread_clock(tid: i32) -> i32 {
    !tid << 3 | OF_THREAD | SCHEDULED
}

/// Whose CPU time does it count? `None`: nobody's; 0: the caller's.
fn cpu_clock_of(clock: i32) -> Option<i32> {
    match clock {
        libc::CLOCK_PROCESS_CPUTIME_ID | libc::CLOCK_THREAD_CPUTIME_ID => Some(0),
        0.. => None,
        _ if clock & CPU_CLOCK_KINDS == OF_DESCRIPTOR => None,
        _ => Some(!(clock >> 3)),
    }
}

/// Does it count CPU time?
pub fn is_of_cpu_time(clock: i32) -> bool {
    cpu_clock_of(clock).is_some()
}

/// The same clock with the id that `translate` has for whom it is of.
pub fn translated(clock: i32, translate: impl Fn(i32) -> i32) -> i32 {
    match cpu_clock_of(clock) {
        None | Some(0) => clock,
        Some(id) => !translate(id) << 3 | clock & CPU_CLOCK_KINDS,
    }
}

/// Does it count the CPU time of the thread that calls timer_create?
pub fn of_calling_thread(clock: i32) -> bool {
    let thread = clock == libc::CLOCK_THREAD_CPUTIME_ID || clock & OF_THREAD != 0;
    thread && cpu_clock_of(clock) == Some(0)
}

/// A timer of some thread's CPU time of which nobody knows which thread's: the hook that names
/// it (`hooks::own_clock`) was not there.
pub fn nobodys(timers: &TimerState) -> Option<&PosixTimer> {
    let mut posix = timers.posix.iter();
    posix.find(|timer| of_calling_thread(timer.clock))
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

/// What remains of ITIMER_REAL and its like, and the interval.
pub fn itimer(which: usize) -> (u64, u64) {
    let mut value = [0u64; 4]; // struct itimerval: interval, value in (s, us)
    // SAFETY: the kernel fills the struct.
    unsafe { syscall!(libc::SYS_getitimer, which, &mut value) };
    (ns(value[2], value[3] * 1000), ns(value[0], value[1] * 1000))
}

/// Reads /proc/self/timers (needs CONFIG_CHECKPOINT_RESTORE; without it: no file,
/// and a program with POSIX timers cannot be told from one without).
pub fn collect() -> TimerState {
    let mut state = TimerState {
        itimers: [0, 1, 2].map(itimer),
        ..TimerState::default()
    };
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
                    let clock = procfs::number(value).unwrap_or(0) as i32;
                    t.clock = translated(clock, hooks::ids::to_virtual);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_of_cpu_time_name_whose_it_is() {
        let plus = |id| id + 1000;
        assert_eq!(translated(thread_clock(77), plus), thread_clock(1077));
        assert_eq!(translated(libc::CLOCK_MONOTONIC, plus), 1);
        // The caller's, as the kernel has it and as glibc asks for it.
        for own in [libc::CLOCK_THREAD_CPUTIME_ID, -2, thread_clock(0)] {
            assert!(of_calling_thread(own), "{own}");
            assert_eq!(translated(own, plus), own);
        }
        // The process's, a device's, a named thread's.
        let device = !5 << 3 | OF_DESCRIPTOR;
        for other in [2, -6, device, thread_clock(77), libc::CLOCK_BOOTTIME] {
            assert!(!of_calling_thread(other), "{other}");
        }
        assert_eq!(translated(device, plus), device);
        let process = !77 << 3 | SCHEDULED;
        assert_eq!(translated(process, plus), !1077 << 3 | SCHEDULED);
    }
}
