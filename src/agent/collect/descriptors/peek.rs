//! Looking at what a socket has received without taking it. Used by
//! [`super::sockets`] in the helper thread.

use super::sockopts::{SO_PEEK_OFF, get_int, set_int};
use super::sys;
use crate::image::state::QueuedData;
use ckpt_sys::raw::check;
use ckpt_sys::syscall;

/// Why a queue cannot be kept.
#[derive(Debug)]
pub enum PeekError {
    /// Descriptors are being passed in it.
    Descriptors,
    Failed(i32),
}

impl From<i32> for PeekError {
    fn from(errno: i32) -> PeekError {
        PeekError::Failed(errno)
    }
}

struct Message {
    len: usize,
    truncated: bool,
    from: Vec<u8>,
}

/// `recvmsg` with MSG_PEEK; descriptors that come with the message are closed.
fn peek_message(fd: i32, buf: &mut [u8]) -> Result<Message, PeekError> {
    let mut name = [0u8; 128];
    let mut control = [0u64; 256];
    let mut iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: a plain struct of pointers and integers; all-zero is valid.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_name = name.as_mut_ptr().cast();
    msg.msg_namelen = name.len() as u32;
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.as_mut_ptr().cast();
    msg.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: every pointer in `msg` is to a live buffer of the length given.
    let len = check(unsafe { syscall!(libc::SYS_recvmsg, fd, &raw mut msg, flags) })?;

    // Ancillary data: headers of 16 bytes (length, level, type), 8-aligned.
    let filled = msg.msg_controllen.min(size_of_val(&control));
    let mut at = 0;
    let mut descriptors = msg.msg_flags & libc::MSG_CTRUNC != 0;
    while at + 16 <= filled {
        let len = control[at / 8] as usize;
        let (level, ty) = (
            control[at / 8 + 1] as u32 as i32,
            (control[at / 8 + 1] >> 32) as i32,
        );
        if len < 16 || at + len > filled {
            break;
        }
        // SCM_RIGHTS = 1, SCM_PIDFD = 4.
        if level == libc::SOL_SOCKET && (ty == libc::SCM_RIGHTS || ty == 4) {
            descriptors |= ty == libc::SCM_RIGHTS;
            for n in 0..(len - 16) / 4 {
                let word = control[(at + 16 + n * 4) / 8];
                sys::close((word >> ((n % 2) * 32)) as u32 as i32);
            }
        }
        at += len.div_ceil(8) * 8;
    }
    if descriptors {
        return Err(PeekError::Descriptors);
    }
    Ok(Message {
        len,
        truncated: msg.msg_flags & libc::MSG_TRUNC != 0,
        from: name[..(msg.msg_namelen as usize).min(name.len())].to_vec(),
    })
}

/// All bytes of a TCP connection's receive queue: one peek sees the whole queue.
pub fn tcp(fd: i32) -> Result<QueuedData, PeekError> {
    let queued = sys::fionread(fd)?;
    if queued == 0 {
        return Ok(QueuedData::default());
    }
    let mut buf = vec![0u8; queued];
    let got = peek_message(fd, &mut buf)?.len;
    buf.truncate(got);
    Ok(QueuedData {
        messages: vec![buf],
        from: vec![Vec::new()],
    })
}

/// Runs `look` with SO_PEEK_OFF at 0 and puts the program's value back.
fn with_offset<T>(fd: i32, look: impl FnOnce() -> Result<T, PeekError>) -> Result<T, PeekError> {
    let before = get_int(fd, libc::SOL_SOCKET, SO_PEEK_OFF)?;
    set_int(fd, libc::SOL_SOCKET, SO_PEEK_OFF, 0)?;
    let result = look();
    set_int(fd, libc::SOL_SOCKET, SO_PEEK_OFF, before)?;
    result
}

/// All bytes of a unix stream socket.
pub fn unix_stream(fd: i32) -> Result<QueuedData, PeekError> {
    let queued = sys::fionread(fd)?;
    if queued == 0 {
        return Ok(QueuedData::default());
    }
    with_offset(fd, || {
        let mut whole = Vec::with_capacity(queued);
        let mut buf = vec![0u8; queued];
        while whole.len() < queued {
            // The kernel advances the offset by what it has shown.
            match peek_message(fd, &mut buf) {
                Ok(m) if m.len == 0 => break,
                Ok(m) => whole.extend_from_slice(&buf[..m.len]),
                Err(PeekError::Failed(libc::EAGAIN)) => break,
                Err(e) => return Err(e),
            }
        }
        Ok(QueuedData {
            messages: vec![whole],
            from: vec![Vec::new()],
        })
    })
}

/// Message by message (datagram, seqpacket), with the senders' addresses.
pub fn messages(fd: i32, seqpacket: bool) -> Result<QueuedData, PeekError> {
    if sys::poll_now(fd, libc::POLLIN) & libc::POLLIN == 0 {
        return Ok(QueuedData::default());
    }
    with_offset(fd, || {
        let mut data = QueuedData::default();
        let mut buf = vec![0u8; 1 << 17];
        let mut offset = 0;
        loop {
            set_int(fd, libc::SOL_SOCKET, SO_PEEK_OFF, offset)?;
            let message = match peek_message(fd, &mut buf) {
                Ok(m) => m,
                Err(PeekError::Failed(libc::EAGAIN)) => return Ok(data),
                Err(e) => return Err(e),
            };
            if message.truncated {
                let double = buf.len() * 2;
                if double > 1 << 26 {
                    return Err(PeekError::Failed(libc::EMSGSIZE));
                }
                buf.resize(double, 0);
                continue;
            }
            // Nothing on a seqpacket socket is its end of file.
            if message.len == 0 && (seqpacket || data.messages.len() > 1 << 16) {
                return Ok(data);
            }
            offset += message.len as i32;
            data.messages.push(buf[..message.len].to_vec());
            data.from.push(message.from);
        }
    })
}
