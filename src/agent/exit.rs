//! Clean-up at the program's end (FIG. 9): what is left of the job's files when the
//! program exits by itself.
//!
//! [`on_exit`] runs in whatever thread calls exit_group, perhaps in a signal handler,
//! while the helper thread may be in the middle of a commit: [`enter_store`] and
//! [`leave_store`] are the helper's side of that. Raw system calls, no allocation.

use crate::agent::refusal;
use crate::agent::state::AGENT;
pub use crate::config::KeepOnExit;
use ckpt_sys::{raw::check, syscall};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicUsize, Ordering::*};

/// The running writer child, 0 for none.
pub static WRITER_PID: AtomicI32 = AtomicI32::new(0);

static POLICY: AtomicU32 = AtomicU32::new(0);
static EXITING: AtomicBool = AtomicBool::new(false);
/// 1 while the helper changes the store.
static IN_STORE: AtomicU32 = AtomicU32::new(0);

const PATH_MAX: usize = 4096;
struct JobDir(UnsafeCell<[u8; PATH_MAX]>);
// SAFETY: written by `set_job_dir` before JOB_DIR_LEN is published.
unsafe impl Sync for JobDir {}
static JOB_DIR: JobDir = JobDir(UnsafeCell::new([0; PATH_MAX]));
static JOB_DIR_LEN: AtomicUsize = AtomicUsize::new(0);

/// Constructor, and after a restore.
pub fn configure(policy: KeepOnExit) {
    let policy = match policy {
        KeepOnExit::Failure => 0,
        KeepOnExit::Always => 1,
        KeepOnExit::Never => 2,
    };
    POLICY.store(policy, Relaxed);
    EXITING.store(false, Relaxed);
    IN_STORE.store(0, Relaxed);
    WRITER_PID.store(0, Relaxed);
}

/// The job's directory, absolute, as soon as it is known (one thread at a time). False
/// if it is too long: nothing is then removed.
pub fn set_job_dir(path: &[u8]) -> bool {
    JOB_DIR_LEN.store(0, Release);
    if path.len() + 64 > PATH_MAX || path.first() != Some(&b'/') || path.contains(&0) {
        return false;
    }
    // SAFETY: the length is 0, nobody reads.
    unsafe {
        let buf = JOB_DIR.0.get().cast::<u8>();
        std::ptr::copy_nonoverlapping(path.as_ptr(), buf, path.len());
        buf.add(path.len()).write(0);
    }
    JOB_DIR_LEN.store(path.len(), Release);
    true
}

/// The helper is about to change the store; false when the program is ending.
pub fn enter_store() -> bool {
    IN_STORE.store(1, SeqCst);
    if EXITING.load(SeqCst) {
        leave_store();
        return false;
    }
    true
}

/// The helper has finished a change of the store.
pub fn leave_store() {
    IN_STORE.store(0, SeqCst);
    if EXITING.load(SeqCst) {
        // SAFETY: our own word.
        unsafe { syscall!(libc::SYS_futex, IN_STORE.as_ptr(), libc::FUTEX_WAKE, 1) };
    }
}

/// Is the program ending?
pub fn exiting() -> bool {
    EXITING.load(Relaxed)
}

/// The agent's process ends with `status` (exit_group's argument).
pub fn on_exit(status: i32) {
    let removes = match POLICY.load(Relaxed) {
        0 => status & 0xff == 0,
        1 => false,
        _ => true,
    };
    // Under a system-call filter our calls may be fatal; the files stay.
    if refusal::sandboxed() || EXITING.swap(true, SeqCst) {
        return;
    }
    end_writer();
    if !removes || !AGENT.has_store.load(Relaxed) {
        return;
    }
    for _ in 0..100 {
        if IN_STORE.load(SeqCst) == 0 {
            break;
        }
        let step = [0u64, 50_000_000];
        // SAFETY: our own word and time.
        unsafe {
            let word = IN_STORE.as_ptr();
            syscall!(libc::SYS_futex, word, libc::FUTEX_WAIT, 1, &raw const step)
        };
    }
    remove_job();
}

/// A writer that is still at work would write into what is about to be removed.
fn end_writer() {
    const WALL: i32 = 0x4000_0000;
    let writer = WRITER_PID.swap(0, SeqCst);
    if writer > 0 {
        // SAFETY: our own child.
        unsafe {
            syscall!(libc::SYS_kill, writer, libc::SIGKILL);
            syscall!(libc::SYS_wait4, writer, 0, WALL, 0);
        }
    }
}

