//! Restart of calls that our stop interrupted, so that the program sees no EINTR, no
//! short transfer and no timeout that it would not have had.
//!
//! [`prepare`] runs first thing in a handler of the reserved signal and decides whether it
//! was this signal that ended a call; [`finish`] runs when the thread is released (or,
//! after a restore, in the new process) and makes the frame execute the call again
//! through the restart stub. Between the two everything lies in memory of the thread.
//!
//! Three rules (each was a bug once):
//! 1. A signal of the program that arrived during the stop must still end the call.
//!    Up to the decision that is looked up; afterwards the stub compares the count
//!    of handlers.
//! 2. `rax = -EINTR` behind a `syscall` proves nothing: one of the program's handlers may have
//!    caused it. The count of handlers must be that of the entry record.
//! 3. Timeouts are counted from the entry record, never from what the kernel wrote back (`time`).

// Call numbers keep the kernel's names.
#![allow(non_upper_case_globals)]

mod time;

use super::entry::{self, SOCKET_CALLS};
use super::{now_ns, site_after, sockets};
use crate::agent::hooks;
use crate::agent::state::RESERVED_BIT;
use ckpt_sys::callsite::{self, RestartMode, RestartRecord};
use ckpt_sys::syscall;
use ckpt_sys::tls::{ThreadBlock, thread_block};
use libc::*;
use std::cell::UnsafeCell;
use time::{OWN_TIME, prepare_remainder, put_off_deadline, recompute, tell_remainder};

/// What was interrupted. Lies on the stack of the stop handler and must stay at its
/// address until rt_sigreturn has been executed and the stub has run: [`finish`] may
/// leave the stack pointer at it.
#[repr(C)]
#[derive(Debug)]
pub struct Interrupted {
    record: UnsafeCell<RestartRecord>,
    what: What,
    /// CLOCK_MONOTONIC when that was found, or what the call counts by instead.
    found_ns: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum What {
    /// Nothing to restart.
    Nothing = 0,
    /// A call that ended with EINTR.
    Call = 1,
    /// A transfer that ended short; the record's `value` bytes are done.
    Transfer = 2,
    /// The stub's poll within a transfer; the record's `time` is what was left of it.
    Gather = 3,
}

impl Interrupted {
    fn nothing() -> Interrupted {
        Interrupted {
            record: UnsafeCell::new(RestartRecord {
                args: [0; 6],
                back: 0,
                rsp: 0,
                handlers_run: 0,
                handlers: 0,
                mode: 0,
                pad: 0,
                nr: 0,
                value: 0,
                time: [0; 2],
                poll_fd: 0,
                poll_events: 0,
                executes: 0,
                remainder_at: 0,
                remainder: [0; 2],
                wanted: 0,
                unit: 1,
                transfer: 0,
                tail: [0; 3],
                whole: [0; 2],
                kept: 0,
            }),
            what: What::Nothing,
            found_ns: 0,
        }
    }

    /// CPU time that passes from here on is none of the call's, and after a restore its clock
    /// begins anew.
    fn count_cpu_time(&mut self, block: &ThreadBlock) {
        if block.call_clock != 0 {
            self.found_ns = entry::now_by(block.call_clock);
        }
    }

