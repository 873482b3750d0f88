//! Rollback: descriptors of the checkpoint that are open still stay open. Part of
//! [`super::restore`].
//!
//! The terminal, a pipe to another program and a connection cannot be opened again, and a
//! file that is left alone need not be where it was. An open file description counts as
//! the one of the checkpoint when it is of the same object with the same access; each is
//! used once. Pipes, eventfds and the like between parts of the program are made
//! anew with their contents.

use super::{InheritedFd, RestoreError, Restorer, regular, tty};
use crate::agent::collect::descriptors::fdinfo;
use crate::agent::collect::descriptors::sys;
use crate::agent::procfs;
use crate::agent::settings;
use crate::image::state::{FileKind, LockKind, SocketRole};
use crate::persist::exclude;
use std::os::fd::RawFd;

const TIOCGPTN: u64 = 0x8004_5430;
const KCMP_FILE: i32 = 0;
const F_SETSIG: i32 = 10;
/// Linux 6.10.
const F_DUPFD_QUERY: i32 = 1024 + 3;
/// What may differ: it is set.
const SETTABLE: i32 =
    libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME | libc::O_ASYNC;

/// A descriptor that is open now.
struct Present {
    fd: RawFd,
    stat: libc::stat,
    link: Vec<u8>,
    flags: i32,
    /// Stands for a description of the checkpoint already.
    used: bool,
}

/// Sets aside, for each description of the checkpoint, what is open of it.
pub(super) fn take(r: &mut Restorer) -> Result<(), RestoreError> {
    let mut present = all(r);
    take_given(r, &mut present)?;
    for file in 0..r.table.files.len() {
        if r.numbers[file].is_empty() {
            continue;
        }
        let Some(at) = find(r, file, &present) else {
            continue;
        };
        let fd = present[at].fd;
        for other in &mut present {
            other.used |= same_description(fd, other.fd);
        }
        for number in std::mem::take(&mut r.numbers[file]) {
            let aside = r.set_aside(fd)?;
            r.sources.insert(number, aside);
        }
    }
    Ok(())
}

/// What this life was started with where the life of the checkpoint had something else: as at
/// the recovery in between, or at the start from a template, the numbers take what is here. Also
/// where the program has moved it to another number since.
fn take_given(r: &mut Restorer, present: &mut [Present]) -> Result<(), RestoreError> {
    let given = settings::get().map_or(&[][..], |s| &s.inherited);
    for file in 0..r.table.files.len() {
        let numbers = r.numbers[file].clone();
        let at = |&number: &RawFd| {
            let of_number = |g: &&(i32, u64, u64)| g.0 == number && r.wanted[&number].inherited;
            let &(_, dev, ino) = given.iter().find(of_number)?;
            let it = |p: &Present| (p.stat.st_dev, p.stat.st_ino) == (dev, ino);
            let at_number = present.iter().position(|p| p.fd == number && it(p));
            let found = at_number.or_else(|| present.iter().position(it))?;
            is_another(r, file, &present[found]).then_some(found)
        };
        let Some(first) = numbers.iter().find_map(at) else {
            continue;
        };
        // A duplicate made by the program goes with the first.
        let sources: Vec<usize> = numbers.iter().map(|n| at(n).unwrap_or(first)).collect();
        for (number, source) in numbers.into_iter().zip(sources) {
            let fd = present[source].fd;
            let aside = r.set_aside(fd)?;
            r.sources.insert(number, aside);
            r.given.insert(number);
            for other in present.iter_mut() {
                other.used |= same_description(fd, other.fd);
            }
        }
        r.numbers[file].clear();
    }
    Ok(())
}

/// Is it another object than the description's, and of a kind that follows the start?
fn is_another(r: &Restorer, file: usize, p: &Present) -> bool {
    match &r.state(file).kind {
        FileKind::Regular { dev, ino, .. } => (p.stat.st_dev, p.stat.st_ino) != (*dev, *ino),
        FileKind::Directory { ino, .. } => p.stat.st_ino != *ino,
        FileKind::Inherited { .. } | FileKind::Device { .. } | FileKind::Tty { .. } => {
            !is_same(r, file, p)
        }
        _ => false,
    }
}

/// What is open, but our own.
fn all(r: &Restorer) -> Vec<Present> {
    let flags = libc::O_RDONLY | libc::O_DIRECTORY;
    let Ok(dir) = sys::open(b"/proc/thread-self/fd", flags, 0) else {
        return Vec::new();
    };
    let names = sys::list_dir(dir.raw()).unwrap_or_default();
    let mut present: Vec<Present> = names
        .iter()
        .filter_map(|name| {
            let fd = fdinfo::number(name, 10) as RawFd;
            if fd == dir.raw() || r.ctx.keep.contains(&fd) {
                return None;
            }
            Some(Present {
                fd,
                stat: sys::fstat(fd).ok()?,
                link: sys::path_of(fd).ok()?,
                flags: sys::fcntl(fd, libc::F_GETFL, 0).ok()? as i32,
                used: false,
            })
        })
        .collect();
    present.sort_by_key(|p| p.fd);
    present
}

