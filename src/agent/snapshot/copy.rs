//! `copy`: the residue is copied aside while the program stands still and stored after
//! it goes on.
//!
//! The buffer is a mapping of the helper's own (no part of the image, [`range`]). Its
//! memory is brought in before the stop: a fresh page costs more than the copy into it.
//! What exceeds a small part of the program is given back after the checkpoint.

use super::SnapshotError;
use super::pages::{BATCH_PAGES, Chunk, Pages};
use super::stretch::{Stretch, batches, open_mem, read_through};
use crate::agent::collect::memory::{PAGE, Piece};
use crate::agent::track::Dirty;
use crate::agent::{headroom, place};
use crate::image::writer::ImageSink;
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicU64, Ordering::*};

static START: AtomicU64 = AtomicU64::new(0);
static END: AtomicU64 = AtomicU64::new(0);

/// Where the buffer is mapped; empty when there is none.
pub fn range() -> (u64, u64) {
    (START.load(Relaxed), END.load(Relaxed))
}

/// After a restore: the buffer of the life before is not in the image.
pub fn reset_after_restore() {
    START.store(0, Relaxed);
    END.store(0, Relaxed);
}

const HUGE: u64 = 2 << 20;
const MADV_POPULATE_WRITE: i32 = 23;

/// Memory for copies of pages.
#[derive(Debug, Default)]
pub struct Buffer {
    at: u64,
    capacity: u64,
    /// Bytes from the start on that are known to be in memory.
    warm: u64,
    /// What lies there, in order, from the start on.
    held: Vec<Stretch>,
}

impl Buffer {
    /// Pages that can be copied without a page fault.
    pub fn warm_pages(&self) -> u64 {
        self.warm / PAGE
    }

    /// Makes room for so many pages, in memory. Before the stop.
    pub fn prepare(&mut self, npages: u64) -> Result<(), SnapshotError> {
        let wanted = (npages * PAGE).next_multiple_of(HUGE);
        if wanted > self.capacity {
            self.unmap();
            // The program would miss it (a forked writer needs none of it).
            if !headroom::ample(wanted) {
                return Err(SnapshotError::NoRoom(libc::ENOMEM));
            }
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let at = place::passing(wanted, prot, flags).map_err(SnapshotError::NoRoom)?;
            (self.at, self.capacity) = (at, wanted);
            START.store(at, Relaxed);
            END.store(at + wanted, Relaxed);
            // SAFETY: advice for it. A fork must not take it along.
            unsafe {
                syscall!(libc::SYS_madvise, at, wanted, libc::MADV_DONTFORK);
                syscall!(libc::SYS_madvise, at, wanted, libc::MADV_HUGEPAGE);
            }
        }
        while self.warm < wanted {
            let step = (wanted - self.warm).min(HUGE);
            let at = self.at + self.warm;
            // SAFETY: our own mapping. The error (no memory) is better met here than by a
            // fault.
            match check(unsafe { syscall!(libc::SYS_madvise, at, step, MADV_POPULATE_WRITE) }) {
                Ok(_) => {}
                // Before Linux 5.14: the pages come with the copy.
                Err(libc::EINVAL) => {}
                Err(errno) => return Err(SnapshotError::NoRoom(errno)),
            }
            self.warm += step;
        }
        Ok(())
    }

    /// Copies all of `dirty`; false when it does not fit in.
    ///
    /// # Safety
    /// The program is stopped and `pieces` is the present map.
    pub unsafe fn copy(&mut self, pieces: &[Piece], dirty: &Dirty) -> Result<bool, SnapshotError> {
        self.held.clear();
        let mut mem = None;
        let mut used = 0u64;
        let done = batches(pieces, dirty, &mut |batch| {
            for s in batch {
                if used + s.npages * PAGE > self.warm {
                    return Err(None);
                }
                let to = self.at + used;
                if s.in_place() {
                    let len = (s.npages * PAGE) as usize;
                    // SAFETY: readable memory that nobody changes, per contract, into the
                    // buffer, where there is room.
                    unsafe {
                        std::ptr::copy_nonoverlapping(s.addr as *const u8, to as *mut u8, len)
                    };
                    self.hold(*s);
                    used += s.npages * PAGE;
                    continue;
                }
                if mem.is_none() {
                    mem = Some(open_mem().map_err(Some)?);
                }
                let mut page = 0;
                while let Some(mem) = &mem
                    && page < s.npages
                {
                    let addr = s.addr + page * PAGE;
                    let len = ((s.npages - page) * PAGE) as usize;
                    // SAFETY: room in the buffer, as above.
                    let room =
                        unsafe { std::slice::from_raw_parts_mut((self.at + used) as *mut u8, len) };
                    let got = read_through(mem, addr, room);
                    if got > 0 {
                        self.hold(Stretch {
                            addr,
                            npages: got,
                            ..*s
                        });
                        used += got * PAGE;
                    }
                    // One that cannot be read at all does not exist.
                    page += got.max(1);
                }
            }
            Ok(())
        });
        match done {
            Ok(()) => Ok(true),
            Err(None) => Ok(false),
            Err(Some(error)) => Err(error),
        }
    }