    /// Will [`finish`] restart something, as far as is known now?
    pub fn is_something(&self) -> bool {
        self.what != What::Nothing
    }
}

const ARGS: [i32; 6] = [REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8, REG_R9];
const FAILED_EINTR: i64 = -(EINTR as i64);

/// Looks at the interrupted frame.
///
/// # Safety
/// In the handler whose frame `uc` is, in the interrupted thread.
pub unsafe fn prepare(uc: *mut ucontext_t) -> Interrupted {
    // SAFETY: the handler's own frame (the caller's promise) and the thread's own block.
    unsafe {
        let regs = &(*uc).uc_mcontext.gregs;
        let block = &*thread_block();
        let rip = regs[REG_RIP as usize] as u64;
        let rsp = regs[REG_RSP as usize] as u64;
        let result = regs[REG_RAX as usize];
        let mut found = Interrupted::nothing();
        let record = found.record.get_mut();
        record.handlers_run = &raw const block.handlers_run as u64;
        record.handlers = block.handlers_run;
        record.args = ARGS.map(|reg| regs[reg as usize] as u64);
        record.back = rip;
        record.rsp = rsp;
        if rip == callsite::restart_after() as u64 {
            // The stub itself was interrupted: its record has the site's registers.
            let old = &*(rsp as *const RestartRecord);
            let ours = old.handlers == block.handlers_run;
            if result == FAILED_EINTR && ours && old.mode == RestartMode::Gather as u32 {
                *record = *old;
                found.what = What::Gather;
                found.found_ns = now_ns();
            } else if result == FAILED_EINTR && ours && old.mode != RestartMode::Rest as u32 {
                if old.mode == RestartMode::Connect as u32 {
                    (record.mode, record.whole) = (old.mode, old.whole);
                }
                record.args = old.args;
                record.nr = old.nr;
                found.what = What::Call;
                found.count_cpu_time(block);
            } else if old.mode == RestartMode::Rest as u32 && result > 0 {
                let rest = regs[REG_RDX as usize] as u64;
                if (result as u64) < rest {
                    record.args = old.args;
                    record.nr = old.nr;
                    record.value = old.value + result;
                    found.what = What::Transfer;
                }
            }
            let record = found.record.get_mut();
            (record.back, record.rsp) = (old.back, old.rsp);
        } else if is_before_call(rip) {
            // On its way to the call's repetition, as the last stop has left it.
            let old = &*(rsp as *const RestartRecord);
            if old.mode == RestartMode::Plain as u32 && old.handlers == block.handlers_run {
                (record.args, record.nr) = (old.args, old.nr);
                (record.back, record.rsp) = (old.back, old.rsp);
                found.what = What::Call;
                found.count_cpu_time(block);
            }
        } else if result == FAILED_EINTR {
            if block.call_after == rip && block.call_handlers == block.handlers_run {
                record.nr = block.call_nr;
                found.what = What::Call;
                found.count_cpu_time(block);
            }
        } else if result == SYS_read
            && block.call_after == rip + 2
            && block.call_nr == SYS_read
            && block.call_handlers == block.handlers_run
            && sockets::terminal_timeout(SYS_read, record.args[0] as i32).is_some()
        {
            // The kernel is about to repeat it, with the whole of the terminal's timeout.
            record.nr = SYS_read;
            record.back = rip + 2;
            found.what = What::Call;
        } else if result > 0
            && let Some(nr) = site_after(rip as usize)
            && sockets::ends_short(nr, &record.args, result)
        {
            record.nr = nr;
            record.value = result;
            found.what = What::Transfer;
        }
        found
    }
}

/// How time went on for the interrupted call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// The thread is released in its own process.
    Runs,
    /// After a restore: from the stop (CLOCK_MONOTONIC of that time) to the present time
    /// stood still.
    StoodStill { stopped_ns: u64 },
}

