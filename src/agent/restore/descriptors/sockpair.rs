//! Connections: both ends in the process, or the stand-in for one to the
//! outside. Part of [`super::restore`], used by [`super::sockets`].

use super::sockets::{bind, bind_raw, connect, named};
use crate::agent::collect::descriptors::sockopts::{self, set, set_int, socket};
use crate::agent::collect::descriptors::sys::{self, Fd};
use crate::image::state::{QueuedData, SocketRole, SocketState};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;

const SO_SNDBUFFORCE: i32 = 32;
const SO_BUF_LOCK: i32 = 72;
/// Enough for what the kernel's own tuning lets a connection hold.
const LARGE: i32 = 8 << 20;

pub(super) fn unix_pair(ty: i32) -> Result<(Fd, Fd), i32> {
    let mut fds = [0i32; 2];
    let ty = ty | libc::SOCK_CLOEXEC;
    // SAFETY: room for two descriptors.
    check(unsafe { syscall!(libc::SYS_socketpair, libc::AF_UNIX, ty, 0, fds.as_mut_ptr()) })?;
    Ok((Fd::own(fds[0]), Fd::own(fds[1])))
}

pub(super) fn shutdown(fd: i32, how: u8) {
    // SHUT_RD, SHUT_WR, SHUT_RDWR are the bits less one.
    // SAFETY: no memory is involved.
    unsafe { syscall!(libc::SYS_shutdown, fd, i32::from(how) - 1) };
}

/// Both ends of a connection, with what each had received, shut down as they
/// were. The flag tells whether the addresses are the old ones.
pub(super) fn connected(a: &SocketState, b: &SocketState) -> Result<(Fd, Fd, bool), i32> {
    let (one, other, exact) = if a.domain == libc::AF_UNIX {
        unix(a, b)?
    } else {
        tcp(a, b)?
    };
    for (fd, s) in [(&one, a), (&other, b)] {
        for name in [libc::SO_SNDBUF, libc::SO_RCVBUF] {
            if let Some(size) = sockopts::value_of(s, libc::SOL_SOCKET, name) {
                let _ = set_int(fd.raw(), libc::SOL_SOCKET, name, size);
            }
        }
    }
    send(&other, &a.receive)?;
    send(&one, &b.receive)?;
    for (fd, s) in [(&one, a), (&other, b)] {
        if s.shutdown != 0 && s.ty != libc::SOCK_DGRAM {
            shutdown(fd.raw(), s.shutdown);
        }
    }
    Ok((one, other, exact))
}

/// Sends without waiting, with a larger buffer where the ordinary one is full.
fn send(fd: &Fd, data: &QueuedData) -> Result<(), i32> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let mut enlarged = None;
    for message in &data.messages {
        let mut done = 0;
        while done < message.len() || (done == 0 && message.is_empty()) {
            let rest = &message[done..];
            // SAFETY: live bytes.
            let sent = check(unsafe {
                syscall!(
                    libc::SYS_sendto,
                    fd.raw(),
                    rest.as_ptr(),
                    rest.len(),
                    flags,
                    0,
                    0
                )
            });
            match sent {
                Ok(n) => done += n.max(usize::from(message.is_empty())),
                Err(libc::EAGAIN | libc::ENOBUFS) if enlarged.is_none() => {
                    let size = sockopts::get_int(fd.raw(), libc::SOL_SOCKET, libc::SO_SNDBUF)?;
                    let lock = sockopts::get_int(fd.raw(), libc::SOL_SOCKET, SO_BUF_LOCK);
                    enlarged = Some((size / 2, lock.unwrap_or(0)));
                    if set_int(fd.raw(), libc::SOL_SOCKET, SO_SNDBUFFORCE, LARGE).is_err() {
                        set_int(fd.raw(), libc::SOL_SOCKET, libc::SO_SNDBUF, LARGE)?;
                    }
                }
                Err(e) => return Err(e),
            }
        }
    }
    if let Some((size, lock)) = enlarged {
        let _ = set_int(fd.raw(), libc::SOL_SOCKET, libc::SO_SNDBUF, size);
        let _ = set_int(fd.raw(), libc::SOL_SOCKET, SO_BUF_LOCK, lock);
    }
    Ok(())
}

/// A unix pair: by socketpair; when an end has a name, by connecting to a
/// listener of that name, which lives only for this.
fn unix(a: &SocketState, b: &SocketState) -> Result<(Fd, Fd, bool), i32> {
    if a.ty == libc::SOCK_DGRAM {
        let (one, other) = unix_pair(a.ty)?;
        let mut exact = true;
        for (fd, s) in [(&one, a), (&other, b)] {
            exact &= !named(&s.local) || bind(fd.raw(), s).is_ok();
        }
        return Ok((one, other, exact));
    }
    let made = if named(&a.local) && b.remote == a.local {
        accepted_unix(a, b)
    } else if named(&b.local) && a.remote == b.local {
        accepted_unix(b, a).map(|(server, client)| (client, server))
    } else {
        return unix_pair(a.ty).map(|(one, other)| (one, other, true));
    };
    match made {
        Ok((one, other)) => Ok((one, other, true)),
        Err(_) => unix_pair(a.ty).map(|(one, other)| (one, other, false)),
    }
}

