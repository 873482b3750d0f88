//! Sockets. Called by [`super::collect`] in the helper thread: [`collect`] for
//! each, then [`resolve`] once to find connections whose both ends are here.
//!
//! A unix socket's peer comes from the kernel's socket diagnosis, a TCP peer is
//! the socket with the same two addresses the other way round.

use super::peek::{self, PeekError};
use super::sockdiag::{UnixDiag, UnixInfo};
use super::{Collector, Raw, sockopts, sys};
use crate::agent::collect::Refusal;
use crate::agent::hooks::listening::leaves_its_address;
use crate::image::state::{DescriptorTable, FileKind, SocketRole, SocketState};

/// TCP states that matter here.
const ESTABLISHED: u8 = 1;
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const CLOSE: u8 = 7;
const CLOSE_WAIT: u8 = 8;
const LISTEN: u8 = 10;
const SHUT_RD: u8 = 1;
const SHUT_WR: u8 = 2;

pub(super) fn collect(c: &mut Collector, at: usize) -> Result<FileKind, Refusal> {
    let raw = &c.raws[at];
    let dup = c.duplicate(raw)?;
    let fd = dup.raw();
    let int = |name| {
        sockopts::get_int(fd, libc::SOL_SOCKET, name).map_err(|e| raw.refuse("is a socket", e))
    };
    let (domain, ty, protocol) = (
        int(libc::SO_DOMAIN)?,
        int(libc::SO_TYPE)?,
        int(libc::SO_PROTOCOL)?,
    );
    let mut s = SocketState {
        ino: raw.stat.st_ino,
        domain,
        ty,
        protocol,
        local: sockopts::address(fd, false).unwrap_or_default(),
        remote: sockopts::address(fd, true).unwrap_or_default(),
        options: sockopts::read(fd, domain, ty),
        ..SocketState::default()
    };
    let inet = domain == libc::AF_INET || domain == libc::AF_INET6;
    match (domain, ty) {
        (libc::AF_UNIX, _) => unix(raw, fd, &mut s)?,
        (_, libc::SOCK_STREAM) if inet => {
            tcp(raw, fd, &mut s)?;
            if s.role != SocketRole::Idle && !c.started_with(raw) {
                leave_the_address(fd, &mut s);
            }
        }
        (_, libc::SOCK_DGRAM) if inet => {
            s.receive = queue(raw, peek::messages(fd, false))?;
        }
        (libc::AF_NETLINK, _) => {
            if sys::poll_now(fd, libc::POLLIN) & libc::POLLIN != 0 {
                return Err(raw.refuse_kind("is a netlink socket with unread messages"));
            }
        }
        _ => {
            return Err(raw.refuse_kind(&format!(
                "is a socket of family {domain} and type {ty}, which cannot be saved"
            )));
        }
    }
    Ok(FileKind::Socket(s))
}

fn queue<T>(raw: &Raw, result: Result<T, PeekError>) -> Result<T, Refusal> {
    result.map_err(|e| match e {
        PeekError::Descriptors => {
            raw.refuse_kind("has descriptors in flight (SCM_RIGHTS) that were not received yet")
        }
        PeekError::Failed(e) => raw.refuse("does not show what it has received", e),
    })
}

fn unix(raw: &Raw, fd: i32, s: &mut SocketState) -> Result<(), Refusal> {
    let diag = |ino| UnixDiag::open().and_then(|d| d.ask(ino));
    let info: UnixInfo = diag(s.ino).map_err(|e| raw.refuse("cannot be asked for its peer", e))?;
    s.shutdown = info.shutdown;
    let stream = s.ty == libc::SOCK_STREAM;
    s.role = match info.state {
        LISTEN => SocketRole::Listening {
            backlog: info.backlog as i32,
        },
        // Also datagram sockets with a peer.
        ESTABLISHED if info.peer != 0 => SocketRole::Pair {
            peer_ino: info.peer,
        },
        // The peer has been closed (which shuts this end down), or is waiting in a
        // listener's queue without an inode of its own.
        ESTABLISHED if s.ty != libc::SOCK_DGRAM => {
            let error = sys::poll_now(fd, libc::POLLIN) & libc::POLLERR != 0;
            match info.shutdown & 3 {
                3 if !error => SocketRole::Ended,
                _ => SocketRole::Outside,
            }
        }
        _ => SocketRole::Idle,
    };
    if !matches!(s.role, SocketRole::Listening { .. }) {
        s.receive = if stream {
            match s.role {
                SocketRole::Idle => Default::default(),
                _ => queue(raw, peek::unix_stream(fd))?,
            }
        } else if s.ty == libc::SOCK_DGRAM || s.role != SocketRole::Idle {
            queue(raw, peek::messages(fd, !stream && s.ty != libc::SOCK_DGRAM))?
        } else {
            Default::default()
        };
    }
    Ok(())
}

