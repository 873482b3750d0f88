//! Times of the clocks that count from the machine's start, in system calls, where the
//! program's are ahead of the kernel's (`agent::clock`): what the kernel tells gets the offset,
//! what it is told loses it. Only marked in stage 1's table where there is an offset.
//!
//! | call | what is translated |
//! |---|---|
//! | clock_gettime, times, sysinfo | the answer (uptime) |
//! | clock_nanosleep | with TIMER_ABSTIME |
//! | futex | the deadlines of FUTEX_WAIT_BITSET, WAIT_REQUEUE_PI and LOCK_PI2 without FUTEX_CLOCK_REALTIME |
//! | futex_wait, futex_waitv | their deadlines on such a clock |
//! | timer_settime, timerfd_settime | with TIMER_ABSTIME |
//!
//! All others take durations, or times of the real clock. The translated deadline of a call that
//! waits lies in the thread's block ([`ThreadBlock::kernel_times`]): it must be there for as
//! long as the kernel may begin the call anew. It is of the kernel's clock, so a
//! restore moves it ([`put_off`]); a call whose deadline is there already is left alone.
//!
//! Any thread of a restored process and of its forked children.

// Call numbers keep the kernel's names.
#![allow(non_upper_case_globals)]

use super::frame::{CallFrame, Verdict};
use super::user;
use crate::agent::clock::{self, Clock};
use crate::agent::state::InHook;
use ckpt_sys::raw::check;
use ckpt_sys::{syscall, tls, tls::ThreadBlock, tls::thread_block};
use libc::*;

const SYS_futex_wait: c_long = 455;
const FUTEX_LOCK_PI2: i32 = 13;
const NS: i64 = 1_000_000_000;
const FLAG_ABSTIME: u64 = TIMER_ABSTIME as u64;

/// Calls that wait until a time.
pub const WAITS: &[c_long] = &[
    SYS_clock_nanosleep,
    SYS_futex,
    SYS_futex_waitv,
    SYS_futex_wait,
];

/// The numbers this file acts on.
pub const NUMBERS: &[c_long] = &[
    SYS_clock_gettime,
    SYS_times,
    SYS_sysinfo,
    SYS_timer_settime,
    SYS_timerfd_settime,
    SYS_clock_nanosleep,
    SYS_futex,
    SYS_futex_waitv,
    SYS_futex_wait,
];

/// Must a thread that is stopped on the way to this call come through the hook again? The
/// offset may be another one when it goes on.
pub fn looks_again(nr: i64) -> bool {
    WAITS.contains(&nr)
}

/// Handles one call; `None`: it goes on, perhaps with another deadline.
pub fn dispatch(f: &mut CallFrame) -> Option<Verdict> {
    if !clock::active() {
        return None;
    }
    match f.rax {
        SYS_clock_gettime => gettime(f),
        SYS_times => told(f, times),
        SYS_sysinfo => told(f, sysinfo),
        SYS_timer_settime if f.args[1] & FLAG_ABSTIME != 0 => {
            let clock = timer_clock(f.args[0] as i32);
            settime(f, clock)
        }
        SYS_timerfd_settime if f.args[1] & FLAG_ABSTIME != 0 => {
            let clock = timerfd_clock(f.args[0] as i32);
            settime(f, clock)
        }
        nr if WAITS.contains(&nr) => {
            if let Some((index, clock)) = deadline_of(f.rax, &f.args) {
                put_deadline(f, index, clock);
            }
            None
        }
        _ => None,
    }
}

fn execute(f: &CallFrame) -> i64 {
    let [a, b, c, d, e, g] = f.args;
    // SAFETY: the program's own call; none of those that come here plays with the stack.
    unsafe { syscall!(f.rax, a, b, c, d, e, g) as i64 }
}

/// The kernel's answer and the addition in one guard: a checkpoint in between would leave the
/// thread with a time of the life before.
fn told(f: &mut CallFrame, translate: fn(&CallFrame) -> i64) -> Option<Verdict> {
    let _guard = InHook::enter();
    f.rax = translate(f);
    Some(Verdict::Done)
}

