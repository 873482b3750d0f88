//! How memory is brought back: what stays mapped as it is (at a rollback), what is mapped from
//! the images and what is read.
//!
//! Constructor of the new process, or the leader at a rollback, as [`super::restore`].

use super::carried::Carried;
use super::stay::{self, Stay};
use super::{Inside, ahead, layout, method, tape};
use crate::agent::collect::descriptors::sys;
use crate::agent::resume::Payload;
use crate::agent::{log, procfs};
use crate::config::RestoreMethod;
use crate::image::chain::Sourced;
use crate::image::state::Manifest;
use crate::store::RawFs;
use crate::store::working_set::WorkingSet;
use std::os::fd::{BorrowedFd, RawFd};
use std::path::Path;

/// What the decision depends on.
pub struct How<'a> {
    pub method: RestoreMethod,
    /// Contents may stay mapped (they are not unpacked ones).
    pub mappable: bool,
    /// The job's directory.
    pub job: &'a Path,
    /// The vdso of the image is led to another one: all is mapped anew then.
    pub leads_vdso: bool,
}

pub struct Memory {
    pub options: tape::Options,
    /// For each area of the manifest.
    pub contents: Vec<layout::Contents>,
    /// What stays mapped; the manifest's memory is the rest then.
    pub stay: Option<Stay>,
    /// What the last life touched.
    pub before: Option<WorkingSet>,
}

pub fn decide(
    manifest: &mut Manifest,
    pieces: &[Sourced],
    carried: &Carried,
    how: How<'_>,
    mut inside: Option<&mut Inside>,
    payload: &mut Payload,
) -> Memory {
    let stay = inside
        .as_mut()
        .filter(|_| !how.leads_vdso)
        .and_then(|inside| what_stays(inside, manifest, pieces, carried.watching, payload));
    let areas = inside.is_some().then(|| manifest.memory.vmas.clone());
    let pieces = match &stay {
        Some(stay) => {
            // From here on memory means what is to be made.
            manifest.memory.vmas.clone_from(&stay.areas);
            payload.watching = carried.watching;
            payload.kept = Some(stay.kept.clone());
            &stay.pieces
        }
        None => pieces,
    };
    let before = WorkingSet::read(&RawFs, how.job);
    let choice = if pieces.is_empty() {
        method::NOTHING
    } else {
        // SAFETY: open until the restorer closes them.
        let borrow = |&fd: &RawFd| unsafe { BorrowedFd::borrow_raw(fd) };
        let files: Vec<_> = carried.needed_images().map(borrow).collect();
        method::choose(how.method, pieces, &files, before.as_ref())
    };
    let lazy = choice.lazy && how.mappable;
    if lazy && choice.cold {
        ahead::at_once(pieces, before.as_ref(), &carried.images);
    }
    log::line(format_args!(
        "memory is {} ({}), {} images, {} pieces",
        if lazy { "mapped" } else { "read" },
        if how.mappable { choice.why } else { "unpacked" },
        carried.needed_images().count(),
        pieces.len(),
    ));
    let mut options = tape::Options {
        lazy,
        cold: lazy && choice.cold,
        collapse: false,
        noexec: false,
        max_maps: 65530,
        huge_pages: (0, 0),
        image_fds: carried.images.clone(),
        held: carried.held.clone(),
    };
    // Where all memory stays mapped nobody wants to know.
    if !manifest.memory.vmas.is_empty() {
        options.collapse = !manifest.process.thp_disable && huge_pages_allowed();
        options.noexec = is_noexec(carried.image());
        let limit = read_number(b"/proc/sys/vm/max_map_count");
        options.max_maps = limit.unwrap_or(options.max_maps);
        options.huge_pages = huge_pages();
    }
    if !options.cold {
        payload.flags = areas.unwrap_or_default();
    }
    let contents = tape::plan(manifest, pieces, &options);
    Memory {
        options,
        contents,
        stay,
        before,
    }
}

/// What a rollback need not map anew, where a tracker knows what has changed.
fn what_stays(
    inside: &mut Inside,
    manifest: &Manifest,
    pieces: &[Sourced],
    watching: Option<RawFd>,
    payload: &Payload,
) -> Option<Stay> {
    let mut pages = inside.pages.take()?;
    // A copy: the descriptor itself goes on to the next life.
    let copy = watching.map(|fd| sys::dup_above(fd, 0)).transpose().ok()?;
    let moved = pages.tracker.moved(copy.map(procfs::OwnFd::from_raw));
    moved.ok()?;
    stay::look(pages, manifest, pieces, &payload.store_root, inside.rseq.0)
}

/// The administrator has not forbidden transparent huge pages.
fn huge_pages_allowed() -> bool {
    let path = b"/sys/kernel/mm/transparent_hugepage/enabled";
    procfs::read_file(path).is_ok_and(|text| !text.windows(7).any(|w| w == b"[never]"))
}

pub fn read_number(path: &[u8]) -> Option<u64> {
    procfs::read_file(path)
        .ok()
        .and_then(|t| procfs::number(&t))
        .map(|n| n as u64)
}

/// The size of a huge page and how many are free.
fn huge_pages() -> (u64, u64) {
    let text = procfs::read_file(b"/proc/meminfo").unwrap_or_default();
    let number = |key| {
        let value = procfs::field(&text, key).and_then(procfs::number);
        value.unwrap_or(0) as u64
    };
    let reserved = number("HugePages_Rsvd");
    let free = number("HugePages_Free").saturating_sub(reserved);
    (number("Hugepagesize") << 10, free)
}

fn is_noexec(fd: i32) -> bool {
    // SAFETY: all-zero is a valid statfs buffer; the kernel fills it.
    unsafe {
        let mut st: libc::statvfs = std::mem::zeroed();
        libc::fstatvfs(fd, &mut st) == 0 && st.f_flag & libc::ST_NOEXEC != 0
    }
}
