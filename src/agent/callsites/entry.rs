//! Entry records: what must be known about a call that can end with EINTR although
//! handlers are installed with SA_RESTART (signal(7) lists them).
//!
//! [`note`] runs at the entry of such a call, in any thread; the record lies in the
//! thread's block and is read by [`super::restart`] when our stop interrupted the
//! call. Calls that the kernel restarts by itself leave no record and cost nothing.

// Call numbers keep the kernel's names.
#![allow(non_upper_case_globals)]

use super::{RECORDED as RECORDED_BIT, now_ns, sockets};
use crate::agent::collect::timers;
use crate::agent::hooks;
use crate::agent::hooks::frame::CallFrame;
use ckpt_sys::{callsite, syscall, tls::thread_block};
use libc::*;
use std::sync::atomic::Ordering;

/// No timeout.
pub const FOREVER: u64 = u64::MAX;

/// Calls that leave a record; `setsockopt` and `ioctl` are among them because timeouts of
/// sockets and terminals make [`SOCKET_CALLS`] join.
pub const RECORDED: &[i64] = &[
    SYS_nanosleep,
    SYS_clock_nanosleep,
    SYS_poll,
    SYS_ppoll,
    SYS_select,
    SYS_pselect6,
    SYS_epoll_wait,
    SYS_epoll_pwait,
    SYS_epoll_pwait2,
    SYS_rt_sigtimedwait,
    SYS_rt_sigsuspend,
    SYS_pause,
    SYS_futex,
    SYS_semop,
    SYS_semtimedop,
    SYS_msgsnd,
    SYS_msgrcv,
    SYS_io_getevents,
    SYS_io_pgetevents,
    SYS_setsockopt,
    SYS_ioctl,
];

const SYS_io_pgetevents: i64 = 333;

/// Calls that wait no longer than the timeout of their socket.
pub const SOCKET_CALLS: &[i64] = &[
    SYS_read,
    SYS_readv,
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_recvmmsg,
    SYS_accept,
    SYS_accept4,
    SYS_write,
    SYS_writev,
    SYS_sendto,
    SYS_sendmsg,
    SYS_sendmmsg,
    SYS_connect,
];

/// How a call was told its timeout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timeout {
    /// It waits for ever, or until an absolute time: nothing to recompute.
    None,
    /// Milliseconds in this argument.
    Milliseconds(usize),
    /// A `timespec` behind this argument.
    Timespec(usize),
    /// A `timeval` behind this argument.
    Timeval(usize),
}

/// The relative timeout of a call, or `None` if the call cannot end with EINTR (or the
/// kernel restarts it).
pub fn timeout_of(nr: i64, args: &[u64; 6]) -> Option<Timeout> {
    use Timeout::{Milliseconds, Timespec, Timeval};
    let behind = |index: usize, kind: Timeout| {
        Some(if args[index] == 0 {
            Timeout::None
        } else {
            kind
        })
    };
    match nr {
        SYS_nanosleep => Some(Timespec(0)),
        SYS_clock_nanosleep if args[1] & TIMER_ABSTIME as u64 != 0 => Some(Timeout::None),
        SYS_clock_nanosleep => Some(Timespec(2)),
        SYS_poll => Some(Milliseconds(2)),
        SYS_ppoll | SYS_rt_sigtimedwait => behind(2, Timespec(2)),
        SYS_epoll_wait | SYS_epoll_pwait => Some(Milliseconds(3)),
        SYS_epoll_pwait2 | SYS_semtimedop => behind(3, Timespec(3)),
        SYS_select => behind(4, Timeval(4)),
        SYS_pselect6 | SYS_io_getevents | SYS_io_pgetevents => behind(4, Timespec(4)),
        SYS_rt_sigsuspend | SYS_pause | SYS_semop | SYS_msgsnd | SYS_msgrcv => Some(Timeout::None),
        SYS_futex => match (args[1] as i32) & FUTEX_CMD_MASK {
            // Without a timeout the kernel restarts them.
            FUTEX_WAIT if args[3] != 0 => Some(Timespec(3)),
            FUTEX_WAIT_BITSET if args[3] != 0 => Some(Timeout::None),
            _ => None,
        },
        _ if SOCKET_CALLS.contains(&nr) => Some(Timeout::None),
        _ => None,
    }
}

/// The clock of CPU time that a relative sleep counts by, 0 for all other calls.
pub fn cpu_clock(nr: i64, args: &[u64; 6]) -> i32 {
    let clock = args[0] as i32;
    let sleeps = nr == SYS_clock_nanosleep && args[1] & TIMER_ABSTIME as u64 == 0;
    match sleeps && timers::is_of_cpu_time(clock) {
        true => clock,
        false => 0,
    }
}

/// The kernel's name, in this life, for a clock as the program named it in the record.
pub fn named(clock: i32) -> i32 {
    timers::translated(clock, hooks::ids::to_real)
}

/// What a call's record counts by now.
pub fn now_by(clock: i32) -> u64 {
    if clock == 0 {
        return now_ns();
    }
    let clock = named(clock);
    let mut time = [0_u64; 2];
    // SAFETY: the kernel fills both words.
    unsafe { syscall!(SYS_clock_gettime, clock, &raw mut time) };
    time[0] * 1_000_000_000 + time[1]
}

