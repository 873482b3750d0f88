//! The tape: the system calls by which the restorer rebuilds the memory image.
//!
//! Prepared here in ordinary Rust, played by the blob once everything else is
//! unmapped (ckpt-sys/blob/restorer.c). Contents are mapped from the image files
//! (lazy) or read (eager, and small or special ranges); `layout` decides which. Before that comes
//! what a rollback does to memory that stays ([`stay`]), behind it what needs the memory ([`process`]).

pub mod process;
pub mod stay;

use super::area::Area;
use super::contents;
use super::layout::{self, Contents, Limits};
use crate::agent::collect::memory::PAGE;
use crate::agent::restore::check::Mapped;
use crate::image::chain::Sourced;
use crate::image::state::{Manifest, SharedKind, VmaKind, VmaState, vma_flag};
use ckpt_sys::blob::{
    OP_COPY, OP_FIXED_RESULT, OP_KEEP_FD, OP_MAY_FAIL, OP_READ_FULL, OP_READV_FULL, TapeOp,
    op_fd_arg,
};

/// Images of a chain that may be mapped at once (`hooks::ranges` knows so many).
const MOST_FILES: usize = 200;
/// Pieces read by one call (UIO_MAXIOV is 1024).
const MOST_PIECES: usize = 512;
/// Runs larger than this are read by a call of their own.
const GATHER_PAGES: u64 = 64;

/// Images that are not in memory: so many pieces are mapped though they are small, since
/// reading a page over a mapping reads the page below it from the disk first.
const MOST_COLD_PIECES: usize = 8000;
/// Bytes of a huge page of anonymous memory.
const HUGE: u64 = 2 << 20;
const MADV_COLLAPSE: u64 = 25;

/// How the image's memory is brought back.
#[derive(Debug, Clone)]
pub struct Options {
    /// Map contents from the images instead of reading them.
    pub lazy: bool,
    /// The images' file system forbids PROT_EXEC.
    pub noexec: bool,
    /// vm.max_map_count.
    pub max_maps: u64,
    /// Bytes of a huge page, and how many are free.
    pub huge_pages: (u64, u64),
    /// Of the chain's images, as `Sourced::file` counts them; -1: not needed. The first one
    /// is the generation's own.
    pub image_fds: Vec<i32>,
    /// Files that are mapped shared and are open already: the tape closes them.
    pub held: Vec<(Mapped, i32)>,
    /// Much of the images must come from the disk.
    pub cold: bool,
    /// Large runs that are read may lie in huge pages.
    pub collapse: bool,
}

#[derive(Debug, Default)]
pub struct Tape {
    pub ops: Vec<TapeOp>,
    /// Ranges that stay mappings of image files: start, end, `vma_flag`s.
    pub mapped: Vec<(u64, u64, u32)>,
    /// For each image that is mapped, its number and an address where it is.
    pub examples: Vec<(u32, u64)>,
    /// Operations that two threads may play at once, in any order.
    pub shared: (usize, usize),
    /// The file that the current descriptor is of, and whether it is open for writing.
    open: Option<(Vec<u8>, bool)>,
}

const PROT_READ: u64 = libc::PROT_READ as u64;
const PROT_WRITE: u64 = libc::PROT_WRITE as u64;

impl Tape {
    fn op(&mut self, nr: i64, flags: u32, arg: [u64; 6]) {
        self.ops.push(TapeOp {
            nr: nr as u32,
            flags,
            arg,
        });
    }

    fn mmap(&mut self, start: u64, len: u64, prot: u64, flags: i32, fd: i64, offset: u64) {
        let flags = (flags | libc::MAP_FIXED) as u64;
        self.op(
            libc::SYS_mmap,
            OP_FIXED_RESULT,
            [start, len, prot, flags, fd as u64, offset],
        );
    }

    fn read(&mut self, fd: i32, addr: u64, len: u64, offset: u64) {
        self.op(
            libc::SYS_pread64,
            OP_READ_FULL,
            [fd as u64, addr, len, offset, 0, 0],
        );
    }