fn gettime(f: &mut CallFrame) -> Option<Verdict> {
    clock::of(f.args[0] as i32)?;
    told(f, |f| {
        let id = f.args[0] as i32;
        let mut time = [0i64; 2];
        // SAFETY: the kernel fills two words.
        let done = unsafe { syscall!(SYS_clock_gettime, id, &mut time) } as i64;
        if let (0, Some(clock)) = (done, clock::of(id)) {
            let time = moved(time, i128::from(clock::offset(clock)));
            if let Err(errno) = user::write(f.args[1], &time.map(|word| word as u64)) {
                return -i64::from(errno);
            }
        }
        done
    })
}

/// `clock_t` may be any number but those that are errors.
fn times(f: &CallFrame) -> i64 {
    match execute(f) {
        error @ -4095..=-1 => error,
        ticks => ticks.wrapping_add(clock::offset(Clock::Ticks) as i64),
    }
}

fn sysinfo(f: &CallFrame) -> i64 {
    let done = execute(f);
    if done == 0 {
        // The first word is the boot clock in seconds, rounded up as the kernel does.
        let uptime = clock::kernel()[Clock::Boot as usize] + clock::offset(Clock::Boot);
        let _ = user::write(f.args[0], &uptime.div_ceil(NS as u64));
    }
    done
}

/// A time with so many nanoseconds more. One that lies before the clock's beginning is over.
fn moved([seconds, rest]: [i64; 2], by: i128) -> [i64; 2] {
    let whole = i128::from(seconds) * i128::from(NS) + i128::from(rest) + by;
    // 0 would disarm a timer.
    let whole = whole.max(1);
    let seconds = whole / i128::from(NS);
    [
        i64::try_from(seconds).unwrap_or(i64::MAX),
        (whole % i128::from(NS)) as i64,
    ]
}

/// A time of the program as the kernel's. `None`: the kernel will not like it.
fn to_kernel(time: [u64; 2], clock: Clock) -> Option<[i64; 2]> {
    let time = time.map(|word| word as i64);
    let valid = time[0] >= 0 && (0..NS).contains(&time[1]);
    valid.then(|| moved(time, -i128::from(clock::offset(clock))))
}

/// Which argument of a waiting call points to an absolute time, and of which clock.
fn deadline_of(nr: i64, args: &[u64; 6]) -> Option<(usize, Clock)> {
    let (index, id) = match nr {
        SYS_clock_nanosleep if args[1] & FLAG_ABSTIME != 0 => (2, args[0] as i32),
        SYS_futex => {
            let op = args[1] as i32;
            let takes_one = matches!(
                op & FUTEX_CMD_MASK,
                FUTEX_WAIT_BITSET | FUTEX_WAIT_REQUEUE_PI | FUTEX_LOCK_PI2
            );
            if !takes_one || op & FUTEX_CLOCK_REALTIME != 0 {
                return None;
            }
            (3, CLOCK_MONOTONIC)
        }
        SYS_futex_waitv => (3, args[4] as i32),
        SYS_futex_wait => (4, args[5] as i32),
        _ => return None,
    };
    (args[index] != 0).then_some(())?;
    Some((index, clock::of(id)?))
}

/// Puts the deadline where it can stay, and the call's argument there.
fn put_deadline(f: &mut CallFrame, index: usize, clock: Clock) {
    // The deadline, and no checkpoint between the look at the offset and its end.
    let _guard = InHook::enter();
    if is_kernel_time(f.args[index]) {
        return;
    }
    let Ok(time) = user::read::<[u64; 2]>(f.args[index]) else {
        return;
    };
    let Some(time) = to_kernel(time, clock) else {
        return;
    };
    // SAFETY: the block is this thread's own.
    unsafe {
        let block = thread_block();
        let made = (*block).kernel_times_made;
        (*block).kernel_times_made = made.wrapping_add(1);
        let place = &raw mut (*block).kernel_times[made as usize % tls::KERNEL_TIMES];
        place.write_volatile(time);
        f.args[index] = place as u64;
    }
}

/// Is this the address of a deadline that has been translated already?
pub fn is_kernel_time(at: u64) -> bool {
    let block = thread_block() as u64;
    let start = block + std::mem::offset_of!(ThreadBlock, kernel_times) as u64;
    (start..start + (tls::KERNEL_TIMES * 16) as u64).contains(&at)
}

