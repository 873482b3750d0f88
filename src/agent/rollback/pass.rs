//! Descriptors from the helper's table to the program's: over a pair of sockets that the
//! leader has made in the program's table, of which the helper takes one end (SCM_RIGHTS).
//! The job's lock is held by one of the two at every instant.
//!
//! Raw system calls on the stack: the receiving side is a signal handler.

use ckpt_sys::raw::check;
use ckpt_sys::syscall;

/// Descriptors at most: the images of a chain and the lock.
pub const MOST: usize = 512;
/// The kernel takes 253 at once.
const AT_ONCE: usize = 128;

#[repr(C, align(8))]
struct Message {
    len: u64,
    level: i32,
    kind: i32,
    fds: [i32; AT_ONCE],
}

const HEADER: usize = 16;

fn with_header<R>(message: &mut Message, room: usize, f: impl FnOnce(&mut libc::msghdr) -> R) -> R {
    let mut byte = [0u8; 1];
    let mut part = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &mut part;
    header.msg_iovlen = 1;
    header.msg_control = (message as *mut Message).cast();
    header.msg_controllen = room;
    f(&mut header)
}

/// Sends all of `fds`.
pub fn send(socket: i32, fds: &[i32]) -> Result<(), i32> {
    for some in fds.chunks(AT_ONCE) {
        let mut message = Message {
            len: (HEADER + size_of_val(some)) as u64,
            level: libc::SOL_SOCKET,
            kind: libc::SCM_RIGHTS,
            fds: [0; AT_ONCE],
        };
        message.fds[..some.len()].copy_from_slice(some);
        let room = message.len as usize;
        with_header(&mut message, room, |header| {
            // SAFETY: a message with one byte and the control data above.
            check(unsafe { syscall!(libc::SYS_sendmsg, socket, header, libc::MSG_NOSIGNAL) })
        })?;
    }
    Ok(())
}

/// Receives `count` descriptors, close-on-exec; `take(number, fd)` gets each. On an error
/// those that came before it have been given out.
pub fn receive(socket: i32, count: usize, mut take: impl FnMut(usize, i32)) -> Result<(), i32> {
    let mut have = 0;
    while have < count {
        let mut message = Message {
            len: 0,
            level: 0,
            kind: 0,
            fds: [-1; AT_ONCE],
        };
        let room = size_of::<Message>();
        with_header(&mut message, room, |header| {
            // SAFETY: as above, with room for as many as are sent at once.
            check(unsafe {
                let flags = libc::MSG_CMSG_CLOEXEC;
                syscall!(libc::SYS_recvmsg, socket, header, flags)
            })
        })?;
        let got = (message.len as usize).saturating_sub(HEADER) / 4;
        let wanted = (count - have).min(AT_ONCE);
        for &fd in &message.fds[..got.min(AT_ONCE)] {
            take(have, fd);
            have += 1;
        }
        // The kernel leaves out what finds no number.
        if got < wanted {
            return Err(libc::EMFILE);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_arrive_in_order() {
        let mut ends = [0i32; 2];
        // SAFETY: two new descriptors of our own; no other memory.
        unsafe {
            let pair = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
            check(syscall!(
                libc::SYS_socketpair,
                libc::AF_UNIX,
                pair,
                0,
                &mut ends
            ))
            .unwrap();
            let (one, other) = (ends[0], ends[1]);
            let fds: Vec<i32> = (0..300)
                .map(|k| if k % 3 == 0 { one } else { other })
                .collect();
            send(one, &fds).unwrap();
            let inode = |fd: i32| {
                let mut st: libc::stat = std::mem::zeroed();
                check(syscall!(libc::SYS_fstat, fd, &mut st)).map(|_| st.st_ino)
            };
            let mut count = 0;
            receive(other, fds.len(), |number, fd| {
                assert_eq!(number, count);
                assert_eq!(inode(fd), inode(fds[number]));
                assert_ne!(fd, fds[number]);
                syscall!(libc::SYS_close, fd);
                count += 1;
            })
            .unwrap();
            assert_eq!(count, 300);
            syscall!(libc::SYS_close, one);
            syscall!(libc::SYS_close, other);
        }
    }
}
