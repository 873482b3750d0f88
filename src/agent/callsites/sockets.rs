//! Interrupted calls on sockets and terminals that have a timeout, and transfers that our stop cut
//! short: what of them is still to be done, and how the restart stub does it.
//!
//! [`super::restart`] calls this in the interrupted thread, in the stop handler or after a
//! restore.

// Call numbers keep the kernel's names.
#![allow(non_upper_case_globals)]

use ckpt_sys::callsite::{RestartMode, RestartRecord};
use ckpt_sys::syscall;
use libc::*;

/// For ever, as a poll is told.
const NO_LIMIT: u64 = 1 << 60;
/// Messages that recvmmsg receives at most; the size of its elements.
const MESSAGES: u64 = 1024;
const MESSAGE: u64 = size_of::<mmsghdr>() as u64;

/// What the stub executes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// A poll for the rest of the timeout; what follows is in the record.
    Poll,
    /// The call itself.
    Again,
    /// No timeout, not our doing.
    Nothing,
}

/// Prepares the wait for the rest of a socket's timeout, `spent` of which is over. `connecting`:
/// the call is a `connect` on a socket that was being connected already.
///
/// # Safety
/// In the interrupted thread.
pub unsafe fn wait(record: &mut RestartRecord, spent: u64, connecting: bool) -> Way {
    let fd = record.args[0] as i32;
    if let Some(whole) = terminal_timeout(record.nr, fd) {
        record.mode = RestartMode::Poll as u32;
        record.value = 0;
        poll(record, whole.saturating_sub(spent));
        return Way::Poll;
    }
    // SAFETY: any descriptor number will do.
    let Some(whole) = (unsafe { timeout(fd, option(record.nr)) }) else {
        return Way::Nothing;
    };
    // SAFETY: as above.
    unsafe {
        if record.nr == SYS_connect && socket_value(fd, SO_DOMAIN) == Some(AF_UNIX) {
            return connect_again(record, whole, spent);
        }
        if gathers(record) {
            record.value = 0;
            gather(record, spent);
            return Way::Poll;
        }
    }
    record.mode = RestartMode::Poll as u32;
    // When the socket is ready the call follows; for `connect` too, since Linux answers the second
    // call on a socket that is being connected with the outcome of the first.
    record.value = match record.nr {
        SYS_connect if connecting => -i64::from(EALREADY),
        SYS_connect => -i64::from(EINPROGRESS),
        _ => -i64::from(EAGAIN),
    };
    poll(record, whole.saturating_sub(spent));
    Way::Poll
}

/// A unix socket's `connect` waits for room in a queue that no poll tells of: the call is made
/// again, with what remains as the socket's timeout.
///
/// # Safety
/// In the interrupted thread; the record's mode is `Connect` if the timeout is already changed.
unsafe fn connect_again(record: &mut RestartRecord, present: u64, spent: u64) -> Way {
    let whole = if record.mode == RestartMode::Connect as u32 {
        record.whole[0] as u64 * 1_000_000_000 + record.whole[1] as u64 * 1000
    } else {
        record.whole = [
            (present / 1_000_000_000) as i64,
            (present % 1_000_000_000 / 1000) as i64,
        ];
        record.mode = RestartMode::Connect as u32;
        present
    };
    let left = whole.saturating_sub(spent);
    let over = left < 1000;
    if over {
        // Waits for nothing: the kernel's shortest timeout may be longer than it is to the next stop.
        record.mode = RestartMode::Poll as u32;
        record.value = -i64::from(EAGAIN);
        poll(record, 0);
        record.poll_fd = -1;
    }
    let next = if over { whole } else { left };
    let time = [next / 1_000_000_000, next % 1_000_000_000 / 1000];
    // SAFETY: the kernel reads `time`.
    unsafe {
        syscall!(
            SYS_setsockopt,
            record.args[0],
            SOL_SOCKET,
            SO_SNDTIMEO,
            time.as_ptr(),
            16
        )
    };
    if over { Way::Poll } else { Way::Again }
}

/// Does the call go on until all is transferred, on a stream with one timeout for all of
/// it (or, receiving messages, one for each)? Then the timeout must not begin anew with the rest.
///
/// # Safety
/// In the interrupted thread.
unsafe fn gathers(record: &RestartRecord) -> bool {
    match record.nr {
        SYS_recvmmsg => record.args[3] & MSG_WAITFORONE as u64 == 0 && record.args[4] == 0,
        // SAFETY: any descriptor number will do.
        _ => {
            waits_for_all(record.nr, &record.args)
                // SAFETY: reads an option of a descriptor.
                && unsafe { socket_value(record.args[0] as i32, SO_TYPE) } == Some(SOCK_STREAM)
        }
    }
}

/// Has what remains of a short transfer a limit in time (or is it one of messages)?
///
/// # Safety
/// In the interrupted thread.
pub unsafe fn has_a_limit(record: &RestartRecord) -> bool {
    // SAFETY: any descriptor number will do.
    record.nr == SYS_recvmmsg
        || unsafe { timeout(record.args[0] as i32, option(record.nr)) }.is_some()
}