/// After a restore: what remained of the deadlines at the stop remains, the kernel's clock has
/// moved by so much (or back).
///
/// # Safety
/// In a thread that resumes, before it goes on.
pub unsafe fn put_off(by_ns: i64) {
    // SAFETY: the block is this thread's own.
    unsafe {
        for time in &mut (*thread_block()).kernel_times {
            if *time != [0; 2] {
                *time = moved(*time, i128::from(by_ns));
            }
        }
    }
}

/// timer_settime and timerfd_settime with an absolute time: made here, they do not wait.
fn settime(f: &mut CallFrame, id: Option<i32>) -> Option<Verdict> {
    let clock = id.and_then(clock::of)?;
    let _guard = InHook::enter();
    // Interval, then the time.
    let new = user::read::<[u64; 2]>(f.args[2]);
    let (Ok(interval), Ok(time)) = (new, user::read::<[u64; 2]>(f.args[2].wrapping_add(16))) else {
        return None;
    };
    if time == [0; 2] {
        return None;
    }
    let time = to_kernel(time, clock)?.map(|word| word as u64);
    let new = [interval[0], interval[1], time[0], time[1]];
    // SAFETY: an itimerspec; the fourth argument is the program's.
    let done = unsafe { syscall!(f.rax, f.args[0], f.args[1], &new, f.args[3]) };
    f.rax = done as i64;
    Some(Verdict::Done)
}

/// Calls `line` for each line of a file of /proc, without memory, until it says something.
fn look_through<T>(path: &[u8], mut line: impl FnMut(&[u8]) -> Option<T>) -> Option<T> {
    debug_assert_eq!(path.last(), Some(&0));
    let flags = O_RDONLY | O_CLOEXEC;
    // SAFETY: a NUL-terminated path.
    let fd = unsafe { check(syscall!(SYS_open, path.as_ptr(), flags, 0)) }.ok()?;
    let mut buffer = [0u8; 1024];
    let (mut have, mut found) = (0, None);
    while found.is_none() {
        let room = buffer.len() - have;
        // SAFETY: the rest of the buffer.
        let read = unsafe { syscall!(SYS_read, fd, buffer[have..].as_mut_ptr(), room) };
        if read <= 0 {
            break;
        }
        have += read as usize;
        let mut start = 0;
        while let Some(len) = buffer[start..have].iter().position(|&b| b == b'\n') {
            found = found.or_else(|| line(&buffer[start..start + len]));
            start += len + 1;
        }
        // A line that does not fit says nothing of interest.
        let start = if start == 0 && have == buffer.len() {
            have
        } else {
            start
        };
        buffer.copy_within(start..have, 0);
        have -= start;
    }
    // SAFETY: opened above.
    unsafe { syscall!(SYS_close, fd) };
    found
}

fn number_after(line: &[u8], key: &[u8]) -> Option<i32> {
    let rest = line.strip_prefix(key)?.trim_ascii();
    crate::agent::procfs::number(rest).map(|number| number as i32)
}

/// The clock of a timer of timer_create: /proc/self/timers.
fn timer_clock(timer: i32) -> Option<i32> {
    let _guard = InHook::enter();
    let mut of_it = false;
    look_through(b"/proc/self/timers\0", |line| {
        if let Some(id) = number_after(line, b"ID:") {
            of_it = id == timer;
        }
        number_after(line, b"ClockID:").filter(|_| of_it)
    })
}

