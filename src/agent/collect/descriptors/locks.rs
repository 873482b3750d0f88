//! File locks held through the program's descriptors, from the `lock:` lines of
//! fdinfo. Called by [`super::collect`] in the helper thread.

use super::{Collector, Raw, fdinfo};
use crate::agent::collect::Refusal;
use crate::image::state::{FileLock, LockKind};

pub(super) fn collect(c: &Collector) -> Result<Vec<FileLock>, Refusal> {
    let mut locks: Vec<FileLock> = Vec::new();
    // What a lock belongs to: the process and inode for POSIX locks, the open
    // file description for the others. Parallel to `locks`.
    let mut owners: Vec<(u64, u64)> = Vec::new();
    for raw in &c.raws {
        for line in raw.info.values("lock") {
            let lock = parse(raw, line)?;
            let owner = match lock.kind {
                LockKind::Posix => (raw.stat.st_dev, raw.stat.st_ino),
                LockKind::Flock | LockKind::Ofd => (u64::MAX, raw.file as u64),
            };
            let same = locks.iter().zip(&owners).position(|(l, o)| {
                let range = (l.start, l.len, l.write) == (lock.start, lock.len, lock.write);
                *o == owner && l.kind == lock.kind && range
            });
            // A write lock needs a descriptor open for writing, and so on.
            let access = raw.access();
            let fits = lock.kind == LockKind::Flock
                || access == libc::O_RDWR
                || (access == libc::O_WRONLY) == lock.write;
            match same {
                Some(known) if fits => {
                    let current = locks[known].fd;
                    let unfit = !fits_fd(c, current, &locks[known]);
                    if unfit {
                        locks[known].fd = raw.fd;
                    }
                }
                Some(_) => {}
                None => {
                    locks.push(lock);
                    owners.push(owner);
                }
            }
        }
    }
    Ok(locks)
}

fn fits_fd(c: &Collector, fd: i32, lock: &FileLock) -> bool {
    let Some(raw) = c.raws.iter().find(|r| r.fd == fd) else {
        return false;
    };
    let access = raw.access();
    lock.kind == LockKind::Flock
        || access == libc::O_RDWR
        || (access == libc::O_WRONLY) == lock.write
}

/// `1: POSIX  ADVISORY  WRITE 1234 fe:00:5678 0 EOF`
fn parse(raw: &Raw, line: &[u8]) -> Result<FileLock, Refusal> {
    let words: Vec<&[u8]> = line
        .split(u8::is_ascii_whitespace)
        .filter(|w| !w.is_empty())
        .collect();
    let [_, kind, _, mode, _, _, start, end, ..] = words[..] else {
        return Err(raw.refuse_kind("has a lock that is not understood"));
    };
    let kind = match kind {
        b"FLOCK" => LockKind::Flock,
        b"POSIX" => LockKind::Posix,
        b"OFDLCK" => LockKind::Ofd,
        b"LEASE" | b"DELEG" | b"ACCESS" => {
            return Err(raw.refuse_kind("has a lease (F_SETLEASE)"));
        }
        _ => return Err(raw.refuse_kind("has a lock of an unknown kind")),
    };
    let start = fdinfo::number(start, 10);
    let len = match end {
        b"EOF" => 0,
        _ => fdinfo::number(end, 10).saturating_sub(start) + 1,
    };
    Ok(FileLock {
        kind,
        write: mode == b"WRITE",
        fd: raw.fd,
        start,
        len,
    })
}