/// Prepares the rest of a transfer of which `value` is done, with what remains of the socket's
/// timeout.
///
/// # Safety
/// In the interrupted thread.
pub unsafe fn gather(record: &mut RestartRecord, spent: u64) {
    // SAFETY: any descriptor number will do.
    let whole = unsafe { timeout(record.args[0] as i32, option(record.nr)) }.unwrap_or(NO_LIMIT);
    record.mode = RestartMode::Gather as u32;
    let flags = (record.args[3] as i32 | MSG_DONTWAIT) as u64;
    (record.wanted, record.unit) = (record.args[2], 1);
    (record.transfer, record.tail) = match record.nr {
        SYS_write => (SYS_sendto, [MSG_DONTWAIT as u64, 0, 0]),
        nr => (nr, [flags, record.args[4], record.args[5]]),
    };
    let mut left = whole.saturating_sub(spent);
    if record.nr == SYS_recvmmsg {
        (record.wanted, record.unit) = ((record.args[2] as u32 as u64).min(MESSAGES), MESSAGE);
        record.tail[1] = 0;
        record.whole = words(whole);
        if record.value > 0 && spent >= whole {
            // The wait for this message began later than the call.
            left = whole;
        }
    }
    poll(record, left);
}

/// The stub's poll within a transfer was interrupted: what remained then, less the time since.
pub fn wait_on(record: &mut RestartRecord, since: u64) {
    let left = record.time[0] as u64 * 1_000_000_000 + record.time[1] as u64;
    poll(record, left.saturating_sub(since));
}

fn poll(record: &mut RestartRecord, left: u64) {
    record.time = words(left);
    record.poll_fd = record.args[0] as i32;
    record.poll_events = (if reads(record.nr) { POLLIN } else { POLLOUT }) as u32;
}

fn words(nanoseconds: u64) -> [i64; 2] {
    [
        (nanoseconds / 1_000_000_000) as i64,
        (nanoseconds % 1_000_000_000) as i64,
    ]
}

fn reads(nr: i64) -> bool {
    matches!(
        nr,
        SYS_read | SYS_readv | SYS_recvfrom | SYS_recvmsg | SYS_recvmmsg | SYS_accept | SYS_accept4
    )
}

fn option(nr: i64) -> i32 {
    if reads(nr) { SO_RCVTIMEO } else { SO_SNDTIMEO }
}

/// A socket's timeout in nanoseconds, if it is one and has one.
///
/// # Safety
/// Any descriptor number will do.
unsafe fn timeout(fd: i32, option: i32) -> Option<u64> {
    let mut time = [0_u64; 2];
    let mut len = 16_u32;
    // SAFETY: the kernel writes at most `len` bytes into `time`.
    let done = unsafe {
        syscall!(
            SYS_getsockopt,
            fd,
            SOL_SOCKET,
            option,
            time.as_mut_ptr(),
            &raw mut len
        )
    };
    let whole = time[0] * 1_000_000_000 + time[1] * 1000;
    (done == 0 && whole != 0).then_some(whole)
}

/// A terminal's way to read: `(minimum of characters, timeout in ns)`, if it is one and does
/// not read lines.
fn raw_terminal(fd: i32) -> Option<(u64, u64)> {
    let mut mode = Mode([0; 60]);
    // SAFETY: the kernel writes a termios, 36 bytes, into `mode`.
    let done = unsafe { syscall!(SYS_ioctl, fd, TCGETS, mode.0.as_mut_ptr()) };
    if done == 0 { mode.raw() } else { None }
}

/// The kernel's `struct termios`, or the longer `termios2`, which begins with it.
pub struct Mode(pub [u8; 60]);

impl Mode {
    /// As for [`raw_terminal`].
    pub fn raw(&self) -> Option<(u64, u64)> {
        const LOCAL: usize = 12;
        const CHARACTERS: usize = 17;
        let local = u32::from_ne_bytes([
            self.0[LOCAL],
            self.0[LOCAL + 1],
            self.0[LOCAL + 2],
            self.0[LOCAL + 3],
        ]);
        let character = |index: usize| u64::from(self.0[CHARACTERS + index]);
        (local & ICANON == 0).then(|| (character(VMIN), character(VTIME) * 100_000_000))
    }
}

/// How long a read of a terminal waits for the first character, if not for ever.
pub fn terminal_timeout(nr: i64, fd: i32) -> Option<u64> {
    if nr != SYS_read {
        return None;
    }
    raw_terminal(fd).and_then(|(least, time)| (least == 0 && time != 0).then_some(time))
}

/// How much of a short transfer is still wanted.
pub fn rest(record: &RestartRecord) -> u64 {
    let whole = match (record.nr, raw_terminal(record.args[0] as i32)) {
        (SYS_read, Some((least, _))) => least.min(record.args[2]),
        _ => record.args[2],
    };
    whole.saturating_sub(record.value as u64)
}