/// Makes the frame restart what was interrupted.
///
/// # Safety
/// In the interrupted thread, with all signals blocked and rt_sigreturn of `uc` to follow;
/// `interrupted` as [`prepare`] made it, at the address where it will stay.
pub unsafe fn finish(uc: *mut ucontext_t, interrupted: &Interrupted, clock: Clock) {
    // SAFETY: the thread's own block and frame; nobody else uses the record.
    unsafe {
        let block = thread_block();
        let record = &mut *interrupted.record.get();
        if clock != Clock::Runs && has_connected(uc, record, interrupted.what) {
            (*block).call_after = 0;
            return;
        }
        if interrupted.what == What::Nothing {
            // The thread may be on its way from the entry record to the call: its
            // timeout begins with the call. Not so in the stub, on its way to the call's
            // repetition: what it had waited before counts.
            let rip = (*uc).uc_mcontext.gregs[REG_RIP as usize] as usize;
            let repeats = (callsite::restart()..callsite::restart_end()).contains(&rip);
            if (*block).call_start_ns != 0 && !repeats {
                (*block).call_start_ns = entry::now_by((*block).call_clock);
            } else if (*block).call_start_ns != 0
                && let Clock::StoodStill { stopped_ns } = clock
            {
                let spent = stopped_ns.saturating_sub((*block).call_start_ns);
                (*block).call_start_ns = super::now_ns().wrapping_sub(spent).max(1);
            }
            return;
        }
        // What the call has waited, and from when on the rest is counted: the next stop may
        // be on another clock, that of a machine started since.
        let present = super::now_ns();
        let of_cpu = (*block).call_clock != 0 && interrupted.what == What::Call;
        let until = match clock {
            _ if of_cpu => interrupted.found_ns,
            Clock::Runs => present,
            Clock::StoodStill { stopped_ns } => stopped_ns,
        };
        let spent = if (*block).call_start_ns == 0 {
            0
        } else {
            // It may have begun after the stop did, while others were waited for.
            until.saturating_sub((*block).call_start_ns)
        };
        if (*block).call_start_ns != 0 {
            let now = if of_cpu {
                entry::now_by((*block).call_clock)
            } else {
                present
            };
            (*block).call_start_ns = now.wrapping_sub(spent).max(1);
        }
        if program_signal_waits(uc, record) {
            // The frame keeps its EINTR or its short count.
            tell_remainder(&*block, record, spent);
            (*block).call_after = 0;
            return;
        }
        let mut args = record.args;
        let mut executes = record.nr;
        match interrupted.what {
            What::Gather => {
                let since = until.saturating_sub(interrupted.found_ns);
                sockets::wait_on(record, since);
                executes = SYS_ppoll;
            }
            What::Transfer if sockets::has_a_limit(record) => {
                // A timeout that was set before an exec left no record of the call.
                let known = (*block).call_after == record.back && (*block).call_start_ns != 0;
                sockets::gather(record, if known { spent } else { 0 });
                executes = SYS_ppoll;
            }
            What::Transfer => {
                record.mode = RestartMode::Rest as u32;
                args[1] += record.value as u64;
                args[2] = sockets::rest(record);
            }
            _ if SOCKET_CALLS.contains(&record.nr) => {
                let connecting = (*block).remainder[0] != 0;
                match sockets::wait(record, spent, connecting) {
                    sockets::Way::Poll => executes = SYS_ppoll,
                    sockets::Way::Again => {}
                    sockets::Way::Nothing => {
                        (*block).call_after = 0;
                        return;
                    }
                }
            }
            _ => {
                record.mode = RestartMode::Plain as u32;
                hooks::signal::made_again(record.nr, &mut args);
                if record.nr == SYS_clock_nanosleep && (*block).call_clock != 0 {
                    // In this life it may be another id's.
                    let named = entry::named((*block).call_clock);
                    args[0] = i64::from(named) as u64;
                }
                recompute(block, record, &mut args, spent);
                prepare_remainder(&*block, record);
                if let Clock::StoodStill { stopped_ns } = clock {
                    (*block).deadline_shift += present.wrapping_sub(stopped_ns) as i64;
                }
                if (*block).deadline_shift != 0 {
                    put_off_deadline(record, &mut args, (*block).deadline_shift);
                }
            }
        }
        record.executes = executes;
        let stack = (*uc).uc_mcontext.gregs[REG_RSP as usize] as usize;
        let rip = (*uc).uc_mcontext.gregs[REG_RIP as usize] as u64;
        let in_stub = rip == callsite::restart_after() as u64 || is_before_call(rip);
        let at = if in_stub {
            // In the old record's place, or every stop would take more of the stack.
            stack
        } else {
            record_place(uc as usize, stack, record)
        };
        let polls = [RestartMode::Poll as u32, RestartMode::Gather as u32];
        if executes == SYS_ppoll && polls.contains(&record.mode) {
            args = [at + POLL_FD, 1, at + TIME, 0, 8, 0].map(|word| word as u64);
        } else if let Some(index) = args.iter().position(|&arg| arg == OWN_TIME) {
            args[index] = (at + TIME) as u64;
        }
        if at != interrupted.record.get() as usize {
            (at as *mut RestartRecord).write(*record);
        }
        let regs = &mut (*uc).uc_mcontext.gregs;
        for (reg, value) in ARGS.iter().zip(args) {
            regs[*reg as usize] = value as i64;
        }
        regs[REG_RAX as usize] = executes;
        regs[REG_RSP as usize] = at as i64;
        regs[REG_RIP as usize] = callsite::restart() as i64;
    }
}

/// After a restore: a `connect` that was interrupted, or that the kernel was about to begin anew, and
/// whose connection is there. The frame then goes on behind it.
///
/// # Safety
/// As for [`finish`].
unsafe fn has_connected(uc: *mut ucontext_t, record: &RestartRecord, what: What) -> bool {
    // SAFETY: the handler's own frame (the caller's promise).
    let regs = unsafe { &mut (*uc).uc_mcontext.gregs };
    let (rip, nr) = (regs[REG_RIP as usize] as u64, regs[REG_RAX as usize]);
    let begins = what == What::Nothing && nr == SYS_connect;
    if begins && site_after(rip as usize + 2).is_some() {
        if !sockets::is_connected(regs[REG_RDI as usize] as i32) {
            return false;
        }
        regs[REG_RIP as usize] += 2;
    } else if what == What::Call && record.nr == SYS_connect {
        if !sockets::is_connected(record.args[0] as i32) {
            return false;
        }
        regs[REG_RIP as usize] = record.back as i64;
        regs[REG_RSP as usize] = record.rsp as i64;
        for (reg, value) in ARGS.iter().zip(record.args) {
            regs[*reg as usize] = value as i64;
        }
    } else {
        return false;
    }
    regs[REG_RAX as usize] = 0;
    true
}

