//! Clean-up at the program's end (FIG. 9): what is left of the job's files when the
//! program exits by itself.
//!
//! [`on_exit`] runs in whatever thread calls exit_group, perhaps in a signal handler,
//! while the helper thread may be in the middle of a commit: [`enter_store`] and
//! [`leave_store`] are the helper's side of that. Raw system calls, no allocation.

use crate::agent::hooks::files::turns;
use crate::agent::refusal;
use crate::agent::state::AGENT;
pub use crate::config::KeepOnExit;
use crate::persist::{sys, table};
use ckpt_sys::{raw::check, syscall};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicUsize, Ordering::*};

/// The running writer child, 0 for none.
pub static WRITER_PID: AtomicI32 = AtomicI32::new(0);

static POLICY: AtomicU32 = AtomicU32::new(0);
static EXITING: AtomicBool = AtomicBool::new(false);
/// 1 while the helper changes the store.
static IN_STORE: AtomicU32 = AtomicU32::new(0);

/// The thread that cleans up, 0 before, [`CLEAN`] when it has.
static CLEANER: AtomicI32 = AtomicI32::new(0);
const CLEAN: i32 = -1;

const PATH_MAX: usize = 4096;
struct JobDir(UnsafeCell<[u8; PATH_MAX]>);
// SAFETY: written by `set_job_dir` before JOB_DIR_LEN is published.
unsafe impl Sync for JobDir {}
static JOB_DIR: JobDir = JobDir(UnsafeCell::new([0; PATH_MAX]));
static JOB_DIR_LEN: AtomicUsize = AtomicUsize::new(0);
/// The jobs of the programs that this process was before it called exec, each with a NUL.
static BEFORE: JobDir = JobDir(UnsafeCell::new([0; PATH_MAX]));
static BEFORE_LEN: AtomicUsize = AtomicUsize::new(0);
/// What stands in the lock files of these jobs.
const OWNER_MAX: usize = 128;
struct OwnerText(UnsafeCell<[u8; OWNER_MAX]>);
// SAFETY: written by `set_owner` before BEFORE_LEN is published.
unsafe impl Sync for OwnerText {}
static OWNER: OwnerText = OwnerText(UnsafeCell::new([0; OWNER_MAX]));

