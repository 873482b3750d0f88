//! The memory map: /proc/self/maps -> what must be saved and how.
//!
//! [`collect`] parses the map: while the program runs (pre-copy) and once more while it is
//! stopped. Then what would change under a writer (shared memory) or what a forked one
//! would not see (ranges with MADV_DONTFORK or MADV_WIPEONFORK) is copied. VmFlags are
//! read before the stop or by the writer; joining of neighbours is the writer's.

use crate::agent::collect::unfrozen::{Copier, Outlet};
use crate::agent::hooks;
use crate::agent::procfs::{self, OwnFd, hex, read_file};
use crate::agent::region;
use crate::agent::side::SideBuffer;
use crate::agent::snapshot::contents::{Contents, Spaced};
use crate::agent::track;
use crate::image::state::{
    Extent, MemoryState, ObjectSpace, SharedKind, SharedObject, VmaKind, VmaState, vma_flag,
};
use crate::persist::kept;
use crate::persist::sys::{self, CPath};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
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

/// What a line of /proc/self/maps says.
struct Line<'a> {
    start: u64,
    end: u64,
    prot: u32,
    shared: bool,
    offset: u64,
    dev: u64,
    ino: u64,
    name: &'a [u8],
}

fn parse_line(line: &[u8]) -> Option<Line<'_>> {
    let mut fields = line.splitn(6, |&b| b == b' ');
    let range = fields.next()?;
    let dash = range.iter().position(|&b| b == b'-')?;
    let perms = fields.next()?;
    let offset = hex(fields.next()?)?;
    let dev = fields.next()?;
    let colon = dev.iter().position(|&b| b == b':')?;
    let ino = procfs::number(fields.next()?)? as u64;
    let bit = |k: usize, c: u8, v: i32| {
        if perms.get(k) == Some(&c) {
            v as u32
        } else {
            0
        }
    };
    Some(Line {
        start: hex(&range[..dash])?,
        end: hex(&range[dash + 1..])?,
        prot: bit(0, b'r', libc::PROT_READ)
            | bit(1, b'w', libc::PROT_WRITE)
            | bit(2, b'x', libc::PROT_EXEC),
        shared: perms.get(3) == Some(&b's'),
        offset,
        dev: libc::makedev(hex(&dev[..colon])? as u32, hex(&dev[colon + 1..])? as u32),
        ino,
        name: fields.next().unwrap_or(&[]).trim_ascii_start(),
    })
}

/// The lines of a memory map, none of which begins before another's end.
///
/// A map that changes while it is read is not one instant's: what was joined with the mapping
/// before it, after that one was told, comes with its new start (Linux 6.18).
fn lines(text: &[u8]) -> impl Iterator<Item = Line<'_>> {
    let mut told = 0;
    text.split(|&b| b == b'\n').filter_map(move |line| {
        let mut line = parse_line(line).filter(|line| line.end > told)?;
        let again = told.saturating_sub(line.start);
        line.start += again;
        if line.ino != 0 {
            line.offset += again;
        }
        told = line.end;
        Some(line)
    })
}

/// The octal escapes (`\012`) that the kernel writes into names.
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut at = 0;
    while at < name.len() {
        if name[at] == b'\\'
            && name.len() >= at + 4
            && name[at + 1..at + 4].iter().all(u8::is_ascii_digit)
        {
            let v = name[at + 1..at + 4]
                .iter()
                .fold(0u32, |v, &b| v * 8 + (b - b'0') as u32);
            out.push(v as u8);
            at += 4;
        } else {
            out.push(name[at]);
            at += 1;
        }
    }
    out
}

/// The name of a mapped file. The kernel escapes line feeds, but not what looks like an escape.
fn file_name(name: &[u8], ino: u64) -> Vec<u8> {
    if name.contains(&b'\\') && is_called(name, ino) {
        return name.to_vec();
    }
    unescape(name)
}

fn is_called(name: &[u8], ino: u64) -> bool {
    CPath::new(&[name])
        .and_then(|path| sys::lstat(&path))
        .is_ok_and(|stat| stat.id.ino == ino)
}