    /// Puts huge pages where contents will fill them. A fresh page of 4 KiB costs more than
    /// to read it; MADV_COLLAPSE, other than MADV_HUGEPAGE, leaves no mark in the mapping. It
    /// wants one page that is there already.
    fn huge_pages(&mut self, pieces: &[Sourced], options: &Options) {
        let mut at = 0;
        while at < pieces.len() {
            let mut last = at;
            while last + 1 < pieces.len() && pieces[last + 1].addr == pieces[last].end() {
                last += 1;
            }
            let start = pieces[at].addr.next_multiple_of(HUGE);
            let end = pieces[last].end() / HUGE * HUGE;
            let mut block = start;
            while block < end {
                while pieces[at].end() <= block {
                    at += 1;
                }
                let piece = &pieces[at];
                let fd = options.image_fds[piece.file as usize];
                self.read(fd, block, PAGE, piece.offset + (block - piece.addr));
                block += HUGE;
            }
            if start < end {
                let arg = [start, end - start, MADV_COLLAPSE, 0, 0, 0];
                self.op(libc::SYS_madvise, OP_MAY_FAIL, arg);
            }
            at = last + 1;
        }
    }

    /// Reads pieces into memory that is mapped; small ones that lie side by side in a file
    /// are read by one call.
    fn contents(&mut self, pieces: &[Sourced], options: &Options, area: &mut Area) {
        let mut small: Vec<&Sourced> = Vec::with_capacity(pieces.len());
        self.ops.reserve(pieces.len());
        for piece in pieces {
            if piece.npages > GATHER_PAGES {
                let fd = options.image_fds[piece.file as usize];
                self.read(fd, piece.addr, piece.npages * PAGE, piece.offset);
            } else {
                small.push(piece);
            }
        }
        small.sort_by_key(|piece| (piece.file, piece.offset));
        let mut batch: Vec<[u64; 2]> = Vec::new();
        for (k, piece) in small.iter().enumerate() {
            batch.push([piece.addr, piece.npages * PAGE]);
            let goes_on = small.get(k + 1).is_some_and(|next| {
                next.file == piece.file && next.offset == piece.offset + piece.npages * PAGE
            });
            if goes_on && batch.len() < MOST_PIECES {
                continue;
            }
            let total: u64 = batch.iter().map(|part| part[1]).sum();
            let start = piece.offset + piece.npages * PAGE - total;
            let fd = options.image_fds[piece.file as usize];
            if let [[addr, len]] = batch[..] {
                self.read(fd, addr, len, start);
            } else {
                let at = area.put_slice(&batch);
                let arg = [fd as u64, at, batch.len() as u64, start, 0, 0];
                self.op(libc::SYS_preadv, OP_READV_FULL, arg);
            }
            batch.clear();
        }
    }

    fn map_file(
        &mut self,
        area: &mut Area,
        path: &[u8],
        write: bool,
        vma: &VmaState,
        flags: i32,
        offset: u64,
    ) {
        // One file is mapped several times in a row, mostly.
        if self.open.as_ref() != Some(&(path.to_vec(), write)) {
            self.close_file();
            let at = area.put_path(path);
            let mode = if write { libc::O_RDWR } else { libc::O_RDONLY } | libc::O_CLOEXEC;
            let at_cwd = libc::AT_FDCWD as i64 as u64;
            self.op(
                libc::SYS_openat,
                OP_KEEP_FD,
                [at_cwd, at, mode as u64, 0, 0, 0],
            );
            self.open = Some((path.to_vec(), write));
        }
        let flags = (flags | libc::MAP_FIXED) as u64;
        let arg = [
            vma.start,
            vma.end - vma.start,
            vma.prot as u64,
            flags,
            0,
            offset,
        ];
        self.op(libc::SYS_mmap, OP_FIXED_RESULT | op_fd_arg(4), arg);
    }

    /// New memory in place of what is there: `len` bytes from `content`, which lies in the area.
    pub fn replace(&mut self, start: u64, len: u64, content: u64, prot: i32) {
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        self.mmap(start, len, PROT_READ | PROT_WRITE, anonymous, -1, 0);
        self.op(0, OP_COPY, [start, content, len, 0, 0, 0]);
        self.op(libc::SYS_mprotect, 0, [start, len, prot as u64, 0, 0, 0]);
    }

    fn close_file(&mut self) {
        if self.open.take().is_some() {
            self.op(libc::SYS_close, op_fd_arg(0), [0; 6]);
        }
    }
}

