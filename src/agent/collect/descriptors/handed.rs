//! Copies of the program's descriptors in the helper's table.
//!
//! By pidfd_getfd(2). Where that is forbidden (the system-call filters of containers mostly
//! forbid it) a stopped thread is asked: it connects to a socket of the helper's and sends the
//! descriptor over it. The socket's name is the kernel's choice and anybody may connect to it,
//! so the other side must be this very process.
//!
//! Helper thread ([`copy`]); stopped threads, in the stop handler or in `ckpt_checkpoint`
//! ([`hand_if_asked`], [`hand`]): raw system calls on the stack.

use super::sys::{self, Fd};
use crate::agent::request;
use crate::agent::rollback::pass;
use crate::agent::state::AGENT;
use crate::agent::stop::{self, now_ns};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::*};

/// The descriptor that is wanted and 1; 0: none; [`TAKEN`]: a thread is about to hand it over.
/// Futex.
static WANTED: AtomicI32 = AtomicI32::new(0);
const TAKEN: i32 = -1;
/// What became of it: 0, or errno.
static ERROR: AtomicI32 = AtomicI32::new(0);
/// Where to: the socket's address, all eight bytes of it (unix(7), autobind).
static ADDRESS: AtomicU64 = AtomicU64::new(0);

const KIND: i32 = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
/// No thread looks: there is none that is stopped.
const PATIENCE_NS: u64 = 2_000_000_000;

/// A copy of descriptor `fd` of the program, which `pidfd` is of. Where the kernel does not give
/// it the program must be stopped.
pub fn copy(pidfd: i32, fd: i32) -> Result<Fd, i32> {
    match sys::pidfd_getfd(pidfd, fd) {
        Err(errno) if is_forbidden(errno) => {
            let socket = listen().map_err(|_| errno)?;
            ask(fd)?;
            accept(&socket)
        }
        other => other,
    }
}

/// Is it the call that is not permitted, not the descriptor?
fn is_forbidden(errno: i32) -> bool {
    matches!(errno, libc::EPERM | libc::ENOSYS | libc::EACCES)
}

/// The socket for a descriptor that a thread hands over by itself ([`hand`]), where copies are
/// not to be had otherwise.
pub fn expect(pidfd: i32) -> Option<Fd> {
    match sys::pidfd_getfd(pidfd, -1) {
        Err(errno) if is_forbidden(errno) => listen().ok(),
        _ => {
            ADDRESS.store(0, Release);
            None
        }
    }
}

/// Is the helper waiting at its socket?
pub fn is_expected() -> bool {
    ADDRESS.load(Acquire) != 0
}

fn listen() -> Result<Fd, i32> {
    // SAFETY: sockets of ours and addresses on this stack.
    unsafe {
        let fd = check(syscall!(libc::SYS_socket, libc::AF_UNIX, KIND, 0))?;
        let socket = Fd::own(fd as i32);
        let family = libc::AF_UNIX as u16;
        check(syscall!(libc::SYS_bind, socket.raw(), &family, 2))?;
        check(syscall!(libc::SYS_listen, socket.raw(), 8))?;
        let (mut address, mut len) = (0u64, 8u32);
        check(syscall!(
            libc::SYS_getsockname,
            socket.raw(),
            &mut address,
            &mut len
        ))?;
        if len != 8 {
            return Err(libc::EADDRNOTAVAIL);
        }
        ADDRESS.store(address, Release);
        Ok(socket)
    }
}

/// Has a stopped thread hand it over.
fn ask(fd: i32) -> Result<(), i32> {
    WANTED.store(fd + 1, SeqCst);
    request::order_inserted();
    stop::look_again();
    let started = now_ns();
    loop {
        match WANTED.load(SeqCst) {
            0 => break,
            seen => {
                if seen != TAKEN && now_ns() - started > PATIENCE_NS {
                    let gone = WANTED.compare_exchange(seen, 0, SeqCst, SeqCst);
                    if gone.is_ok() {
                        return Err(libc::EPERM);
                    }
                    continue;
                }
                let (op, pause) = (
                    libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                    [0u64, 1_000_000],
                );
                // SAFETY: a futex word of ours and a valid timespec.
                unsafe { syscall!(libc::SYS_futex, &WANTED, op, seen, &pause, 0, 0) };
            }
        }
    }
    match ERROR.load(SeqCst) {
        0 => Ok(()),
        errno => Err(errno),
    }
}