/// Has a file that was unlinked under the name it was mapped by other names than those that the
/// jobs in `store` keep? What is stored through the mapping would be seen there. Told where the
/// program may ask for it (CAP_CHECKPOINT_RESTORE).
fn has_other_names(line: &Line<'_>, store: &[u8]) -> bool {
    let path = format!("/proc/self/map_files/{:x}-{:x}", line.start, line.end);
    let stat = OwnFd::open(path.as_bytes()).and_then(|fd| sys::fstat(fd.raw()));
    stat.is_ok_and(|stat| {
        let store = Path::new(OsStr::from_bytes(store));
        let jobs = CPath::new(&[store.as_os_str().as_bytes()]).and_then(|path| sys::list(&path));
        let jobs = jobs.unwrap_or_default();
        let kept = || {
            let jobs = jobs.iter().map(|job| store.join(OsStr::from_bytes(job)));
            jobs.map(|job| kept::links_of(&job, &stat.id)).sum::<u64>()
        };
        stat.is_regular() && stat.nlink > 0 && u64::from(stat.nlink) > kept()
    })
}

/// What decides between our own files and the program's.
pub struct Own<'a> {
    /// Directory of this job's images, ending in '/'.
    pub store: &'a [u8],
    /// Is this path in the call-site cache?
    pub is_cache: fn(&[u8]) -> bool,
}

fn is_device(path: &[u8]) -> bool {
    path.starts_with(b"/dev/") && !path.starts_with(b"/dev/shm/") && path != b"/dev/zero"
}