/// The clock of a timerfd: its fdinfo.
fn timerfd_clock(fd: i32) -> Option<i32> {
    let _guard = InHook::enter();
    let mut path = *b"/proc/thread-self/fdinfo/\0\0\0\0\0\0\0\0\0\0\0\0";
    let start = b"/proc/thread-self/fdinfo/".len();
    let (mut digits, mut len, mut rest) = ([0u8; 10], 0, u32::try_from(fd).ok()?);
    loop {
        digits[len] = b'0' + (rest % 10) as u8;
        len += 1;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    for k in 0..len {
        path[start + k] = digits[len - 1 - k];
    }
    look_through(&path, |line| number_after(line, b"clockid:"))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{frame, in_child};
    use super::*;
    use crate::agent::clock::Clocks;

    const DAY: u64 = 86_400_000_000_000;

    /// The calling process, which is a forked child.
    fn ahead(ns: u64) {
        clock::adopt(&Clocks {
            offsets: [ns, ns, ns, 500],
            real: clock::kernel_vdso(),
            ..Clocks::default()
        });
    }

    fn kernel_now(id: i32) -> i64 {
        let mut time = [0i64; 2];
        // SAFETY: the kernel fills two words.
        unsafe { syscall!(SYS_clock_gettime, id, &mut time) };
        time[0] * NS + time[1]
    }

    #[test]
    fn without_an_offset_nothing_is_touched() {
        let time = [5u64, 0];
        let at = &raw const time as u64;
        let args = [CLOCK_MONOTONIC as u64, 1, at, 0, 0, 0];
        let mut f = frame(SYS_clock_nanosleep, &args);
        assert_eq!(dispatch(&mut f), None);
        assert_eq!(f.args, args);
        assert_eq!(dispatch(&mut frame(SYS_clock_gettime, &args)), None);
    }

    #[test]
    fn answers_get_the_offset() {
        in_child(|| {
            ahead(DAY);
            for id in [1, 4, 6, 7, 9] {
                let mut time = [0i64; 2];
                // SAFETY: the kernel fills two words. No real-time clock, no alarm clock.
                if unsafe { syscall!(SYS_clock_gettime, id, &mut time) } != 0 && id == 9 {
                    continue;
                }
                let mut f = frame(SYS_clock_gettime, &[id, &raw mut time as u64, 0, 0, 0, 0]);
                let before = kernel_now(id as i32);
                assert_eq!(dispatch(&mut f), Some(Verdict::Done));
                let shown = time[0] * NS + time[1] - DAY as i64;
                assert_eq!(f.rax, 0);
                assert!(before <= shown && shown <= kernel_now(id as i32), "{id}");
            }
            // The real clock and CPU time are none of ours; a bad pointer is EFAULT.
            for id in [0u64, 2, 3, 5, 11, -2i64 as u64] {
                assert_eq!(
                    dispatch(&mut frame(SYS_clock_gettime, &[id, 0, 0, 0, 0, 0])),
                    None
                );
            }
            let mut f = frame(SYS_clock_gettime, &[1, 8, 0, 0, 0, 0]);
            dispatch(&mut f);
            assert_eq!(f.rax, -i64::from(EFAULT));
            let mut f = frame(SYS_times, &[0; 6]);
            dispatch(&mut f);
            // SAFETY: no result but the return value.
            let now = unsafe { syscall!(SYS_times, 0) } as i64;
            assert!((now + 490..=now + 500).contains(&f.rax));
            let mut info = [0u64; 16];
            dispatch(&mut frame(
                SYS_sysinfo,
                &[info.as_mut_ptr() as u64, 0, 0, 0, 0, 0],
            ));
            let up = kernel_now(CLOCK_BOOTTIME) / NS;
            assert!((info[0] as i64 - 86_400 - up).abs() <= 1);
        });
    }

    #[test]
    fn deadlines_lose_it_once() {
        in_child(|| {
            ahead(DAY);
            let time = [86_400u64 + 77, 5];
            let at = &raw const time as u64;
            let futex = |op: i32| (SYS_futex, [0, op as u64, 0, at, 0, 0], 3);
            let translated = [
                (SYS_clock_nanosleep, [1, 1, at, 0, 0, 0], 2),
                (SYS_clock_nanosleep, [7, 1, at, 0, 0, 0], 2),
                futex(FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG),
                futex(FUTEX_WAIT_REQUEUE_PI),
                futex(FUTEX_LOCK_PI2),
                (SYS_futex_waitv, [0, 1, 0, at, 1, 0], 3),
                (SYS_futex_wait, [0, 0, 0, 0, at, 1], 4),
            ];
            for (nr, args, index) in translated {
                let mut f = frame(nr, &args);
                assert_eq!(dispatch(&mut f), None);
                assert!(is_kernel_time(f.args[index]), "{nr} {args:?}");
                let once = f.args;
                assert_eq!(dispatch(&mut f), None);
                assert_eq!(f.args, once);
                // SAFETY: the thread's own block.
                assert_eq!(unsafe { *(once[index] as *const [i64; 2]) }, [77, 5]);
            }
            // SAFETY: in this thread.
            unsafe { put_off(-(80 * NS)) };
            let left = [
                (SYS_clock_nanosleep, [0, 1, at, 0, 0, 0]),
                (SYS_clock_nanosleep, [1, 0, at, 0, 0, 0]),
                (SYS_clock_nanosleep, [1, 1, 8, 0, 0, 0]),
                (SYS_futex, [0, FUTEX_WAIT as u64, 0, at, 0, 0]),
                (SYS_futex, [0, FUTEX_LOCK_PI as u64, 0, at, 0, 0]),
                (
                    SYS_futex,
                    [
                        0,
                        (FUTEX_WAIT_BITSET | FUTEX_CLOCK_REALTIME) as u64,
                        0,
                        at,
                        0,
                        0,
                    ],
                ),
                (SYS_futex, [0, FUTEX_WAIT_BITSET as u64, 0, 0, 0, 0]),
                (SYS_futex_waitv, [0, 1, 0, at, 0, 0]),
            ];
            for (nr, args) in left {
                let mut f = frame(nr, &args);
                assert_eq!(dispatch(&mut f), None);
                assert_eq!(f.args, args);
            }
        });
    }

    #[test]
    fn a_time_before_the_beginning_is_over_and_one_far_ahead_stays_far() {
        assert_eq!(moved([5, 0], -6 * i128::from(NS)), [0, 1]);
        assert_eq!(moved([5, 0], -5 * i128::from(NS)), [0, 1]);
        assert_eq!(moved([5, 3], -5 * i128::from(NS)), [0, 3]);
        assert_eq!(moved([i64::MAX, 999_999_999], 1 << 60)[0], i64::MAX);
        assert_eq!(moved([1, 999_999_999], 2), [2, 1]);
    }

    #[test]
    fn timers_are_set_on_the_kernels_clock() {
        in_child(|| {
            ahead(DAY);
            let now = kernel_now(CLOCK_MONOTONIC);
            let at = now + DAY as i64 + 100 * NS;
            let new = [3u64, 4, (at / NS) as u64, (at % NS) as u64];
            let remaining = |value: [u64; 4]| {
                assert_eq!(value[..2], [3, 4]);
                assert!((99..=100).contains(&value[2]), "{value:?}");
            };
            // SAFETY: calls on locals.
            unsafe {
                let mut value = [0u64; 4];
                for id in [CLOCK_MONOTONIC, CLOCK_BOOTTIME] {
                    let fd = syscall!(SYS_timerfd_create, id, 0);
                    let args = [fd as u64, 1, &raw const new as u64, 0, 0, 0];
                    let mut f = frame(SYS_timerfd_settime, &args);
                    assert_eq!((dispatch(&mut f), f.rax), (Some(Verdict::Done), 0));
                    syscall!(SYS_timerfd_gettime, fd, &mut value);
                    remaining(value);
                    let (mut timer, mut other) = (0i32, 0i32);
                    let mut event = [0u64; 8];
                    event[1] = (SIGEV_NONE as u64) << 32;
                    syscall!(SYS_timer_create, CLOCK_REALTIME, &event, &mut other);
                    assert_eq!(syscall!(SYS_timer_create, id, &event, &mut timer), 0);
                    let args = [timer as u64, 1, &raw const new as u64, 0, 0, 0];
                    let mut f = frame(SYS_timer_settime, &args);
                    assert_eq!((dispatch(&mut f), f.rax), (Some(Verdict::Done), 0));
                    syscall!(SYS_timer_gettime, timer, &mut value);
                    remaining(value);
                    let args = [other as u64, 1, &raw const new as u64, 0, 0, 0];
                    assert_eq!(dispatch(&mut frame(SYS_timer_settime, &args)), None);
                    // Disarming is disarming.
                    let off = [0u64; 4];
                    let args = [timer as u64, 1, &raw const off as u64, 0, 0, 0];
                    assert_eq!(dispatch(&mut frame(SYS_timer_settime, &args)), None);
                }
                let fd = syscall!(SYS_timerfd_create, CLOCK_REALTIME, 0);
                let args = [fd as u64, 1, &raw const new as u64, 0, 0, 0];
                assert_eq!(dispatch(&mut frame(SYS_timerfd_settime, &args)), None);
            }
        });
    }
}
