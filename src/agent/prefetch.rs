//! After a lazy restore: pages that are mapped from images are brought into the page cache
//! ahead of the program, and what it touches is remembered for the next time.
//!
//! Of images that were not in memory, what the program touched after the restart before
//! (`store::working_set`) comes first, then all the rest if there is memory for it. Until
//! then the mappings are advised MADV_RANDOM: a page fault reads one page and not what lies
//! around it. [`fetch`] does that, [`record`] finds out what is touched.
//!
//! Helper thread, between its other work; [`prepare`] before the program's threads run.

pub mod fetch;
pub mod record;

use crate::agent::log;
use crate::agent::resume::Payload;
use crate::agent::stop::now_ns;
use crate::image::state::vma_flag;
use crate::store::{Job, RawFs};
use ckpt_sys::syscall;
use fetch::{BULK_AFTER_NS, Fetch};
use record::Record;
use std::sync::atomic::{AtomicPtr, Ordering};

/// What is still to be done.
#[derive(Debug)]
pub struct Prefetch {
    fetch: Fetch,
    record: Record,
    /// Mappings of images: start, end, `vma_flag`s.
    mapped: Vec<(u64, u64, u32)>,
    /// The mappings are advised MADV_RANDOM.
    advised: bool,
    began_ns: u64,
}

static PREPARED: AtomicPtr<Prefetch> = AtomicPtr::new(std::ptr::null_mut());

/// In the restored helper: notes what the constructor has found out.
pub fn prepare(payload: &Payload) {
    if payload.mapped.is_empty() {
        return;
    }
    let now = now_ns();
    let ranges = payload.mapped.iter().map(|range| (range.0, range.1));
    let mut record = Record::new(payload.generation, ranges.collect(), payload.cold, now);
    if payload.limits.is_empty() {
        // A rollback: what is mapped was touched before it.
        record.leave_out();
    }
    let prefetch = Prefetch {
        fetch: Fetch::new(payload.prefetch.clone(), payload.touched as usize, now),
        record,
        mapped: payload.mapped.clone(),
        advised: payload.cold,
        began_ns: now,
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

/// Page faults of this process: all, and those that had to wait for a disk.
fn faults() -> (i64, i64) {
    // SAFETY: all-zero is a valid rusage; the kernel fills it.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        syscall!(libc::SYS_getrusage, libc::RUSAGE_SELF, &mut usage);
        (usage.ru_minflt + usage.ru_majflt, usage.ru_majflt)
    }
}

impl Prefetch {
    /// When [`Prefetch::slice`] wants to be called.
    pub fn due(&self) -> u64 {
        match self.fetch.due() {
            Some(due) => due.min(self.record.due()),
            None if self.advised => 0,
            None => self.record.due(),
        }
    }

    /// Works for a moment; false: all is done.
    pub fn slice(&mut self, job: Option<&Job<RawFs>>) -> bool {
        let now = now_ns();
        if now >= self.record.due() {
            self.record.look(now);
        }
        if self.fetch.due().is_some_and(|due| now >= due) {
            if self.fetch.is_bulk() && now >= self.began_ns + BULK_AFTER_NS {
                // From now on the kernel maps what was fetched around each page touched.
                self.record.unwatch();
            }
            self.fetch.slice(now);
        }
        if self.fetch.due().is_none() && self.advised {
            self.advised = false;
            for &(start, end, flags) in &self.mapped {
                if flags & (vma_flag::RANDOM | vma_flag::SEQUENTIAL) == 0 {
                    advise(start, end, libc::MADV_NORMAL);
                }
            }
            log::line(format_args!(
                "fetched ahead: {} KiB in {} ms",
                self.fetch.bytes >> 10,
                (now_ns() - self.began_ns) / 1_000_000
            ));
        }
        if let Some(set) = self.record.finished()
            && let Some(job) = job
            && let Err(error) = set.write(&RawFs, &job.dir)
        {
            log::line(format_args!("{error}"));
        }
        self.due() != u64::MAX
    }

    /// Before a checkpoint or a rollback: the tracker registers the mappings itself.
    pub fn unwatch(&mut self) {
        self.record.unwatch();
    }
}