/// May this range be a mapping of the image file? Not where the kernel wants anonymous
/// memory, or where the flag would be lost when the program discards pages.
fn mappable(vma: &VmaState, options: &Options) -> bool {
    let special = vma_flag::WIPEONFORK
        | vma_flag::DONTFORK
        | vma_flag::HUGETLB
        | vma_flag::LOCKED
        | vma_flag::MERGEABLE;
    options.lazy
        && matches!(vma.kind, VmaKind::Anon | VmaKind::Heap)
        && vma.flags & special == 0
        && !(options.noexec && vma.prot & libc::PROT_EXEC as u32 != 0)
}

/// May its memory lie in huge pages? The program may have said no.
fn may_be_huge(vma: &VmaState) -> bool {
    let special = vma_flag::NOHUGEPAGE | vma_flag::HUGETLB | vma_flag::GROWSDOWN;
    matches!(vma.kind, VmaKind::Anon | VmaKind::Heap) && vma.flags & special == 0
}

/// Which contents are mapped and which are read. The map count stays below the limit.
pub fn plan(manifest: &Manifest, pieces: &[Sourced], options: &Options) -> Vec<Contents> {
    let vmas = &manifest.memory.vmas;
    let limits = Limits {
        maps: (options.max_maps * 6 / 10).saturating_sub(vmas.len() as u64) / 2,
        least: if options.cold && pieces.len() <= MOST_COLD_PIECES {
            1
        } else {
            layout::MAP_MIN_PAGES
        },
        first_file: options.image_fds.len().saturating_sub(MOST_FILES) as u32,
    };
    layout::plan(vmas, pieces, |vma| mappable(vma, options), limits)
}

/// Can all ranges of huge pages (MAP_HUGETLB) have such pages again? The kernel lets
/// nobody try: a failed mapping leaves a hole.
fn enough_huge_pages(manifest: &Manifest, options: &Options) -> bool {
    let (size, free) = options.huge_pages;
    let ranges = || {
        let all = manifest.memory.vmas.iter();
        all.filter(|vma| vma.kind == VmaKind::Anon && vma.flags & vma_flag::HUGETLB != 0)
    };
    let wanted: u64 = ranges().map(|vma| vma.end - vma.start).sum();
    size > 0
        && wanted / size <= free
        && ranges().all(|vma| vma.start.is_multiple_of(size) && vma.end.is_multiple_of(size))
}

