//! The forked writer: a child of the helper whose memory the kernel freezes by
//! copy-on-write.
//!
//! It is a raw clone of the helper thread (no atfork handlers), with exit signal 0
//! (no SIGCHLD, invisible to wait(2) without __WALL), the helper's descriptor table
//! (nothing of the program's) and all signals blocked. It dies with the process.

use super::{Outcome, SnapshotError};
use crate::agent::exit;
use crate::agent::place;
use crate::agent::procfs::OwnFd;
use ckpt_sys::syscall;
use std::sync::atomic::Ordering;

/// What the child leaves in shared memory.
#[repr(C)]
struct Result_ {
    ok: u32,
    not_inherited: u32,
    message_len: u32,
    outcome: Outcome,
    message: [u8; 512],
}

/// A writer at work.
pub struct Writer {
    pid: i32,
    shared: *mut Result_,
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum WriterError {
    #[error("{0}")]
    Failed(String),
    /// To be tried again with the flags read during the stop.
    #[error("{0}")]
    NotInherited(String),
    #[error("the checkpoint's writer was killed by signal {0}")]
    Killed(i32),
}

/// Forks a writer that runs `work` and leaves its result. `None` when the kernel
/// refuses (memory, process limit): the caller writes during the stop instead.
pub fn fork(work: &mut dyn FnMut() -> Result<Outcome, SnapshotError>) -> Option<Writer> {
    // SAFETY: a fresh shared page pair; the raw clone copies this thread only, which
    // holds no lock; the child ends with exit_group.
    unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let page = place::passing(4096, prot, flags).ok()?;
        let shared = page as *mut Result_;
        let parent = syscall!(libc::SYS_getpid);
        match syscall!(libc::SYS_clone, 0, 0, 0, 0, 0) {
            0 => {
                syscall!(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                // Not in the program's group and session: a dead writer that nobody has
                // reaped yet would keep their number, the old process id, taken.
                syscall!(libc::SYS_setsid);
                if syscall!(libc::SYS_getppid) != parent {
                    syscall!(libc::SYS_exit_group, 1);
                }
                syscall!(libc::SYS_prctl, libc::PR_SET_NAME, c"ckpt-writer".as_ptr());
                lift_file_size_limit();
                die_first();
                match work() {
                    Ok(outcome) => {
                        (*shared).outcome = outcome;
                        (*shared).ok = 1;
                    }
                    Err(error) => {
                        let not_inherited = matches!(error, SnapshotError::NotInherited(_));
                        (*shared).not_inherited = not_inherited as u32;
                        let text = error.to_string();
                        let n = text.len().min(512);
                        (&mut (*shared).message)[..n].copy_from_slice(&text.as_bytes()[..n]);
                        (*shared).message_len = n as u32;
                    }
                }
                loop {
                    syscall!(libc::SYS_exit_group, 0);
                }
            }
            pid if pid > 0 => {
                exit::WRITER_PID.store(pid as i32, Ordering::SeqCst);
                Some(Writer {
                    pid: pid as i32,
                    shared,
                })
            }
            _ => {
                syscall!(libc::SYS_munmap, page, 4096);
                None
            }
        }
    }
}

/// The program's RLIMIT_FSIZE is not meant for our images (this is our own process).
fn lift_file_size_limit() {
    let mut limit = [0u64; 2];
    let resource = libc::RLIMIT_FSIZE;
    // SAFETY: valid structs.
    unsafe {
        syscall!(libc::SYS_prlimit64, 0, resource, 0, &mut limit);
        limit[0] = limit[1];
        syscall!(libc::SYS_prlimit64, 0, resource, &limit, 0);
    }
}

/// When memory runs out it is the writer that must go, not the program: the checkpoint
/// fails, and that is all.
fn die_first() {
    if let Ok(file) = OwnFd::open_with(b"/proc/thread-self/oom_score_adj", libc::O_WRONLY) {
        // SAFETY: a buffer of the length given. Raising one's own score needs no privilege.
        unsafe { syscall!(libc::SYS_write, file.raw(), b"1000".as_ptr(), 4) };
    }
}

impl Writer {
    /// Waits for the end of the writer.
    pub fn wait(self) -> Result<Outcome, WriterError> {
        let mut status = 0i32;
        // SAFETY: plain numbers.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: our own child; the shared page is ours.
        unsafe {
            loop {
                let got = syscall!(
                    libc::SYS_wait4,
                    self.pid,
                    &mut status,
                    libc::__WALL,
                    &mut usage
                );
                if got != -(libc::EINTR as isize) {
                    break;
                }
            }
            exit::WRITER_PID.store(0, Ordering::SeqCst);
            let result = &*self.shared;
            let outcome = if result.ok == 1 {
                let us = |t: libc::timeval| (t.tv_sec * 1_000_000 + t.tv_usec) as u64;
                Ok(Outcome {
                    cpu_us: us(usage.ru_utime) + us(usage.ru_stime),
                    ..result.outcome
                })
            } else if libc::WIFSIGNALED(status) {
                Err(WriterError::Killed(libc::WTERMSIG(status)))
            } else {
                let n = (result.message_len as usize).min(512);
                let text = String::from_utf8_lossy(&result.message[..n]).into_owned();
                if result.not_inherited == 1 {
                    Err(WriterError::NotInherited(text))
                } else {
                    Err(WriterError::Failed(text))
                }
            };
            syscall!(libc::SYS_munmap, self.shared, 4096);
            outcome
        }
    }
}
