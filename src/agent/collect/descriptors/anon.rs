//! Anonymous inodes: eventfd, timerfd, signalfd, inotify, pidfd; epoll is in
//! [`super::epoll`]. Called by [`super::collect`] in the helper thread. A kind
//! that is not in the list here is refused by name (io_uring, perf_event, bpf,
//! userfaultfd, fanotify, seccomp notification, kvm, ...).

use super::{Collector, Raw, epoll, fdinfo, sys};
use crate::agent::collect::Refusal;
use crate::image::state::{FileKind, InotifyWatch};
use std::collections::BTreeSet;

pub(super) fn collect(c: &mut Collector, at: usize, name: &[u8]) -> Result<FileKind, Refusal> {
    let raw = &c.raws[at];
    match name {
        b"[eventfd]" => Ok(eventfd(raw)),
        b"[eventpoll]" => epoll::collect(c, at),
        b"[timerfd]" => timerfd(c, at),
        b"[signalfd]" => Ok(FileKind::SignalFd {
            mask: raw
                .info
                .value("sigmask")
                .map_or(0, |v| fdinfo::number(v, 16)),
        }),
        b"inotify" => inotify(c, at),
        b"[pidfd]" => pidfd(c, raw),
        b"[io_uring]" => Err(raw.refuse_kind("is an io_uring, whose rings cannot be saved")),
        _ => Err(raw.refuse_kind("is of a kind that cannot be saved")),
    }
}

fn eventfd(raw: &Raw) -> FileKind {
    let value = |name, base| raw.info.value(name).map_or(0, |v| fdinfo::number(v, base));
    FileKind::EventFd {
        count: value("eventfd-count", 16),
        semaphore: value("eventfd-semaphore", 10) != 0,
    }
}

fn timerfd(c: &Collector, at: usize) -> Result<FileKind, Refusal> {
    let raw = &c.raws[at];
    // Asking for the time left makes the kernel count expirations up to now; the
    // fdinfo read after it shows them.
    let dup = c.duplicate(raw)?;
    let mut left = [0u64; 4];
    // SAFETY: `left` has the size of `struct itimerspec`.
    let asked = ckpt_sys::raw::check(unsafe {
        ckpt_sys::syscall!(libc::SYS_timerfd_gettime, dup.raw(), left.as_mut_ptr())
    });
    asked.map_err(|e| raw.refuse("does not tell its time left", e))?;
    drop(dup);
    let path = format!("/proc/self/task/{}/fdinfo/{}\0", c.target.tid, raw.fd);
    let mut text = Vec::new();
    sys::read_file(libc::AT_FDCWD, path.as_bytes(), &mut text)
        .map_err(|e| raw.refuse("does not tell its state", e))?;
    let info = fdinfo::FdInfo::parse(&text);
    let value = |name, base| info.value(name).map_or(0, |v| fdinfo::number(v, base));
    let flags = value("settime flags", 8) as i32;
    Ok(FileKind::TimerFd {
        clock: value("clockid", 10) as i32,
        ticks: value("ticks", 10),
        interval_ns: left[0] * 1_000_000_000 + left[1],
        remaining_ns: left[2] * 1_000_000_000 + left[3],
        absolute: flags & libc::TFD_TIMER_ABSTIME != 0,
        cancel_on_set: flags & libc::TFD_TIMER_CANCEL_ON_SET != 0,
    })
}

fn pidfd(c: &Collector, raw: &Raw) -> Result<FileKind, Refusal> {
    let nonblock = raw.info.flags & libc::O_NONBLOCK as u32 != 0;
    let pid = raw.info.value("Pid").map_or(0, |v| fdinfo::number(v, 10)) as i32;
    let of_thread = raw.info.flags & libc::O_EXCL as u32 != 0;
    if pid == -1 {
        return Ok(FileKind::PidFdDead { nonblock });
    }
    if pid == c.target.pid && !of_thread {
        return Ok(FileKind::PidFdSelf { nonblock });
    }
    Err(raw.refuse_kind(&format!(
        "refers to the {} {pid}, which is not the process itself",
        if of_thread { "thread" } else { "process" }
    )))
}

fn inotify(c: &Collector, at: usize) -> Result<FileKind, Refusal> {
    let raw = &c.raws[at];
    let dup = c.duplicate(raw)?;
    let queued = sys::fionread(dup.raw()).map_err(|e| raw.refuse("cannot be examined", e))?;
    if queued > 0 {
        return Err(raw.refuse_kind("has inotify events that have not been read yet"));
    }
    let mut watches = Vec::new();
    let mut search = PathSearch::default();
    for line in raw.info.lines().filter(|l| l.starts_with(b"inotify ")) {
        let hex = |name| fdinfo::word(line, name).map_or(0, |v| fdinfo::number(v, 16));
        let (ino, sdev) = (hex("ino"), hex("sdev"));
        let path = by_handle(c, line, ino)
            .or_else(|| search.find(c, ino, kernel_dev(sdev)))
            .ok_or_else(|| {
                raw.refuse_kind(&format!(
                    "watches inode {ino}, whose path could not be found"
                ))
            })?;
        watches.push(InotifyWatch {
            wd: hex("wd") as i32,
            path,
            mask: hex("mask") as u32,
        });
    }
    watches.sort_by_key(|w| w.wd);
    Ok(FileKind::Inotify {
        watches,
        queued: false,
    })
}

