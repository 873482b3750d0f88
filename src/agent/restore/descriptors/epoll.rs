//! Epoll sets. Part of [`super::restore`], after everything they watch is at its
//! number.
//!
//! Edges: adding an entry with EPOLLET raises an event when its file is ready. A
//! spurious edge is allowed, a lost one is not. Edges that had been consumed at the
//! stop, of files that come back exactly as they were, are consumed here too; all
//! others stay raised.
//! One-shot entries that have fired are made to fire again where their file lets
//! them, and are otherwise armed for errors only.

use super::{RestoreError, Restorer};
use crate::agent::collect::descriptors::sys::{self, Fd};
use crate::image::state::{EpollEntry, FileKind, SocketRole};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;

const EPOLLET: u32 = 1 << 31;
const EPOLLONESHOT: u32 = 1 << 30;
const EPOLLWAKEUP: u32 = 1 << 29;
const EPOLLEXCLUSIVE: u32 = 1 << 28;
/// What stays of an entry's events when it has fired once for all.
const PRIVATE: u32 = EPOLLET | EPOLLONESHOT | EPOLLWAKEUP | EPOLLEXCLUSIVE;

pub(super) fn create(r: &Restorer, file: usize) -> Result<Fd, RestoreError> {
    // SAFETY: no memory is involved.
    check(unsafe { syscall!(libc::SYS_epoll_create1, libc::EPOLL_CLOEXEC) })
        .map(|fd| Fd::own(fd as i32))
        .map_err(|e| r.fail(file, "epoll set", e))
}

/// Adds the entries of every set.
pub(super) fn fill(r: &mut Restorer) -> Result<(), RestoreError> {
    for file in 0..r.table.files.len() {
        let FileKind::Epoll { entries } = &r.state(file).kind else {
            continue;
        };
        let Some(&number) = r.numbers[file].first() else {
            continue;
        };
        // An entry's number may be this set's own (closed since, then reused).
        let set = sys::dup_above(number, 0).map_err(|e| r.fail(file, "epoll set", e))?;
        let set = r.park(Fd::own(set))?;
        let (edges, levels): (Vec<_>, Vec<_>) = entries.iter().partition(|e| quiet(r, e));
        let (fired, rest): (Vec<_>, Vec<_>) = levels
            .into_iter()
            .partition(|e| e.events & EPOLLONESHOT != 0 && e.events & !PRIVATE == 0);
        for entry in fired {
            add_fired(r, file, &set, entry)?;
        }
        for entry in &edges {
            with_number(r, file, entry, |fd| {
                control(&set, libc::EPOLL_CTL_ADD, fd, entry, entry.events)
            })?;
        }
        if !edges.is_empty() {
            while wait_now(&set) > 0 {}
        }
        for entry in rest {
            with_number(r, file, entry, |fd| {
                control(&set, libc::EPOLL_CTL_ADD, fd, entry, entry.events)
            })?;
        }
    }
    Ok(())
}

/// Edge-triggered, its edge consumed, and its file is exactly as it was: a pipe or
/// connection with both ends here, an eventfd.
fn quiet(r: &Restorer, entry: &EpollEntry) -> bool {
    let et_only = entry.events & (EPOLLET | EPOLLONESHOT) == EPOLLET;
    et_only
        && entry.spent
        && match &r.state(entry.file as usize).kind {
            FileKind::EventFd { .. } => true,
            FileKind::Pipe { pipe, .. } => {
                let side = |want: bool| {
                    r.table.files.iter().any(|f| {
                        matches!(&f.kind, FileKind::Pipe { pipe: p, .. } if p == pipe)
                            && (f.flags as i32 & libc::O_ACCMODE != libc::O_RDONLY) == want
                    })
                };
                side(true) && side(false)
            }
            FileKind::Socket(s) => matches!(s.role, SocketRole::Pair { .. }),
            _ => false,
        }
}

fn control(set: &Fd, op: i32, fd: i32, entry: &EpollEntry, events: u32) -> Result<(), i32> {
    let mut event = libc::epoll_event {
        events,
        u64: entry.data,
    };
    // SAFETY: a live event.
    check(unsafe { syscall!(libc::SYS_epoll_ctl, set.raw(), op, fd, &raw mut event) }).map(drop)
}

fn wait_now(set: &Fd) -> usize {
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
    // SAFETY: room for 64 events.
    check(unsafe { syscall!(libc::SYS_epoll_wait, set.raw(), events.as_mut_ptr(), 64, 0) })
        .unwrap_or(0)
}

/// Runs `action` while the entry's file is at the entry's number, which may be
/// closed or another file's by now.
fn with_number(
    r: &Restorer,
    file: usize,
    entry: &EpollEntry,
    action: impl FnOnce(i32) -> Result<(), i32>,
) -> Result<(), RestoreError> {
    let fail = |e: i32| r.fail(file, "epoll set: add an entry", e);
    let there = r.wanted.get(&entry.fd);
    if there.is_some_and(|d| d.file == entry.file) {
        return action(entry.fd).map_err(fail);
    }
    let watched = r.first(entry.file as usize);
    let aside = match there {
        Some(_) => Some(r.park(Fd::own(sys::dup_above(entry.fd, 0).map_err(fail)?))?),
        None => None,
    };
    sys::dup3(watched, entry.fd, true).map_err(fail)?;
    let result = action(entry.fd).map_err(fail);
    match (aside, there) {
        (Some(aside), Some(d)) => {
            sys::dup3(aside.raw(), entry.fd, d.cloexec).map_err(fail)?;
        }
        _ => sys::close(entry.fd),
    }
    result
}

/// An EPOLLONESHOT entry that has fired: fire it, or leave it armed for errors,
/// which cannot be masked.
fn add_fired(r: &Restorer, file: usize, set: &Fd, entry: &EpollEntry) -> Result<(), RestoreError> {
    let any = (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLPRI | libc::EPOLLRDHUP) as u32;
    with_number(r, file, entry, |fd| {
        control(set, libc::EPOLL_CTL_ADD, fd, entry, entry.events | any)?;
        // Only fired entries are in the set so far: what comes is one of them.
        if wait_now(set) == 0 {
            control(set, libc::EPOLL_CTL_MOD, fd, entry, entry.events)?;
            wait_now(set);
        }
        Ok(())
    })
}