/// One step for every reader: the directory is renamed to a name that the store takes
/// for rubbish, then emptied.
fn remove_job() {
    let len = JOB_DIR_LEN.load(Acquire);
    if len == 0 {
        return;
    }
    let job = JOB_DIR.0.get().cast::<u8>();
    let mut trash = [0u8; PATH_MAX];
    // SAFETY: `len` bytes and a NUL were written before the length.
    let path = unsafe { std::slice::from_raw_parts(job, len) };
    let cut = path.iter().rposition(|&b| b == b'/').map_or(0, |i| i + 1);
    let mut n = 0;
    let mut push = |part: &[u8]| {
        let room = PATH_MAX - 1 - n;
        let take = part.len().min(room);
        trash[n..n + take].copy_from_slice(&part[..take]);
        n += take;
    };
    push(&path[..cut]);
    push(TRASH_PREFIX);
    push(&path[cut..]);
    push(b"-");
    // SAFETY: no arguments.
    let pid = unsafe { syscall!(libc::SYS_getpid) } as u32;
    for shift in (0..8).rev() {
        push(&[b"0123456789abcdef"[(pid >> (shift * 4)) as usize & 15]]);
    }
    // SAFETY: two NUL-terminated paths of ours.
    unsafe {
        if syscall!(libc::SYS_rename, job, trash.as_ptr()) != 0 {
            return;
        }
        empty(libc::AT_FDCWD, trash.as_ptr(), 4);
        syscall!(
            libc::SYS_unlinkat,
            libc::AT_FDCWD,
            trash.as_ptr(),
            libc::AT_REMOVEDIR
        );
    }
}

/// What the store takes for the remains of a removal (its own `TRASH_PREFIX`).
const TRASH_PREFIX: &[u8] = b".removed-";

/// Removes what is in the directory `name` of `at`, `depth` levels deep at the most.
///
/// # Safety
/// `name` is NUL-terminated.
unsafe fn empty(at: i32, name: *const u8, depth: u32) {
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    // SAFETY: per contract.
    let Ok(dir) = check(unsafe { syscall!(libc::SYS_openat, at, name, flags) }) else {
        return;
    };
    let mut buf = [0u64; 256];
    loop {
        // SAFETY: our buffer.
        let got = unsafe {
            syscall!(
                libc::SYS_getdents64,
                dir,
                buf.as_mut_ptr(),
                size_of_val(&buf)
            )
        };
        if got <= 0 {
            break;
        }
        let mut removed = false;
        let mut from = 0usize;
        while from < got as usize {
            // SAFETY: the kernel filled `got` bytes with records: ino, off, length, type, name.
            unsafe {
                let record = buf.as_ptr().cast::<u8>().add(from);
                let (len, kind) = (*(record.add(16) as *const u16), *record.add(18));
                let name = record.add(19);
                from += len as usize;
                if *name == b'.' && matches!((*name.add(1), *name.add(2)), (0, _) | (b'.', 0)) {
                    continue;
                }
                let flag = if kind == libc::DT_DIR {
                    if depth > 0 {
                        empty(dir as i32, name, depth - 1);
                    }
                    libc::AT_REMOVEDIR
                } else {
                    0
                };
                removed |= syscall!(libc::SYS_unlinkat, dir, name, flag) == 0;
            }
        }
        if !removed {
            break;
        }
        // Removing moves the positions of the rest: from the start again.
        // SAFETY: our descriptor.
        unsafe { syscall!(libc::SYS_lseek, dir, 0, libc::SEEK_SET) };
    }
    // SAFETY: our descriptor.
    unsafe { syscall!(libc::SYS_close, dir) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;
    use std::os::unix::ffi::OsStrExt;
    use std::path::PathBuf;

    fn job(name: &str) -> PathBuf {
        let root = std::env::temp_dir().join(format!("ckpt-exit-{}-{name}", std::process::id()));
        let dir = root.join("key");
        std::fs::create_dir_all(dir.join("gen-000001/shadow")).unwrap();
        for i in 0..300 {
            std::fs::write(dir.join(format!("gen-000001/shadow/{i}")), b"x").unwrap();
        }
        std::fs::write(dir.join("journal"), b"x").unwrap();
        std::fs::write(dir.join("lock"), b"x").unwrap();
        assert!(set_job_dir(dir.as_os_str().as_bytes()));
        AGENT.has_store.store(true, SeqCst);
        root
    }

    fn left(policy: KeepOnExit, status: i32, name: &str) -> usize {
        let root = job(name);
        configure(policy);
        on_exit(status);
        let n = std::fs::read_dir(&root).unwrap().count();
        std::fs::remove_dir_all(&root).unwrap();
        n
    }

    #[test]
    fn the_policy_decides() {
        in_child(|| {
            assert_eq!(left(KeepOnExit::Failure, 0, "a"), 0);
            assert_eq!(left(KeepOnExit::Failure, 256, "b"), 0);
            assert_eq!(left(KeepOnExit::Failure, 1, "c"), 1);
            assert_eq!(left(KeepOnExit::Always, 0, "d"), 1);
            assert_eq!(left(KeepOnExit::Never, 3, "e"), 0);
            AGENT.has_store.store(false, SeqCst);
            assert!(!set_job_dir(b"relative"));
        });
    }

    #[test]
    fn the_writer_dies_first() {
        in_child(|| {
            // SAFETY: a child that only waits.
            let writer = unsafe { libc::fork() };
            if writer == 0 {
                loop {
                    // SAFETY: waits for a signal.
                    unsafe { libc::pause() };
                }
            }
            configure(KeepOnExit::Always);
            WRITER_PID.store(writer, SeqCst);
            on_exit(0);
            assert!(exiting() && !enter_store());
            // SAFETY: asks whether the child is still there.
            assert_eq!(unsafe { libc::kill(writer, 0) }, -1);
        });
    }
}
