//! A dirty set, cut into batches of pages that are read in the same way; and reading
//! them where nothing changes: in the stop, or in the forked writer.

use super::SnapshotError;
use super::pages::{BATCH_PAGES, Chunk, Pages};
use crate::agent::collect::memory::{How, PAGE, Piece};
use crate::agent::procfs::OwnFd;
use crate::agent::track::{Change, Dirty};
use crate::image::writer::ImageSink;
use ckpt_sys::syscall;

/// Pages of one mapping, all to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    pub addr: u64,
    pub npages: u64,
    /// May be read in place; else only through /proc/thread-self/mem, which may fail for
    /// pages that do not exist (beyond the end of a file).
    pub direct: bool,
    /// A private mapping of a file: a page of zeros is content.
    pub over_file: bool,
}

impl Stretch {
    /// Can every page be read in place? Some of a file's mapping may lie behind the file's end,
    /// whatever a tracker says of them: reading one ended the program by SIGBUS.
    pub fn in_place(&self) -> bool {
        self.direct && !self.over_file
    }
}

/// Calls `f` for what is to be stored of `dirty`, at most [`BATCH_PAGES`] pages at a time,
/// ascending.
pub fn batches<E>(
    pieces: &[Piece],
    dirty: &Dirty,
    f: &mut dyn FnMut(&[Stretch]) -> Result<(), E>,
) -> Result<(), E> {
    let mut batch: Vec<Stretch> = Vec::with_capacity(BATCH_PAGES as usize);
    let mut pages = 0;
    for piece in pieces {
        if matches!(piece.how, How::Nothing | How::Copied) {
            continue;
        }
        let readable = piece.vma.prot & libc::PROT_READ as u32 != 0;
        let template = Stretch {
            addr: 0,
            npages: 0,
            direct: readable && piece.how != How::Readable,
            over_file: piece.vma.kind.is_private_file(),
        };
        for run in dirty.within(piece.vma.start, piece.vma.end) {
            if run.change != Change::Present {
                continue;
            }
            let mut at = run.start;
            while at < run.end {
                let npages = ((run.end - at) / PAGE).min(BATCH_PAGES - pages);
                batch.push(Stretch {
                    addr: at,
                    npages,
                    ..template
                });
                pages += npages;
                at += npages * PAGE;
                if pages == BATCH_PAGES {
                    f(&batch)?;
                    batch.clear();
                    pages = 0;
                }
            }
        }
    }
    if batch.is_empty() { Ok(()) } else { f(&batch) }
}

/// /proc/thread-self/mem.
pub fn open_mem() -> Result<OwnFd, SnapshotError> {
    OwnFd::open(b"/proc/thread-self/mem").map_err(|errno| SnapshotError::Open {
        path: "/proc/thread-self/mem",
        errno,
    })
}

/// Reads pages through `mem`; how many are whole.
pub fn read_through(mem: &OwnFd, addr: u64, into: &mut [u8]) -> u64 {
    // SAFETY: a buffer of that length; the file reports bad addresses.
    let n = unsafe {
        syscall!(
            libc::SYS_pread64,
            mem.raw(),
            into.as_mut_ptr(),
            into.len(),
            addr
        )
    };
    n.max(0) as u64 / PAGE
}

fn is_mapped(addr: u64) -> bool {
    let mut byte = 0u8;
    // SAFETY: one page, one byte.
    let ret = unsafe { syscall!(libc::SYS_mincore, addr, PAGE, &raw mut byte) };
    ret != -(libc::ENOMEM as isize)
}

/// Stores all of `dirty` from memory that stands still.
///
/// # Safety
/// The program is stopped, or this is the forked writer; `pieces` is the present map.
pub unsafe fn store_frozen<S: ImageSink>(
    pages: &mut Pages<S>,
    pieces: &[Piece],
    dirty: &Dirty,
) -> Result<(), SnapshotError> {
    pages.drop_absent(dirty);
    let mem = open_mem()?;
    let mut bounce: Vec<u8> = Vec::new();
    batches(pieces, dirty, &mut |batch| {
        let mut chunks: Vec<Chunk<'_>> = Vec::with_capacity(batch.len());
        for s in batch {
            if s.in_place() {
                let len = (s.npages * PAGE) as usize;
                // SAFETY: readable memory that nobody changes, per contract.
                let data = unsafe { std::slice::from_raw_parts(s.addr as *const u8, len) };
                chunks.push(Chunk {
                    addr: s.addr,
                    data,
                    over_file: s.over_file,
                });
                continue;
            }
            pages.put(&chunks)?;
            chunks.clear();
            bounce.resize((BATCH_PAGES * PAGE) as usize, 0);
            let mut done = 0;
            while done < s.npages {
                let addr = s.addr + done * PAGE;
                let room = &mut bounce[..((s.npages - done) * PAGE) as usize];
                let got = read_through(&mem, addr, room);
                if got == 0 && !is_mapped(addr) {
                    // The map says otherwise: a forked writer has not got it (MADV_DONTFORK).
                    return Err(SnapshotError::NotInherited(addr));
                } else if got == 0 {
                    // It cannot be read at all: it does not exist.
                    pages.forget(addr, addr + PAGE);
                } else {
                    pages.put(&[Chunk {
                        addr,
                        data: &room[..(got * PAGE) as usize],
                        over_file: s.over_file,
                    }])?;
                }
                done += got.max(1);
            }
        }
        pages.put(&chunks)
    })?;
    pages.end_pass();
    Ok(())
}
