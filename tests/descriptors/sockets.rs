//! Sockets: pairs, names, TCP, UDP, the outside.

use crate::harness::*;
use ckpt::agent::restore::descriptors::Restored;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("unix_pairs", pairs_setup, pairs_check),
        Case::new("unix_names", names_setup, names_check),
        Case::new("unix_datagrams", datagrams_setup, datagrams_check),
        Case::new("tcp", tcp_setup, tcp_check),
        Case::new("tcp_large_queue", large_setup, large_check),
        Case::new("tcp_v6", tcp6_setup, tcp6_check),
        Case::new("udp", udp_setup, udp_check),
        Case::new("outside", outside_setup, outside_check),
        Case::new("socket_options", options_setup, options_check),
        Case::new("netlink", netlink_setup, netlink_check),
    ];
    cases.push(Case {
        refused: Some("SCM_RIGHTS"),
        ..Case::new("descriptors_in_flight", rights_setup, |_| {})
    });
    cases
}

fn pair(ty: i32, a: i32, b: i32) {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(
        // SAFETY: room for two descriptors.
        unsafe { libc::socketpair(libc::AF_UNIX, ty, 0, fds.as_mut_ptr()) },
        0
    );
    let high = fcntl(fds[1], libc::F_DUPFD, 300);
    // SAFETY: no memory is involved.
    unsafe { libc::close(fds[1]) };
    at(a, fds[0]);
    at(b, high);
}

fn nonblock(fd: i32) {
    fcntl(
        fd,
        libc::F_SETFL,
        fcntl(fd, libc::F_GETFL, 0) | libc::O_NONBLOCK,
    );
}

fn close(fd: i32) {
    // SAFETY: no memory is involved.
    unsafe { libc::close(fd) };
}

fn shutdown(fd: i32, how: i32) {
    // SAFETY: no memory is involved.
    assert_eq!(unsafe { libc::shutdown(fd, how) }, 0);
}

fn pairs_setup() {
    pair(libc::SOCK_STREAM, 5, 6);
    write(5, b"to ");
    write(5, b"six");
    write(6, b"to five");
    dup(6, 60);
    pair(libc::SOCK_DGRAM, 7, 8);
    write(7, b"one");
    write(7, b"");
    write(7, b"three");
    pair(libc::SOCK_SEQPACKET, 10, 9);
    write(9, b"first");
    write(9, b"second");
    // Half closed with bytes in flight.
    pair(libc::SOCK_STREAM, 11, 12);
    write(11, b"bye");
    shutdown(11, libc::SHUT_WR);
    // The other end closed in order, and closed with unread bytes.
    pair(libc::SOCK_STREAM, 13, 14);
    write(14, b"last");
    close(14);
    pair(libc::SOCK_STREAM, 15, 14);
    write(14, b"last");
    write(15, b"unread");
    close(14);
    // Nothing in it.
    pair(libc::SOCK_SEQPACKET, 16, 17);
    nonblock(16);
    for fd in [5, 6, 7, 8, 9, 10] {
        nonblock(fd);
    }
}

fn pairs_check(_: &Restored) {
    assert_eq!(read(60, 100).unwrap(), b"to six");
    assert_eq!(read(5, 100).unwrap(), b"to five");
    assert_eq!(read(5, 100), Err(libc::EAGAIN));
    write(60, b"again");
    assert_eq!(read(5, 100).unwrap(), b"again");
    assert_eq!(read(8, 100).unwrap(), b"one");
    assert_eq!(read(8, 100).unwrap(), b"");
    assert_eq!(read(8, 100).unwrap(), b"three");
    assert_eq!(read(8, 100), Err(libc::EAGAIN));
    write(8, b"back");
    assert_eq!(read(7, 100).unwrap(), b"back");
    assert_eq!(read(10, 100).unwrap(), b"first");
    assert_eq!(read(10, 3).unwrap(), b"sec");
    assert_eq!(read(10, 100), Err(libc::EAGAIN));
    assert_eq!(read(12, 100).unwrap(), b"bye");
    assert_eq!(read(12, 100).unwrap(), b"");
    assert_eq!(write(11, b"x"), -1);
    write(12, b"still");
    assert_eq!(read(11, 100).unwrap(), b"still");
    assert_eq!(read(13, 100).unwrap(), b"last");
    assert_eq!(read(13, 100).unwrap(), b"");
    assert_eq!(write(13, b"x"), -1);
    assert!(poll(15) & libc::POLLERR != 0);
    assert_eq!(read(15, 100).unwrap(), b"last");
    assert_eq!(read(15, 100), Err(libc::ECONNRESET));
    assert_eq!(read(16, 100), Err(libc::EAGAIN));
    write(17, b"x");
    assert_eq!(read(16, 100).unwrap(), b"x");
}

