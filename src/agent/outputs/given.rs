//! The regular files that a start was given to write: which of them are outputs even when the
//! program has closed them, and writing to one that only whoever gave it may open.
//!
//! Constructor, and the helper at a rollback.

use crate::agent::settings::{GivenOutput, Settings};
use crate::persist::Id;
use rustix::fs::OFlags;
use std::os::fd::{BorrowedFd, OwnedFd};

/// The regular file, open for writing, that there is at a number, and its size.
pub fn written(fd: i32) -> Option<(Id, u64)> {
    // SAFETY: only asked about; a number that is not open gives an error.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let stat = rustix::fs::fstat(borrowed).ok()?;
    let flags = rustix::fs::fcntl_getfl(borrowed).ok()?;
    let writable = flags & OFlags::ACCMODE != OFlags::RDONLY && !flags.contains(OFlags::PATH);
    let regular = stat.st_mode & libc::S_IFMT == libc::S_IFREG;
    let id = Id {
        dev: stat.st_dev,
        ino: stat.st_ino,
    };
    (writable && regular).then_some((id, stat.st_size as u64))
}

/// The files without contents among what the process was started with: a shell's `>` leaves them
/// so. What is handed down with contents (somebody's log) is nobody's output once it is closed.
pub fn empty_now(inherited: &[(i32, u64, u64)]) -> Vec<GivenOutput> {
    let mut outputs = Vec::new();
    for &(fd, ..) in inherited {
        if let Some((id, 0)) = written(fd) {
            add(&mut outputs, fd, id);
        }
    }
    outputs
}

/// Those of a start that goes on from a checkpoint: also what a recovery has filled, or found
/// to be an output's.
pub fn with_filled(start: &Settings, filled: &[(u64, u64)]) -> Vec<GivenOutput> {
    let mut outputs = start.outputs.clone();
    for &(fd, dev, ino) in &start.inherited {
        if filled.contains(&(dev, ino)) {
            add(&mut outputs, fd, Id { dev, ino });
        }
    }
    outputs
}

fn add(outputs: &mut Vec<GivenOutput>, fd: i32, Id { dev, ino }: Id) {
    let link = format!("/proc/thread-self/fd/{fd}");
    let known = outputs.iter().any(|o| (o.dev, o.ino) == (dev, ino));
    if let (false, Ok(path)) = (known, rustix::fs::readlink(link, Vec::new())) {
        let path = path.into_bytes();
        outputs.push(GivenOutput { dev, ino, path });
    }
}

/// A descriptor for writing to this file, of what the start was given: for one that the user
/// may not open. `inherited`: the descriptors of the start; `copy` makes one ours.
pub fn lend(
    inherited: &[(i32, u64, u64)],
    id: Id,
    copy: &dyn Fn(i32) -> Option<OwnedFd>,
) -> Option<OwnedFd> {
    use std::os::fd::AsRawFd;
    let of_it = inherited.iter().filter(|i| (i.1, i.2) == (id.dev, id.ino));
    let copies = of_it.filter_map(|&(fd, ..)| copy(fd));
    let mut good = copies.filter(|fd| written(fd.as_raw_fd()).is_some_and(|(now, _)| now == id));
    good.next()
}

/// A duplicate of a descriptor of this very process.
pub fn duplicate(fd: i32) -> Option<OwnedFd> {
    // SAFETY: only asked to be duplicated; a number that is not open gives an error.
    let given = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_dupfd_cloexec(given, 0).ok()
}
