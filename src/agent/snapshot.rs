//! Writing the memory of the (stopped or forked) process into an image.
//!
//! The same code serves both snapshot methods: `copy` calls [`write`] in the helper
//! while the world is stopped; `fork` calls it in a child whose memory is frozen by
//! the kernel's copy-on-write while the program goes on.

use crate::agent::collect::memory::{How, PAGE, Piece, Plan, is_zero};
use crate::agent::procfs::OwnFd;
use crate::agent::state;
use crate::image::state::{Extent, Manifest};
use crate::image::writer::{ImageSink, ImageWriter, WriteError, Written};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::io::IoSlice;

/// What a snapshot method reports.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    pub bytes_logical: u64,
    pub bytes_stored: u64,
    pub pages: u64,
    pub header_crc: u32,
    /// Processor time of a forked writer.
    pub cpu_us: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error(transparent)]
    Write(#[from] WriteError),
    /// Memory that the program excludes from forks, by an madvise that no hook saw:
    /// the next checkpoint looks for such ranges during the stop.
    #[error("memory at {0:#x} is not passed on to a forked writer")]
    NotInherited(u64),
    #[error("scan the page tables: errno {0}")]
    Scan(i32),
    #[error("open {path}: errno {errno}")]
    Open { path: &'static str, errno: i32 },
}

/// `struct pm_scan_arg` (linux/fs.h, Linux 6.7).
#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Default, Clone, Copy)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// _IOWR('f', 16, struct pm_scan_arg)
const PAGEMAP_SCAN: u64 = 0xc060_6610;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// Finds the pages of a range that exist and belong to the process.
pub struct PageScanner {
    pagemap: OwnFd,
    regions: Vec<PageRegion>,
    /// The kernel has no PAGEMAP_SCAN (before 6.7): read the map word by word.
    by_words: bool,
}

impl PageScanner {
    pub fn new() -> Result<PageScanner, SnapshotError> {
        let pagemap =
            OwnFd::open(b"/proc/thread-self/pagemap").map_err(|errno| SnapshotError::Open {
                path: "/proc/thread-self/pagemap",
                errno,
            })?;
        // More than 512 regions a call and the walk may end behind what was returned.
        Ok(PageScanner {
            pagemap,
            regions: vec![PageRegion::default(); 512],
            by_words: false,
        })
    }

    pub fn scan(
        &mut self,
        start: u64,
        end: u64,
        f: &mut dyn FnMut(u64, u64) -> Result<(), SnapshotError>,
    ) -> Result<(), SnapshotError> {
        let mut at = start;
        while at < end && !self.by_words {
            let mut arg = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                start: at,
                end,
                vec: self.regions.as_mut_ptr() as u64,
                vec_len: self.regions.len() as u64,
                category_inverted: PAGE_IS_FILE | PAGE_IS_PFNZERO,
                category_mask: PAGE_IS_FILE | PAGE_IS_PFNZERO,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: PAGE_IS_PRESENT,
                ..PmScanArg::default()
            };
            // SAFETY: a filled struct and a region array of the length given.
            let n = match check(unsafe {
                syscall!(libc::SYS_ioctl, self.pagemap.raw(), PAGEMAP_SCAN, &mut arg)
            }) {
                Ok(n) => n,
                Err(libc::ENOTTY | libc::EINVAL | libc::ENOSYS) if at == start => {
                    self.by_words = true;
                    break;
                }
                Err(errno) => return Err(SnapshotError::Scan(errno)),
            };
            for region in &self.regions[..n] {
                f(region.start, (region.end - region.start) / PAGE)?;
            }
            if arg.walk_end <= at {
                return Err(SnapshotError::Scan(libc::EIO));
            }
            at = arg.walk_end;
        }
        if self.by_words {
            self.scan_words(start, end, f)
        } else {
            Ok(())
        }
    }

    /// proc_pid_pagemap(5): bit 63 present, 62 swapped, 61 file or shared anonymous.
    fn scan_words(
        &mut self,
        start: u64,
        end: u64,
        f: &mut dyn FnMut(u64, u64) -> Result<(), SnapshotError>,
    ) -> Result<(), SnapshotError> {
        let mut words = vec![0u64; 8192];
        let mut at = start;
        let (mut run, mut len) = (start, 0);
        while at < end {
            let want = ((end - at) / PAGE).min(words.len() as u64);
            // SAFETY: a buffer of that many words.
            let n = check(unsafe {
                syscall!(
                    libc::SYS_pread64,
                    self.pagemap.raw(),
                    words.as_mut_ptr(),
                    want * 8,
                    at / PAGE * 8
                )
            })
            .map_err(SnapshotError::Scan)?;
            if n < 8 {
                return Err(SnapshotError::Scan(libc::EIO));
            }
            for word in &words[..n / 8] {
                if word >> 62 != 0 && word & (1 << 61) == 0 {
                    if len == 0 {
                        run = at;
                    }
                    len += 1;
                } else if len > 0 {
                    f(run, len)?;
                    len = 0;
                }
                at += PAGE;
            }
        }
        if len > 0 { f(run, len) } else { Ok(()) }
    }
}

