//! Pipes and FIFOs.

use crate::harness::*;
use ckpt::agent::restore::descriptors::Restored;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("pipes", pipe_setup, pipe_check),
        Case::new("pipe_ends_outside", ends_setup, ends_check),
        Case::new("packet_pipe", packet_setup, packet_check),
        Case::new("fifos", fifo_setup, fifo_check),
    ]
}

pub fn pipe(flags: i32, reader: i32, writer: i32) {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(unsafe { libc::pipe2(fds.as_mut_ptr(), flags) }, 0);
    // The write end may be where the read end is to go.
    let high = fcntl(fds[1], libc::F_DUPFD, 300);
    // SAFETY: no memory is involved.
    unsafe { libc::close(fds[1]) };
    at(reader, fds[0]);
    at(writer, high);
}

fn pipe_setup() {
    pipe(0, 5, 6);
    dup(6, 9);
    write(6, b"hello ");
    write(6, b"world");
    // Numbers crossed: the write end is the lower one.
    pipe(libc::O_NONBLOCK, 8, 7);
    fcntl(8, libc::F_SETFL, 0);
    // A full pipe of another size.
    pipe(libc::O_NONBLOCK, 20, 21);
    assert_eq!(fcntl(20, libc::F_SETPIPE_SZ, 1 << 17), 1 << 17);
    assert_eq!(write(21, &vec![b'x'; 1 << 18]), 1 << 17);
    // Both directions, and a second description of the read end.
    at(22, open("/proc/self/fd/5", libc::O_RDWR));
    at(
        23,
        open("/proc/self/fd/5", libc::O_RDONLY | libc::O_NONBLOCK),
    );
}

fn pipe_check(_: &Restored) {
    assert_eq!(read(23, 3).unwrap(), b"hel");
    assert_eq!(read(5, 100).unwrap(), b"lo world");
    assert_eq!(read(23, 3), Err(libc::EAGAIN));
    assert!(same_description(6, 9) && !same_description(5, 23));
    write(9, b"a");
    write(22, b"b");
    assert_eq!(read(22, 9).unwrap(), b"ab");
    write(7, b"crossed");
    assert_eq!(read(8, 100).unwrap(), b"crossed");
    assert_eq!(fcntl(20, libc::F_GETPIPE_SZ, 0), 1 << 17);
    assert_eq!(poll(21) & libc::POLLOUT, 0);
    assert_eq!(write(21, b"x"), -1);
    assert_eq!(read(20, 1 << 20).unwrap(), vec![b'x'; 1 << 17]);
    assert_eq!(read(20, 1), Err(libc::EAGAIN));
}

fn ends_setup() {
    pipe(0, 5, 6);
    write(6, b"last words");
    pipe(0, 7, 8);
    // SAFETY: no memory is involved.
    unsafe {
        libc::close(6);
        libc::close(7);
    }
}

fn ends_check(_: &Restored) {
    assert_eq!(read(5, 100).unwrap(), b"last words");
    assert_eq!(read(5, 100).unwrap(), b"");
    assert!(poll(5) & libc::POLLHUP != 0);
    assert_eq!(write(8, b"x"), -1);
    assert!(poll(8) & libc::POLLERR != 0);
}

fn packet_setup() {
    pipe(libc::O_DIRECT | libc::O_NONBLOCK, 5, 6);
    for message in [&b"one"[..], b"two", b"three"] {
        write(6, message);
    }
    write(6, &vec![b'4'; 4096]);
}

fn packet_check(_: &Restored) {
    assert_eq!(read(5, 100).unwrap(), b"one");
    assert_eq!(read(5, 100).unwrap(), b"two");
    assert_eq!(read(5, 2).unwrap(), b"th");
    assert_eq!(read(5, 5000).unwrap(), vec![b'4'; 4096]);
    assert_eq!(read(5, 5000), Err(libc::EAGAIN));
    write(6, b"a");
    write(6, b"b");
    assert_eq!(read(5, 100).unwrap(), b"a");
}

fn fifo_setup() {
    // SAFETY: a live path.
    assert_eq!(unsafe { libc::mkfifo(c"f".as_ptr(), 0o600) }, 0);
    at(5, open("f", libc::O_RDONLY | libc::O_NONBLOCK));
    at(6, open("f", libc::O_WRONLY));
    write(6, b"in the fifo");
    // SAFETY: a live path.
    assert_eq!(unsafe { libc::mkfifo(c"g".as_ptr(), 0o600) }, 0);
    at(8, open("g", libc::O_RDWR));
    at(7, open("g", libc::O_RDONLY));
}

fn fifo_check(_: &Restored) {
    assert_eq!(read(5, 100).unwrap(), b"in the fifo");
    write(6, b"more");
    assert_eq!(read(5, 100).unwrap(), b"more");
    assert_eq!(read(5, 1), Err(libc::EAGAIN));
    write(8, b"g");
    assert_eq!(read(7, 100).unwrap(), b"g");
}
