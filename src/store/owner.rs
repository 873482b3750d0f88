//! Whose a job is: a process, by its number and when it began.
//!
//! Used with the lock ([`super::lock`]), in the target (constructor, helper thread) and in the command.

use super::fs::{Fs, RawFs};
use super::{Context, StoreError};
use crate::errno::Errno;
use rustix::fs::{CWD, Mode, OFlags};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The fourth word of an owner who keeps the job without the lock.
pub(super) const UNTIL_ITS_END: &str = "asleep";

/// A process, told apart from a later one with the same number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    pub pid: i32,
    /// Field 22 of /proc/PID/stat: clock ticks since boot.
    pub start_time: u64,
    /// /proc/sys/kernel/random/boot_id.
    pub boot_id: String,
}

impl Owner {
    /// The calling process (the helper thread's, too).
    pub fn current() -> Result<Owner, StoreError> {
        Owner::of(rustix::process::getpid().as_raw_nonzero().get())
    }

    /// Process `pid` of this machine.
    pub(super) fn of(pid: i32) -> Result<Owner, StoreError> {
        let (_, start_time) = stat_of(pid)?;
        Ok(Owner {
            pid,
            start_time,
            boot_id: boot_id(),
        })
    }

    /// What the lock file holds: one line; a fourth word where the job is the owner's until
    /// its end ([`JobLock::outlive`]).
    pub fn to_text(&self, until_its_end: bool) -> Vec<u8> {
        let word = if until_its_end {
            format!(" {UNTIL_ITS_END}")
        } else {
            String::new()
        };
        format!("{} {} {}{word}\n", self.pid, self.start_time, self.boot_id).into_bytes()
    }

    pub(super) fn from_text(text: &[u8]) -> Option<Owner> {
        let text = std::str::from_utf8(text).ok()?;
        let mut words = text.lines().next()?.split(' ');
        Some(Owner {
            pid: words.next()?.parse().ok()?,
            start_time: words.next()?.parse().ok()?,
            boot_id: words.next()?.to_owned(),
        })
    }

    /// How far it has come. Dead only when that is certain: not of this boot of this machine, not
    /// visible here, and so on, count as alive.
    pub fn life(&self) -> Life {
        if self.boot_id != boot_id() {
            return Life::Alive;
        }
        match stat_of(self.pid) {
            Ok((_, start)) if start != self.start_time => Life::Dead,
            Ok(_) => life_of_tasks(self.pid),
            Err(error) if matches!(error.errno, Errno::ENOENT | Errno::ESRCH) => Life::Dead,
            Err(_) => Life::Alive,
        }
    }

    pub fn is_alive(&self) -> bool {
        self.life() == Life::Alive
    }
}

/// How far a process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    Alive,
    /// It was killed, but some of its threads have not ended: they may be in a call that
    /// modifies files.
    Dying,
    Dead,
}

/// By all of its threads: a first one that has ended says nothing of the others.
fn life_of_tasks(pid: i32) -> Life {
    let dir = PathBuf::from(format!("/proc/{pid}/task"));
    let tasks = match RawFs.list(&dir) {
        Ok(tasks) => tasks,
        Err(Errno::ENOENT | Errno::ESRCH) => return Life::Dead,
        Err(_) => return Life::Alive,
    };
    let mut life = Life::Dead;
    for task in tasks {
        match life_of_task(&dir.join(OsStr::from_bytes(&task.name))) {
            Life::Dead => {}
            Life::Dying => life = Life::Dying,
            Life::Alive => return Life::Alive,
        }
    }
    life
}