/// Nanoseconds of a timeout; [`FOREVER`] for none and for one that cannot be read
/// (the kernel will refuse the call).
pub fn nanoseconds(timeout: Timeout, args: &[u64; 6]) -> u64 {
    let pair = |index: usize, unit: u64| {
        let at = args[index] as *const u64;
        if !readable(at) {
            return FOREVER;
        }
        // SAFETY: the kernel has just read both words.
        let (seconds, rest) = unsafe { (at.read_unaligned(), at.add(1).read_unaligned()) };
        seconds
            .saturating_mul(1_000_000_000)
            .saturating_add(rest.saturating_mul(unit))
    };
    match timeout {
        Timeout::None => FOREVER,
        Timeout::Milliseconds(index) => match args[index] as i32 {
            negative if negative < 0 => FOREVER,
            milliseconds => milliseconds as u64 * 1_000_000,
        },
        Timeout::Timespec(index) => pair(index, 1),
        Timeout::Timeval(index) => pair(index, 1000),
    }
}

/// Where the kernel writes what remains of a sleep that a signal ended.
pub fn remainder(nr: i64, args: &[u64; 6]) -> Option<*mut u64> {
    let at = match nr {
        SYS_nanosleep => args[1],
        SYS_clock_nanosleep if args[1] & TIMER_ABSTIME as u64 == 0 => args[3],
        _ => 0,
    };
    (at != 0).then_some(at as *mut u64)
}

/// Can two words at `at` be read? Asks the kernel to take them for a signal set, with a
/// request that it refuses afterwards: EFAULT or EINVAL.
pub fn readable(at: *const u64) -> bool {
    const NO_SUCH_REQUEST: i32 = 99;
    // SAFETY: changes nothing; a bad address is reported.
    unsafe {
        [at, at.wrapping_add(1)].iter().all(|&word| {
            syscall!(SYS_rt_sigprocmask, NO_SUCH_REQUEST, word, 0, 8) != -(EFAULT as isize)
        })
    }
}

/// Leaves the record of a call that is about to be made.
pub fn note(frame: &CallFrame) {
    if frame.rax == SYS_setsockopt {
        return note_socket_timeout(frame);
    }
    if frame.rax == SYS_ioctl {
        return note_terminal_timeout(frame);
    }
    let Some(timeout) = timeout_of(frame.rax, &frame.args) else {
        return;
    };
    let nanoseconds = nanoseconds(timeout, &frame.args);
    let remainder = match remainder(frame.rax, &frame.args) {
        // SAFETY: both words can be read.
        Some(at) if readable(at) => unsafe { [at.read_unaligned(), at.add(1).read_unaligned()] },
        _ if frame.rax == SYS_connect => [sockets::is_connecting(frame.args[0] as i32).into(), 0],
        _ => [0; 2],
    };
    let clock = cpu_clock(frame.rax, &frame.args);
    // No need to look at the clock when there is nothing to count down.
    let start = match nanoseconds {
        0 => 0,
        FOREVER if !SOCKET_CALLS.contains(&frame.rax) => 0,
        _ => now_by(clock),
    };
    // SAFETY: the slot's data holds the distance of the address behind the `syscall`; the
    // block is this thread's own. The address is written last: a stop in between finds
    // no record.
    unsafe {
        let after = frame.slot.wrapping_add(*((frame.slot + 24) as *const u64));
        let block = thread_block();
        (&raw mut (*block).call_after).write_volatile(0);
        (&raw mut (*block).call_nr).write_volatile(frame.rax);
        (&raw mut (*block).call_start_ns).write_volatile(start);
        (&raw mut (*block).call_clock).write_volatile(clock);
        (&raw mut (*block).call_timeout_ns).write_volatile(nanoseconds);
        (&raw mut (*block).remainder).write_volatile(remainder);
        (&raw mut (*block).deadline_shift).write_volatile(0);
        let handlers = (&raw const (*block).handlers_run).read_volatile();
        (&raw mut (*block).call_handlers).write_volatile(handlers);
        (&raw mut (*block).call_after).write_volatile(after);
    }
}

/// From the first socket timeout on, calls on sockets leave records too.
fn note_socket_timeout(frame: &CallFrame) {
    const SO_RCVTIMEO_NEW: u64 = 66;
    const SO_SNDTIMEO_NEW: u64 = 67;
    let is_timeout = frame.args[1] == SOL_SOCKET as u64
        && (frame.args[2] == SO_RCVTIMEO as u64
            || frame.args[2] == SO_SNDTIMEO as u64
            || frame.args[2] == SO_RCVTIMEO_NEW
            || frame.args[2] == SO_SNDTIMEO_NEW);
    if !is_timeout {
        return;
    }
    record(SOCKET_CALLS);
}

/// From the first terminal on that is to read with a timeout, `read` leaves records too.
fn note_terminal_timeout(frame: &CallFrame) {
    const SETS: [u64; 6] = [TCSETS, TCSETSW, TCSETSF, TCSETS2, TCSETSW2, TCSETSF2];
    if !SETS.contains(&frame.args[1]) {
        return;
    }
    let mut mode = sockets::Mode([0; 60]);
    let at = frame.args[2] as *const u64;
    // Three words hold all that is looked at.
    if !readable(at) || !readable(at.wrapping_add(1)) {
        return;
    }
    for (index, word) in mode.0.chunks_exact_mut(8).take(3).enumerate() {
        // SAFETY: found readable.
        word.copy_from_slice(&unsafe { at.add(index).read_unaligned() }.to_ne_bytes());
    }
    if mode
        .raw()
        .is_some_and(|(least, time)| least == 0 && time != 0)
    {
        record(&[SYS_read]);
    }
}

fn record(calls: &[i64]) {
    for &nr in calls {
        if let Some(byte) = callsite::hook_byte(nr as usize) {
            byte.fetch_or(RECORDED_BIT, Ordering::Relaxed);
        }
    }
}