/// Writes the tape for all memory of the image. `contents`: of each area, from [`plan`];
/// `shared_fd(object)` is a descriptor of a shared object that has been made already.
pub fn memory(
    tape: &mut Tape,
    manifest: &Manifest,
    contents: &[Contents],
    options: &Options,
    area: &mut Area,
    shared_fd: &dyn Fn(usize) -> Option<i32>,
    writable: &dyn Fn(&[u8]) -> bool,
) {
    let huge = if enough_huge_pages(manifest, options) {
        libc::MAP_HUGETLB
    } else {
        0
    };
    for (vma, inside) in manifest.memory.vmas.iter().zip(contents) {
        let (start, len) = (vma.start, vma.end - vma.start);
        let prot = vma.prot as u64;
        let contents_read = !inside.reads.is_empty();
        let noreserve = if vma.flags & vma_flag::NORESERVE != 0 {
            libc::MAP_NORESERVE
        } else {
            0
        };
        let mut anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | noreserve;
        if vma.flags & vma_flag::HUGETLB != 0 {
            anonymous |= huge;
        }
        let open_prot = if contents_read {
            prot | PROT_WRITE
        } else {
            prot
        };
        let mut given = open_prot;
        match &vma.kind {
            VmaKind::Anon | VmaKind::Heap => tape.mmap(start, len, open_prot, anonymous, -1, 0),
            VmaKind::Stack => {
                given = prot | PROT_WRITE;
                tape.mmap(start, len, given, anonymous | libc::MAP_GROWSDOWN, -1, 0);
            }
            VmaKind::FilePrivate { path, offset } => {
                let opened = VmaState {
                    prot: open_prot as u32,
                    ..vma.clone()
                };
                tape.map_file(
                    area,
                    path,
                    false,
                    &opened,
                    libc::MAP_PRIVATE | noreserve,
                    *offset,
                );
            }
            VmaKind::PrivateOf { object, offset } => {
                // `restore` has made sure that there is one.
                let fd = shared_fd(*object as usize).unwrap_or(-1);
                let private = libc::MAP_PRIVATE | noreserve;
                tape.mmap(start, len, open_prot, private, i64::from(fd), *offset);
            }
            VmaKind::FileShared {
                path,
                offset,
                writable: was_writable,
            } => {
                given = prot;
                let mut held = options.held.iter();
                let held = held.find(|((held, write), _)| (held, write) == (path, was_writable));
                if let Some((_, fd)) = held {
                    let shared = libc::MAP_SHARED;
                    tape.mmap(start, len, prot, shared, i64::from(*fd), *offset);
                } else {
                    let write = *was_writable && writable(path);
                    tape.map_file(area, path, write, vma, libc::MAP_SHARED, *offset);
                }
            }
            VmaKind::Shared { object, offset } => match shared_fd(*object as usize) {
                Some(fd) => {
                    given = prot;
                    tape.mmap(start, len, prot, libc::MAP_SHARED, fd as i64, *offset);
                }
                None => {
                    given = prot | PROT_READ | PROT_WRITE;
                    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | noreserve;
                    tape.mmap(start, len, given, flags, -1, 0);
                    for e in &manifest.memory.shared[*object as usize].extents {
                        if e.addr >= *offset && e.addr < *offset + len {
                            let (file, at) = contents::place_of(e);
                            let image = options.image_fds[file];
                            tape.read(image, start + (e.addr - offset), e.npages * PAGE, at);
                        }
                    }
                }
            },
        }
        for m in &inside.maps {
            let fd = options.image_fds[m.file as usize];
            let flags = libc::MAP_PRIVATE | noreserve;
            tape.mmap(m.addr, m.npages * PAGE, given, flags, fd as i64, m.offset);
            if !tape.examples.iter().any(|(file, _)| *file == m.file) {
                // The first page of a strip is its own.
                tape.examples.push((m.file, m.addr));
            }
        }
        let ranges = inside.mapped_ranges();
        if options.cold {
            for &(from, to) in &ranges {
                let random = libc::MADV_RANDOM as u64;
                tape.op(
                    libc::SYS_madvise,
                    OP_MAY_FAIL,
                    [from, to - from, random, 0, 0, 0],
                );
            }
        }
        let ranges = ranges.into_iter().map(|(from, to)| (from, to, vma.flags));
        tape.mapped.extend(ranges);
        if options.collapse && may_be_huge(vma) {
            tape.huge_pages(&inside.reads, options);
        }
        tape.contents(&inside.reads, options, area);
        if given != prot {
            tape.op(libc::SYS_mprotect, 0, [start, len, prot, 0, 0, 0]);
        }
        guard(tape, &manifest.memory.guarded, vma);
        advise(tape, vma);
    }
    tape.close_file();
    // Before locks are taken: closing a descriptor of a file drops them.
    for (_, fd) in &options.held {
        tape.op(libc::SYS_close, OP_MAY_FAIL, [*fd as u64, 0, 0, 0, 0, 0]);
    }
}

/// Guard regions come back. Before the advice: a locked mapping takes none.
fn guard(tape: &mut Tape, guarded: &[(u64, u64)], vma: &VmaState) {
    const GUARD_INSTALL: u64 = 102;
    let first = guarded.partition_point(|&(addr, npages)| addr + npages * PAGE <= vma.start);
    for &(addr, npages) in guarded[first..].iter().take_while(|run| run.0 < vma.end) {
        let (from, to) = (addr.max(vma.start), (addr + npages * PAGE).min(vma.end));
        tape.op(
            libc::SYS_madvise,
            0,
            [from, to - from, GUARD_INSTALL, 0, 0, 0],
        );
    }
}