/// Constructor, and after a restore.
pub fn configure(policy: KeepOnExit) {
    let policy = match policy {
        KeepOnExit::Failure => 0,
        KeepOnExit::Always => 1,
        KeepOnExit::Never => 2,
    };
    POLICY.store(policy, Relaxed);
    EXITING.store(false, Relaxed);
    CLEANER.store(0, Relaxed);
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

/// Who holds the jobs of [`add_before`] (constructor, before that).
pub fn set_owner(text: &[u8]) {
    let len = text.len().min(OWNER_MAX - 1);
    // SAFETY: one thread; nobody reads until there is a job.
    unsafe { (&mut *OWNER.0.get())[..len].copy_from_slice(&text[..len]) };
}

/// The directory of a job that this process has left by exec (constructor). Its end is that
/// program's end as well: after a successful one the same command must not go on from
/// before the exec.
pub fn add_before(path: &[u8]) {
    let at = BEFORE_LEN.load(Relaxed);
    if path.first() != Some(&b'/') || path.contains(&0) || at + path.len() >= PATH_MAX {
        return;
    }
    // SAFETY: one thread; room for the path and a NUL.
    unsafe {
        let to = BEFORE.0.get().cast::<u8>().add(at);
        std::ptr::copy_nonoverlapping(path.as_ptr(), to, path.len());
        to.add(path.len()).write(0);
    }
    BEFORE_LEN.store(at + path.len() + 1, Release);
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
    if refusal::sandboxed() || !begin() {
        return;
    }
    end_writer();
    if removes {
        clean_up();
    } else if turns::is_alone() {
        // No other thread can modify anything behind this: what is modified later is another's.
        table::ended(sys::realtime_ns());
    }
    CLEANER.store(CLEAN, SeqCst);
    // SAFETY: our own word.
    unsafe {
        syscall!(
            libc::SYS_futex,
            CLEANER.as_ptr(),
            libc::FUTEX_WAKE,
            i32::MAX
        )
    };
}

/// The first who ends the process cleans up, and the others wait for that (ten seconds at the
/// most): whoever comes through first ends the process. A handler that ends it amid the
/// cleaning begins once more.
fn begin() -> bool {
    // SAFETY: no arguments.
    let own = unsafe { syscall!(libc::SYS_gettid) } as i32;
    EXITING.store(true, SeqCst);
    let Err(mut who) = CLEANER.compare_exchange(0, own, SeqCst, SeqCst) else {
        return true;
    };
    for _ in 0..200 {
        if who == own || who == CLEAN {
            break;
        }
        let step = [0u64, 50_000_000];
        // SAFETY: our own word and time.
        unsafe {
            let word = CLEANER.as_ptr();
            syscall!(
                libc::SYS_futex,
                word,
                libc::FUTEX_WAIT,
                who,
                &raw const step
            )
        };
        who = CLEANER.load(SeqCst);
    }
    who == own
}

/// Removes the process's jobs.
fn clean_up() {
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
    let (own, len) = (JOB_DIR.0.get().cast::<u8>(), JOB_DIR_LEN.load(Acquire));
    if AGENT.has_store.load(Relaxed) && len != 0 {
        // SAFETY: `len` bytes and a NUL were written before the length.
        remove_job(unsafe { std::slice::from_raw_parts(own, len + 1) });
    }
    let (before, len) = (BEFORE.0.get().cast::<u8>(), BEFORE_LEN.load(Acquire));
    // SAFETY: so many bytes were written before the length.
    let before = unsafe { std::slice::from_raw_parts(before, len) };
    for job in before.split_inclusive(|&byte| byte == 0) {
        if is_ours(job) {
            remove_job(job);
        }
    }
}

/// Was this process the last one that held the job (path with its NUL)? The lock stays ours
/// until the end.
fn is_ours(job: &[u8]) -> bool {
    const LOCK: &[u8] = b"/lock\0";
    let mut path = [0u8; PATH_MAX];
    let len = job.len() - 1;
    if len + LOCK.len() > PATH_MAX {
        return false;
    }
    path[..len].copy_from_slice(&job[..len]);
    path[len..len + LOCK.len()].copy_from_slice(LOCK);
    let flags = libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let mut owner = [0u8; OWNER_MAX];
    // SAFETY: a NUL-terminated path; our own descriptor and buffer; written before the jobs.
    unsafe {
        let Ok(lock) = open(libc::AT_FDCWD, path.as_ptr(), flags) else {
            return false;
        };
        syscall!(libc::SYS_flock, lock, libc::LOCK_EX | libc::LOCK_NB) == 0
            && syscall!(libc::SYS_read, lock, &mut owner, OWNER_MAX - 1) > 0
            && owner == *OWNER.0.get()
    }
}

static MADE_ROOM: AtomicBool = AtomicBool::new(false);
/// Directories within a job's.
const DEPTH: u32 = 4;

/// openat(2) that makes room where the process may have no descriptor more: it ends now.
///
/// # Safety
/// `name` is NUL-terminated.
unsafe fn open(at: i32, name: *const u8, flags: i32) -> Result<usize, i32> {
    const NOFILE: u32 = libc::RLIMIT_NOFILE;
    const ROOM: u64 = 64;
    // SAFETY: per contract; whole structs.
    unsafe {
        let now = check(syscall!(libc::SYS_openat, at, name, flags));
        if now != Err(libc::EMFILE) {
            return now;
        }
        let mut limit = [0u64; 2];
        syscall!(libc::SYS_prlimit64, 0, NOFILE, 0, &raw mut limit);
        let more = [limit[1].max(ROOM); 2];
        if syscall!(libc::SYS_prlimit64, 0, NOFILE, &raw const more, 0) != 0 {
            let most = [limit[1]; 2];
            syscall!(libc::SYS_prlimit64, 0, NOFILE, &raw const most, 0);
        }
        let again = check(syscall!(libc::SYS_openat, at, name, flags));
        if again != Err(libc::EMFILE) {
            return again;
        }
        // Those of the program go, once: what is opened below takes their places.
        if !MADE_ROOM.swap(true, SeqCst) {
            syscall!(libc::SYS_close_range, 0, DEPTH + 2, 0);
        }
        check(syscall!(libc::SYS_openat, at, name, flags))
    }
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

/// One step for every reader: the directory (its path with a NUL) is renamed to a name that
/// the store takes for rubbish, then emptied.
fn remove_job(job: &[u8]) {
    let path = &job[..job.len() - 1];
    let job = job.as_ptr();
    let mut trash = [0u8; PATH_MAX];
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
        // Begun once more it has that name already.
        let renamed = check(syscall!(libc::SYS_rename, job, trash.as_ptr()));
        if !matches!(renamed, Ok(_) | Err(libc::ENOENT)) {
            return;
        }
        empty(libc::AT_FDCWD, trash.as_ptr(), DEPTH);
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
    let Ok(dir) = (unsafe { open(at, name, flags) }) else {
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

    /// A program that had used up its descriptors, or was ended by several threads at once,
    /// left the job's files under another name.
    #[test]
    fn without_descriptors_and_by_many() {
        in_child(|| {
            let root = job("f");
            configure(KeepOnExit::Failure);
            let limit = libc::rlimit {
                rlim_cur: 20,
                rlim_max: 20,
            };
            // SAFETY: a whole struct; opens what there is room for.
            unsafe {
                libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
                while libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY) >= 0 {}
            }
            let ends = || std::thread::spawn(|| on_exit(0));
            let ends: Vec<_> = (0..4).map(|_| ends()).collect();
            ends.into_iter().for_each(|end| end.join().unwrap());
            // SAFETY: makes room to look.
            unsafe { libc::close(9) };
            assert_eq!(std::fs::read_dir(&root).unwrap().count(), 0);
            std::fs::remove_dir_all(&root).unwrap();
        });
    }

    /// `sh script` whose script ended by exec was gone on with, the next time, from before it.
    #[test]
    fn jobs_of_programs_before_an_exec() {
        in_child(|| {
            let root = job("g");
            set_owner(b"7 8 boot\n");
            let jobs = [
                ("left", "7 8 boot\n"),
                ("other's", "7 9 boot\n"),
                ("used", "7 8 boot\n"),
            ];
            for (name, owner) in jobs {
                let dir = root.join(name);
                std::fs::create_dir_all(dir.join("gen-000001")).unwrap();
                std::fs::write(dir.join("lock"), owner).unwrap();
                let lock = std::fs::File::open(dir.join("lock")).unwrap();
                add_before(dir.as_os_str().as_bytes());
                if name == "used" {
                    lock.lock().unwrap();
                    std::mem::forget(lock);
                }
            }
            add_before(root.join("gone").as_os_str().as_bytes());
            add_before(b"relative");
            configure(KeepOnExit::Failure);
            on_exit(0);
            let left = std::fs::read_dir(&root).unwrap().flatten();
            let mut left: Vec<_> = left.map(|entry| entry.file_name()).collect();
            left.sort();
            assert_eq!(left, ["other's", "used"]);
            std::fs::remove_dir_all(&root).unwrap();
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