fn tcp(raw: &Raw, fd: i32, s: &mut SocketState) -> Result<(), Refusal> {
    // struct tcp_info: state is byte 0, the listener's backlog at 28.
    let mut info = [0u8; 232];
    sockopts::get_into(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)
        .map_err(|e| raw.refuse("does not tell its state", e))?;
    let state = info[0];
    if state == LISTEN {
        let backlog = i32::from_ne_bytes([info[28], info[29], info[30], info[31]]);
        s.role = SocketRole::Listening { backlog };
        return Ok(());
    }
    let events = sys::poll_now(fd, libc::POLLIN | libc::POLLRDHUP);
    let hung_up = events & libc::POLLRDHUP != 0;
    if state == CLOSE && !hung_up && s.remote.is_empty() {
        // Never connected, or the connection attempt failed.
        return Ok(());
    }
    s.receive = queue(raw, peek::tcp(fd))?;
    s.shutdown = match state {
        FIN_WAIT1 | FIN_WAIT2 => SHUT_WR,
        ESTABLISHED | CLOSE_WAIT => 0,
        _ => SHUT_WR,
    };
    if hung_up && matches!(state, ESTABLISHED | FIN_WAIT1 | FIN_WAIT2) {
        s.shutdown |= SHUT_RD;
    }
    s.role = match state {
        // The other end has sent its end of file.
        CLOSE_WAIT => SocketRole::Ended,
        ESTABLISHED | FIN_WAIT1 | FIN_WAIT2 => SocketRole::Outside,
        _ if events & libc::POLLERR != 0 => SocketRole::Outside,
        _ if hung_up => SocketRole::Ended,
        _ => SocketRole::Outside,
    };
    Ok(())
}

/// A program that had not set SO_REUSEADDR was refused for a minute with "address in use": by
/// what its killed life had left of its connections.
fn leave_the_address(fd: i32, s: &mut SocketState) {
    const REUSE: (i32, i32) = (libc::SOL_SOCKET, libc::SO_REUSEADDR);
    let kept = s.options.iter_mut().find(|o| (o.0, o.1) == REUSE);
    if let Some((.., value)) = kept.filter(|_| leaves_its_address(fd)) {
        *value = 1i32.to_ne_bytes().to_vec();
    }
}

/// Two addresses as the other end would give them: an IPv4 address mapped into
/// IPv6 equals the IPv4 one. (port, address)
fn normal(address: &[u8]) -> Option<(u16, Vec<u8>)> {
    let family = i32::from(u16::from_ne_bytes([*address.first()?, *address.get(1)?]));
    let port = u16::from_be_bytes([*address.get(2)?, *address.get(3)?]);
    let bytes = match family {
        libc::AF_INET => address.get(4..8)?,
        libc::AF_INET6 => {
            let bytes = address.get(8..24)?;
            let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
            bytes.strip_prefix(&mapped[..]).unwrap_or(bytes)
        }
        _ => return None,
    };
    Some((port, bytes.to_vec()))
}

/// Finds the connections whose both ends are here; what is left belongs to the
/// outside.
pub(super) fn resolve(c: &Collector, table: &mut DescriptorTable) -> Result<(), Refusal> {
    let sockets: Vec<(usize, SocketState)> = table
        .files
        .iter()
        .enumerate()
        .filter_map(|(i, f)| match &f.kind {
            FileKind::Socket(s) => Some((i, s.clone())),
            _ => None,
        })
        .collect();
    for (file, s) in &sockets {
        let raw = &c.raws[c.lead[*file]];
        let role = match s.domain {
            libc::AF_UNIX => unix_role(c, raw, s, &sockets)?,
            _ if s.ty == libc::SOCK_STREAM => tcp_role(c, raw, s, &sockets)?,
            _ => s.role.clone(),
        };
        if c.started_with(raw) && !matches!(role, SocketRole::Pair { .. }) {
            table.files[*file].kind = FileKind::Inherited {
                path: raw.link.clone(),
                termios: Vec::new(),
            };
        } else if let FileKind::Socket(kept) = &mut table.files[*file].kind {
            kept.role = role;
        }
    }
    Ok(())
}

fn listening(s: &SocketState) -> bool {
    matches!(s.role, SocketRole::Listening { .. })
}