/// In the stub, with the call still to be made?
fn is_before_call(rip: u64) -> bool {
    (callsite::restart()..=callsite::restart_call()).contains(&(rip as usize))
}

/// Tells a restarted call that one of the program's handlers runs: if the thread is in
/// the stub before its `syscall`, it compares the counts again and the call ends with
/// EINTR. For a wrapper of handlers that counts in `handlers_run`
/// (`ckpt_program_sigreturn` does the same).
///
/// # Safety
/// In the handler whose frame `uc` is.
pub unsafe fn program_handler_runs(uc: *mut ucontext_t) {
    // SAFETY: the handler's own frame (the caller's promise).
    unsafe {
        let rip = &mut (*uc).uc_mcontext.gregs[REG_RIP as usize];
        if is_before_call(*rip as u64) {
            *rip = callsite::restart() as i64;
        }
    }
}

const TIME: usize = std::mem::offset_of!(RestartRecord, time);
const POLL_FD: usize = std::mem::offset_of!(RestartRecord, poll_fd);
/// Where the record can lie while the stub runs: at the place that it has, when the
/// handler runs below the interrupted code on the same stack; under the red zone of the
/// interrupted code, when the handler has a stack of its own.
fn record_place(uc: usize, stack: usize, record: &RestartRecord) -> usize {
    const LARGEST_FRAME: usize = 32 << 10;
    if stack.wrapping_sub(uc) < LARGEST_FRAME {
        std::ptr::from_ref(record) as usize
    } else {
        (stack - 128 - size_of::<RestartRecord>()) & !15
    }
}

/// Rule 1: has a signal of the program arrived during the stop that would have ended
/// the call? Calls that set a signal mask for their duration find out themselves.
///
/// # Safety
/// In the interrupted thread, with all signals blocked.
unsafe fn program_signal_waits(uc: *mut ucontext_t, record: &RestartRecord) -> bool {
    let own_mask = match record.nr {
        SYS_rt_sigsuspend => true,
        SYS_ppoll => record.args[3] != 0,
        SYS_epoll_pwait | SYS_epoll_pwait2 => record.args[4] != 0,
        SYS_pselect6 => record.args[5] != 0,
        _ => false,
    };
    if own_mask {
        return false;
    }
    // SAFETY: the kernel writes one word to `pending` and a sigaction to `action`.
    unsafe {
        let mut pending = 0_u64;
        syscall!(SYS_rt_sigpending, &raw mut pending, 8);
        let mask = (&raw const (*uc).uc_sigmask).cast::<u64>().read();
        let mut waiting = pending & !mask & !RESERVED_BIT;
        while waiting != 0 {
            let signal = waiting.trailing_zeros() + 1;
            waiting &= waiting - 1;
            let mut action = [0_u64; 4];
            syscall!(SYS_rt_sigaction, signal, 0, action.as_mut_ptr(), 8);
            if action[0] > 1 {
                return true;
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    /// The stop had interrupted `connect`, the connection was made meanwhile and restored as one:
    /// the call was made again and failed with EISCONN.
    #[test]
    fn a_connect_that_has_succeeded_is_not_made_again() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connected = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut found = Interrupted::nothing();
        let record = found.record.get_mut();
        (record.nr, record.back, record.rsp) = (SYS_connect, 0x1234, 0x5678);
        for (fd, done) in [(connected.as_raw_fd(), true), (listener.as_raw_fd(), false)] {
            record.args = [fd as u64, 7, 16, 0, 0, 0];
            // SAFETY: all-zero is a valid frame; nobody goes back to it.
            unsafe {
                let mut uc: ucontext_t = std::mem::zeroed();
                uc.uc_mcontext.gregs[REG_RAX as usize] = FAILED_EINTR;
                assert_eq!(has_connected(&raw mut uc, record, What::Call), done);
                let regs = uc.uc_mcontext.gregs;
                let seen = [REG_RAX, REG_RIP, REG_RSP, REG_RSI].map(|reg| regs[reg as usize]);
                let expected = match done {
                    true => [0, 0x1234, 0x5678, 7],
                    false => [FAILED_EINTR, 0, 0, 0],
                };
                assert_eq!(seen, expected);
                assert!(!has_connected(&raw mut uc, record, What::Transfer));
            }
        }
    }
}
