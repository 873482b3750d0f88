//! The memory map: /proc/self/maps -> what must be saved and how.
//!
//! [`collect`] parses the map: while the program runs (pre-copy) and once more while it is
//! stopped. Then what would change under a writer (shared memory) or what a forked one
//! would not see (ranges with MADV_DONTFORK or MADV_WIPEONFORK) is copied. VmFlags are
//! read before the stop or by the writer; joining of neighbours is the writer's.
//!
//! Here: the plan, and what is done with the whole of it. `lines` reads the text, `pieces` says
//! what a mapping is, `flags` has VmFlags.

mod flags;
mod lines;
mod pieces;

use crate::agent::collect::unfrozen::{Copier, Outlet};
use crate::agent::hooks;
use crate::agent::procfs::{self, read_file};
use crate::agent::region;
use crate::agent::side::SideBuffer;
use crate::agent::snapshot::contents::{Contents, Spaced};
use crate::agent::track;
use crate::image::state::{
    Extent, MemoryState, ObjectSpace, SharedObject, VmaKind, VmaState, vma_flag,
};
use lines::{Line, lines};
use std::sync::atomic::{AtomicBool, Ordering};

pub const PAGE: u64 = 4096;
/// User addresses end here (47 bits, one guard page).
pub const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// How the pages of a piece are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Pages that exist and are not the file's own: PAGEMAP_SCAN.
    Scan,
    /// Every page: a mapping of an older image, which is all content.
    All,
    /// Every page that can be read: a mapping of a deleted file that is not open, or of our cache.
    Readable,
    /// Copied into the side buffer during the stop.
    Copied,
    /// None: contents belong to a file or to a shared object.
    Nothing,
}

/// A line of the map.
#[derive(Debug, Clone)]
pub struct Piece {
    pub vma: VmaState,
    pub how: How,
}

/// Everything the writer needs to write the memory.
#[derive(Debug, Default, Clone)]
pub struct Plan {
    pub pieces: Vec<Piece>,
    pub shared: Vec<SharedObject>,
    /// The spaces in which contents of objects will lie (`snapshot::contents`), and those that
    /// have got them.
    pub objects: Vec<Spaced>,
    pub spaces: Vec<ObjectSpace>,
    /// Pages copied during the stop; `Extent::offset` counts from the buffer's start.
    pub copied: Vec<Extent>,
    /// Guard regions, as `(address, pages)`.
    pub guarded: Vec<(u64, u64)>,
    pub vvar_start: u64,
    pub vdso_start: u64,
    pub vdso_end: u64,
    /// Everything that is mapped, ours as well.
    pub mapped: Vec<(u64, u64)>,
    flags_known: bool,
    /// By piece: smaps has a line for it.
    seen: Vec<bool>,
}

/// Why the memory cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("cannot read the memory map: errno {0}")]
    Maps(i32),
    #[error("the program maps {0}, which cannot be saved")]
    Device(String),
    #[error("the program maps {0}, which was unlinked under that name but has other names")]
    OtherNames(String),
    #[error("cannot read shared memory at {addr:#x}: errno {errno}")]
    Shared { addr: u64, errno: i32 },
}

/// What decides between our own files and the program's.
pub struct Own<'a> {
    /// Directory of this job's images, ending in '/'.
    pub store: &'a [u8],
    /// Is this path in the call-site cache?
    pub is_cache: fn(&[u8]) -> bool,
}

/// Parses the map of this process. Own ranges are cut out (never matched by start:
/// the kernel joins them with neighbours).
pub fn collect(own: &Own<'_>) -> Result<Plan, MemoryError> {
    let mut open: Option<Vec<(u64, u64)>> = None;
    collect_with(own, &mut |dev, ino| {
        let open = open.get_or_insert_with(procfs::open_without_name);
        open.contains(&(dev, ino))
    })
}

