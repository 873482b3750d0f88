//! Sockets. Part of [`super::restore`]: [`make`] creates sockets and connections
//! with what had been received, [`finish`] does what needs all of them: listening
//! (a listener would be in the way of rebuilding its connections), datagrams in
//! flight, datagram peers, options.

use super::{RestoreError, Restorer, sockpair};
use crate::agent::collect::descriptors::sockopts::{self, set_int, socket};
use crate::agent::collect::descriptors::sys::{self, Fd};
use crate::image::state::{FileKind, SocketRole, SocketState};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;

pub(super) fn state<'a>(r: &Restorer<'a, '_>, file: usize) -> Option<&'a SocketState> {
    match &r.state(file).kind {
        FileKind::Socket(s) => Some(s),
        _ => None,
    }
}

/// The other end's description, when both point at each other.
fn mutual_peer(r: &Restorer, file: usize, s: &SocketState) -> Option<usize> {
    let SocketRole::Pair { peer_ino } = s.role else {
        return None;
    };
    (0..r.table.files.len()).find(|&other| {
        let points_back =
            |p: &SocketState| p.role == SocketRole::Pair { peer_ino: s.ino } && p.ino == peer_ino;
        other != file && state(r, other).is_some_and(points_back)
    })
}

pub(super) fn make(r: &mut Restorer, file: usize) -> Result<(), RestoreError> {
    let Some(s) = state(r, file) else {
        return Ok(());
    };
    if let Some(peer) = mutual_peer(r, file, s) {
        let Some(p) = state(r, peer) else {
            return Ok(());
        };
        let (one, other, exact) =
            sockpair::connected(s, p).map_err(|e| r.fail(file, "connection", e))?;
        if !exact {
            let fd = r.first(file);
            r.warn(&format!(
                "descriptor {fd}: the connection's addresses are in use, it has others now"
            ));
        }
        let other = r.park(other)?;
        let one = r.park(one)?;
        r.place(file, one)?;
        return r.place(peer, other);
    }
    let fd = match s.role {
        // Made by `finish`.
        SocketRole::Listening { .. } | SocketRole::Queued { .. } => return Ok(()),
        SocketRole::Outside | SocketRole::Ended => {
            sockpair::stand_in(s).map_err(|e| r.fail(file, "connection to the outside", e))?
        }
        SocketRole::Idle | SocketRole::Pair { .. } => bound(r, file, s)?,
    };
    r.place(file, fd)
}

