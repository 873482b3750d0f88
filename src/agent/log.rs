//! The agent's log: one line a message, written at once with a raw `write` from a
//! fixed buffer (no allocation, no lock, no stdio).
//!
//! Destination: the path of `CKPT_LOG`, opened for appending per line, so that no
//! descriptor has to be kept anywhere. Without it there is no log.

use crate::agent::collect::descriptors::sys;
use crate::agent::state::AGENT;
use ckpt_sys::syscall;
use ckpt_sys::tls::thread_block;
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

/// One line on the program's standard error, for what its user must see. In the helper, whose
/// descriptor table is not the program's, on a copy of the program's descriptor.
pub fn complain(message: Arguments<'_>) {
    let mut line = Line {
        buf: [0; 1024],
        len: 0,
    };
    let _ = write!(line, "ckpt: {message}");
    line.buf[line.len] = b'\n';
    // SAFETY: the block is this thread's own.
    let in_helper = unsafe { (*thread_block()).is_helper } != 0;
    let copy = in_helper.then(program_stderr);
    let fd = match &copy {
        None => 2,
        // A pipe that nobody empties must not hold up the helper for ever.
        Some(Ok(fd)) if poll(fd.raw()) => fd.raw(),
        Some(_) => return,
    };
    // SAFETY: raw write of a buffer of ours.
    unsafe { syscall!(libc::SYS_write, fd, line.buf.as_ptr(), line.len + 1) };
}

fn program_stderr() -> Result<sys::Fd, i32> {
    let leader = AGENT.real_pid.load(Ordering::Relaxed);
    sys::pidfd_getfd(sys::pidfd_of(leader, leader)?.raw(), 2).or_else(|_| {
        // Forbidden; for all but sockets this does it.
        let path = format!("/proc/self/task/{leader}/fd/2");
        let flags = libc::O_WRONLY | libc::O_APPEND | libc::O_NOCTTY | libc::O_NONBLOCK;
        sys::open(path.as_bytes(), flags, 0)
    })
}

/// Can it be written to within a second?
fn poll(fd: i32) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one live pollfd.
    unsafe { syscall!(libc::SYS_poll, &raw mut poll, 1, 1000) == 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;

    /// What the helper says goes to the program's standard error, not to what has number 2 in a
    /// table of the helper's own (it was the lock of the job).
    #[test]
    fn the_helper_complains_to_the_user() {
        in_child(|| {
            let (from, to) = sys::pipe(0).unwrap();
            sys::dup3(to.raw(), 2, false).unwrap();
            // SAFETY: no arguments.
            let pid = unsafe { syscall!(libc::SYS_getpid) } as i32;
            AGENT.real_pid.store(pid, Ordering::SeqCst);
            let helper = std::thread::spawn(|| {
                // SAFETY: this thread's own table and block; the name is constant.
                let own = unsafe {
                    assert_eq!(syscall!(libc::SYS_unshare, libc::CLONE_FILES), 0);
                    let own = syscall!(libc::SYS_memfd_create, c"own".as_ptr(), 0) as i32;
                    sys::dup3(own, 2, false).unwrap();
                    (*thread_block()).is_helper = 1;
                    complain(format_args!("no way {}", 7));
                    (*thread_block()).is_helper = 0;
                    own
                };
                sys::fstat(own).unwrap().st_size
            });
            assert_eq!(helper.join().unwrap(), 0);
            let mut said = [0u8; 64];
            let n = sys::read(from.raw(), &mut said).unwrap();
            assert_eq!(&said[..n], b"ckpt: no way 7\n");
        });
    }
}