/// The present descriptor that leads to the description, one of its own numbers if possible.
fn find(r: &Restorer, file: usize, present: &[Present]) -> Option<usize> {
    let fits = |p: &&(usize, &Present)| !p.1.used && is_same(r, file, p.1);
    let candidates: Vec<(usize, &Present)> = present.iter().enumerate().collect();
    let own = |p: &&(usize, &Present)| r.numbers[file].contains(&p.1.fd);
    let at_its_number = candidates.iter().filter(own).find(fits);
    let found = at_its_number.or_else(|| candidates.iter().find(fits));
    found.map(|p| p.0)
}

/// Is it the object of the description, open in the same way?
fn is_same(r: &Restorer, file: usize, p: &Present) -> bool {
    let state = r.state(file);
    let large = libc::O_LARGEFILE | 0o100_000 | libc::O_CLOEXEC;
    if (p.flags ^ state.flags as i32) & !(SETTABLE | large) != 0 {
        return false;
    }
    let id = (p.stat.st_dev, p.stat.st_ino);
    match &state.kind {
        FileKind::Inherited { path, .. } => p.link == *path,
        FileKind::Tty { path, rdev, .. } => p.stat.st_rdev == *rdev && p.link == *path,
        FileKind::Device { path, rdev } => p.stat.st_rdev == *rdev && p.link == *path,
        FileKind::PtyMaster { index, .. } => {
            let mut number = 0u32;
            p.link.ends_with(b"/ptmx")
                && sys::ioctl(p.fd, TIOCGPTN, &mut number).is_ok()
                && number == *index
        }
        FileKind::Regular { path, dev, ino, .. } => {
            let anew = r
                .ctx
                .files
                .replaced
                .iter()
                .any(|(old, _)| *old == (*dev, *ino));
            id == (*dev, *ino) && !anew && !regular::is_redirected(r, path)
        }
        FileKind::Directory { path, ino } => {
            let anew = r.ctx.files.replaced.iter().any(|(old, _)| old.1 == *ino);
            id.1 == *ino && p.link == *path && !anew && !regular::is_redirected(r, path)
        }
        // With both ends here it is made again with its contents.
        FileKind::Pipe { pipe, .. } => {
            let fifo = p.stat.st_mode & libc::S_IFMT == libc::S_IFIFO;
            fifo && id.1 == *pipe && users(r, *pipe) == 1
        }
        FileKind::Fifo { path, ino, .. } => id.1 == *ino && p.link == *path && users(r, *ino) == 1,
        FileKind::Socket(s) => {
            let socket = p.stat.st_mode & libc::S_IFMT == libc::S_IFSOCK && id.1 == s.ino;
            socket
                && match s.role {
                    SocketRole::Outside => true,
                    // With connections of our own in its queue it is made again with them.
                    SocketRole::Listening { .. } => !has_queue(r, s.ino),
                    _ => false,
                }
        }
        _ => false,
    }
}

/// Open file descriptions of a pipe in the image.
fn users(r: &Restorer, ino: u64) -> usize {
    let of_it = |kind: &FileKind| match kind {
        FileKind::Pipe { pipe, .. } => *pipe == ino,
        FileKind::Fifo { ino: fifo, .. } => *fifo == ino,
        _ => false,
    };
    let files = r.table.files.iter();
    files.filter(|file| of_it(&file.kind)).count()
}

fn has_queue(r: &Restorer, ino: u64) -> bool {
    let of_it = |kind: &FileKind| match kind {
        FileKind::Socket(s) => s.role == SocketRole::Queued { listener_ino: ino },
        _ => false,
    };
    r.table.files.iter().any(|file| of_it(&file.kind))
}

/// Do both numbers lead to one open file description? Where nobody tells: yes, so that
/// none is used twice.
fn same_description(a: RawFd, b: RawFd) -> bool {
    // SAFETY: no arguments.
    let tid = unsafe { ckpt_sys::syscall!(libc::SYS_gettid) } as i32;
    if a == b {
        return true;
    }
    match sys::kcmp(tid, KCMP_FILE, a, b as usize) {
        Ok(order) => order == 0,
        Err(_) => match sys::fcntl(a, F_DUPFD_QUERY, b as usize) {
            Ok(same) => same == 1,
            Err(_) => {
                let id = |fd| sys::fstat(fd).map(|st| (st.st_dev, st.st_ino));
                id(a) == id(b)
            }
        },
    }
}