fn names_setup() {
    let listener = UnixListener::bind("listen").unwrap();
    let client = UnixStream::connect("listen").unwrap();
    let (server, _) = listener.accept().unwrap();
    at(5, listener.into_raw_fd());
    at(6, client.into_raw_fd());
    at(7, server.into_raw_fd());
    write(6, b"request");
    write(7, b"answer");
    // Waiting in the queue.
    at(8, UnixStream::connect("listen").unwrap().into_raw_fd());
    // A connection whose listener is gone.
    let listener = UnixListener::bind("gone").unwrap();
    at(9, UnixStream::connect("gone").unwrap().into_raw_fd());
    at(10, listener.accept().unwrap().0.into_raw_fd());
    drop(listener);
    std::fs::remove_file("gone").unwrap();
}

fn names_check(_: &Restored) {
    // SAFETY: descriptors of this process, given over.
    let (listener, client, server, second) = unsafe {
        (
            UnixListener::from_raw_fd(5),
            UnixStream::from_raw_fd(6),
            UnixStream::from_raw_fd(7),
            UnixStream::from_raw_fd(9),
        )
    };
    assert_eq!(read(7, 100).unwrap(), b"request");
    assert_eq!(read(6, 100).unwrap(), b"answer");
    let name = std::path::Path::new("listen");
    assert_eq!(client.peer_addr().unwrap().as_pathname(), Some(name));
    assert_eq!(server.local_addr().unwrap().as_pathname(), Some(name));
    let gone = std::path::Path::new("gone");
    assert_eq!(second.peer_addr().unwrap().as_pathname(), Some(gone));
    assert!(!gone.exists());
    let (waiting, _) = listener.accept().unwrap();
    write(8, b"queued");
    assert_eq!(read(waiting.as_raw_fd(), 100).unwrap(), b"queued");
    let _new = UnixStream::connect("listen").unwrap();
    listener.accept().unwrap();
    write(9, b"x");
    assert_eq!(read(10, 9).unwrap(), b"x");
}

fn datagrams_setup() {
    let a = UnixDatagram::bind("a").unwrap();
    let b = UnixDatagram::bind("b").unwrap();
    a.send_to(b"one", "b").unwrap();
    a.send_to(b"two", "b").unwrap();
    let c = UnixDatagram::unbound().unwrap();
    c.connect("b").unwrap();
    c.send(b"three").unwrap();
    a.connect("b").unwrap();
    at(5, a.into_raw_fd());
    at(6, b.into_raw_fd());
    at(7, c.into_raw_fd());
}

fn datagrams_check(_: &Restored) {
    // SAFETY: descriptors of this process, given over.
    let b = unsafe { UnixDatagram::from_raw_fd(6) };
    let mut buf = [0; 100];
    let mut next = || {
        let (n, from) = b.recv_from(&mut buf).unwrap();
        let from = from.as_pathname().map(|p| p.to_str().unwrap().to_string());
        (String::from_utf8(buf[..n].to_vec()).unwrap(), from)
    };
    assert_eq!(next(), ("one".into(), Some("a".into())));
    assert_eq!(next(), ("two".into(), Some("a".into())));
    assert_eq!(next(), ("three".into(), None));
    write(7, b"from c");
    assert_eq!(next(), ("from c".into(), None));
    write(5, b"from a");
    assert_eq!(next(), ("from a".into(), Some("a".into())));
}

fn tcp_setup() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let client = TcpStream::connect(address).unwrap();
    let (server, _) = listener.accept().unwrap();
    client.set_nodelay(true).unwrap();
    let names = format!("{} {}", client.local_addr().unwrap(), address);
    std::fs::write("names", names).unwrap();
    at(5, listener.into_raw_fd());
    at(6, client.into_raw_fd());
    at(7, server.into_raw_fd());
    write(6, b"request");
    write(7, b"answer");
    at(8, TcpStream::connect(address).unwrap().into_raw_fd());
    // A half closed one, without its listener.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    at(9, listener.accept().unwrap().0.into_raw_fd());
    at(10, client.into_raw_fd());
    write(9, b"bye");
    shutdown(9, libc::SHUT_WR);
    // Bound, not connected.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    at(11, listener.into_raw_fd());
    std::thread::sleep(std::time::Duration::from_millis(20));
}

