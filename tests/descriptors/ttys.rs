//! Ptys of the process itself, and the standard descriptors of the new start.

use crate::harness::*;
use ckpt::agent::restore::descriptors::Restored;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("own_pty", pty_setup, pty_check),
        Case::new("standard_descriptors", standard_setup, standard_check),
        Case::new("same_output", same_setup, same_check),
        Case {
            between: |dir| std::fs::rename(dir.join("stdout"), dir.join("first")).unwrap(),
            ..Case::new("redirected_output", redirected_setup, redirected_check)
        },
    ]
}

fn termios(fd: i32) -> libc::termios {
    // SAFETY: a live, plain struct.
    unsafe {
        let mut modes = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(fd, &raw mut modes), 0);
        modes
    }
}

fn pty_setup() {
    at(5, open("/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY));
    // SAFETY: calls on descriptors of our own with live arguments.
    unsafe {
        assert_eq!(libc::unlockpt(5), 0);
        let name = std::ffi::CStr::from_ptr(libc::ptsname(5));
        at(
            6,
            open(name.to_str().unwrap(), libc::O_RDWR | libc::O_NOCTTY),
        );
        let mut modes = termios(6);
        libc::cfmakeraw(&raw mut modes);
        assert_eq!(libc::tcsetattr(6, libc::TCSANOW, &raw const modes), 0);
        let size = libc::winsize {
            ws_row: 33,
            ws_col: 77,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        assert_eq!(libc::ioctl(5, libc::TIOCSWINSZ, &raw const size), 0);
    }
    // Another one at a lower number than its master's.
    at(8, open("/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY));
    std::fs::write(
        "names",
        format!("{:?}", std::fs::read_link("/proc/self/fd/6")),
    )
    .unwrap();
}

fn pty_check(_: &Restored) {
    write(5, b"in");
    assert_eq!(read(6, 100).unwrap(), b"in");
    write(6, b"out\n");
    assert_eq!(read(5, 100).unwrap(), b"out\n");
    assert_eq!(termios(6).c_lflag & libc::ECHO, 0);
    assert!(termios(8).c_lflag & libc::ECHO != 0);
    // SAFETY: a live, plain struct.
    let size = unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        assert_eq!(libc::ioctl(6, libc::TIOCGWINSZ, &raw mut size), 0);
        size
    };
    assert_eq!((size.ws_row, size.ws_col), (33, 77));
    // SAFETY: a session of our own has no terminal: the pty must not become it.
    unsafe {
        libc::setsid();
        assert_eq!(libc::open(c"/dev/tty".as_ptr(), libc::O_RDWR), -1);
    }
}

/// The program was started with 0-2, has duplicated 1, and has put a file of its
/// own at 2.
fn standard_setup() {
    dup(1, 10);
    at(2, open("own-log", libc::O_RDWR | libc::O_CREAT));
    write(2, b"logged");
}

fn standard_check(restored: &Restored) {
    let link = |fd: i32| std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
    assert!(link(0).ends_with("null") && link(1).ends_with("stdout"));
    assert!(same_description(1, 10));
    assert!(link(2).ends_with("own-log"));
    assert_eq!(pos(2), 6);
    let inherited: Vec<i32> = restored.inherited.iter().map(|i| i.fd).collect();
    assert_eq!(inherited, [0, 1, 10]);
}

/// The shell opens the same file again (and truncates it).
fn same_setup() {
    write(1, &[b'x'; 1000]);
    std::fs::write("pos", pos(1).to_string()).unwrap();
}

fn same_check(_: &Restored) {
    let saved = std::fs::read_to_string("pos").unwrap();
    assert_eq!(pos(1).to_string(), saved);
}

/// The new start's output goes to another file: it gets it, from its start.
fn redirected_setup() {
    write(1, &[b'x'; 1000]);
}

fn redirected_check(_: &Restored) {
    assert!(pos(1) < 1000);
}
