//! Finds out what a program touches soon after a restart.
//!
//! The page tables tell, but the kernel fills them with up to sixteen pages around each one
//! touched, those that are in the page cache. It leaves that alone in mappings that are
//! registered with userfaultfd. So they are registered here, with a descriptor that asks
//! for nothing and protects nothing, as long as that costs little: for a moment, and
//! until the program has had so many faults. What comes to the page tables later is kept
//! apart.
//!
//! Helper thread.

use super::faults;
use super::fetch::BULK_AFTER_NS;
use crate::agent::procfs::OwnFd;
use crate::agent::track::blank::{Range, push, without};
use crate::agent::track::pagemap::{PageMap, Query, is};
use crate::agent::track::uffd;
use crate::image::PAGE;
use crate::store::working_set::WorkingSet;

/// A working set is what was touched so soon after a restart.
const SOON_NS: u64 = 2_000_000_000;
/// Mappings are watched at most so long, and until so many page faults: each costs half a
/// microsecond, and the sixteenth part of that if sixteen pages come with it.
const WATCH_NS: u64 = BULK_AFTER_NS;
const MOST_FAULTS: i64 = 4096;
/// How often the faults are counted.
const COUNT_NS: u64 = 2_000_000;
/// The first look; each later one comes at twice the time.
const FIRST_NS: u64 = 2_000_000;

pub struct Record {
    ranges: Vec<Range>,
    /// By this the mappings are registered.
    watch: Option<OwnFd>,
    /// What comes to the page tables now was touched.
    exact: bool,
    cold: bool,
    began_ns: u64,
    /// `None`: done.
    due_ns: Option<u64>,
    look_ns: u64,
    /// Page faults before.
    faults: i64,
    pagemap: Option<PageMap>,
    seen: Vec<Range>,
    set: WorkingSet,
}

impl std::fmt::Debug for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Record").field("set", &self.set).finish()
    }
}

impl Record {
    pub fn new(generation: u64, ranges: Vec<Range>, cold: bool, now: u64) -> Record {
        Record {
            ranges,
            watch: None,
            exact: false,
            cold,
            began_ns: now,
            due_ns: Some(0),
            look_ns: now + FIRST_NS,
            faults: 0,
            pagemap: None,
            seen: Vec::new(),
            set: WorkingSet {
                generation,
                ..WorkingSet::default()
            },
        }
    }

    /// There is nothing to be learned.
    pub fn leave_out(&mut self) {
        self.due_ns = None;
    }

    /// When [`Record::look`] wants to be called.
    pub fn due(&self) -> u64 {
        self.due_ns.unwrap_or(u64::MAX)
    }

    pub fn look(&mut self, now: u64) {
        let end = self.began_ns + SOON_NS;
        if self.due_ns == Some(0) {
            self.begin();
        } else if now >= end {
            self.unwatch();
            self.finish();
            self.due_ns = None;
            return;
        } else if self.exact {
            let many = faults().0 - self.faults > MOST_FAULTS && !self.cold;
            if many || now >= self.began_ns + WATCH_NS {
                self.unwatch();
            } else if now >= self.look_ns {
                self.look_ns = self.began_ns + (now - self.began_ns) * 2;
                self.note();
            }
        }
        self.due_ns = Some(if self.exact {
            (now + COUNT_NS).min(self.look_ns.max(now + 1)).min(end)
        } else {
            end
        });
    }

    /// What is there already was put there by the restore, or touched in the meantime. The
    /// program runs: this costs it no time.
    fn begin(&mut self) {
        self.faults = faults().0;
        self.pagemap = PageMap::open().ok();
        if uffd::in_use()
            && let Ok(fd) = uffd::open()
        {
            let register = |&range: &Range| uffd::register(&fd, range).is_ok();
            // Some may belong to the tracker: those are as good as registered here.
            let registered = self.ranges.iter().filter(|range| register(range)).count();
            self.exact = registered > 0;
            self.watch = Some(fd);
        }
        // Of what is not in memory the kernel maps nothing that was not asked for.
        self.exact |= self.cold;
        if let Some(all) = self.present(&mut Vec::new()) {
            // The first look is what was touched on the way here, if that can be told.
            let touched = if self.cold { &all[..] } else { &[] };
            self.set.looks.push(runs(touched));
            self.seen = all;
        }
    }

    /// What has come to the page tables since the look before was touched.
    fn note(&mut self) {
        let mut new = Vec::new();
        let Some(all) = self.present(&mut Vec::new()) else {
            return;
        };
        without(&all, &self.seen, |from, to| push(&mut new, (from, to)));
        self.set.looks.push(runs(&new));
        self.seen = all;
    }

