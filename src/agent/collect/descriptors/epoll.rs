//! Epoll sets. Called by [`super::collect`] in the helper thread.
//!
//! An entry belongs to a pair (descriptor number, open file description). The
//! number may have been closed or reused while another descriptor keeps the
//! description alive, so the description is looked for by kcmp's
//! `KCMP_EPOLL_TFD`; fdinfo alone cannot tell anonymous inodes apart.

use super::{Collector, Raw, fdinfo, sys};
use crate::agent::collect::Refusal;
use crate::image::state::{EpollEntry, FileKind};

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
        });
    }
    let dup = c.duplicate(raw)?;
    let pending = sys::poll_now(dup.raw(), libc::POLLIN) != 0;
    Ok(FileKind::Epoll { entries, pending })
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
