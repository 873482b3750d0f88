//! Who may write to a job: a flock(2) on its `lock` file, whose text names the owner.
//!
//! The lock belongs to the open file description, so whoever inherits or is handed
//! the descriptor holds it too: the restored process of a recovery takes it over
//! from the starter that way. A forked writer child may outlive its parent by
//! moments and still hold it; so an owner that is dead, with the lock busy, is
//! waited for. So is one that was killed and has threads that have not ended, whoever
//! holds the lock: they may be in the midst of a write to a file that a recovery would
//! take back. An owner whose helper ends before it does lets the lock go and says so in
//! the text: the job is its until it is dead.
//!
//! Used in the target (constructor, helper thread) and in the command (`prune`).

use super::owner::{Life, Owner, UNTIL_ITS_END, boot_id};
use super::{Context, StoreError};
use crate::errno::Errno;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{CWD, FlockOperation, Mode, OFlags};
use std::path::{Path, PathBuf};

pub const NAME: &str = "lock";
/// How long a dead owner's children may take to let go.
const PATIENCE_MS: u64 = 10_000;
const POLL_MS: u64 = 5;
const SHORT_MS: u64 = 2;
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LockError {
    /// A live process has it.
    #[error("the job in {} is in use by process {pid}", dir.display())]
    Busy { dir: PathBuf, pid: i32 },
    /// Its process was killed, but is not gone: it may still be in the midst of a write.
    #[error("process {pid}, which has the job in {}, was killed and has not ended yet: start again when it has", dir.display())]
    Dying { dir: PathBuf, pid: i32 },
    /// There is no such job (and it was not to be created).
    #[error("no job in {}", .0.display())]
    NoJob(PathBuf),
    #[error("{} belongs to another user or can be written by others", .0.display())]
    NotOurs(PathBuf),
    #[error(transparent)]
    Io(#[from] StoreError),
}

/// The lock, held until the last descriptor is closed.
#[derive(Debug)]
pub struct JobLock {
    fd: OwnedFd,
    dir: PathBuf,
}

impl JobLock {
    /// Takes the lock of the job in `dir` for `owner`. The directory must exist; with
    /// `create` the lock file need not. Waits for the children of a dead owner.
    pub fn take(dir: &Path, create: bool, owner: &Owner) -> Result<JobLock, LockError> {
        let lock = JobLock::wait(dir, create, PATIENCE_MS)?;
        lock.set_owner(owner)?;
        Ok(lock)
    }

    fn wait(dir: &Path, create: bool, patience_ms: u64) -> Result<JobLock, LockError> {
        let path = dir.join(NAME);
        let mut waited = 0;
        let mut seen_alive = false;
        loop {
            check_dir(dir)?;
            let mut flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            if create {
                flags |= OFlags::CREATE;
            }
            let mode = Mode::RUSR | Mode::WUSR;
            let fd = match rustix::fs::openat(CWD, &path, flags, mode) {
                Err(rustix::io::Errno::NOENT) => return Err(LockError::NoJob(dir.to_owned())),
                other => other.map_err(Errno::from).on("open", &path)?,
            };
            let busy = match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {
                    if let Some(pid) = owned_without_lock(&fd) {
                        let dir = dir.to_owned();
                        return Err(LockError::Busy { dir, pid });
                    }
                    // The job may have been removed, or removed and made again, between
                    // the two calls: then this is a lock on nothing.
                    if !same_file(fd.as_fd(), &path) {
                        continue;
                    }
                    false
                }
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::WOULDBLOCK) => true,
                Err(errno) => {
                    return Err(Errno::from(errno))
                        .on("lock", &path)
                        .map_err(Into::into);
                }
            };
            // No text yet: its owner is just writing it.
            let owner = read_owner(&fd).map(|(owner, _)| owner);
            let life = owner.as_ref().map_or(Life::Dead, Owner::life);
            // The helper, whose the lock was, may end before threads that are in a call.
            if !busy && life != Life::Dying {
                let dir = dir.to_owned();
                return Ok(JobLock { fd, dir });
            }
            let (pid, dir) = (owner.map_or(0, |o| o.pid), dir.to_owned());
            if life == Life::Alive {
                // A thread that has taken the signal that kills it looks alive for an instant.
                if seen_alive {
                    return Err(LockError::Busy { dir, pid });
                }
                seen_alive = true;
                pause(SHORT_MS);
                continue;
            }
            if waited >= patience_ms {
                return Err(LockError::Dying { dir, pid });
            }
            pause(POLL_MS);
            waited += POLL_MS;
        }
    }

    /// Names another owner: the restored process, once it has the descriptor.
    pub fn set_owner(&self, owner: &Owner) -> Result<(), StoreError> {
        self.write(owner.to_text(false))
    }

    /// The job is the owner's as long as it lives, though nobody will hold the lock any
    /// more: its helper ends before it does (a system-call filter, say).
    pub fn outlive(&self, owner: &Owner) -> Result<(), StoreError> {
        self.write(owner.to_text(true))
    }

    fn write(&self, text: Vec<u8>) -> Result<(), StoreError> {
        let path = self.dir.join(NAME);
        rustix::io::pwrite(&self.fd, &text, 0)
            .map_err(Errno::from)
            .on("write", &path)?;
        rustix::fs::ftruncate(&self.fd, text.len() as u64)
            .map_err(Errno::from)
            .on("truncate", &path)
    }

    /// A lock whose descriptor was inherited or handed over.
    pub fn adopt(fd: OwnedFd, dir: PathBuf) -> JobLock {
        JobLock { fd, dir }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The descriptor, to be kept or handed over.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

/// The live owner of the job in `dir`, if it is locked; for the command. The lock is
/// not tried, so that a starting program cannot be turned away by this: the kernel's
/// list of locks is read.
pub fn live_owner(dir: &Path) -> Option<Owner> {
    let path = dir.join(NAME);
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = rustix::fs::openat(CWD, &path, flags, Mode::empty()).ok()?;
    let (owner, until_its_end) = read_owner(&fd)?;
    let inode = rustix::fs::fstat(&fd).ok()?.st_ino;
    let live = owner.boot_id == boot_id() && owner.is_alive();
    (live && (until_its_end || is_flocked(inode))).then_some(owner)
}

/// Does anyone hold a flock on a file with this inode number? (The device is left out:
/// btrfs shows another one there than in stat.) True where the list cannot be read.
fn is_flocked(inode: u64) -> bool {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let Ok(file) = rustix::fs::openat(CWD, "/proc/locks", flags, Mode::empty()) else {
        return true;
    };
    let (mut text, mut buffer) = (Vec::new(), [0u8; 4096]);
    while let Ok(got @ 1..) = rustix::io::read(&file, &mut buffer) {
        text.extend_from_slice(&buffer[..got]);
    }
    // `1: FLOCK  ADVISORY  WRITE 4711 fe:01:1234 0 EOF`; `1: -> FLOCK` is one that waits.
    let lines = String::from_utf8_lossy(&text);
    lines.lines().any(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let held = words.next() == Some("FLOCK");
        let number = words
            .nth(3)
            .and_then(|file| file.rsplit(':').next()?.parse().ok());
        held && number == Some(inode)
    })
}