fn accepted_unix(server: &SocketState, client: &SocketState) -> Result<(Fd, Fd), i32> {
    let listener = socket(libc::AF_UNIX, server.ty, 0)?;
    let path = (server.local[2] != 0).then(|| sys::cstr(&server.local[2..]));
    let existed = path
        .as_ref()
        .is_some_and(|p| sys::fstatat(libc::AT_FDCWD, p, 0).is_ok());
    bind(listener.raw(), server)?;
    let end = socket(libc::AF_UNIX, client.ty, 0)?;
    let result = (|| {
        if named(&client.local) && client.local != server.local {
            bind(end.raw(), client)?;
        }
        listen_accept(&listener, &end, &server.local)
    })();
    if let (Some(path), false) = (path, existed) {
        // SAFETY: a live NUL-terminated path.
        unsafe { syscall!(libc::SYS_unlink, path.as_ptr()) };
    }
    result.map(|accepted| (accepted, end))
}

/// Connects `client` to `listener` and accepts exactly that connection.
fn listen_accept(listener: &Fd, client: &Fd, address: &[u8]) -> Result<Fd, i32> {
    let second = [1u64, 0].map(u64::to_ne_bytes).concat();
    set(listener.raw(), libc::SOL_SOCKET, libc::SO_RCVTIMEO, &second)?;
    set(client.raw(), libc::SOL_SOCKET, libc::SO_SNDTIMEO, &second)?;
    // SAFETY: no memory is involved.
    check(unsafe { syscall!(libc::SYS_listen, listener.raw(), 1) })?;
    connect(client.raw(), address)?;
    set(client.raw(), libc::SOL_SOCKET, libc::SO_SNDTIMEO, &[0; 16])?;
    let wanted = sockopts::address(client.raw(), false)?;
    loop {
        // SAFETY: no address is asked for.
        let fd = check(unsafe {
            syscall!(libc::SYS_accept4, listener.raw(), 0, 0, libc::SOCK_CLOEXEC)
        })?;
        let fd = Fd::own(fd as i32);
        let peer = sockopts::address(fd.raw(), true)?;
        let inet = peer.first() != Some(&(libc::AF_UNIX as u8));
        // Someone else may have found the listener meanwhile: theirs is dropped.
        if !inet || peer[2..4] == wanted[2..4] {
            set(fd.raw(), libc::SOL_SOCKET, libc::SO_RCVTIMEO, &[0; 16])?;
            return Ok(fd);
        }
    }
}

/// A TCP pair at the old addresses. A connection of the dead process may linger
/// in TIME_WAIT at one end: then connecting from the other end is accepted.
fn tcp(a: &SocketState, b: &SocketState) -> Result<(Fd, Fd, bool), i32> {
    if let Ok((client, server)) = tcp_once(a, b, true) {
        return Ok((client, server, true));
    }
    if let Ok((client, server)) = tcp_once(b, a, true) {
        return Ok((server, client, true));
    }
    if let Ok((client, server)) = tcp_once(a, b, false) {
        return Ok((client, server, false));
    }
    let (client, server) = tcp_anywhere(a.domain, a.protocol)?;
    Ok((client, server, false))
}

fn tcp_once(client: &SocketState, server: &SocketState, exact: bool) -> Result<(Fd, Fd), i32> {
    let listener = socket(server.domain, libc::SOCK_STREAM, server.protocol)?;
    let end = socket(client.domain, libc::SOCK_STREAM, client.protocol)?;
    set_int(listener.raw(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    bind_raw(listener.raw(), &server.local)?;
    if exact {
        set_int(end.raw(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        bind_raw(end.raw(), &client.local)?;
    }
    let accepted = listen_accept(&listener, &end, &client.remote)?;
    Ok((end, accepted))
}

/// A TCP connection over the loopback; the first end has the given family. IPv6
/// goes by mapped addresses, which work without IPv6 on the loopback.
fn tcp_anywhere(domain: i32, protocol: i32) -> Result<(Fd, Fd), i32> {
    let listener = socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    let mut address = vec![0u8; 16];
    address[0] = libc::AF_INET as u8;
    address[4..8].copy_from_slice(&[127, 0, 0, 1]);
    bind_raw(listener.raw(), &address)?;
    let mut to = sockopts::address(listener.raw(), false)?;
    let end = socket(domain, libc::SOCK_STREAM, protocol)?;
    if domain == libc::AF_INET6 {
        let mut mapped = vec![0u8; 28];
        mapped[0] = libc::AF_INET6 as u8;
        mapped[2..4].copy_from_slice(&to[2..4]);
        mapped[18..20].fill(0xff);
        mapped[20..24].copy_from_slice(&to[4..8]);
        to = mapped;
        set_int(end.raw(), libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 0)?;
    }
    let accepted = listen_accept(&listener, &end, &to)?;
    Ok((end, accepted))
}

/// One end of a connection to the outside: it gives what had been received, and
/// then an error (reset) or end of file (the other end had closed in order).
pub(super) fn stand_in(s: &SocketState) -> Result<Fd, i32> {
    let reset = s.role == SocketRole::Outside;
    if s.domain == libc::AF_UNIX {
        let (one, other) = unix_pair(s.ty)?;
        send(&other, &s.receive)?;
        match (s.ty, reset) {
            // Datagrams know no reset: nothing comes, nothing can be sent.
            (libc::SOCK_DGRAM, _) => shutdown(one.raw(), 3),
            // Closed with unread data: ECONNRESET.
            (_, true) => drop(sys::write(one.raw(), b"!")?),
            (_, false) => {}
        }
        return Ok(one);
    }
    let (one, other) = tcp_anywhere(s.domain, s.protocol)?;
    send(&other, &s.receive)?;
    if reset {
        // l_onoff 1, l_linger 0: closing sends a reset.
        let linger = [1i32, 0].map(i32::to_ne_bytes).concat();
        set(other.raw(), libc::SOL_SOCKET, libc::SO_LINGER, &linger)?;
    }
    drop(other);
    if !reset && s.shutdown != 0 {
        shutdown(one.raw(), s.shutdown);
    }
    Ok(one)
}