/// A new socket with its options, bound to its address.
fn bound(r: &Restorer, file: usize, s: &SocketState) -> Result<Fd, RestoreError> {
    let fd = socket(s.domain, s.ty, s.protocol).map_err(|e| r.fail(file, "socket", e))?;
    let _ = sockopts::apply(fd.raw(), s);
    if named(&s.local) {
        if s.domain == libc::AF_INET || s.domain == libc::AF_INET6 {
            let _ = set_int(fd.raw(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
        }
        bind(fd.raw(), s).map_err(|e| RestoreError::Descriptor {
            fd: r.first(file),
            what: "bind its socket to its address",
            reason: sys::errno_text(e),
        })?;
    }
    Ok(fd)
}

/// Could [`make`] bind a socket to its address now? Of one whose name is a file this is not
/// asked: it would be made.
pub fn would_bind(s: &SocketState) -> Result<(), i32> {
    let fd = socket(s.domain, s.ty, s.protocol)?;
    let _ = sockopts::apply(fd.raw(), s);
    if s.domain == libc::AF_INET || s.domain == libc::AF_INET6 {
        let _ = set_int(fd.raw(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
    }
    bind(fd.raw(), s)
}

/// Is there an address beyond the family? (An unbound IP socket has port 0.)
pub fn named(address: &[u8]) -> bool {
    match address {
        [] | [_] | [_, _] => false,
        [family, 0, port @ ..] if [libc::AF_INET as u8, libc::AF_INET6 as u8].contains(family) => {
            port[..2] != [0, 0]
        }
        _ => true,
    }
}

pub(super) fn bind_raw(fd: i32, address: &[u8]) -> Result<(), i32> {
    // SAFETY: live address bytes.
    check(unsafe { syscall!(libc::SYS_bind, fd, address.as_ptr(), address.len()) }).map(drop)
}

pub(super) fn connect(fd: i32, address: &[u8]) -> Result<(), i32> {
    // SAFETY: live address bytes.
    check(unsafe { syscall!(libc::SYS_connect, fd, address.as_ptr(), address.len()) }).map(drop)
}

/// Binds; a socket file that nobody listens at any more makes room.
pub(super) fn bind(fd: i32, s: &SocketState) -> Result<(), i32> {
    match bind_raw(fd, &s.local) {
        Err(libc::EADDRINUSE) if s.domain == libc::AF_NETLINK => {
            // Another port number, by the kernel's choice.
            let mut address = s.local.clone();
            address[4..8].fill(0);
            bind_raw(fd, &address)
        }
        Err(libc::EADDRINUSE) if s.domain == libc::AF_UNIX && s.local[2] != 0 => {
            let path = sys::cstr(&s.local[2..]);
            let old = sys::fstatat(libc::AT_FDCWD, &path, libc::AT_SYMLINK_NOFOLLOW)?;
            let probe = socket(s.domain, s.ty, s.protocol)?;
            let dead = old.st_mode & libc::S_IFMT == libc::S_IFSOCK
                && connect(probe.raw(), &s.local) == Err(libc::ECONNREFUSED);
            if !dead {
                return Err(libc::EADDRINUSE);
            }
            // SAFETY: a live NUL-terminated path.
            check(unsafe { syscall!(libc::SYS_unlink, path.as_ptr()) })?;
            bind_raw(fd, &s.local)?;
            // SAFETY: as above.
            unsafe { syscall!(libc::SYS_chmod, path.as_ptr(), old.st_mode & 0o7777) };
            Ok(())
        }
        other => other,
    }
}

/// Where a socket bound to `local` is reached from here: the loopback for any.
fn reachable(local: &[u8]) -> Vec<u8> {
    let mut to = local.to_vec();
    let family = i32::from(local.first().copied().unwrap_or(0));
    if family == libc::AF_INET && to.len() >= 8 && to[4..8] == [0; 4] {
        to[4..8].copy_from_slice(&[127, 0, 0, 1]);
    }
    if family == libc::AF_INET6 && to.len() >= 24 && to[8..24] == [0; 16] {
        to[23] = 1;
    }
    to
}

pub(super) fn finish(r: &mut Restorer) -> Result<(), RestoreError> {
    let files: Vec<usize> = (0..r.table.files.len())
        .filter(|&f| state(r, f).is_some() && !r.numbers[f].is_empty())
        .collect();
    let each = |r: &Restorer, file: usize| state(r, file).cloned().unwrap_or_default();
    for &file in &files {
        let s = each(r, file);
        if let SocketRole::Listening { backlog } = s.role {
            let fd = bound(r, file, &s)?;
            // SAFETY: no memory is involved.
            check(unsafe { syscall!(libc::SYS_listen, fd.raw(), backlog) })
                .map_err(|e| r.fail(file, "listen again", e))?;
            r.place(file, fd)?;
        }
    }
    for &file in &files {
        let s = each(r, file);
        if let SocketRole::Queued { .. } = s.role {
            let fd = socket(s.domain, s.ty, s.protocol)
                .and_then(|fd| {
                    if s.domain == libc::AF_UNIX && named(&s.local) {
                        bind(fd.raw(), &s)?;
                    } else if named(&s.local) {
                        set_int(fd.raw(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
                        let _ = bind_raw(fd.raw(), &s.local);
                    }
                    connect(fd.raw(), &s.remote).map(|()| fd)
                })
                .map_err(|e| r.fail(file, "connect to its own listener again", e))?;
            r.place(file, fd)?;
        }
    }
    for &file in &files {
        let s = each(r, file);
        if s.ty == libc::SOCK_DGRAM && mutual_peer(r, file, &s).is_none() {
            redeliver(r, file, &s, &files);
        }
    }
    for &file in &files {
        let s = each(r, file);
        let fd = r.first(file);
        let datagram = s.ty == libc::SOCK_DGRAM;
        if datagram && named(&s.remote) && mutual_peer(r, file, &s).is_none() {
            // Whoever it was may be gone; sending tells then, as it would have.
            if let Err(e) = connect(fd, &s.remote) {
                r.warn(&format!(
                    "descriptor {fd}: its peer does not answer: {}",
                    sys::errno_text(e)
                ));
            }
        }
        if let Err((level, name, e)) = sockopts::apply(fd, &s) {
            r.warn(&format!(
                "descriptor {fd}: socket option {level}/{name} not restored: {}",
                sys::errno_text(e)
            ));
        }
        if datagram && s.shutdown != 0 {
            sockpair::shutdown(fd, s.shutdown);
        }
        let handle = Fd::own(fd);
        let set = r.set_flags(file, &handle);
        handle.release();
        set?;
    }
    Ok(())
}

/// Sends datagrams that were in flight again, from the senders' addresses.
fn redeliver(r: &mut Restorer, file: usize, s: &SocketState, files: &[usize]) {
    let to = reachable(&s.local);
    let mut lost = 0;
    for (message, from) in s.receive.messages.iter().zip(&s.receive.from) {
        let own = files.iter().find(|&&f| {
            named(from) && state(r, f).is_some_and(|p| p.local == *from && p.ty == s.ty)
        });
        let sent = match own {
            Some(&sender) => send_to(r.first(sender), message, &to),
            None => socket(s.domain, s.ty, s.protocol).and_then(|fd| {
                if named(from) {
                    if s.domain != libc::AF_UNIX {
                        set_int(fd.raw(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
                        bind_raw(fd.raw(), from)?;
                    } else if from[2] == 0 {
                        // An abstract name leaves nothing behind.
                        let _ = bind_raw(fd.raw(), from);
                    }
                }
                send_to(fd.raw(), message, &to)
            }),
        };
        lost += usize::from(sent.is_err());
    }
    if lost > 0 {
        let fd = r.first(file);
        r.warn(&format!(
            "descriptor {fd}: {lost} datagrams in flight are lost, their senders are elsewhere"
        ));
    }
}

fn send_to(fd: i32, message: &[u8], to: &[u8]) -> Result<(), i32> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: live message and address bytes.
    check(unsafe {
        syscall!(
            libc::SYS_sendto,
            fd,
            message.as_ptr(),
            message.len(),
            flags,
            to.as_ptr(),
            to.len()
        )
    })
    .map(drop)
}

/// A unix stream socket whose other end is closed.
pub(super) fn ended_unix() -> Result<Fd, i32> {
    sockpair::unix_pair(libc::SOCK_STREAM).map(|(one, _)| one)
}
