//! Socket options: which ones are kept, reading and setting them. Used by the
//! collector (helper thread) and the restorer (constructor).

use super::sys;
use crate::image::state::SocketState;
use ckpt_sys::raw::{SysResult, check};
use ckpt_sys::syscall;

pub const SO_PEEK_OFF: i32 = 42;
const SO_BUF_LOCK: i32 = 72;
const SOL_NETLINK: i32 = 270;

/// `(level, option)` of every option with a value of its own, in the order in
/// which they are set again.
const GENERAL: &[(i32, i32)] = &[
    (libc::SOL_SOCKET, libc::SO_REUSEADDR),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    (libc::SOL_SOCKET, libc::SO_BROADCAST),
    (libc::SOL_SOCKET, libc::SO_OOBINLINE),
    (libc::SOL_SOCKET, libc::SO_DONTROUTE),
    (libc::SOL_SOCKET, libc::SO_LINGER),
    (libc::SOL_SOCKET, libc::SO_RCVTIMEO),
    (libc::SOL_SOCKET, libc::SO_SNDTIMEO),
    (libc::SOL_SOCKET, libc::SO_RCVLOWAT),
    (libc::SOL_SOCKET, libc::SO_PRIORITY),
    (libc::SOL_SOCKET, libc::SO_MARK),
    (libc::SOL_SOCKET, libc::SO_BINDTODEVICE),
    (libc::SOL_SOCKET, libc::SO_PASSCRED),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMP),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMPNS),
    (libc::SOL_SOCKET, libc::SO_RXQ_OVFL),
    (libc::SOL_SOCKET, libc::SO_BUSY_POLL),
];
const IPV4: &[(i32, i32)] = &[
    (libc::IPPROTO_IP, libc::IP_TOS),
    (libc::IPPROTO_IP, libc::IP_TTL),
    (libc::IPPROTO_IP, libc::IP_PKTINFO),
    (libc::IPPROTO_IP, libc::IP_RECVTOS),
    (libc::IPPROTO_IP, libc::IP_RECVTTL),
    (libc::IPPROTO_IP, libc::IP_RECVERR),
    (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
    (libc::IPPROTO_IP, libc::IP_FREEBIND),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
    (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_TTL),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_LOOP),
];
const IPV6: &[(i32, i32)] = &[
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
    (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP),
];
const TCP: &[(i32, i32)] = &[
    (libc::IPPROTO_TCP, libc::TCP_NODELAY),
    (libc::IPPROTO_TCP, libc::TCP_CORK),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    (libc::IPPROTO_TCP, libc::TCP_SYNCNT),
    (libc::IPPROTO_TCP, libc::TCP_LINGER2),
    (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
    (libc::IPPROTO_TCP, libc::TCP_FASTOPEN),
    (libc::IPPROTO_TCP, libc::TCP_CONGESTION),
];
/// Netlink options that are flags by number: pktinfo, broadcast error, no ENOBUFS,
/// all namespaces, capped and extended acknowledgements, strict check.
const NETLINK: &[(i32, i32)] = &[
    (SOL_NETLINK, 3),
    (SOL_NETLINK, 4),
    (SOL_NETLINK, 5),
    (SOL_NETLINK, 8),
    (SOL_NETLINK, 10),
    (SOL_NETLINK, 11),
    (SOL_NETLINK, 12),
];

pub fn get(fd: i32, level: i32, name: i32) -> Result<Vec<u8>, i32> {
    let mut value = [0u8; 64];
    let n = get_into(fd, level, name, &mut value)?;
    Ok(value[..n].to_vec())
}

pub fn get_into(fd: i32, level: i32, name: i32, value: &mut [u8]) -> SysResult {
    let mut len = value.len() as u32;
    // SAFETY: a live buffer and its length.
    check(unsafe {
        syscall!(
            libc::SYS_getsockopt,
            fd,
            level,
            name,
            value.as_mut_ptr(),
            &raw mut len
        )
    })?;
    Ok(len as usize)
}

pub fn get_int(fd: i32, level: i32, name: i32) -> Result<i32, i32> {
    let mut value = [0u8; 4];
    get_into(fd, level, name, &mut value)?;
    Ok(i32::from_ne_bytes(value))
}

pub fn set(fd: i32, level: i32, name: i32, value: &[u8]) -> SysResult {
    // SAFETY: a live buffer and its length.
    check(unsafe {
        syscall!(
            libc::SYS_setsockopt,
            fd,
            level,
            name,
            value.as_ptr(),
            value.len()
        )
    })
}

pub fn set_int(fd: i32, level: i32, name: i32, value: i32) -> SysResult {
    set(fd, level, name, &value.to_ne_bytes())
}

fn kept(domain: i32, ty: i32) -> impl Iterator<Item = (i32, i32)> {
    let inet = domain == libc::AF_INET || domain == libc::AF_INET6;
    let lists = [
        Some(GENERAL),
        inet.then_some(IPV4),
        (domain == libc::AF_INET6).then_some(IPV6),
        (inet && ty == libc::SOCK_STREAM).then_some(TCP),
        (domain == libc::AF_NETLINK).then_some(NETLINK),
    ];
    lists.into_iter().flatten().flatten().copied()
}

/// The options of a socket; those that it does not know are left out.
pub fn read(fd: i32, domain: i32, ty: i32) -> Vec<(i32, i32, Vec<u8>)> {
    let mut options = Vec::new();
    for (level, name) in kept(domain, ty) {
        if let Ok(value) = get(fd, level, name) {
            options.push((level, name, value));
        }
    }
    // Sizes set by the program only: setting one ends the kernel's own tuning.
    let locked = get_int(fd, libc::SOL_SOCKET, SO_BUF_LOCK).unwrap_or(0);
    for (bit, name) in [(1, libc::SO_SNDBUF), (2, libc::SO_RCVBUF)] {
        if locked & bit != 0
            && let Ok(size) = get_int(fd, libc::SOL_SOCKET, name)
        {
            // The kernel doubles what is asked for.
            let asked = (size / 2).to_ne_bytes().to_vec();
            options.push((libc::SOL_SOCKET, name, asked));
        }
    }
    options
}

/// Sets what differs from what the socket has; returns the first failure.
pub fn apply(fd: i32, state: &SocketState) -> Result<(), (i32, i32, i32)> {
    let mut result = Ok(());
    for (level, name, value) in &state.options {
        let same = get(fd, *level, *name).is_ok_and(|have| have == *value);
        // An interface name of no bytes means none.
        if same || value.is_empty() {
            continue;
        }
        if let Err(e) = set(fd, *level, *name, value) {
            result = result.and(Err((*level, *name, e)));
        }
    }
    result
}

/// The value kept for one option.
pub fn value_of(state: &SocketState, level: i32, name: i32) -> Option<i32> {
    let found = state.options.iter().find(|o| (o.0, o.1) == (level, name))?;
    let bytes = <[u8; 4]>::try_from(&found.2[..]).ok()?;
    Some(i32::from_ne_bytes(bytes))
}

/// `getsockname` and `getpeername` as raw address bytes.
pub fn address(fd: i32, peer: bool) -> Result<Vec<u8>, i32> {
    let mut buf = [0u8; 128];
    let mut len = buf.len() as u32;
    let nr = if peer {
        libc::SYS_getpeername
    } else {
        libc::SYS_getsockname
    };
    // SAFETY: a live buffer and its length.
    check(unsafe { syscall!(nr, fd, buf.as_mut_ptr(), &raw mut len) })?;
    Ok(buf[..(len as usize).min(buf.len())].to_vec())
}

/// A fresh socket, close-on-exec.
pub fn socket(domain: i32, ty: i32, protocol: i32) -> Result<sys::Fd, i32> {
    // SAFETY: no memory is involved.
    check(unsafe { syscall!(libc::SYS_socket, domain, ty | libc::SOCK_CLOEXEC, protocol) })
        .map(|fd| sys::Fd::own(fd as i32))
}
