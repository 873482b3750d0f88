//! A set of page runs with what is known of each: what a sweep yields and what the
//! helper keeps until a generation is published.
//!
//! Pure data. Runs are ascending, disjoint and never empty; neighbours of the same kind
//! are one run. Addresses are multiples of the page size. What is added later wins.

use crate::agent::collect::memory::PAGE;

/// What is known of a page that changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It has content, which is to be stored.
    Present,
    /// There is nothing (zero, or the file's own page): what the base says no longer
    /// counts.
    Absent,
}

/// `start..end`, all of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub start: u64,
    pub end: u64,
    pub change: Change,
}

impl Run {
    pub fn pages(&self) -> u64 {
        (self.end - self.start) / PAGE
    }
}

/// A sorted set of page runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dirty {
    runs: Vec<Run>,
}

/// Appends a run that begins at or behind the end of the last one.
fn push(runs: &mut Vec<Run>, run: Run) {
    if run.start >= run.end {
        return;
    }
    if let Some(last) = runs.last_mut()
        && last.end == run.start
        && last.change == run.change
    {
        last.end = run.end;
        return;
    }
    runs.push(run);
}

impl Dirty {
    pub const fn new() -> Dirty {
        Dirty { runs: Vec::new() }
    }

    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    pub fn clear(&mut self) {
        self.runs.clear();
    }

    /// All runs, ascending.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// How many pages are to be stored.
    pub fn present_pages(&self) -> u64 {
        self.count(Change::Present)
    }

    /// How many pages there is nothing of.
    pub fn absent_pages(&self) -> u64 {
        self.count(Change::Absent)
    }

    fn count(&self, change: Change) -> u64 {
        let of_kind = self.runs.iter().filter(|run| run.change == change);
        of_kind.map(Run::pages).sum()
    }

    /// What the set says of the page at `addr`.
    pub fn at(&self, addr: u64) -> Option<Change> {
        let k = self.runs.partition_point(|run| run.end <= addr);
        let run = self.runs.get(k).filter(|run| run.start <= addr)?;
        Some(run.change)
    }

    /// Adds `start..end`; cheap behind everything that is there.
    pub fn insert(&mut self, start: u64, end: u64, change: Change) {
        if start >= end {
            return;
        }
        let run = Run { start, end, change };
        if self.runs.last().is_none_or(|last| last.end <= start) {
            push(&mut self.runs, run);
            return;
        }
        let mut first = self.runs.partition_point(|r| r.end < start);
        let behind = self.runs.partition_point(|r| r.start <= end);
        // What touches the new run: cut off, or joined when it is of the same kind.
        let mut parts = [None; 3];
        let mut middle = run;
        if let Some(r) = self.runs.get(first..behind).and_then(<[Run]>::first)
            && r.start < start
        {
            if r.change == change {
                middle.start = r.start;
            } else {
                parts[0] = Some(Run { end: start, ..*r });
            }
        }
        if let Some(r) = self.runs.get(first..behind).and_then(<[Run]>::last)
            && r.end > end
        {
            if r.change == change {
                middle.end = r.end;
            } else {
                parts[2] = Some(Run { start: end, ..*r });
            }
        }
        parts[1] = Some(middle);
        first = first.min(behind);
        self.runs.splice(first..behind, parts.into_iter().flatten());
    }

    /// Adds everything of `later`, which wins.
    pub fn unite(&mut self, later: &Dirty) {
        let Some(first) = later.runs.first() else {
            return;
        };
        if self.runs.last().is_none_or(|last| last.end <= first.start) {
            for &run in &later.runs {
                push(&mut self.runs, run);
            }
            return;
        }
        let old = std::mem::take(&mut self.runs);
        let mut out = Vec::with_capacity(old.len() + later.runs.len());
        let mut next = 0;
        // What is left of the old run at hand.
        let mut rest: Option<Run> = None;
        for &new in &later.runs {
            while let Some(run) = rest.take().or_else(|| {
                next += 1;
                old.get(next - 1).copied()
            }) {
                push(
                    &mut out,
                    Run {
                        end: run.end.min(new.start),
                        ..run
                    },
                );
                if run.end > new.end {
                    rest = Some(Run {
                        start: run.start.max(new.end),
                        ..run
                    });
                    break;
                }
            }
            push(&mut out, new);
        }
        if let Some(run) = rest {
            push(&mut out, run);
        }
        for &run in old.get(next..).unwrap_or(&[]) {
            push(&mut out, run);
        }
        self.runs = out;
    }