/// An option of a socket that is a number. Asking for `SO_ERROR` clears it.
///
/// # Safety
/// Any descriptor number will do.
unsafe fn socket_value(fd: i32, option: i32) -> Option<i32> {
    let (mut value, mut len) = (0_i32, 4_u32);
    let at = (&raw mut value, &raw mut len);
    // SAFETY: the kernel writes into the locals given.
    let done = unsafe { syscall!(SYS_getsockopt, fd, SOL_SOCKET, option, at.0, at.1) };
    (done == 0).then_some(value)
}

fn tcp_state(fd: i32) -> Option<u8> {
    let (mut state, mut len) = (0_u8, 1_u32);
    let at = (&raw mut state, &raw mut len);
    // SAFETY: the kernel writes into the locals given: the first byte of a tcp_info.
    let done = unsafe { syscall!(SYS_getsockopt, fd, IPPROTO_TCP, TCP_INFO, at.0, at.1) };
    (done == 0).then_some(state)
}

/// Is the socket being connected, so that a further `connect` waits for the first one's end?
pub fn is_connecting(fd: i32) -> bool {
    const TCP_SYN_SENT: u8 = 2;
    tcp_state(fd) == Some(TCP_SYN_SENT)
}

/// Is it a TCP connection? A `connect` that the stop interrupted has succeeded then. In its own
/// process the kernel says so when the call is made again; of a restored socket it says EISCONN.
pub fn is_connected(fd: i32) -> bool {
    const TCP_ESTABLISHED: u8 = 1;
    const TCP_CLOSE_WAIT: u8 = 8;
    matches!(tcp_state(fd), Some(TCP_ESTABLISHED | TCP_CLOSE_WAIT))
}

fn waits_for_all(nr: i64, args: &[u64; 6]) -> bool {
    match nr {
        SYS_write => true,
        SYS_sendto => args[3] & MSG_DONTWAIT as u64 == 0,
        SYS_recvfrom => {
            args[3] & (MSG_WAITALL | MSG_DONTWAIT | MSG_PEEK) as u64 == MSG_WAITALL as u64
        }
        _ => false,
    }
}

/// Did a transfer that would have gone on end short because of a signal? True for
/// blocking pipes, stream sockets and terminals (which return early for no other reason, if not
/// because their time is over), and for messages where the socket says so.
///
/// # Safety
/// In the thread that made the call.
pub unsafe fn ends_short(nr: i64, args: &[u64; 6], done: i64) -> bool {
    let fd = args[0] as i32;
    if nr == SYS_recvmmsg {
        let waits = args[3] & (MSG_WAITFORONE | MSG_DONTWAIT) as u64 == 0;
        // SAFETY: any descriptor number will do.
        return waits
            && (done as u64) < u64::from(args[2] as u32).min(MESSAGES)
            && unsafe { messages_interrupted(fd) }
            && args[4] == 0;
    }
    if nr == SYS_read && (done as u64) < args[2] {
        // With both a minimum and a timeout the timeout counts from each character: lost.
        let few = |(least, time)| time == 0 && (done as u64) < least;
        // SAFETY: as above.
        return raw_terminal(fd).is_some_and(few)
            && unsafe { syscall!(SYS_fcntl, fd, F_GETFL) } & O_NONBLOCK as isize == 0;
    }
    if !waits_for_all(nr, args) || done as u64 >= args[2] {
        return false;
    }
    // SAFETY: the calls write into the locals given, or nothing.
    unsafe {
        let mut stat = std::mem::zeroed::<stat>();
        if syscall!(SYS_fcntl, fd, F_GETFL) & O_NONBLOCK as isize != 0
            || syscall!(SYS_fstat, fd, &raw mut stat) != 0
        {
            return false;
        }
        match stat.st_mode & S_IFMT {
            S_IFIFO => nr == SYS_write,
            S_IFCHR => nr == SYS_write && syscall!(SYS_ioctl, fd, TIOCGPGRP, &raw mut stat) == 0,
            // At the end of a stream MSG_WAITALL comes back short too: going on returns 0. And
            // when its time is over: nothing is left to wait for.
            S_IFSOCK => socket_value(fd, SO_TYPE) == Some(SOCK_STREAM),
            _ => false,
        }
    }
}

/// Was recvmmsg ended by a signal after some messages? Linux leaves the error at the socket
/// then, for the next call on it; it is taken away, for the program has seen no signal.
///
/// # Safety
/// Any descriptor number will do.
unsafe fn messages_interrupted(fd: i32) -> bool {
    const ERESTARTSYS: i32 = 512;
    let mut at = pollfd {
        fd,
        events: 0,
        revents: 0,
    };
    let now = [0_u64; 2];
    // SAFETY: the kernel writes into `at` and reads `now`.
    unsafe {
        syscall!(SYS_ppoll, &raw mut at, 1, now.as_ptr(), 0, 8) == 1
            && at.revents & POLLERR != 0
            && matches!(socket_value(fd, SO_ERROR), Some(EINTR | ERESTARTSYS))
    }
}