fn tcp_check(_: &Restored) {
    // SAFETY: descriptors of this process, given over.
    let (listener, client, server) = unsafe {
        (
            TcpListener::from_raw_fd(5),
            TcpStream::from_raw_fd(6),
            TcpStream::from_raw_fd(7),
        )
    };
    assert_eq!(read(7, 100).unwrap(), b"request");
    assert_eq!(read(6, 100).unwrap(), b"answer");
    assert!(client.nodelay().unwrap() && !server.nodelay().unwrap());
    let names = std::fs::read_to_string("names").unwrap();
    let now = format!(
        "{} {}",
        client.local_addr().unwrap(),
        listener.local_addr().unwrap()
    );
    assert_eq!(now, names);
    assert_eq!(server.peer_addr().unwrap(), client.local_addr().unwrap());
    assert_eq!(client.peer_addr().unwrap(), server.local_addr().unwrap());
    let (waiting, _) = listener.accept().unwrap();
    write(8, b"queued");
    assert_eq!(read(waiting.as_raw_fd(), 100).unwrap(), b"queued");
    assert_eq!(read(10, 100).unwrap(), b"bye");
    assert_eq!(read(10, 100).unwrap(), b"");
    write(10, b"still");
    assert_eq!(read(9, 100).unwrap(), b"still");
    assert_eq!(write(9, b"x"), -1);
}

/// More than a fresh connection's window: what a tuned one may hold.
fn large_setup() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    at(7, listener.accept().unwrap().0.into_raw_fd());
    at(6, client.into_raw_fd());
    nonblock(6);
    // Let the window grow, then leave much of it full.
    let block = vec![b'x'; 1 << 16];
    for _ in 0..200 {
        write(6, &block);
        read(7, 1 << 16).unwrap();
    }
    let mut sent = 0;
    while sent < 1 << 19 {
        sent += write(6, &block).max(0) as usize;
        let mut queued = 0;
        // SAFETY: a live integer.
        unsafe { libc::ioctl(6, libc::TIOCOUTQ, &raw mut queued) };
        if queued > 0 {
            // The window is full: read as much as is not acknowledged.
            while queued > 0 {
                read(7, 1 << 15).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(2));
                // SAFETY: as above.
                unsafe { libc::ioctl(6, libc::TIOCOUTQ, &raw mut queued) };
            }
            break;
        }
    }
    let mut queued = 0;
    // SAFETY: a live integer.
    unsafe { libc::ioctl(7, libc::FIONREAD, &raw mut queued) };
    std::fs::write("queued", queued.to_string()).unwrap();
}

fn large_check(_: &Restored) {
    let queued: usize = std::fs::read_to_string("queued").unwrap().parse().unwrap();
    say(&format!("{queued} bytes in flight"));
    write(6, b"end");
    close(6);
    let mut got = 0;
    loop {
        match read(7, 1 << 16).unwrap().len() {
            0 => break,
            n => got += n,
        }
    }
    assert_eq!(got, queued + 3);
}

fn tcp6_setup() {
    let Ok(listener) = TcpListener::bind("[::]:0") else {
        return;
    };
    let port = listener.local_addr().unwrap().port();
    // An IPv4 client of a dual-stack listener.
    let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    at(7, listener.accept().unwrap().0.into_raw_fd());
    at(6, client.into_raw_fd());
    at(5, listener.into_raw_fd());
    write(6, b"four to six");
}

fn tcp6_check(_: &Restored) {
    if fcntl(7, libc::F_GETFD, 0) < 0 {
        return;
    }
    assert_eq!(read(7, 100).unwrap(), b"four to six");
    write(7, b"back");
    assert_eq!(read(6, 100).unwrap(), b"back");
    // SAFETY: descriptors of this process, given over.
    let (client, server) = unsafe { (TcpStream::from_raw_fd(6), TcpStream::from_raw_fd(7)) };
    let (a, b) = (client.local_addr().unwrap(), server.peer_addr().unwrap());
    assert_eq!(a.port(), b.port());
    assert!(b.is_ipv6());
}

fn udp_setup() {
    let a = UdpSocket::bind("127.0.0.1:0").unwrap();
    let b = UdpSocket::bind("0.0.0.0:0").unwrap();
    let to_b = ("127.0.0.1", b.local_addr().unwrap().port());
    a.send_to(b"one", to_b).unwrap();
    a.send_to(b"two", to_b).unwrap();
    a.connect(to_b).unwrap();
    a.send(b"three").unwrap();
    a.set_broadcast(true).unwrap();
    b.set_nonblocking(true).unwrap();
    std::fs::write("address", a.local_addr().unwrap().to_string()).unwrap();
    at(5, a.into_raw_fd());
    at(6, b.into_raw_fd());
}

fn udp_check(_: &Restored) {
    // SAFETY: descriptors of this process, given over.
    let (a, b) = unsafe { (UdpSocket::from_raw_fd(5), UdpSocket::from_raw_fd(6)) };
    let address = std::fs::read_to_string("address").unwrap();
    assert_eq!(a.local_addr().unwrap().to_string(), address);
    assert!(a.broadcast().unwrap() && !b.broadcast().unwrap());
    let mut buf = [0; 100];
    for expected in [&b"one"[..], b"two", b"three"] {
        let (n, from) = b.recv_from(&mut buf).unwrap();
        assert_eq!(&buf[..n], expected);
        assert_eq!(from.to_string(), address);
    }
    assert!(b.recv_from(&mut buf).is_err());
    a.send(b"four").unwrap();
    assert_eq!(b.recv_from(&mut buf).unwrap().0, 4);
}