    /// The kernel may fill the page tables as it likes from here on, and the tracker may
    /// have the mappings.
    pub fn unwatch(&mut self) {
        if std::mem::take(&mut self.exact) {
            self.note();
        }
        self.watch = None;
    }

    fn finish(&mut self) {
        let mut files = Vec::new();
        let Some(all) = self.present(&mut files) else {
            return;
        };
        let pages = |ranges: &[Range]| ranges.iter().map(|r| (r.1 - r.0) / PAGE).sum::<u64>();
        self.set.touched = pages(&all);
        self.set.written = self.set.touched - pages(&files);
        let looks = self.set.looks.iter().flatten();
        let range = |&(page, pages): &(u64, u64)| (page * PAGE, (page + pages) * PAGE);
        let mut known: Vec<Range> = looks.map(range).collect();
        known.sort_unstable();
        let mut rest = Vec::new();
        without(&all, &known, |from, to| push(&mut rest, (from, to)));
        self.set.around = runs(&rest);
        self.set.shorten();
    }

    /// What of the mappings is in the page tables, and in `files` what of that is the
    /// images' own.
    fn present(&mut self, files: &mut Vec<Range>) -> Option<Vec<Range>> {
        let query = Query {
            any: is::PRESENT | is::SWAPPED,
            tell: is::FILE,
            ..Query::default()
        };
        let map = self.pagemap.as_mut()?;
        let mut all = Vec::new();
        for &(start, end) in &self.ranges {
            map.scan(start, end, query, |from, to, categories| {
                push(&mut all, (from, to));
                if categories & is::FILE != 0 {
                    push(files, (from, to));
                }
            })
            .ok()?;
        }
        Some(all)
    }

    /// The set, once, when it is complete.
    pub fn finished(&mut self) -> Option<WorkingSet> {
        if self.due_ns.is_some() {
            return None;
        }
        self.pagemap.take()?;
        Some(std::mem::take(&mut self.set))
    }
}

fn runs(ranges: &[Range]) -> Vec<(u64, u64)> {
    let run = |&(from, to): &Range| (from / PAGE, (to - from) / PAGE);
    ranges.iter().map(run).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;
    use crate::agent::track::uffd::Uffd;

    /// Of a file in the page cache the kernel maps what lies around a page as well; the record
    /// tells the two apart as long as it watches.
    #[test]
    fn what_is_touched_is_told_from_what_lies_around_it() {
        if let Err(why) = uffd::probe() {
            eprintln!("not here: {why}");
            return;
        }
        let path = std::env::temp_dir().join(format!("ckpt-record-{}", std::process::id()));
        std::fs::write(&path, vec![1u8; 256 * PAGE as usize]).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        in_child(|| {
            let _tracker = Uffd::new().unwrap();
            // SAFETY: a file of the test, which nobody truncates.
            let mut map = unsafe { memmap2::MmapOptions::new().map_copy(&file) }.unwrap();
            let base = map.as_ptr() as u64;
            let page = |number: u64| (base / PAGE + number, 1);
            let touch = |map: &memmap2::MmapMut, number: usize| {
                // SAFETY: inside the mapping.
                unsafe { map.as_ptr().add(number * PAGE as usize).read_volatile() }
            };
            let mut record = Record::new(1, vec![(base, base + 256 * PAGE)], false, 1000);
            record.look(1000);
            assert!(record.watch.is_some() && record.exact);
            touch(&map, 40);
            map[70 * PAGE as usize] = 9;
            record.look(record.look_ns);
            touch(&map, 8);
            record.look(record.look_ns);
            record.unwatch();
            touch(&map, 150);
            record.look(1000 + SOON_NS);
            let set = record.finished().unwrap();
            assert!(set.looks[0].is_empty());
            assert_eq!(set.looks[1], [page(40), page(70)]);
            assert_eq!(set.looks[2], [page(8)]);
            let later = set.looks[3..].iter().all(Vec::is_empty);
            assert!(later, "{:?}", set.looks);
            // It was not watched any more: the page is there, and more than it.
            assert!(
                set.around
                    .iter()
                    .any(|r| r.0 <= page(150).0 && r.0 + r.1 > page(150).0)
            );
            assert!(set.around.iter().map(|r| r.1).sum::<u64>() > 1);
            assert_eq!((set.touched > 4, set.written), (true, 1));
            assert!(record.finished().is_none());
            drop(map);
        });
        std::fs::remove_file(&path).unwrap();
    }
}