/// As [`collect`]; `is_open` says whether a file without a name (device, inode) comes back with a
/// descriptor, so that a private mapping of it can be one again.
pub fn collect_with(
    own: &Own<'_>,
    is_open: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Plan, MemoryError> {
    let text = read_file(b"/proc/thread-self/maps").map_err(MemoryError::Maps)?;
    let mut plan = Plan::default();
    let mut comes_back = |line: &Line<'_>| is_open(line.dev, line.ino);
    for line in lines(&text) {
        if line.start >= TASK_SIZE {
            continue; // [vsyscall]
        }
        plan.mapped.push((line.start, line.end));
        if line.name == b"[vdso]" {
            (plan.vdso_start, plan.vdso_end) = (line.start, line.end);
            continue;
        }
        if line.name.starts_with(b"[vvar") {
            if plan.vvar_start == 0 {
                plan.vvar_start = line.start;
            }
            continue;
        }
        let mut at = line.start;
        for (from, to) in region::own_ranges() {
            if to <= at || from >= line.end {
                continue;
            }
            if from > at {
                plan.add(&line, (at, from), own, &mut comes_back)?;
            }
            at = to.min(line.end);
        }
        if at < line.end {
            plan.add(&line, (at, line.end), own, &mut comes_back)?;
        }
    }
    track::mprotect::program_view(&mut plan.pieces);
    // The map does not tell which areas grow down, and trackers must know. Once there can be
    // ones from before the hooks were laid.
    static LOOKED: AtomicBool = AtomicBool::new(false);
    if hooks::memory::grows_down_seen() || !LOOKED.swap(true, Ordering::Relaxed) {
        plan.read_flags();
    }
    Ok(plan)
}

impl Plan {
    /// Joins neighbours that the kernel would join if they were not mapped from
    /// different places: after a lazy restore one range of the program consists of
    /// many mappings, and must not fall apart further from generation to generation.
    pub fn join(&mut self) {
        let mut out: Vec<Piece> = Vec::with_capacity(self.pieces.len());
        for piece in self.pieces.drain(..) {
            if let Some(last) = out.last_mut()
                && last.vma.end == piece.vma.start
                && last.vma.prot == piece.vma.prot
                && last.vma.flags == piece.vma.flags
                && last.vma.kind == piece.vma.kind
                && matches!(piece.vma.kind, VmaKind::Anon | VmaKind::Heap)
            {
                last.vma.end = piece.vma.end;
            } else {
                out.push(piece);
            }
        }
        self.pieces = out;
    }

    /// Copies what the base does not hold of shared objects into `side`, unless `elsewhere`
    /// says that their contents are kept with a descriptor.
    pub fn copy_shared(
        &mut self,
        side: &mut SideBuffer,
        contents: &mut Contents,
        elsewhere: &dyn Fn(u64, u64) -> bool,
    ) -> Result<(), MemoryError> {
        let mut copier = Copier::new(side);
        copier.compare(contents);
        for piece in &mut self.pieces {
            let (start, end) = (piece.vma.start, piece.vma.end);
            if let VmaKind::Shared { object, offset } = &piece.vma.kind {
                let o = &mut self.shared[*object as usize];
                o.size = o.size.max(offset + (end - start));
                if !elsewhere(o.dev, o.ino) {
                    copier.shared((start, end), *offset, o)?;
                }
            }
        }
        Ok(())
    }

    /// Before the stop: what is worth it of shared objects goes to `outlet`.
    pub fn shared_ahead(
        &mut self,
        side: &mut SideBuffer,
        contents: &mut Contents,
        outlet: &mut Outlet<'_>,
    ) -> Result<(), MemoryError> {
        let wanted = |o: &SharedObject| contents.wants_ahead((o.dev, o.ino));
        let wanted: Vec<bool> = self.shared.iter().map(wanted).collect();
        if !wanted.contains(&true) {
            return Ok(());
        }
        let mut copier = Copier::new(side);
        copier.compare(contents);
        copier.ahead(outlet);
        for piece in &self.pieces {
            let range = (piece.vma.start, piece.vma.end);
            if let VmaKind::Shared { object, offset } = &piece.vma.kind
                && wanted[*object as usize]
            {
                copier.shared(range, *offset, &mut self.shared[*object as usize])?;
            }
        }
        Ok(())
    }

    /// Before a fork: copies the private ranges that it drops or wipes, as far as the flags
    /// are known, whole into `side`. `files`: private mappings of files as well.
    pub fn copy_unfrozen(&mut self, side: &mut SideBuffer, files: bool) -> Result<(), MemoryError> {
        let mut copier = Copier::new(side);
        for piece in &mut self.pieces {
            let unfrozen = vma_flag::DONTFORK | vma_flag::WIPEONFORK;
            let private = !matches!(piece.how, How::Nothing | How::Copied);
            let of_file = files && piece.how == How::Scan && piece.vma.kind.is_private_file();
            if (piece.vma.flags & unfrozen != 0 || of_file) && private {
                copier.private(piece, &mut self.copied)?;
                piece.how = How::Copied;
            }
        }
        Ok(())
    }

    /// The plan as the manifest's memory state; extents are the writer's.
    pub fn into_state(self, extents: Vec<Extent>) -> MemoryState {
        MemoryState {
            vmas: self.pieces.into_iter().map(|piece| piece.vma).collect(),
            extents,
            shared: self.shared,
            vvar_start: self.vvar_start,
            vdso_start: self.vdso_start,
            vdso_end: self.vdso_end,
            base: None,
            dropped: Vec::new(),
            guarded: self.guarded,
            objects: self.spaces,
        }
    }
}

/// Is this page (or any 8-byte aligned block) all zero?
pub fn is_zero(block: &[u8]) -> bool {
    // SAFETY: any bit pattern is a valid u64.
    let (head, words, tail) = unsafe { block.align_to::<u64>() };
    head.iter().all(|&b| b == 0)
        && words
            .chunks(8)
            .all(|c| c.iter().fold(0, |a, &w| a | w) == 0)
        && tail.iter().all(|&b| b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_map_is_collected_in_order() {
        let own = Own {
            store: b"/nowhere/",
            is_cache: |_| false,
        };
        let mut plan = collect(&own).unwrap();
        plan.read_flags();
        assert!(plan.vdso_start != 0);
        assert!(
            plan.pieces
                .windows(2)
                .all(|w| w[0].vma.end <= w[1].vma.start)
        );
        assert!(
            plan.pieces
                .iter()
                .any(|p| p.vma.kind == VmaKind::Stack && p.vma.flags & vma_flag::GROWSDOWN != 0)
        );
    }

    /// What is mapped of a file without a name is the file's where it is open, else contents.
    #[test]
    fn files_without_a_name_are_asked_for() {
        let own = Own {
            store: b"/nowhere/",
            is_cache: |_| false,
        };
        let name = c"nameless";
        // SAFETY: a file and a mapping of this test.
        unsafe {
            let fd = libc::memfd_create(name.as_ptr(), 0);
            assert!(fd >= 0 && libc::ftruncate(fd, 2 * PAGE as i64) == 0);
            let (prot, flags) = (libc::PROT_READ, libc::MAP_PRIVATE);
            let nowhere = std::ptr::null_mut();
            let at = libc::mmap(nowhere, PAGE as usize, prot, flags, fd, PAGE as i64) as u64;
            let look = || {
                let plan = collect(&own).unwrap();
                let piece = plan.pieces.iter().find(|p| p.vma.start == at).unwrap();
                (piece.vma.kind.clone(), piece.how, plan.shared.len())
            };
            let (kind, how, objects) = look();
            let at_second = matches!(kind, VmaKind::PrivateOf { offset: PAGE, .. });
            assert!(at_second && how == How::Scan && objects > 0, "{kind:?}");
            libc::close(fd);
            let (kind, how, left) = look();
            assert_eq!(
                (kind, how, left),
                (VmaKind::Anon, How::Readable, objects - 1)
            );
            libc::munmap(at as *mut _, PAGE as usize);
        }
    }

    #[test]
    fn zero_pages_are_told_from_others() {
        let mut page = vec![0u8; 4096];
        assert!(is_zero(&page));
        page[4095] = 1;
        assert!(!is_zero(&page));
    }
}
