//! After a lazy restore: pages that are mapped from images are brought into the page cache
//! ahead of the program, and what it touches is remembered for the next time.
//!
//! Of images that were not in memory, what the program touched after the restart before
//! (`store::working_set`) comes first, then all the rest if there is memory for it. Until
//! then the mappings are advised MADV_RANDOM: a page fault reads one page and not what lies
//! around it. A while after the restart the page tables tell what was touched.
//!
//! Helper thread, between its other work; [`prepare`] before the program's threads run.

use crate::agent::log;
use crate::agent::resume::Payload;
use crate::agent::stop::now_ns;
use crate::agent::track::pagemap::{PageMap, Query, is};
use crate::image::PAGE;
use crate::image::state::vma_flag;
use crate::store::working_set::WorkingSet;
use crate::store::{Job, RawFs};
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Bytes asked for at a time.
const STEP: u64 = 1 << 20;
/// The bulk waits until the program has had its first pages, and then leaves room in the
/// disk's queue for more of them: a page fault stands behind what was asked for before it.
const BULK_AFTER_NS: u64 = 200_000_000;
const BULK_PAUSE_NS: u64 = 2_000_000;
/// The working set is what was touched so soon after a restart.
const SOON_NS: u64 = 2_000_000_000;

/// What is still to be done.
#[derive(Debug)]
pub struct Prefetch {
    /// Ranges to be fetched, in order; the first one from `at` on.
    queue: Vec<(u64, u64)>,
    at: usize,
    /// From this range on it is not known to be wanted.
    bulk: usize,
    due_ns: u64,
    /// Mappings of images: start, end, `vma_flag`s.
    mapped: Vec<(u64, u64, u32)>,
    /// The mappings are advised MADV_RANDOM.
    advised: bool,
    generation: u64,
    record_ns: u64,
    began_ns: u64,
    bytes: u64,
    /// Page faults of the program that waited for a disk, as of the latest look.
    waited: i64,
}

static PREPARED: AtomicPtr<Prefetch> = AtomicPtr::new(std::ptr::null_mut());

/// In the restored helper: notes what the constructor has found out.
pub fn prepare(payload: &Payload) {
    if payload.mapped.is_empty() {
        return;
    }
    let now = now_ns();
    let prefetch = Prefetch {
        queue: payload.prefetch.clone(),
        at: 0,
        bulk: payload.touched as usize,
        due_ns: 0,
        mapped: payload.mapped.clone(),
        advised: payload.cold,
        generation: payload.generation,
        record_ns: now + SOON_NS,
        began_ns: now,
        bytes: payload.prefetch.iter().map(|range| range.1 - range.0).sum(),
        waited: 0,
    };
    PREPARED.store(Box::into_raw(Box::new(prefetch)), Ordering::SeqCst);
}

/// Takes what [`prepare`] has left, once.
pub fn take() -> Option<Prefetch> {
    let left = PREPARED.swap(std::ptr::null_mut(), Ordering::SeqCst);
    // SAFETY: made by Box::into_raw in this very thread, taken once.
    (!left.is_null()).then(|| *unsafe { Box::from_raw(left) })
}

/// The pointer in the image belongs to the life before.
pub fn forget() {
    PREPARED.store(std::ptr::null_mut(), Ordering::SeqCst);
}

fn advise(start: u64, end: u64, advice: i32) {
    // SAFETY: advice that changes no contents; what the program has put there meanwhile at
    // most gets the normal treatment. An error (nothing mapped there any more) is none.
    unsafe { syscall!(libc::SYS_madvise, start, end - start, advice) };
}

/// Page faults of this process that had to wait for a disk.
fn major_faults() -> i64 {
    // SAFETY: all-zero is a valid rusage; the kernel fills it.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        syscall!(libc::SYS_getrusage, libc::RUSAGE_SELF, &mut usage);
        usage.ru_majflt
    }
}

impl Prefetch {
    /// When [`Prefetch::slice`] wants to be called.
    pub fn due(&self) -> u64 {
        if self.at < self.queue.len() || self.advised {
            self.due_ns
        } else {
            self.record_ns
        }
    }

    /// Works for a moment; false: all is done.
    pub fn slice(&mut self, job: Option<&Job<RawFs>>) -> bool {
        let now = now_ns();
        if self.at >= self.bulk && now < self.began_ns + BULK_AFTER_NS {
            self.due_ns = self.began_ns + BULK_AFTER_NS;
            return true;
        }
        let mut left = STEP;
        while let Some((start, end)) = self.queue.get_mut(self.at)
            && left > 0
        {
            let until = (*end).min(*start + left);
            advise(*start, until, libc::MADV_WILLNEED);
            left -= until - *start;
            *start = until;
            if until == *end {
                self.at += 1;
            }
        }
        if self.at < self.queue.len() {
            // A program that waits for the disk anyway is served best by having all of it soon.
            let waited = major_faults();
            let waits = std::mem::replace(&mut self.waited, waited) != waited;
            let pause = self.at >= self.bulk && !waits;
            self.due_ns = if pause { now + BULK_PAUSE_NS } else { 0 };
            return true;
        }
        if self.advised {
            self.advised = false;
            for &(start, end, flags) in &self.mapped {
                if flags & (vma_flag::RANDOM | vma_flag::SEQUENTIAL) == 0 {
                    advise(start, end, libc::MADV_NORMAL);
                }
            }
            log::line(format_args!(
                "fetched ahead: {} KiB in {} ms",
                self.bytes >> 10,
                (now_ns() - self.began_ns) / 1_000_000
            ));
        }
        if now_ns() < self.record_ns {
            return true;
        }
        if let (Some(job), Some(set)) = (job, self.look())
            && let Err(error) = set.write(&RawFs, &job.dir)
        {
            log::line(format_args!("{error}"));
        }
        false
    }

    /// What of the mappings is in the page tables.
    fn look(&self) -> Option<WorkingSet> {
        let mut map = PageMap::open().ok()?;
        let query = Query {
            any: is::PRESENT | is::SWAPPED,
            tell: is::FILE,
            ..Query::default()
        };
        let mut set = WorkingSet {
            generation: self.generation,
            ..WorkingSet::default()
        };
        for &(start, end, _) in &self.mapped {
            map.scan(start, end, query, |from, to, categories| {
                let (page, pages) = (from / PAGE, (to - from) / PAGE);
                set.touched += pages;
                if categories & is::FILE == 0 {
                    set.written += pages;
                }
                match set.runs.last_mut() {
                    Some(last) if last.0 + last.1 == page => last.1 += pages,
                    _ => set.runs.push((page, pages)),
                }
            })
            .ok()?;
        }
        set.shorten();
        Some(set)
    }
}