    fn hold(&mut self, s: Stretch) {
        if let Some(last) = self.held.last_mut()
            && last.addr + last.npages * PAGE == s.addr
            && last.over_file == s.over_file
        {
            last.npages += s.npages;
            return;
        }
        self.held.push(s);
    }

    /// Stores what was copied; `dirty` is what was asked to be.
    pub fn store<S: ImageSink>(
        &self,
        pages: &mut Pages<S>,
        dirty: &Dirty,
    ) -> Result<(), SnapshotError> {
        pages.drop_absent(dirty);
        let mut at = self.at;
        let mut chunks: Vec<Chunk<'_>> = Vec::new();
        let mut room = BATCH_PAGES;
        for s in &self.held {
            let mut done = 0;
            while done < s.npages {
                let npages = (s.npages - done).min(room);
                // SAFETY: written by `copy`, and not changed since.
                let data = unsafe {
                    std::slice::from_raw_parts(at as *const u8, (npages * PAGE) as usize)
                };
                chunks.push(Chunk {
                    addr: s.addr + done * PAGE,
                    data,
                    over_file: s.over_file,
                });
                at += npages * PAGE;
                done += npages;
                room -= npages;
                if room == 0 {
                    pages.put(&chunks)?;
                    chunks.clear();
                    room = BATCH_PAGES;
                }
            }
        }
        pages.put(&chunks)?;
        pages.end_pass();
        Ok(())
    }

    /// Gives back what is more than `keep` bytes.
    pub fn shrink(&mut self, keep: u64) {
        self.held.clear();
        let keep = keep.checked_next_multiple_of(HUGE).unwrap_or(u64::MAX);
        if self.warm > keep {
            let (at, len) = (self.at + keep, self.warm - keep);
            // SAFETY: our own mapping, nothing in use in it.
            unsafe { syscall!(libc::SYS_madvise, at, len, libc::MADV_DONTNEED) };
            self.warm = keep;
        }
        // The program would miss what stays reserved.
        if !headroom::ample(self.capacity) {
            self.unmap();
        }
    }

    fn unmap(&mut self) {
        if self.capacity > 0 {
            reset_after_restore();
            // SAFETY: our own mapping, no longer used.
            unsafe { syscall!(libc::SYS_munmap, self.at, self.capacity) };
            (self.at, self.capacity, self.warm) = (0, 0, 0);
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.unmap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::collect::memory::How;
    use crate::agent::track::Change;
    use crate::image::state::{VmaKind, VmaState};
    use crate::image::writer::ImageWriter;
    use crate::image::writer::tests::MemorySink;

    #[test]
    fn copies_do_not_change_any_more() {
        // SAFETY: a fresh mapping of this test; the pieces are parts of it.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let at = check(syscall!(libc::SYS_mmap, 0, 600 * PAGE, 3, flags, -1i32, 0)).unwrap();
            let at = at as u64;
            let piece = |from: u64, to: u64, prot: u32, how| Piece {
                vma: VmaState {
                    start: at + from * PAGE,
                    end: at + to * PAGE,
                    prot,
                    kind: VmaKind::Anon,
                    flags: 0,
                },
                how,
            };
            let pieces = [
                piece(0, 400, 3, How::Scan),
                piece(400, 500, 0, How::Scan),
                piece(500, 600, 3, How::Readable),
            ];
            let value = |page: u64| (page * 7 % 255 + 1) as u8;
            let write = |page: u64, v: u8| *((at + page * PAGE + 9) as *mut u8) = v;
            (0..600).for_each(|page| write(page, value(page)));
            syscall!(libc::SYS_mprotect, at + 400 * PAGE, 100 * PAGE, 0);
            let mut dirty = Dirty::new();
            let chosen = |page: u64| page % 3 != 1;
            for page in (0..600).filter(|&p| chosen(p)) {
                dirty.insert(at + page * PAGE, at + (page + 1) * PAGE, Change::Present);
            }
            let mut buffer = Buffer::default();
            assert!(!buffer.copy(&pieces, &dirty).unwrap());
            buffer.prepare(dirty.present_pages()).unwrap();
            assert!(buffer.copy(&pieces, &dirty).unwrap());
            let (start, end) = range();
            assert!(end - start >= dirty.present_pages() * PAGE);
            (0..400).for_each(|page| write(page, 0));
            let mut sink = MemorySink::default();
            let mut pages = Pages::new(ImageWriter::new(&mut sink, 1));
            buffer.store(&mut pages, &dirty).unwrap();
            let stored = pages.parts().1.to_vec();
            drop(pages);
            let mut found = vec![0u8; 600];
            for e in stored {
                for k in 0..e.npages {
                    let page = (e.addr - at) / PAGE + k;
                    found[page as usize] = sink.bytes[(e.offset + k * PAGE + 9) as usize];
                }
            }
            for page in 0..600 {
                let wanted = if chosen(page) { value(page) } else { 0 };
                assert_eq!(found[page as usize], wanted, "page {page}");
            }
            buffer.shrink(0);
            assert_eq!(buffer.warm_pages(), 0);
            drop(buffer);
            assert_eq!(range(), (0, 0));
            syscall!(libc::SYS_munmap, at, 600 * PAGE);
        }
    }
}
