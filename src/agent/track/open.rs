//! What a rollback has put back and leaves open for writing.
//!
//! A program that goes back again and again mostly writes the same pages each time. To protect
//! them costs time, and then a fault each. A page that is left open counts as changed: the next
//! rollback puts it back, the next generation holds it. So nothing is missed, and it pays as
//! long as the pages are the same; where they are others each time it is given up for a while.
//!
//! Pure data: decided by the leader of a rollback, kept by the tracker.

use super::blank::{Range, push};
use super::lazy::both;
use crate::agent::collect::memory::PAGE;
use serde::{Deserialize, Serialize};

/// After so many rollbacks all pages are watched once: the program may write fewer by then.
const MOST_ROUNDS: u32 = 32;
/// It is tried again after so many rollbacks at the latest.
const MOST_WAIT: u32 = 31;

/// What is open, and how it went so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// Empty: everything is watched.
    pub ranges: Vec<Range>,
    rounds: u32,
    futile: u32,
    wait: u32,
}

fn pages(ranges: &[Range]) -> u64 {
    ranges.iter().map(|(start, end)| (end - start) / PAGE).sum()
}

impl Open {
    /// What is to be left open now that `back` (ascending) is put back, which includes all that
    /// was left open before.
    pub fn next(&self, back: impl Iterator<Item = Range>) -> Open {
        let (rounds, futile) = (self.rounds + 1, self.futile);
        let closed = |futile: u32, wait: u32| Open {
            futile,
            wait,
            ..Open::default()
        };
        if self.ranges.is_empty() && self.wait > 0 {
            return closed(futile, self.wait - 1);
        }
        let mut ranges: Vec<Range> = Vec::with_capacity(self.ranges.len());
        back.for_each(|range| push(&mut ranges, range));
        if self.ranges.is_empty() {
            return Open {
                ranges,
                rounds: 0,
                futile,
                wait: 0,
            };
        }
        let others = pages(&ranges) - pages(&both(&ranges, &self.ranges));
        if others > pages(&self.ranges) / 4 {
            let futile = (futile * 2 + 1).min(MOST_WAIT);
            return closed(futile, futile);
        }
        match rounds < MOST_ROUNDS {
            true => Open {
                ranges,
                rounds,
                futile: 0,
                wait: 0,
            },
            false => closed(0, 0),
        }
    }

    /// Everything is watched again.
    pub fn closed(&mut self) {
        self.ranges.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(from: u64, npages: u64) -> Vec<Range> {
        // Every other page.
        let starts = (from..from + npages).map(|k| 2 * k * PAGE);
        starts.map(|start| (start, start + PAGE)).collect()
    }

    #[test]
    fn the_same_pages_stay_open_and_are_watched_now_and_then() {
        let mut open = Open::default();
        let mut watched = Vec::new();
        for round in 0..100 {
            let mut back = some(0, 100);
            back.extend(some(1000 + round, 10));
            open = open.next(back.clone().into_iter());
            match open.ranges.is_empty() {
                true => watched.push(round),
                false => assert_eq!(open.ranges, back),
            }
        }
        assert_eq!(watched, [32, 65, 98]);
    }

    #[test]
    fn other_pages_each_time_are_left_open_ever_more_seldom() {
        let mut open = Open::default();
        let mut opened = Vec::new();
        for round in 0..100 {
            // What was left open is put back as well.
            let mut back = open.ranges.clone();
            back.extend(some(1000 * (round + 1), 64));
            open = open.next(back.into_iter());
            if !open.ranges.is_empty() {
                opened.push(round);
            }
        }
        assert_eq!(opened, [0, 3, 8, 17, 34, 67]);
    }
}
