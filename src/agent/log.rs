//! The agent's log: one line a message, written at once with a raw `write` from a
//! fixed buffer (no allocation, no lock, no stdio).
//!
//! Destination: the path of `CKPT_LOG`, opened for appending per line, so that no
//! descriptor has to be kept anywhere. Without it there is no log.

use ckpt_sys::syscall;
use std::fmt::{Arguments, Write};
use std::sync::atomic::{AtomicBool, Ordering};

struct Line {
    buf: [u8; 1024],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, s: &str) -> std::fmt::Result {
        let room = self.buf.len() - 1 - self.len;
        let n = s.len().min(room);
        self.buf[self.len..self.len + n].copy_from_slice(&s.as_bytes()[..n]);
        self.len += n;
        Ok(())
    }
}

struct Path(std::cell::UnsafeCell<[u8; 1024]>);

// SAFETY: written once in the constructor (or by the restored helper while all
// threads are held), before `ENABLED` is set.
unsafe impl Sync for Path {}

static PATH: Path = Path(std::cell::UnsafeCell::new([0; 1024]));
static ENABLED: AtomicBool = AtomicBool::new(false);

/// Sets the log's path (shorter than 1024 bytes), or none.
///
/// # Safety
/// Constructor or restored helper, while no other thread logs.
pub unsafe fn configure(path: Option<&[u8]>) {
    ENABLED.store(false, Ordering::SeqCst);
    if let Some(path) = path.filter(|p| p.len() < 1024) {
        // SAFETY: per contract nobody reads it now.
        unsafe {
            let place = &mut *PATH.0.get();
            place.fill(0);
            place[..path.len()].copy_from_slice(path);
        }
        ENABLED.store(true, Ordering::SeqCst);
    }
}

/// Writes one line, with the process id and the time before it.
pub fn line(message: Arguments<'_>) {
    if !ENABLED.load(Ordering::Acquire) {
        return;
    }
    let mut ts = [0u64; 2];
    let mut line = Line {
        buf: [0; 1024],
        len: 0,
    };
    // SAFETY: raw system calls on a buffer and a path of ours.
    unsafe {
        syscall!(libc::SYS_clock_gettime, libc::CLOCK_REALTIME, &mut ts);
        let pid = syscall!(libc::SYS_getpid);
        let _ = write!(line, "{}.{:06} [{pid}] {message}", ts[0], ts[1] / 1000);
        line.buf[line.len] = b'\n';
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND | libc::O_CLOEXEC;
        let fd = syscall!(libc::SYS_openat, libc::AT_FDCWD, PATH.0.get(), flags, 0o600);
        if fd >= 0 {
            syscall!(libc::SYS_write, fd, line.buf.as_ptr(), line.len + 1);
            syscall!(libc::SYS_close, fd);
        }
    }
}

/// One line on standard error, for what the user must see before main runs.
pub fn complain(message: Arguments<'_>) {
    let mut line = Line {
        buf: [0; 1024],
        len: 0,
    };
    let _ = write!(line, "ckpt: {message}");
    line.buf[line.len] = b'\n';
    // SAFETY: raw write of a buffer of ours.
    unsafe { syscall!(libc::SYS_write, 2, line.buf.as_ptr(), line.len + 1) };
}
