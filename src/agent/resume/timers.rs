//! Timers: setitimer(2) and timer_create(2) with what remained of them.
//!
//! New helper thread, the program's threads waiting.

use crate::agent::log;
use crate::image::state::{PosixTimer, TimerState};
use ckpt_sys::syscall;

fn split(ns: u64) -> (u64, u64) {
    (ns / 1_000_000_000, ns % 1_000_000_000)
}

/// Sets all; those in `kept` exist. `real` tells the number of a thread.
pub fn set(timers: &TimerState, kept: &[i32], real: &dyn Fn(i32) -> i32) {
    for (which, &(remaining, interval)) in timers.itimers.iter().enumerate() {
        if remaining == 0 && interval == 0 {
            continue;
        }
        let (value_s, value_ns) = split(remaining.max(1000));
        let (interval_s, interval_ns) = split(interval);
        let value = [interval_s, interval_ns / 1000, value_s, value_ns / 1000];
        // SAFETY: a struct itimerval.
        unsafe { syscall!(libc::SYS_setitimer, which, &value, 0) };
    }
    for timer in &timers.posix {
        let made = if kept.contains(&timer.id) {
            Ok(())
        } else {
            make_timer(timer, real)
        };
        if let Err(errno) = made.and_then(|()| set_timer(timer)) {
            log::line(format_args!(
                "timer {} not restored: errno {errno}",
                timer.id
            ));
        }
    }
}

/// `struct sigevent` as the kernel reads it.
#[repr(C)]
struct SigEvent {
    value: u64,
    signo: i32,
    notify: i32,
    tid: i32,
    pad: [i32; 11],
}

/// prctl(2): timer_create uses the id given (Linux 6.15).
const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
/// Without that prctl ids are given in ascending order: so many are tried.
const MAX_TRIES: i32 = 65536;

/// Creates a POSIX timer with its old id (libc has it in memory).
fn make_timer(timer: &PosixTimer, real: &dyn Fn(i32) -> i32) -> Result<(), i32> {
    let event = SigEvent {
        value: timer.sigval,
        signo: timer.signo,
        notify: timer.notify,
        tid: if timer.tid != 0 { real(timer.tid) } else { 0 },
        pad: [0; 11],
    };
    // SAFETY: valid structs throughout.
    unsafe {
        let by_id = syscall!(libc::SYS_prctl, PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0) == 0;
        let mut id = timer.id;
        let mut result = syscall!(libc::SYS_timer_create, timer.clock, &event, &mut id);
        let mut tries = 0;
        while !by_id && result == 0 && id != timer.id && tries < MAX_TRIES {
            syscall!(libc::SYS_timer_delete, id);
            result = syscall!(libc::SYS_timer_create, timer.clock, &event, &mut id);
            tries += 1;
        }
        if by_id {
            syscall!(libc::SYS_prctl, PR_TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0);
        }
        if result != 0 {
            return Err(-result as i32);
        }
        if id != timer.id {
            syscall!(libc::SYS_timer_delete, id);
            return Err(libc::EEXIST);
        }
    }
    Ok(())
}

fn set_timer(timer: &PosixTimer) -> Result<(), i32> {
    if timer.remaining_ns == 0 {
        return Ok(());
    }
    let (value_s, value_ns) = split(timer.remaining_ns);
    let (interval_s, interval_ns) = split(timer.interval_ns);
    let value = [interval_s, interval_ns, value_s, value_ns];
    // SAFETY: a struct itimerspec.
    match unsafe { syscall!(libc::SYS_timer_settime, timer.id, 0, &value, 0) } {
        0 => Ok(()),
        error => Err(-error as i32),
    }
}