/// The owner, and whether the job is its until its end ([`JobLock::outlive`]).
fn read_owner(fd: &OwnedFd) -> Option<(Owner, bool)> {
    let mut text = [0u8; 256];
    let got = rustix::io::pread(fd, &mut text, 0).ok()?;
    let owner = Owner::from_text(&text[..got])?;
    let mut words = text[..got].split(|byte| b" \n".contains(byte));
    Some((owner, words.nth(3) == Some(UNTIL_ITS_END.as_bytes())))
}

/// The process, other than this one, whose job it is though it does not hold the lock.
/// Not of this boot: it is dead.
fn owned_without_lock(fd: &OwnedFd) -> Option<i32> {
    let (owner, until_its_end) = read_owner(fd)?;
    let lives = until_its_end && owner.boot_id == boot_id() && owner.is_alive();
    (lives && Owner::current().ok() != Some(owner.clone())).then_some(owner.pid)
}

/// A checkpoint is code that will run as us: nobody else may have written it.
fn check_dir(dir: &Path) -> Result<(), LockError> {
    let stat = match rustix::fs::stat(dir) {
        Err(rustix::io::Errno::NOENT) => return Err(LockError::NoJob(dir.to_owned())),
        other => other.map_err(Errno::from).on("examine", dir)?,
    };
    let uid = rustix::process::geteuid().as_raw();
    if stat.st_uid != uid || stat.st_mode & 0o022 != 0 {
        return Err(LockError::NotOurs(dir.to_owned()));
    }
    Ok(())
}

