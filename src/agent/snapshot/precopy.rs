//! Pre-copy: pages are stored while the program runs, so that the stop has only the
//! residue to deal with.
//!
//! Each round's sweep comes before its copy, so a page that is written while it is
//! copied is dirty again. Memory may vanish while it is read: it is read by
//! process_vm_readv(2) into a bounce buffer (which also makes the checksum that of the
//! bytes written), and what cannot be read stays for the stop.

use super::SnapshotError;
use super::pages::{BATCH_PAGES, Chunk, Pages};
use super::stretch::{Stretch, batches};
use crate::agent::collect::memory::{PAGE, Piece};
use crate::agent::track::{Change, Dirty};
use crate::image::writer::ImageSink;
use ckpt_sys::syscall;

/// More rounds than this never pay.
pub const MOST_ROUNDS: u32 = 4;

/// Reads memory of this very process that may go away meanwhile.
pub struct Live {
    pid: i32,
    bounce: Vec<u8>,
}

impl Default for Live {
    fn default() -> Live {
        Live::new()
    }
}

impl Live {
    pub fn new() -> Live {
        Live {
            // SAFETY: no arguments.
            pid: unsafe { syscall!(libc::SYS_getpid) } as i32,
            bounce: vec![0; (BATCH_PAGES * PAGE) as usize],
        }
    }

    /// As [`Live::new`], but its memory is touched when it is first used: a life that goes
    /// back soon never uses it.
    pub fn cold() -> Live {
        Live {
            // SAFETY: no arguments.
            pid: unsafe { syscall!(libc::SYS_getpid) } as i32,
            bounce: Vec::with_capacity((BATCH_PAGES * PAGE) as usize),
        }
    }

    /// Reads at most a batch of pages; `None` when they cannot be read.
    pub fn read_run(&mut self, addr: u64, npages: u64) -> Option<&[u8]> {
        let stretch = Stretch {
            addr,
            npages,
            direct: true,
            over_file: false,
        };
        let got = self.read(&[stretch])?;
        (got == npages).then_some(&self.bounce[..])
    }

    /// Reads the pages one after the other into the bounce buffer; how many it got before
    /// one could not be read. `None`: nothing can be read in this way.
    fn read(&mut self, batch: &[Stretch]) -> Option<u64> {
        if self.bounce.is_empty() {
            self.bounce.resize((BATCH_PAGES * PAGE) as usize, 0);
        }
        let local = [self.bounce.as_mut_ptr() as u64, self.bounce.len() as u64];
        let mut remote = [[0u64; 2]; BATCH_PAGES as usize];
        for (iov, s) in remote.iter_mut().zip(batch) {
            *iov = [s.addr, s.npages * PAGE];
        }
        // SAFETY: the local buffer has room for a batch; bad remote addresses are errors.
        let n = unsafe {
            syscall!(
                libc::SYS_process_vm_readv,
                self.pid,
                &local,
                1,
                remote.as_ptr(),
                batch.len(),
                0
            )
        };
        match n {
            n if n >= 0 => Some(n as u64 / PAGE),
            n if n == -(libc::EFAULT as isize) => Some(0),
            // A system-call filter, no memory: the stop will do it.
            _ => None,
        }
    }
}

/// One round: stores all of `wanted`; what could not be read is put into `left`.
pub fn round<S: ImageSink>(
    pages: &mut Pages<S>,
    live: &mut Live,
    pieces: &[Piece],
    wanted: &Dirty,
    left: &mut Dirty,
) -> Result<(), SnapshotError> {
    pages.drop_absent(wanted);
    batches(pieces, wanted, &mut |batch| {
        let mut todo: Vec<Stretch> = Vec::with_capacity(batch.len());
        for s in batch {
            if s.direct {
                todo.push(*s);
            } else {
                left.insert(s.addr, s.addr + s.npages * PAGE, Change::Present);
            }
        }
        let mut rest = &mut todo[..];
        while !rest.is_empty() {
            let Some(mut got) = live.read(rest) else {
                for s in rest.iter() {
                    left.insert(s.addr, s.addr + s.npages * PAGE, Change::Present);
                }
                return Ok(());
            };
            let mut chunks: Vec<Chunk<'_>> = Vec::with_capacity(rest.len());
            let mut at = 0;
            let mut whole = 0;
            for s in rest.iter_mut() {
                let npages = s.npages.min(got);
                if npages > 0 {
                    let len = (npages * PAGE) as usize;
                    chunks.push(Chunk {
                        addr: s.addr,
                        data: &live.bounce[at..at + len],
                        over_file: s.over_file,
                    });
                    at += len;
                    got -= npages;
                }
                if npages < s.npages {
                    // This page cannot be read now; go on behind it.
                    let bad = s.addr + npages * PAGE;
                    left.insert(bad, bad + PAGE, Change::Present);
                    s.addr = bad + PAGE;
                    s.npages -= npages + 1;
                    break;
                }
                whole += 1;
            }
            pages.put(&chunks)?;
            rest = &mut rest[whole..];
            if rest.first().is_some_and(|s| s.npages == 0) {
                rest = &mut rest[1..];
            }
        }
        Ok::<(), SnapshotError>(())
    })?;
    pages.end_pass();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::collect::memory::How;
    use crate::image::state::{VmaKind, VmaState};
    use crate::image::writer::ImageWriter;
    use crate::image::writer::tests::MemorySink;
    use ckpt_sys::raw::check;

    #[test]
    fn what_has_vanished_is_left_over() {
        // SAFETY: a fresh mapping of this test.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let at = check(syscall!(libc::SYS_mmap, 0, 300 * PAGE, 3, flags, -1i32, 0)).unwrap();
            let at = at as u64;
            let pieces = [Piece {
                vma: VmaState {
                    start: at,
                    end: at + 300 * PAGE,
                    prot: 3,
                    kind: VmaKind::Anon,
                    flags: 0,
                },
                how: How::Scan,
            }];
            (0..300).for_each(|page| *((at + page * PAGE) as *mut u64) = page + 1);
            let gone = [0u64, 7, 8, 127, 128, 200, 299];
            for page in gone {
                // Out of reach, but not free for others.
                syscall!(libc::SYS_mprotect, at + page * PAGE, PAGE, 0);
            }
            let mut wanted = Dirty::new();
            wanted.insert(at, at + 250 * PAGE, Change::Present);
            wanted.insert(at + 260 * PAGE, at + 300 * PAGE, Change::Present);
            let mut sink = MemorySink::default();
            let mut pages = Pages::new(ImageWriter::new(&mut sink, 1));
            let mut left = Dirty::new();
            round(&mut pages, &mut Live::new(), &pieces, &wanted, &mut left).unwrap();
            let missing: Vec<u64> = (0..300)
                .filter(|page| left.at(at + page * PAGE).is_some())
                .collect();
            assert_eq!(missing, gone);
            let stored = pages.parts().1.to_vec();
            drop(pages);
            let mut count = 0;
            for e in stored {
                for k in 0..e.npages {
                    let page = (e.addr - at) / PAGE + k;
                    assert_eq!(sink.bytes[(e.offset + k * PAGE) as usize], (page + 1) as u8);
                    count += 1;
                }
            }
            assert_eq!(count, 290 - gone.len());
            syscall!(libc::SYS_munmap, at, 300 * PAGE);
        }
    }
}