fn unix_role(
    c: &Collector,
    raw: &Raw,
    s: &SocketState,
    sockets: &[(usize, SocketState)],
) -> Result<SocketRole, Refusal> {
    let peer = match s.role {
        SocketRole::Pair { peer_ino } => peer_ino,
        SocketRole::Outside => 0,
        _ => return Ok(s.role.clone()),
    };
    if sockets.iter().any(|(_, p)| p.ino == peer) {
        return Ok(s.role.clone());
    }
    if s.ty == libc::SOCK_DGRAM {
        // Connected by name to a socket elsewhere: connected again by name.
        return Ok(match s.remote.len() {
            0..=2 => SocketRole::Outside,
            _ => SocketRole::Idle,
        });
    }
    for (_, listener) in sockets {
        if listener.domain != s.domain || !listening(listener) {
            continue;
        }
        let info = UnixDiag::open().and_then(|d| d.ask(listener.ino));
        if !info.is_ok_and(|i| i.queued.contains(&s.ino)) {
            continue;
        }
        if unsent(c, raw)? > 0 {
            return Err(raw.refuse_kind("has sent bytes to a connection not accepted yet"));
        }
        return Ok(SocketRole::Queued {
            listener_ino: listener.ino,
        });
    }
    Ok(SocketRole::Outside)
}

/// SIOCOUTQ: bytes sent that the other end does not have (TCP) or has not read (unix).
fn unsent(c: &Collector, raw: &Raw) -> Result<i32, Refusal> {
    let dup = c.duplicate(raw)?;
    let mut n = 0i32;
    match sys::ioctl(dup.raw(), libc::TIOCOUTQ, &mut n) {
        Ok(_) | Err(libc::EINVAL) => Ok(n),
        Err(e) => Err(raw.refuse("does not tell what it has sent", e)),
    }
}

/// `struct tcp_info` of one end, as far as the kernel gives it.
fn tcp_info(c: &Collector, raw: &Raw) -> Result<[u8; 232], Refusal> {
    let dup = c.duplicate(raw)?;
    let mut info = [0u8; 232];
    sockopts::get_into(dup.raw(), libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)
        .map_err(|e| raw.refuse("does not tell its state", e))?;
    Ok(info)
}

/// Is everything that one end has sent in the other one's receive queue? (Being
/// acknowledged may take 40 ms more, so SIOCOUTQ is of no use.)
fn arrived(c: &Collector, from: &Raw, to: &Raw) -> Result<bool, Refusal> {
    if unsent(c, from)? == 0 {
        return Ok(true);
    }
    let (sender, receiver) = (tcp_info(c, from)?, tcp_info(c, to)?);
    let word = |info: &[u8], at: usize| {
        u64::from_ne_bytes(info[at..at + 8].try_into().unwrap_or_default())
    };
    // tcpi_notsent_bytes, tcpi_bytes_sent less tcpi_bytes_retrans, tcpi_bytes_received
    // (which may count the end of file as one).
    let not_sent = word(&sender, 144) as u32;
    let sent = word(&sender, 200).saturating_sub(word(&sender, 208));
    Ok(not_sent == 0 && word(&receiver, 128) >= sent)
}

fn tcp_role(
    c: &Collector,
    raw: &Raw,
    s: &SocketState,
    sockets: &[(usize, SocketState)],
) -> Result<SocketRole, Refusal> {
    let (Some(local), Some(remote)) = (normal(&s.local), normal(&s.remote)) else {
        return Ok(s.role.clone());
    };
    let peer = sockets.iter().find(|(_, p)| {
        p.ino != s.ino
            && p.ty == libc::SOCK_STREAM
            && normal(&p.local).as_ref() == Some(&remote)
            && normal(&p.remote).as_ref() == Some(&local)
    });
    if let Some((_, peer)) = peer {
        // Nobody can look at what has not arrived at the other end yet; over the
        // loopback that is only so when its window is full.
        let at_peer = c
            .raws
            .iter()
            .find(|r| r.stat.st_ino == peer.ino)
            .unwrap_or(raw);
        for _ in 0..20 {
            if arrived(c, raw, at_peer)? {
                return Ok(SocketRole::Pair { peer_ino: peer.ino });
            }
            let pause = [0u64, 200_000];
            // SAFETY: a live timespec.
            unsafe { ckpt_sys::syscall!(libc::SYS_nanosleep, pause.as_ptr(), 0) };
        }
        return Err(raw.refuse_kind("has sent more than the other end's window takes"));
    }
    // Connected to a listening socket of our own and not accepted yet?
    let own = local.1 == remote.1 || remote.1.starts_with(&[127]);
    let listener = sockets.iter().find(|(_, l)| {
        let address = normal(&l.local);
        let any = |a: &[u8]| a.iter().all(|&b| b == 0) || *a == *remote.1;
        listening(l) && address.is_some_and(|(port, a)| port == remote.0 && any(&a))
    });
    if let (true, Some((_, listener)), SocketRole::Outside) = (own, listener, &s.role) {
        // tcpi_bytes_sent
        if tcp_info(c, raw)?[200..208] != [0; 8] {
            return Err(raw.refuse_kind("has sent bytes to a connection not accepted yet"));
        }
        return Ok(SocketRole::Queued {
            listener_ino: listener.ino,
        });
    }
    Ok(s.role.clone())
}