/// Collects runs of pages and hands them to the image in large writes.
struct Pages<'w, S> {
    writer: &'w mut ImageWriter<S>,
    extents: Vec<Extent>,
    runs: Vec<(u64, u64)>,
    pages: u64,
    /// The next extent stands by itself: an extent never crosses a VMA's end.
    barrier: bool,
}

/// Runs handed over at once.
const MAX_RUNS: usize = 256;

impl<S: ImageSink> Pages<'_, S> {
    fn extent(&mut self, addr: u64, npages: u64, offset: u64) {
        self.pages += npages;
        if !std::mem::replace(&mut self.barrier, false)
            && let Some(last) = self.extents.last_mut()
            && last.addr + last.npages * PAGE == addr
            && last.offset + last.npages * PAGE == offset
        {
            last.npages += npages;
            return;
        }
        self.extents.push(Extent {
            addr,
            npages,
            offset,
        });
    }

    fn flush(&mut self) -> Result<(), SnapshotError> {
        let runs = std::mem::take(&mut self.runs);
        if !runs.is_empty() {
            // SAFETY: the memory is readable and frozen: the world is stopped, or
            // this is the forked writer.
            let mut offset = unsafe { self.writer.write_memory(&runs) }?;
            for &(addr, npages) in &runs {
                self.extent(addr, npages, offset);
                offset += npages * PAGE;
            }
        }
        self.runs = runs;
        self.runs.clear();
        Ok(())
    }

    /// Readable memory: written in place, zero pages left out.
    fn memory(&mut self, start: u64, npages: u64) -> Result<(), SnapshotError> {
        let mut run = (start, 0);
        for k in 0..npages {
            let addr = start + k * PAGE;
            // SAFETY: a present, readable page of frozen memory.
            let page = unsafe { std::slice::from_raw_parts(addr as *const u8, PAGE as usize) };
            if is_zero(page) {
                self.run(run)?;
                run = (addr + PAGE, 0);
            } else {
                run.1 += 1;
            }
        }
        self.run(run)
    }

    fn run(&mut self, run: (u64, u64)) -> Result<(), SnapshotError> {
        if run.1 > 0 {
            self.runs.push(run);
            if self.runs.len() == MAX_RUNS {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Memory that cannot be read in place: through /proc/thread-self/mem. Pages that cannot
    /// be read at all (beyond the end of a file) do not exist.
    fn through(&mut self, mem: &OwnFd, start: u64, npages: u64) -> Result<(), SnapshotError> {
        self.flush()?;
        let mut page = [0u8; PAGE as usize];
        for k in 0..npages {
            let addr = start + k * PAGE;
            // SAFETY: a buffer of one page.
            let n =
                unsafe { syscall!(libc::SYS_pread64, mem.raw(), page.as_mut_ptr(), PAGE, addr) };
            if n != PAGE as isize || is_zero(&page) {
                continue;
            }
            let offset = self.writer.write_pages(&[IoSlice::new(&page)])?;
            self.extent(addr, 1, offset);
        }
        Ok(())
    }
}

/// Extents that lie side by side in memory and in the image become one, as far as the
/// ranges allow. After a lazy restore each of them was a mapping of its own, and the
/// next restore must not need more of them.
fn join_extents(extents: &mut Vec<Extent>, pieces: &[Piece]) {
    let mut next = 0;
    extents.dedup_by(|e, last| {
        while next < pieces.len() && pieces[next].vma.end <= e.addr {
            next += 1;
        }
        let whole = pieces.get(next).is_some_and(|p| p.vma.start <= last.addr);
        let fits = last.addr + last.npages * PAGE == e.addr
            && last.offset + last.npages * PAGE == e.offset;
        if whole && fits {
            last.npages += e.npages;
        }
        whole && fits
    });
}

/// Writes `copied` (contents taken during the stop), then all memory of `plan`, then
/// the manifest. Offsets in `manifest` and `plan` that point into `copied` become
/// file offsets.
pub fn write<S: ImageSink>(
    mut writer: ImageWriter<S>,
    mut manifest: Manifest,
    mut plan: Plan,
    copied: &[u8],
    forked: bool,
    sync: bool,
) -> Result<Outcome, SnapshotError> {
    if !plan.flags_known() {
        plan.read_flags();
        if forked && let Some(addr) = plan.not_inherited(state::awake_page()) {
            return Err(SnapshotError::NotInherited(addr));
        }
    }
    let base = writer.write_bytes_as_pages(copied)?;
    for object in &mut plan.shared {
        object.extents.iter_mut().for_each(|e| e.offset += base);
    }
    for extents in manifest.descriptors.content_extents() {
        extents.iter_mut().for_each(|e| e.offset += base);
    }
    let mut scanner = PageScanner::new()?;
    let mem = OwnFd::open(b"/proc/thread-self/mem").map_err(|errno| SnapshotError::Open {
        path: "/proc/thread-self/mem",
        errno,
    })?;
    let mut out = Pages {
        writer: &mut writer,
        extents: Vec::new(),
        runs: Vec::with_capacity(MAX_RUNS),
        pages: 0,
        barrier: false,
    };
    let mut logical = 0;
    for piece in &plan.pieces {
        let (start, end) = (piece.vma.start, piece.vma.end);
        let readable = piece.vma.prot & libc::PROT_READ as u32 != 0;
        match piece.how {
            How::Nothing | How::Copied => {}
            How::Readable => out.through(&mem, start, (end - start) / PAGE)?,
            How::All if readable => out.memory(start, (end - start) / PAGE)?,
            How::All => out.through(&mem, start, (end - start) / PAGE)?,
            How::Scan => scanner.scan(start, end, &mut |at, n| {
                logical += n * PAGE;
                if readable {
                    out.memory(at, n)
                } else {
                    out.through(&mem, at, n)
                }
            })?,
        }
        out.flush()?;
        out.barrier = true;
    }
    let mut extents = std::mem::take(&mut out.extents);
    let pages = out.pages;
    extents.extend(plan.copied.iter().map(|e| Extent {
        offset: e.offset + base,
        ..*e
    }));
    extents.sort_unstable_by_key(|e| e.addr);
    plan.join();
    join_extents(&mut extents, &plan.pieces);
    manifest.identity.objects = crate::agent::collect::objects::collect(&plan);
    manifest.memory = plan.into_state(extents);
    let Written {
        bytes, header_crc, ..
    } = writer.finish(&manifest, sync)?;
    Ok(Outcome {
        bytes_logical: logical.max(pages * PAGE),
        bytes_stored: bytes,
        pages,
        header_crc,
        cpu_us: 0,
    })
}