/// Puts them at their numbers, once everything else is closed.
pub(super) fn place(r: &mut Restorer) -> Result<(), RestoreError> {
    let sources = std::mem::take(&mut r.sources);
    let mut adapted = vec![false; r.table.files.len()];
    for (&fd, &aside) in &sources {
        let d = r.wanted[&fd];
        let file = d.file as usize;
        sys::dup3(aside, fd, d.cloexec).map_err(|e| RestoreError::Number {
            fd,
            reason: sys::errno_text(e),
        })?;
        if r.given.contains(&fd) {
            r.adapt_source(fd, file);
            not_behind_the_end(fd);
            continue;
        }
        r.made[file] = true;
        if !std::mem::replace(&mut adapted[file], true) {
            adapt(r, fd, file);
        }
        if d.inherited
            && let Ok(st) = sys::fstat(fd)
        {
            r.out.inherited.push(InheritedFd {
                fd,
                dev: st.st_dev,
                ino: st.st_ino,
            });
        }
    }
    for aside in sources.into_values() {
        sys::close(aside);
    }
    Ok(())
}

/// An output of this start has been made shorter: no hole.
fn not_behind_the_end(fd: RawFd) {
    if let (Ok(st), Ok(at)) = (sys::fstat(fd), sys::lseek(fd, 0, libc::SEEK_CUR))
        && st.st_mode & libc::S_IFMT == libc::S_IFREG
        && at as i64 > st.st_size
    {
        let _ = sys::lseek(fd, 0, libc::SEEK_END);
    }
}

/// Position, flags, modes and locks as they were.
fn adapt(r: &mut Restorer, fd: RawFd, file: usize) {
    let state = r.state(file);
    let have = sys::fcntl(fd, libc::F_GETFL, 0).unwrap_or(0) as i32;
    let want = state.flags as i32 & SETTABLE;
    if have & SETTABLE != want && have & libc::O_PATH == 0 {
        let flags = have & !SETTABLE | want;
        let _ = sys::fcntl(fd, libc::F_SETFL, flags as u32 as usize);
    }
    // Only where signals can be meant it is known whose they were (`collect::descriptors`).
    if matches!(state.kind, FileKind::Socket(_)) || want & libc::O_ASYNC != 0 {
        let _ = sys::fcntl(fd, F_SETSIG, 0);
        let _ = sys::fcntl(fd, libc::F_SETOWN, 0);
        r.set_owner(file, fd);
    }
    match &state.kind {
        FileKind::Regular { .. } | FileKind::Directory { .. } if have & libc::O_PATH == 0 => {
            if !goes_on(fd, have) {
                let _ = sys::lseek(fd, state.pos, libc::SEEK_SET);
            }
            unlock(r, fd, file);
        }
        FileKind::Inherited { termios, .. } => {
            // A file that somebody else has opened, say.
            if state.pos != 0 && !goes_on(fd, have) {
                let _ = sys::lseek(fd, state.pos, libc::SEEK_SET);
            }
            tty::set_modes(fd, termios);
        }
        FileKind::Tty { termios, .. } => tty::set_modes(fd, termios),
        FileKind::PtyMaster {
            termios, winsize, ..
        } => {
            tty::set_modes(fd, termios);
            tty::set_size(fd, winsize);
        }
        _ => {}
    }
}

/// An output that is excluded keeps what was written to it, so the program goes on behind
/// that: at the old position it would write over it.
fn goes_on(fd: RawFd, flags: i32) -> bool {
    let name = format!("/proc/self/fd/{fd}");
    flags & libc::O_ACCMODE == libc::O_WRONLY
        && procfs::read_link(name.as_bytes()).is_ok_and(|path| exclude::is_excluded(&path))
}

/// Locks that were taken since; those of the checkpoint are taken at the end.
fn unlock(r: &Restorer, fd: RawFd, file: usize) {
    // SAFETY: all-zero is a valid lock: from the beginning to the end.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_UNLCK as i16;
    let at = &raw mut lock as usize;
    let _ = sys::fcntl(fd, libc::F_SETLK, at);
    let _ = sys::fcntl(fd, libc::F_OFD_SETLK, at);
    let held = r.table.locks.iter().any(|lock| {
        let same_file = r
            .wanted
            .get(&lock.fd)
            .is_some_and(|d| d.file as usize == file);
        lock.kind == LockKind::Flock && same_file
    });
    if !held {
        // SAFETY: no memory is involved.
        unsafe { ckpt_sys::syscall!(libc::SYS_flock, fd, libc::LOCK_UN) };
    }
}