fn life_of_task(dir: &Path) -> Life {
    const PF_EXITING: u64 = 0x4;
    const KILL: u64 = 1 << (libc::SIGKILL - 1);
    let read = |leaf: &str| read_small(&dir.join(leaf)).unwrap_or_default();
    let (stat, status) = (read("stat"), read("status"));
    let fields = fields_of(&stat).unwrap_or_default();
    // Fields 3 (state) and 9 (flags) of proc(5).
    let state = fields.first().and_then(|field| field.bytes().next());
    let flags = fields.get(6).and_then(|field| field.parse().ok());
    let status = String::from_utf8_lossy(&status);
    let pending = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .is_some_and(|mask| mask & KILL != 0)
    };
    match state {
        None | Some(b'Z' | b'X') => Life::Dead,
        _ if flags.unwrap_or(0) & PF_EXITING != 0 => Life::Dying,
        _ if pending("SigPnd:") || pending("ShdPnd:") => Life::Dying,
        _ => Life::Alive,
    }
}

/// State letter and start time of a process.
fn stat_of(pid: i32) -> Result<(u8, u64), StoreError> {
    let path = PathBuf::from(format!("/proc/{pid}/stat"));
    let text = read_small(&path).on("read", &path)?;
    parse_stat(&text).ok_or(Errno::EINVAL).on("read", &path)
}

/// The fields from the third on. (The command name may hold anything, so they count from the last `)`.)
fn fields_of(text: &[u8]) -> Option<Vec<&str>> {
    let close = text.iter().rposition(|&b| b == b')')?;
    let rest = std::str::from_utf8(text.get(close + 2..)?).ok()?;
    Some(rest.split_ascii_whitespace().collect())
}

fn parse_stat(text: &[u8]) -> Option<(u8, u64)> {
    let fields = fields_of(text)?;
    let state = *fields.first()?.as_bytes().first()?;
    // `state` is field 3; 22 is the start time.
    Some((state, fields.get(22 - 3)?.parse().ok()?))
}

pub fn boot_id() -> String {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = read_small(path).unwrap_or_default();
    String::from_utf8_lossy(&text).trim().to_owned()
}

fn read_small(path: &Path) -> Result<Vec<u8>, Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
    let mut bytes = vec![0u8; 4096];
    let got = rustix::io::pread(&file, &mut bytes, 0)?;
    bytes.truncate(got);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_fields() {
        let text = b"12 (a) b (c)) S 1 12 12 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 9 9";
        assert_eq!(parse_stat(text), Some((b'S', 777)));
        assert_eq!(parse_stat(b"12 (x"), None);
        assert!(Owner::current().unwrap().is_alive());
    }

    /// The process that was started was killed, and started again at once: the program, which dies
    /// with it, was still there, and the new start became a second job with the same files.
    #[test]
    fn a_killed_process_is_dying_until_it_is_dead() {
        let mut command = std::process::Command::new("sleep");
        let mut child = command.arg("60").spawn().unwrap();
        let pid = child.id() as i32;
        let owner = Owner::of(pid).unwrap();
        assert_eq!(owner.life(), Life::Alive);
        child.kill().unwrap();
        let mut seen = Vec::new();
        while owner.life() != Life::Dead {
            seen.push(owner.life());
        }
        // Nothing but a thread that is between taking the signal and its end looks alive.
        let alive = seen.iter().filter(|life| **life == Life::Alive).count();
        assert!(alive <= 2, "{seen:?}");
        child.wait().unwrap();
        assert_eq!(owner.life(), Life::Dead);
        let other = Owner {
            start_time: owner.start_time + 1,
            ..Owner::current().unwrap()
        };
        assert_eq!(other.life(), Life::Dead);
    }

    /// A program whose first thread has ended lives.
    #[test]
    fn all_threads_count() {
        // SAFETY: the child makes a thread and ends its first one.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            std::thread::spawn(|| std::thread::sleep(std::time::Duration::from_secs(60)));
            // SAFETY: ends this thread alone.
            unsafe { libc::syscall(libc::SYS_exit, 0) };
        }
        let owner = Owner::of(pid).unwrap();
        while stat_of(pid).unwrap().0 != b'Z' {
            std::thread::yield_now();
        }
        assert_eq!(owner.life(), Life::Alive);
        // SAFETY: our own child.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        while owner.life() != Life::Dead {
            std::thread::yield_now();
        }
        // SAFETY: reaps it.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    }
}