/// Brings back the VmFlags that madvise(2) and mlock2(2) set.
fn advise(tape: &mut Tape, vma: &VmaState) {
    let advices = [
        (vma_flag::HUGEPAGE, libc::MADV_HUGEPAGE),
        (vma_flag::NOHUGEPAGE, libc::MADV_NOHUGEPAGE),
        (vma_flag::DONTFORK, libc::MADV_DONTFORK),
        (vma_flag::DONTDUMP, libc::MADV_DONTDUMP),
        (vma_flag::WIPEONFORK, libc::MADV_WIPEONFORK),
        (vma_flag::MERGEABLE, libc::MADV_MERGEABLE),
        (vma_flag::RANDOM, libc::MADV_RANDOM),
        (vma_flag::SEQUENTIAL, libc::MADV_SEQUENTIAL),
    ];
    let (start, len) = (vma.start, vma.end - vma.start);
    for (flag, advice) in advices {
        if vma.flags & flag != 0 {
            tape.op(
                libc::SYS_madvise,
                OP_MAY_FAIL,
                [start, len, advice as u64, 0, 0, 0],
            );
        }
    }
    if vma.flags & vma_flag::LOCKED != 0 {
        let on_fault = (vma.flags & vma_flag::LOCKONFAULT != 0) as u64;
        tape.op(
            libc::SYS_mlock2,
            OP_MAY_FAIL,
            [start, len, on_fault, 0, 0, 0],
        );
    }
}

/// Bytes of the area that the tape's strings and structs need at most.
pub fn area_needed(manifest: &Manifest, contents: &[Contents]) -> u64 {
    let paths: usize = manifest
        .memory
        .vmas
        .iter()
        .map(|vma| match &vma.kind {
            VmaKind::FilePrivate { path, .. } | VmaKind::FileShared { path, .. } => path.len() + 65,
            _ => 0,
        })
        .sum();
    let vmas = manifest.memory.vmas.len() * 14;
    let shared: usize = manifest
        .memory
        .shared
        .iter()
        .map(|o| o.extents.len() * 4)
        .sum();
    let maps: usize = contents.iter().map(|area| area.maps.len()).sum();
    let reads: usize = contents.iter().map(|area| area.reads.len()).sum();
    let pages = contents.iter().flat_map(|area| &area.reads);
    let pages: u64 = pages.map(|piece| piece.npages).sum();
    let huge = (pages * PAGE / HUGE) as usize + reads;
    let guards = manifest.memory.guarded.len() + manifest.memory.vmas.len();
    let ops = vmas + 2 * maps + reads + huge + shared + guards + 200;
    // An entry of a vector for each piece, and what rounding costs each vector.
    let vectors = reads * (size_of::<[u64; 2]>() + 32);
    let actions = 64 * 64;
    // A `struct flock` and an operation each, and the other late work.
    let late = manifest.descriptors.locks.len() * 64 + manifest.descriptors.files.len();
    let late = late * (1 + size_of::<TapeOp>() / 64)
        + manifest.descriptors.files.len() * size_of::<TapeOp>();
    (paths
        + ops * size_of::<TapeOp>()
        + vectors
        + actions
        + late
        + manifest.process.auxv.len()
        + 4096) as u64
}

/// Shared objects that several ranges map, or that have a descriptor, need a file of
/// their own; a single anonymous mapping does not.
pub fn needs_file(manifest: &Manifest, object: usize) -> bool {
    let uses = manifest
        .memory
        .vmas
        .iter()
        .filter(|vma| matches!(vma.kind, VmaKind::Shared { object: o, .. } if o as usize == object))
        .count();
    let first_at_zero = manifest.memory.vmas.iter().any(
        |vma| matches!(vma.kind, VmaKind::Shared { object: o, offset: 0 } if o as usize == object),
    );
    manifest.memory.shared[object].kind != SharedKind::Anonymous || uses != 1 || !first_at_zero
}

/// Does memory map it shared?
pub fn is_mapped_shared(manifest: &Manifest, object: usize) -> bool {
    let vmas = &mut manifest.memory.vmas.iter();
    vmas.any(|vma| matches!(vma.kind, VmaKind::Shared { object: o, .. } if o as usize == object))
}

/// Is it one that must be open, since memory maps it privately?
pub fn is_mapped_privately(manifest: &Manifest, object: usize) -> bool {
    let vmas = &mut manifest.memory.vmas.iter();
    vmas.any(|vma| matches!(vma.kind, VmaKind::PrivateOf { object: o, .. } if o as usize == object))
}