    /// The runs inside `start..end`, clipped.
    pub fn within(&self, start: u64, end: u64) -> impl Iterator<Item = Run> + '_ {
        let first = self.runs.partition_point(|run| run.end <= start);
        self.runs[first..]
            .iter()
            .take_while(move |run| run.start < end)
            .map(move |run| Run {
                start: run.start.max(start),
                end: run.end.min(end),
                change: run.change,
            })
            .filter(|run| run.start < run.end)
    }

    /// Forgets everything in the ranges (ascending, disjoint).
    pub fn remove(&mut self, ranges: &[(u64, u64)]) {
        let old = std::mem::take(&mut self.runs);
        let mut next = 0;
        for run in old {
            let mut at = run.start;
            while next < ranges.len() && ranges[next].1 <= at {
                next += 1;
            }
            for &(from, to) in ranges[next..].iter().take_while(|r| r.0 < run.end) {
                let end = from.max(at);
                push(
                    &mut self.runs,
                    Run {
                        start: at,
                        end,
                        ..run
                    },
                );
                at = at.max(to.min(run.end));
            }
            push(&mut self.runs, Run { start: at, ..run });
        }
    }

    /// Keeps only what lies in the ranges (ascending, disjoint).
    pub fn retain(&mut self, ranges: &[(u64, u64)]) {
        let mut out = Vec::with_capacity(self.runs.len());
        let mut next = 0;
        for &(from, to) in ranges {
            while next < self.runs.len() && self.runs[next].end <= from {
                next += 1;
            }
            for run in self.runs[next..].iter().take_while(|run| run.start < to) {
                push(
                    &mut out,
                    Run {
                        start: run.start.max(from),
                        end: run.end.min(to),
                        ..*run
                    },
                );
            }
        }
        self.runs = out;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Change::*;

    const SPACE: u64 = 40;

    type Model = [Option<Change>; SPACE as usize];

    fn check(set: &Dirty, model: &Model) {
        for page in 0..SPACE {
            assert_eq!(set.at(page * PAGE), model[page as usize], "{set:?}");
        }
        for pair in set.runs().windows(2) {
            assert!(pair[0].end <= pair[1].start);
            assert!(pair[0].end < pair[1].start || pair[0].change != pair[1].change);
        }
        assert!(set.runs().iter().all(|run| run.start < run.end));
        let count = |c| model.iter().filter(|&&m| m == Some(c)).count() as u64;
        assert_eq!(set.present_pages(), count(Present));
        assert_eq!(set.absent_pages(), count(Absent));
    }

    /// A small generator: the tests must not depend on anything.
    struct Random(u64);
    impl Random {
        fn next(&mut self, below: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % below
        }
        fn range(&mut self) -> (u64, u64) {
            let (a, b) = (self.next(SPACE + 1), self.next(SPACE + 1));
            (a.min(b), a.max(b))
        }
    }

    fn random_set(random: &mut Random) -> (Dirty, Model) {
        let (mut set, mut model) = (Dirty::new(), [None; SPACE as usize]);
        for _ in 0..random.next(12) {
            let (from, to) = random.range();
            let change = if random.next(2) == 0 { Present } else { Absent };
            set.insert(from * PAGE, to * PAGE, change);
            model[from as usize..to as usize].fill(Some(change));
        }
        check(&set, &model);
        (set, model)
    }

    #[test]
    fn sets_behave_like_a_table_of_pages() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for _ in 0..20_000 {
            let (mut a, mut a_model) = random_set(&mut random);
            let (b, b_model) = random_set(&mut random);
            let (from, to) = random.range();
            let mut within = Dirty::new();
            for run in a.within(from * PAGE, to * PAGE) {
                within.insert(run.start, run.end, run.change);
            }
            let mut clipped = a_model;
            clipped[..from as usize].fill(None);
            clipped[to as usize..].fill(None);
            check(&within, &clipped);
            a.unite(&b);
            for (mine, later) in a_model.iter_mut().zip(&b_model) {
                *mine = later.or(*mine);
            }
            check(&a, &a_model);
            // Ranges from the other set's runs: ascending, disjoint, some touching.
            let ranges: Vec<_> = b.runs().iter().map(|run| (run.start, run.end)).collect();
            let mut kept = a.clone();
            kept.retain(&ranges);
            a.remove(&ranges);
            let (mut kept_model, mut rest_model) = (a_model, a_model);
            for page in 0..SPACE as usize {
                match b_model[page] {
                    Some(_) => rest_model[page] = None,
                    None => kept_model[page] = None,
                }
            }
            check(&kept, &kept_model);
            check(&a, &rest_model);
        }
    }

    #[test]
    fn ascending_runs_are_appended_and_joined() {
        let mut set = Dirty::new();
        set.insert(0, PAGE, Present);
        set.insert(PAGE, 3 * PAGE, Present);
        set.insert(3 * PAGE, 4 * PAGE, Absent);
        set.insert(9 * PAGE, 9 * PAGE, Present);
        let run = |start: u64, end: u64, change| Run {
            start: start * PAGE,
            end: end * PAGE,
            change,
        };
        assert_eq!(set.runs(), [run(0, 3, Present), run(3, 4, Absent)]);
        set.clear();
        assert!(set.is_empty());
    }
}