impl Plan {
    fn add(
        &mut self,
        line: &Line<'_>,
        (start, end): (u64, u64),
        own: &Own<'_>,
        comes_back: &mut dyn FnMut(&Line<'_>) -> bool,
    ) -> Result<(), MemoryError> {
        let deleted = line.name.strip_suffix(b" (deleted)");
        // There are files called so.
        let deleted = deleted.filter(|_| !is_called(line.name, line.ino));
        let name = deleted.unwrap_or(line.name);
        let offset = line.offset + (start - line.start);
        let mut flags = 0;
        let device = || MemoryError::Device(String::from_utf8_lossy(line.name).into_owned());
        let (kind, how) = if line.shared {
            if name.starts_with(b"/[aio]") || name.starts_with(b"/secretmem") {
                return Err(device());
            } else if name.starts_with(b"/memfd:")
                || name.starts_with(b"/dev/zero")
                || name.starts_with(b"/SYSV")
                || name.is_empty()
                || (deleted.is_some() && name.starts_with(b"/"))
            {
                if deleted.is_some() && has_other_names(line, own.store) {
                    let name = String::from_utf8_lossy(name).into_owned();
                    return Err(MemoryError::OtherNames(name));
                }
                (
                    VmaKind::Shared {
                        object: self.object(line, name),
                        offset,
                    },
                    How::Nothing,
                )
            } else if name.starts_with(b"/") && !is_device(name) {
                (
                    VmaKind::FileShared {
                        path: file_name(name, line.ino),
                        offset,
                        writable: true,
                    },
                    How::Nothing,
                )
            } else {
                return Err(device());
            }
        } else if name == b"[heap]" {
            (VmaKind::Heap, How::Scan)
        } else if name == b"[stack]" {
            (VmaKind::Stack, How::Scan)
        } else if name.is_empty() || name.starts_with(b"[anon") || name == b"/dev/zero" {
            (VmaKind::Anon, How::Scan)
        } else if name == b"/anon_hugepage" {
            flags |= vma_flag::HUGETLB;
            (VmaKind::Anon, How::Scan)
        } else if name.starts_with(b"/") {
            if name.starts_with(own.store) {
                (VmaKind::Anon, How::All)
            } else if (own.is_cache)(name) {
                (VmaKind::Anon, How::Readable)
            } else if deleted.is_some() && comes_back(line) {
                let object = self.object(line, name);
                (VmaKind::PrivateOf { object, offset }, How::Scan)
            } else if deleted.is_some() {
                (VmaKind::Anon, How::Readable)
            } else if is_device(name) {
                return Err(device());
            } else {
                (
                    VmaKind::FilePrivate {
                        path: file_name(name, line.ino),
                        offset,
                    },
                    How::Scan,
                )
            }
        } else {
            // anon_inode:[io_uring], [perf_event], [uprobes], ...
            return Err(device());
        };
        self.pieces.push(Piece {
            vma: VmaState {
                start,
                end,
                prot: line.prot,
                kind,
                flags,
            },
            how,
        });
        Ok(())
    }

    fn object(&mut self, line: &Line<'_>, name: &[u8]) -> u32 {
        let same = |o: &SharedObject| o.dev == line.dev && o.ino == line.ino;
        if let Some(k) = self.shared.iter().position(same) {
            return k as u32;
        }
        let kind = if name.starts_with(b"/memfd:") {
            SharedKind::Memfd
        } else if name.starts_with(b"/SYSV") {
            SharedKind::SysV
        } else if name.is_empty() || name.starts_with(b"/dev/zero") {
            SharedKind::Anonymous
        } else {
            SharedKind::DeletedFile
        };
        self.shared.push(SharedObject {
            dev: line.dev,
            ino: line.ino,
            name: unescape(name),
            kind,
            ..SharedObject::default()
        });
        self.shared.len() as u32 - 1
    }
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

/// The bits of a VmFlags line that are restored.
fn parse_flags(text: &[u8]) -> u32 {
    let mut flags = 0;
    for word in text.split(|&b| b == b' ') {
        flags |= match word {
            b"hg" => vma_flag::HUGEPAGE,
            b"nh" => vma_flag::NOHUGEPAGE,
            b"lo" => vma_flag::LOCKED,
            b"dc" => vma_flag::DONTFORK,
            b"dd" => vma_flag::DONTDUMP,
            b"nr" => vma_flag::NORESERVE,
            b"wf" => vma_flag::WIPEONFORK,
            b"mg" => vma_flag::MERGEABLE,
            b"rr" => vma_flag::RANDOM,
            b"sr" => vma_flag::SEQUENTIAL,
            b"lf" => vma_flag::LOCKONFAULT,
            b"gd" => vma_flag::GROWSDOWN,
            b"ht" => vma_flag::HUGETLB,
            _ => 0,
        };
    }
    flags
}

impl Plan {
    /// Reads VmFlags (smaps walks every page table: not for the stop, unless it must).
    pub fn read_flags(&mut self) {
        if std::mem::replace(&mut self.flags_known, true) {
            return;
        }
        let Ok(text) = read_file(b"/proc/thread-self/smaps") else {
            return;
        };
        self.seen = vec![false; self.pieces.len()];
        let mut range = (0, 0);
        let mut next = 0;
        for line in text.split(|&b| b == b'\n') {
            if let Some(rest) = line.strip_prefix(b"VmFlags:") {
                let flags = parse_flags(rest);
                let may_write = rest.split(|&b| b == b' ').any(|word| word == b"mw");
                while next < self.pieces.len() && self.pieces[next].vma.end <= range.0 {
                    next += 1;
                }
                let mut k = next;
                while k < self.pieces.len() && self.pieces[k].vma.start < range.1 {
                    let vma = &mut self.pieces[k].vma;
                    vma.flags |= flags;
                    if flags & vma_flag::GROWSDOWN != 0 && vma.kind == VmaKind::Anon {
                        vma.kind = VmaKind::Stack;
                        hooks::memory::note_grows_down();
                    }
                    if let VmaKind::FileShared { writable, .. } = &mut vma.kind {
                        *writable = may_write;
                    }
                    self.seen[k] = true;
                    k += 1;
                }
            } else if line
                .first()
                .is_some_and(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b))
                && let Some(line) = parse_line(line)
            {
                range = (line.start, line.end);
            }
        }
    }

    /// In a forked writer that has just read the flags: a range that fork did not pass
    /// on, whole (MADV_DONTFORK) or with its contents (MADV_WIPEONFORK). `ours` is the
    /// agent's own wipe-on-fork page.
    pub fn not_inherited(&self, ours: u64) -> Option<u64> {
        self.pieces
            .iter()
            .zip(&self.seen)
            .filter(|(piece, _)| !matches!(piece.how, How::Nothing | How::Copied))
            .find(|(piece, seen)| {
                let wiped = piece.vma.flags & vma_flag::WIPEONFORK != 0;
                !**seen || (wiped && piece.vma.start != ours)
            })
            .map(|(piece, _)| piece.vma.start)
    }

    /// Were the flags read (at the stop, unless this is the writer)?
    pub fn flags_known(&self) -> bool {
        self.flags_known
    }

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

    /// A plan that [`Plan::take_flags`] can look areas up in.
    pub fn with_flags(vmas: Vec<VmaState>) -> Plan {
        let how = How::Nothing;
        Plan {
            pieces: vmas.into_iter().map(|vma| Piece { vma, how }).collect(),
            flags_known: true,
            ..Plan::default()
        }
    }

    /// Takes over the flags of `known`, which was collected a moment ago, while the program
    /// ran, and which nothing has advised otherwise since. False when a range is new: its
    /// flags must be read.
    pub fn take_flags(&mut self, known: &Plan) -> bool {
        if !known.flags_known {
            return false;
        }
        let mut next = 0;
        let same = |a: &VmaKind, b: &VmaKind| match (a, b) {
            (VmaKind::FilePrivate { path: a, .. }, VmaKind::FilePrivate { path: b, .. })
            | (VmaKind::FileShared { path: a, .. }, VmaKind::FileShared { path: b, .. }) => a == b,
            // Numbers of objects may differ from one look to the next.
            (VmaKind::Shared { .. }, VmaKind::Shared { .. })
            | (VmaKind::PrivateOf { .. }, VmaKind::PrivateOf { .. }) => true,
            _ => a == b,
        };
        for piece in &mut self.pieces {
            let vma = &mut piece.vma;
            while known
                .pieces
                .get(next)
                .is_some_and(|k| k.vma.end <= vma.start)
            {
                next += 1;
            }
            // A range that has grown or shrunk in its place, or one that is as it was.
            let old = known.pieces.get(next).map(|k| &k.vma).filter(|old| {
                old.start < vma.end && old.prot == vma.prot && same(&old.kind, &vma.kind)
            });
            let Some(old) = old else {
                return false;
            };
            vma.flags |= old.flags;
            if let (
                VmaKind::FileShared { writable, .. },
                VmaKind::FileShared { writable: was, .. },
            ) = (&mut vma.kind, &old.kind)
            {
                *writable = *was;
            }
        }
        self.flags_known = true;
        self.seen = vec![true; self.pieces.len()];
        true
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
    fn map_lines_are_understood() {
        let line =
            parse_line(b"7f00-8f00 rw-s 00001000 fe:01 77    /dev/shm/a\\012b (deleted)").unwrap();
        assert_eq!(
            (line.start, line.end, line.offset, line.ino),
            (0x7f00, 0x8f00, 0x1000, 77)
        );
        assert!(line.shared);
        assert_eq!(unescape(line.name), b"/dev/shm/a\nb (deleted)");
        let line = parse_line(b"7f00-8f00 ---p 00000000 00:00 0 ").unwrap();
        assert_eq!(line.prot, 0);
        assert!(line.name.is_empty());
    }

    /// Pages of the second mapping were stored twice, and the image was refused: read while
    /// the program changed it, the map told a mapping again with the one that had joined it.
    #[test]
    fn what_was_told_is_not_told_again() {
        let text = b"1000-5000 rw-p 00000000 00:00 0 \n\
            3000-7000 rw-p 00000000 00:00 0 \n\
            6000-7000 r--p 00000000 00:00 0 \n\
            8000-9000 r--p 00002000 fe:01 77 /a\n\
            8000-b000 r--p 00002000 fe:01 77 /a\n";
        let told: Vec<_> = lines(text).map(|l| (l.start, l.end, l.offset)).collect();
        assert_eq!(
            told,
            [
                (0x1000, 0x5000, 0),
                (0x5000, 0x7000, 0),
                (0x8000, 0x9000, 0x2000),
                (0x9000, 0xb000, 0x3000),
            ]
        );
    }

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
