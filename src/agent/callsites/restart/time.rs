//! What remains of an interrupted call's timeout, in the arguments of the restarted call, in its
//! entry record, and where the program looks for it.
//!
//! [`super::finish`] calls this in the interrupted thread, in the stop handler or after a restore.

// Call numbers keep the kernel's names.
#![allow(non_upper_case_globals)]

use crate::agent::callsites::entry::{self, FOREVER, Timeout};
use crate::agent::hooks;
use ckpt_sys::callsite::RestartRecord;
use ckpt_sys::syscall;
use ckpt_sys::tls::ThreadBlock;
use libc::*;

/// Stands for the address of the record's own time until that is known.
pub(super) const OWN_TIME: u64 = u64::MAX;

/// Puts what remains of the call's timeout into its arguments and the entry record.
///
/// # Safety
/// In the interrupted thread; `record` describes a call with an entry record.
pub(super) unsafe fn recompute(
    block: *mut ThreadBlock,
    record: &mut RestartRecord,
    args: &mut [u64; 6],
    spent: u64,
) {
    // SAFETY: the thread's own block.
    let whole = unsafe { (*block).call_timeout_ns };
    let left = if whole == FOREVER {
        FOREVER
    } else {
        whole.saturating_sub(spent)
    };
    // SAFETY: as above. The next stop counts from here.
    unsafe {
        (*block).call_timeout_ns = left;
        (*block).call_start_ns = entry::now_by((*block).call_clock);
    }
    let timeout = entry::timeout_of(record.nr, &record.args).unwrap_or(Timeout::None);
    if left == FOREVER {
        return;
    }
    let (seconds, rest) = ((left / 1_000_000_000) as i64, (left % 1_000_000_000) as i64);
    match timeout {
        Timeout::None => {}
        Timeout::Milliseconds(index) => args[index] = left.div_ceil(1_000_000),
        Timeout::Timespec(index) => {
            record.time = [seconds, rest];
            args[index] = time_argument(record, index);
        }
        Timeout::Timeval(index) => {
            record.time = [seconds, rest.unsigned_abs().div_ceil(1000) as i64];
            if record.time[1] == 1_000_000 {
                record.time = [seconds + 1, 0];
            }
            args[index] = time_argument(record, index);
        }
    }
}

/// An interrupted sleep has had the kernel write its remainder, which the program is to see
/// only when a signal of its own ends the call: the stub puts back what stood there, or
/// leaves it when such a signal comes before the call.
///
/// # Safety
/// In the interrupted thread, after [`recompute`].
pub(super) unsafe fn prepare_remainder(block: &ThreadBlock, record: &mut RestartRecord) {
    record.remainder_at = 0;
    if let Some(at) = entry::remainder(record.nr, &record.args) {
        record.remainder_at = at as u64;
        record.remainder = block.remainder;
        // SAFETY: the kernel has just written there.
        unsafe { write_time(at, block.call_timeout_ns) };
    }
}

/// A signal of the program ends the sleep: what remains of it *now*, not when the stop
/// began.
///
/// # Safety
/// In the interrupted thread.
pub(super) unsafe fn tell_remainder(block: &ThreadBlock, record: &RestartRecord, spent: u64) {
    if let Some(at) = entry::remainder(record.nr, &record.args) {
        // SAFETY: the kernel has just written there. A sleep that is over was still going
        // on when the signal came, so something remains.
        unsafe { write_time(at, block.call_timeout_ns.saturating_sub(spent).max(1)) };
    }
}

/// # Safety
/// Both words can be written.
unsafe fn write_time(at: *mut u64, ns: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        at.write_unaligned(ns / 1_000_000_000);
        at.add(1).write_unaligned(ns % 1_000_000_000);
    }
}

/// Absolute deadlines on clocks that count from the machine's start move by the time that
/// the process lay dead (or by the difference of two machines' clocks).
///
/// # Safety
/// In the interrupted thread.
pub(super) unsafe fn put_off_deadline(record: &mut RestartRecord, args: &mut [u64; 6], by_ns: i64) {
    let index = match record.nr {
        SYS_clock_nanosleep
            if record.args[1] & TIMER_ABSTIME as u64 != 0
                && matches!(record.args[0] as i32, CLOCK_MONOTONIC | CLOCK_BOOTTIME) =>
        {
            2
        }
        SYS_futex
            if record.args[1] as i32 & FUTEX_CMD_MASK == FUTEX_WAIT_BITSET
                && record.args[1] as i32 & FUTEX_CLOCK_REALTIME == 0
                && record.args[3] != 0 =>
        {
            3
        }
        _ => return,
    };
    // One that a hook has translated has been moved where it lies.
    if hooks::clock::is_kernel_time(record.args[index]) {
        return;
    }
    let at = record.args[index] as *const i64;
    if !entry::readable(at.cast()) {
        return;
    }
    // SAFETY: both words were found readable.
    let (seconds, rest) = unsafe { (at.read_unaligned(), at.add(1).read_unaligned()) };
    let deadline = i128::from(seconds) * 1_000_000_000 + i128::from(rest) + i128::from(by_ns);
    let deadline = deadline.max(0);
    record.time = [
        (deadline / 1_000_000_000) as i64,
        (deadline % 1_000_000_000) as i64,
    ];
    args[index] = OWN_TIME;
}

/// The pointer that the restarted call gets: the record's own time; but the program's
/// where the kernel writes back what remains, if it can be written.
fn time_argument(record: &RestartRecord, index: usize) -> u64 {
    let writes_back = matches!(record.nr, SYS_select | SYS_pselect6 | SYS_ppoll);
    let at = record.args[index] as *mut i64;
    // SAFETY: the kernel writes a signal set to both words, or says EFAULT; after
    // that they are known to be writable.
    unsafe {
        let writable = |word: *mut i64| syscall!(SYS_rt_sigprocmask, SIG_BLOCK, 0, word, 8) == 0;
        if writes_back && writable(at) && writable(at.wrapping_add(1)) {
            at.write_unaligned(record.time[0]);
            at.add(1).write_unaligned(record.time[1]);
            return at as u64;
        }
    }
    OWN_TIME
}