/// The other ends are held by a child process for a while.
fn outside_setup() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let server = listener.accept().unwrap().0.into_raw_fd();
    at(5, client.into_raw_fd());
    at(305, server);
    write(305, b"received");
    pair(libc::SOCK_STREAM, 6, 306);
    write(306, b"received");
    pair(libc::SOCK_SEQPACKET, 7, 307);
    pair(libc::SOCK_DGRAM, 8, 308);
    // The other end has sent its end of file.
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let server = listener.accept().unwrap().0.into_raw_fd();
    at(9, client.into_raw_fd());
    at(309, server);
    write(309, b"over");
    shutdown(309, libc::SHUT_WR);
    drop(listener);
    // SAFETY: the child only sleeps.
    unsafe {
        if libc::fork() == 0 {
            libc::sleep(2);
            libc::_exit(0);
        }
    }
    for fd in 305..310 {
        close(fd);
    }
    std::thread::sleep(std::time::Duration::from_millis(20));
}

fn outside_check(_: &Restored) {
    assert!(poll(5) & libc::POLLHUP != 0);
    assert_eq!(read(5, 100).unwrap(), b"received");
    assert_eq!(read(5, 100), Err(libc::ECONNRESET));
    assert_eq!(write(5, b"x"), -1);
    assert!(poll(6) & (libc::POLLHUP | libc::POLLERR) != 0);
    assert_eq!(read(6, 100).unwrap(), b"received");
    assert_eq!(read(6, 100), Err(libc::ECONNRESET));
    assert_eq!(read(7, 100), Err(libc::ECONNRESET));
    assert_eq!(read(8, 100).unwrap(), b"");
    assert_eq!(write(8, b"x"), -1);
    assert_eq!(read(9, 100).unwrap(), b"over");
    assert_eq!(read(9, 100).unwrap(), b"");
}

fn set_option(fd: i32, level: i32, name: i32, value: i32) {
    // SAFETY: a live integer.
    let ret = unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), 4) };
    assert_eq!(ret, 0, "{}", std::io::Error::last_os_error());
}

fn option(fd: i32, level: i32, name: i32) -> i32 {
    let (mut value, mut len) = (0i32, 4u32);
    // SAFETY: a live integer and its length.
    unsafe { libc::getsockopt(fd, level, name, (&raw mut value).cast(), &raw mut len) };
    value
}

const SET: &[(i32, i32, i32)] = &[
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT, 1),
    (libc::SOL_SOCKET, libc::SO_RCVBUF, 30000),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 1234),
    (libc::IPPROTO_IP, libc::IP_TOS, 16),
];

fn options_setup() {
    // SAFETY: no memory is involved.
    at(5, unsafe {
        libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0)
    });
    for &(level, name, value) in SET {
        set_option(5, level, name, value);
    }
    fcntl(5, libc::F_SETOWN, std::process::id() as i32);
    fcntl(
        5,
        libc::F_SETFL,
        libc::O_ASYNC | libc::O_NONBLOCK | libc::O_RDWR,
    );
}

fn options_check(_: &Restored) {
    for &(level, name, value) in SET {
        let double = if name == libc::SO_RCVBUF { 2 } else { 1 };
        assert_eq!(option(5, level, name), value * double, "{level}/{name}");
    }
    assert_eq!(fcntl(5, libc::F_GETOWN, 0), std::process::id() as i32);
    assert!(fcntl(5, libc::F_GETFL, 0) & libc::O_ASYNC != 0);
}

fn netlink_setup() {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE) };
    at(5, fd);
    let mut address = [0u8; 12];
    address[0] = libc::AF_NETLINK as u8;
    // SAFETY: a live sockaddr_nl.
    assert_eq!(unsafe { libc::bind(5, address.as_ptr().cast(), 12) }, 0);
}

fn netlink_check(_: &Restored) {
    assert_eq!(
        option(5, libc::SOL_SOCKET, libc::SO_DOMAIN),
        libc::AF_NETLINK
    );
}

fn rights_setup() {
    pair(libc::SOCK_STREAM, 5, 6);
    let file = open("/dev/null", libc::O_RDONLY);
    let mut byte = 0u8;
    let mut iov = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    // struct cmsghdr and one descriptor.
    let mut control = [20u64, 1 | 1 << 32, file as u64];
    // SAFETY: a plain struct, then a live message.
    unsafe {
        let mut msg: libc::msghdr = std::mem::zeroed();
        msg.msg_iov = &raw mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.as_mut_ptr().cast();
        msg.msg_controllen = 20;
        assert_eq!(libc::sendmsg(6, &raw const msg, 0), 1);
    }
}
