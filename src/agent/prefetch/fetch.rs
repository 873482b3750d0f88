//! Asks for the pages of images ahead of the program, and stays out of its way.
//!
//! A page fault stands in the disk's queue behind what was asked for before it. So what the
//! program is known to want is asked for in small batches, each when the one before has
//! come; and what it may want later waits until it has had its first pages.
//!
//! Helper thread.

use super::{advise, faults};
use crate::image::PAGE;
use ckpt_sys::syscall;

/// Bytes of what is not known to be wanted that are asked for at a time, and the pause
/// behind them.
const STEP: u64 = 1 << 20;
const BULK_PAUSE_NS: u64 = 2_000_000;
/// The bulk waits until the program has had its first pages.
pub const BULK_AFTER_NS: u64 = 200_000_000;
/// Of what is wanted: ranges and bytes at a time. Fewer as long as the program is on its way
/// out of the restore: it waits for one page after the other then.
const BATCH: usize = 32;
const FIRST_BATCH: usize = 4;
const FIRST_NS: u64 = 3_000_000;
const BATCH_BYTES: u64 = 256 << 10;
/// How often it is asked whether they have come, at most, and how soon again.
const LOOKS: u32 = 50;
const LOOK_NS: u64 = 50_000;

#[derive(Debug)]
pub struct Fetch {
    /// Ranges to be fetched, in order; the first one from `at` on.
    queue: Vec<(u64, u64)>,
    at: usize,
    /// From this range on it is not known to be wanted.
    bulk: usize,
    due_ns: u64,
    bulk_ns: u64,
    /// The page that was asked for last, and how often it has been looked for.
    last: Option<(u64, u32)>,
    /// Page faults of the program that waited for a disk, as of the latest look.
    waited: i64,
    /// All that there is to fetch.
    pub bytes: u64,
}

/// Is it in memory, as far as the kernel tells? It does not tell of files of others.
fn is_here(page: u64) -> bool {
    let mut present = 0u8;
    // SAFETY: a byte for one page; an address without a mapping is an error.
    let ret = unsafe { syscall!(libc::SYS_mincore, page, PAGE, &mut present) };
    ret != 0 || present & 1 != 0
}

impl Fetch {
    /// `queue`: ascending in parts; the first `bulk` ranges are known to be wanted.
    pub fn new(queue: Vec<(u64, u64)>, bulk: usize, now: u64) -> Fetch {
        Fetch {
            bytes: queue.iter().map(|range| range.1 - range.0).sum(),
            queue,
            at: 0,
            bulk,
            due_ns: 0,
            bulk_ns: now + BULK_AFTER_NS,
            last: None,
            waited: 0,
        }
    }

    /// When there is something to do; `None`: never again.
    pub fn due(&self) -> Option<u64> {
        (self.at < self.queue.len()).then_some(self.due_ns)
    }

    /// Is the rest not known to be wanted?
    pub fn is_bulk(&self) -> bool {
        self.at >= self.bulk
    }

    pub fn slice(&mut self, now: u64) {
        if let Some((page, looks)) = self.last.take()
            && looks < LOOKS
            && !is_here(page)
        {
            self.last = Some((page, looks + 1));
            self.due_ns = now + LOOK_NS;
            return;
        }
        if !self.is_bulk() {
            let first = now < self.bulk_ns - BULK_AFTER_NS + FIRST_NS;
            let batch = if first { FIRST_BATCH } else { BATCH };
            self.ask(self.bulk.min(self.at + batch), BATCH_BYTES);
            self.due_ns = 0;
            return;
        }
        if now < self.bulk_ns {
            self.due_ns = self.bulk_ns;
            return;
        }
        self.ask(self.queue.len(), STEP);
        self.last = None;
        // A program that waits for the disk anyway is served best by having all of it soon.
        let waited = faults().1;
        let waits = std::mem::replace(&mut self.waited, waited) != waited;
        self.due_ns = if waits { 0 } else { now + BULK_PAUSE_NS };
    }

    /// Asks for so many bytes of the ranges before number `until`.
    fn ask(&mut self, until: usize, mut left: u64) {
        while left > 0
            && self.at < until
            && let Some((start, end)) = self.queue.get_mut(self.at)
        {
            let to = (*end).min(*start + left);
            advise(*start, to, libc::MADV_WILLNEED);
            left -= to - *start;
            *start = to;
            self.last = Some((to - PAGE, 0));
            if to == *end {
                self.at += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is wanted comes in batches, the rest not before its time.
    #[test]
    fn wanted_first_the_rest_later() {
        // Nothing is mapped at these addresses: nothing is asked for in truth.
        let wanted = (0..100u64).map(|k| (k * 4 * PAGE, (k * 4 + 1) * PAGE));
        let mut queue: Vec<_> = wanted.collect();
        queue.push((PAGE << 20, (PAGE << 20) + 3 * STEP));
        let mut fetch = Fetch::new(queue, 100, 1000);
        fetch.slice(1000);
        assert_eq!(fetch.at, FIRST_BATCH);
        let mut slices = 0;
        while !fetch.is_bulk() {
            assert_eq!(fetch.due(), Some(0));
            fetch.slice(1000 + FIRST_NS);
            slices += 1;
        }
        assert_eq!(slices, (100 - FIRST_BATCH).div_ceil(BATCH));
        fetch.slice(1000 + FIRST_NS);
        assert_eq!(fetch.due(), Some(1000 + BULK_AFTER_NS));
        let mut now = 1000 + BULK_AFTER_NS;
        for left in [2, 1, 0] {
            fetch.slice(now);
            now += BULK_PAUSE_NS;
            assert_eq!(fetch.due().is_some(), left > 0);
        }
    }
}