/// What this process has sent to the socket. It is there already.
pub fn accept(socket: &Fd) -> Result<Fd, i32> {
    ADDRESS.store(0, Release);
    loop {
        // SAFETY: the kernel fills three words; a socket of ours.
        let (from, peer) = unsafe {
            let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            let (none, no_len) = (0u64, 0u64);
            let from = check(syscall!(
                libc::SYS_accept4,
                socket.raw(),
                none,
                no_len,
                flags
            ))?;
            let from = Fd::own(from as i32);
            let (mut peer, mut len) = ([0i32; 3], 12u32);
            let (level, name) = (libc::SOL_SOCKET, libc::SO_PEERCRED);
            check(syscall!(
                libc::SYS_getsockopt,
                from.raw(),
                level,
                name,
                &mut peer,
                &mut len
            ))?;
            (from, peer[0])
        };
        if peer != AGENT.real_pid.load(Relaxed) {
            continue;
        }
        let mut got = Err(libc::EBADF);
        pass::receive(from.raw(), 1, |_, fd| got = Ok(Fd::own(fd)))?;
        return got;
    }
}

/// In a stopped thread: hands over what the helper wants, if it wants something.
pub fn hand_if_asked() {
    let wanted = WANTED.load(Acquire);
    if wanted <= 0
        || WANTED
            .compare_exchange(wanted, TAKEN, SeqCst, SeqCst)
            .is_err()
    {
        return;
    }
    ERROR.store(hand(wanted - 1).err().unwrap_or(0), SeqCst);
    WANTED.store(0, SeqCst);
    let op = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: a futex word of ours.
    unsafe { syscall!(libc::SYS_futex, &WANTED, op, 1, 0, 0, 0) };
}

/// In a stopped thread: hands a descriptor of the program over. It takes a number of the
/// program's for a moment.
pub fn hand(fd: i32) -> Result<(), i32> {
    let address = ADDRESS.load(Acquire);
    // SAFETY: a socket of ours, closed again; an address on this stack.
    unsafe {
        let socket = check(syscall!(libc::SYS_socket, libc::AF_UNIX, KIND, 0))? as i32;
        let connected = check(syscall!(libc::SYS_connect, socket, &address, 8));
        let sent = connected.and_then(|_| pass::send(socket, &[fd]));
        syscall!(libc::SYS_close, socket);
        sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;

    /// The filters of containers forbid pidfd_getfd, and no checkpoint was taken there.
    #[test]
    fn a_thread_hands_over_what_is_wanted() {
        in_child(|| {
            // SAFETY: no arguments.
            let pid = unsafe { syscall!(libc::SYS_getpid) } as i32;
            AGENT.real_pid.store(pid, Relaxed);
            let (from, to) = sys::pipe(0).unwrap();
            let stopped = std::thread::spawn(|| {
                while WANTED.load(SeqCst) == 0 {
                    std::thread::yield_now();
                }
                hand_if_asked();
            });
            let socket = listen().unwrap();
            ask(to.raw()).unwrap();
            let copy = accept(&socket).unwrap();
            stopped.join().unwrap();
            assert_ne!(copy.raw(), to.raw());
            let inode = |fd: &Fd| sys::fstat(fd.raw()).unwrap().st_ino;
            assert_eq!(inode(&copy), inode(&from));
        });
    }

    #[test]
    fn what_another_process_sends_is_left_alone() {
        in_child(|| {
            // SAFETY: no arguments.
            let pid = unsafe { syscall!(libc::SYS_getpid) } as i32;
            let socket = listen().unwrap();
            AGENT.real_pid.store(pid + 1, Relaxed);
            hand(0).unwrap();
            assert_eq!(accept(&socket).err(), Some(libc::EAGAIN));
            let address = listen().unwrap();
            AGENT.real_pid.store(pid, Relaxed);
            hand(0).unwrap();
            assert!(accept(&address).is_ok());
        });
    }

    /// A descriptor that is not open, or no thread that is stopped: an error, no waiting for ever.
    #[test]
    fn what_cannot_be_handed_over_is_an_error() {
        in_child(|| {
            let socket = listen().unwrap();
            assert_eq!(hand(9999), Err(libc::EBADF));
            drop(socket);
            assert_eq!(hand(0), Err(libc::ECONNREFUSED));
            assert_eq!(ask(0), Err(libc::EPERM));
        });
    }
}