/// The kernel's internal device number (12 bits major, 20 minor) as in `st_dev`.
fn kernel_dev(sdev: u64) -> u64 {
    libc::makedev((sdev >> 20) as u32, (sdev & 0xf_ffff) as u32)
}

/// The path of a watch by its file handle; needs CAP_DAC_READ_SEARCH.
fn by_handle(c: &Collector, line: &[u8], ino: u64) -> Option<Vec<u8>> {
    let bytes = fdinfo::number(fdinfo::word(line, "fhandle-bytes")?, 16) as usize;
    let kind = fdinfo::number(fdinfo::word(line, "fhandle-type")?, 16) as u32;
    let hex = fdinfo::word(line, "f_handle")?;
    if bytes > 128 || hex.len() < bytes * 2 {
        return None;
    }
    // struct file_handle: u32 handle_bytes, i32 handle_type, bytes.
    let mut handle = Vec::with_capacity(8 + bytes);
    handle.extend_from_slice(&(bytes as u32).to_ne_bytes());
    handle.extend_from_slice(&kind.to_ne_bytes());
    for pair in hex[..bytes * 2].chunks(2) {
        handle.push(fdinfo::number(pair, 16) as u8);
    }
    let roots = [
        &b"."[..],
        b"/",
        b"/tmp",
        b"/dev/shm",
        b"/run",
        b"/home",
        b"/var",
    ];
    let hints = c.target.path_hints.iter().map(|p| &p[..]);
    for root in roots.into_iter().chain(hints) {
        let Ok(mount) = sys::open(root, libc::O_RDONLY | libc::O_NONBLOCK, 0) else {
            continue;
        };
        let flags = libc::O_PATH | libc::O_CLOEXEC;
        // SAFETY: a live file handle of the size that its first word tells.
        let fd = ckpt_sys::raw::check(unsafe {
            ckpt_sys::syscall!(
                libc::SYS_open_by_handle_at,
                mount.raw(),
                handle.as_mut_ptr(),
                flags
            )
        });
        if let Ok(fd) = fd {
            let fd = sys::Fd::own(fd as i32);
            let path = sys::path_of(fd.raw()).ok()?;
            if sys::stat(&path).is_ok_and(|st| st.st_ino == ino) {
                return Some(path);
            }
        }
    }
    None
}

/// Looks for an inode among the paths that the program has to do with: hints,
/// the working directory, open files, all directories above these, and the
/// entries of those directories.
#[derive(Default)]
struct PathSearch {
    near: Vec<Vec<u8>>,
}

/// Directories are listed up to this many entries in all.
const MAX_ENTRIES: usize = 50_000;

impl PathSearch {
    fn find(&mut self, c: &Collector, ino: u64, dev: u64) -> Option<Vec<u8>> {
        let is_it =
            |path: &[u8]| sys::stat(path).is_ok_and(|st| st.st_ino == ino && st.st_dev == dev);
        if self.near.is_empty() {
            self.near = near_paths(c);
        }
        if let Some(path) = self.near.iter().find(|p| is_it(p)) {
            return Some(path.clone());
        }
        let mut budget = MAX_ENTRIES;
        for dir in &self.near {
            let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NONBLOCK;
            let Ok(fd) = sys::open(dir, flags, 0) else {
                continue;
            };
            for name in sys::list_dir(fd.raw()).unwrap_or_default() {
                if budget == 0 {
                    return None;
                }
                budget -= 1;
                let path = match &dir[..] {
                    b"/" => [b"/", &name[..]].concat(),
                    _ => [&dir[..], b"/", &name[..]].concat(),
                };
                if is_it(&path) {
                    return Some(path);
                }
            }
        }
        None
    }
}

fn near_paths(c: &Collector) -> Vec<Vec<u8>> {
    let mut starts = c.target.path_hints.clone();
    let cwd = format!("/proc/self/task/{}/cwd\0", c.target.tid);
    starts.extend(sys::readlinkat(libc::AT_FDCWD, cwd.as_bytes()));
    starts.extend(
        c.raws
            .iter()
            .filter(|r| r.link.starts_with(b"/"))
            .map(|r| r.link.clone()),
    );
    starts.push(b"/tmp".to_vec());
    let mut seen = BTreeSet::new();
    let mut near = Vec::new();
    for mut path in starts {
        while path.starts_with(b"/") && seen.insert(path.clone()) {
            near.push(path.clone());
            let slash = path.iter().rposition(|&b| b == b'/').unwrap_or(0);
            path.truncate(slash.max(1));
        }
    }
    near
}
