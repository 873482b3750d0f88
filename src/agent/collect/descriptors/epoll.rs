//! Epoll sets. Called by [`super::collect`] in the helper thread.
//!
//! An entry belongs to a pair (descriptor number, open file description). The
//! number may have been closed or reused while another descriptor keeps the
//! description alive, so the description is looked for by kcmp's
//! `KCMP_EPOLL_TFD`; fdinfo alone cannot tell anonymous inodes apart.
//!
//! Which edges have been consumed is not told by anything but `epoll_wait`. It is
//! asked only when something is ready, and what that consumed is raised again by
//! `EPOLL_CTL_MOD` before the program goes on: see [`find_spent`].

use super::{Collector, Raw, fdinfo, handed, sys, sys::Fd};
use crate::agent::collect::Refusal;
use crate::image::state::{EpollEntry, FileKind};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;

const EPOLLET: u32 = 1 << 31;
const EPOLLONESHOT: u32 = 1 << 30;
const EPOLLEXCLUSIVE: u32 = 1 << 28;
/// More entries than this are not asked about, but taken for not spent.
const ASK_MAX: usize = 4096;
const KCMP_EPOLL_TFD: i32 = 7;

/// `struct kcmp_epoll_slot`.
#[repr(C)]
struct EpollSlot {
    efd: u32,
    tfd: u32,
    toff: u32,
}

pub(super) fn collect(c: &mut Collector, at: usize) -> Result<FileKind, Refusal> {
    let raw = &c.raws[at];
    let mut entries: Vec<EpollEntry> = Vec::new();
    for line in raw.info.lines().filter(|l| l.starts_with(b"tfd:")) {
        let value = |name, base| fdinfo::word(line, name).map_or(0, |v| fdinfo::number(v, base));
        let fd = value("tfd", 10) as i32;
        let toff = entries.iter().filter(|e| e.fd == fd).count() as u32;
        let file = watched(c, raw, fd, toff, value("ino", 16))?;
        entries.push(EpollEntry {
            fd,
            file: file as u32,
            events: value("events", 16) as u32,
            data: value("data", 16),
            spent: false,
        });
    }
    if entries.iter().any(|e| e.events & EPOLLET != 0) {
        let dup = c.duplicate(raw)?;
        if sys::poll_now(dup.raw(), libc::POLLIN) == 0 {
            entries.iter_mut().for_each(|e| e.spent = true);
        } else {
            find_spent(c, dup.raw(), &mut entries);
        }
    }
    Ok(FileKind::Epoll { entries })
}

/// Fires when it is ready, and then not again by itself.
fn is_consumed(entry: &EpollEntry) -> bool {
    entry.events & (EPOLLET | EPOLLONESHOT) != 0
}

/// Marks the entries whose edge has been consumed, though others are ready. Does
/// nothing where what it consumes itself could not surely be raised again.
fn find_spent(c: &Collector, set: i32, entries: &mut [EpollEntry]) {
    let twice = |e: &EpollEntry| entries.iter().filter(|o| o.data == e.data).count() > 1;
    let in_doubt = |e: &EpollEntry| e.events & EPOLLEXCLUSIVE != 0 || is_consumed(e) && twice(e);
    if entries.len() > ASK_MAX || entries.iter().any(in_doubt) {
        return;
    }
    // At a number that none of the entries has.
    let top = entries.iter().map(|e| e.fd).max().unwrap_or(0);
    let Ok(set) = sys::dup_above(set, top + 1).map(Fd::own) else {
        return;
    };
    // An entry is named by the number and the file behind it, in the table of who
    // asks: each file has to be at its number in the helper's table for a moment.
    // Tried for all of them before anything is consumed; one at a time, since two
    // entries may have the same number.
    let consumed = |e: &&EpollEntry| is_consumed(e);
    if entries
        .iter()
        .filter(consumed)
        .any(|e| Borrowed::at(c, e).is_err())
    {
        return;
    }
    let mut events = vec![libc::epoll_event { events: 0, u64: 0 }; entries.len()];
    // SAFETY: room for that many events.
    let Ok(count) = check(unsafe {
        syscall!(
            libc::SYS_epoll_wait,
            set.raw(),
            events.as_mut_ptr(),
            events.len(),
            0
        )
    }) else {
        return;
    };
    for entry in entries.iter_mut().filter(|e| is_consumed(e)) {
        if !events[..count].iter().any(|event| event.u64 == entry.data) {
            entry.spent = true;
            continue;
        }
        let mut event = libc::epoll_event {
            events: entry.events,
            u64: entry.data,
        };
        if let Ok(_at) = Borrowed::at(c, entry) {
            let (modify, fd) = (libc::EPOLL_CTL_MOD, entry.fd);
            // SAFETY: a live event.
            unsafe { syscall!(libc::SYS_epoll_ctl, set.raw(), modify, fd, &raw mut event) };
        }
    }
}

/// A file of the program at the same number in the helper's own table; what the
/// helper has there is set aside meanwhile.
struct Borrowed {
    number: i32,
    aside: Option<i32>,
}

impl Borrowed {
    fn at(c: &Collector, entry: &EpollEntry) -> Result<Borrowed, i32> {
        let lead = *c.lead.get(entry.file as usize).ok_or(libc::EBADF)?;
        let file = handed::copy(c.pidfd.raw(), c.raws[lead].fd)?;
        if file.raw() == entry.fd {
            let number = file.release();
            return Ok(Borrowed {
                number,
                aside: None,
            });
        }
        let aside = match sys::fcntl(entry.fd, libc::F_GETFD, 0) {
            Ok(_) => Some(sys::dup_above(entry.fd, 0)?),
            Err(_) => None,
        };
        let borrowed = Borrowed {
            number: entry.fd,
            aside,
        };
        sys::dup3(file.raw(), entry.fd, true)?;
        Ok(borrowed)
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        match self.aside {
            Some(aside) => {
                let _ = sys::dup3(aside, self.number, true);
                sys::close(aside);
            }
            None => sys::close(self.number),
        }
    }
}

/// The open file description behind the `toff`th entry with number `tfd`.
fn watched(c: &Collector, epoll: &Raw, tfd: i32, toff: u32, ino: u64) -> Result<usize, Refusal> {
    let slot = EpollSlot {
        efd: epoll.fd as u32,
        tfd: tfd as u32,
        toff,
    };
    let slot = &raw const slot as usize;
    // The descriptor of that number first, it nearly always is the one.
    let by_number = c.raws.binary_search_by_key(&tfd, |r| r.fd).ok();
    let leads = c.lead.iter().copied();
    let mut asked = false;
    for at in by_number.into_iter().chain(leads) {
        let raw = &c.raws[at];
        if raw.stat.st_ino != ino {
            continue;
        }
        match sys::kcmp(c.target.tid, KCMP_EPOLL_TFD, raw.fd, slot) {
            Ok(0) => return Ok(raw.file),
            Ok(_) => asked = true,
            // No kcmp here: the number with the right inode has to do.
            Err(_) if by_number == Some(at) => return Ok(raw.file),
            Err(_) => {}
        }
    }
    Err(epoll.refuse_kind(&format!(
        "watches descriptor {tfd}, which {}",
        if asked {
            "has been closed here while another process keeps its file open"
        } else {
            "no longer is the file that was added"
        }
    )))
}