fn same_file(fd: BorrowedFd<'_>, path: &Path) -> bool {
    match (rustix::fs::fstat(fd), rustix::fs::stat(path)) {
        (Ok(a), Ok(b)) => a.st_dev == b.st_dev && a.st_ino == b.st_ino,
        _ => false,
    }
}

fn pause(ms: u64) {
    let time = rustix::thread::Timespec {
        tv_sec: (ms / 1000) as i64,
        tv_nsec: (ms % 1000 * 1_000_000) as i64,
    };
    let _ = rustix::thread::nanosleep(&time);
}

#[cfg(test)]
mod tests {
    use super::super::fs::tests::TempDir;
    use super::super::fs::{Fs, RawFs};
    use super::*;

    fn dead() -> Owner {
        // Nobody started at tick 1 with this number.
        Owner {
            pid: 1,
            start_time: u64::MAX,
            boot_id: boot_id(),
        }
    }

    #[test]
    fn a_live_owner_keeps_it() {
        let dir = TempDir::new("lock");
        let me = Owner::current().unwrap();
        assert_eq!(
            JobLock::take(&dir.0, false, &me).unwrap_err(),
            LockError::NoJob(dir.0.clone())
        );
        let lock = JobLock::take(&dir.0, true, &me).unwrap();
        assert_eq!(live_owner(&dir.0), Some(me.clone()));
        let busy = JobLock::take(&dir.0, true, &me).unwrap_err();
        let dir_path = dir.0.clone();
        assert_eq!(
            busy,
            LockError::Busy {
                dir: dir_path,
                pid: me.pid
            }
        );
        drop(lock);
        assert_eq!(live_owner(&dir.0), None, "it let go, though it lives");
        JobLock::take(&dir.0, false, &me).unwrap();
    }

    /// A program under seccomp had given up its lock: a second start of the same command
    /// went on from its last generation while it lived.
    #[test]
    fn an_owner_without_the_lock_keeps_it_until_its_end() {
        let dir = TempDir::new("asleep");
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        let owner = Owner::of(pid).unwrap();
        let me = Owner::current().unwrap();
        let asleep = |owner: &Owner| {
            let lock = JobLock::take(&dir.0, true, &me).unwrap();
            lock.outlive(owner).unwrap();
        };
        asleep(&owner);
        assert_eq!(live_owner(&dir.0), Some(owner.clone()));
        let busy = JobLock::take(&dir.0, true, &me).unwrap_err();
        assert!(matches!(busy, LockError::Busy { pid: by, .. } if by == pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(live_owner(&dir.0), None);
        JobLock::take(&dir.0, true, &me).unwrap();
        // It executed the same command once more: its own job is no obstacle.
        asleep(&me);
        JobLock::take(&dir.0, true, &me).unwrap();
        let lock = JobLock::take(&dir.0, true, &me).unwrap();
        lock.set_owner(&owner).unwrap();
        drop(lock);
        assert_eq!(live_owner(&dir.0), None);
    }

    #[test]
    fn a_dead_owners_children_are_waited_for() {
        let dir = TempDir::new("dead");
        let me = Owner::current().unwrap();
        let lock = JobLock::take(&dir.0, true, &dead()).unwrap();
        assert!(JobLock::wait(&dir.0, true, 60).is_err());
        let waiter = std::thread::spawn({
            let dir = dir.0.clone();
            move || JobLock::take(&dir, true, &me).is_ok()
        });
        pause(100);
        drop(lock);
        assert!(waiter.join().unwrap());
    }

    #[test]
    fn a_lock_on_a_removed_job_is_not_a_lock() {
        let dir = TempDir::new("gone");
        let job = dir.0.join("job");
        RawFs.mkdir(&job).unwrap();
        let me = Owner::current().unwrap();
        let old = JobLock::take(&job, true, &me).unwrap();
        RawFs.rename(&job, &dir.0.join("trash")).unwrap();
        RawFs.mkdir(&job).unwrap();
        let new = JobLock::take(&job, true, &me).unwrap();
        assert!(!same_file(old.as_fd(), &job.join(NAME)));
        assert!(same_file(new.as_fd(), &job.join(NAME)));
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let dir = TempDir::new("shared");
        rustix::fs::chmod(&dir.0, Mode::from_raw_mode(0o777)).unwrap();
        let error = JobLock::take(&dir.0, true, &Owner::current().unwrap()).unwrap_err();
        assert!(matches!(error, LockError::NotOurs(_)));
    }
}
