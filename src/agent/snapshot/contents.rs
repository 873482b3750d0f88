//! What the base generation holds of objects whose writes nobody sees: shared memory, memfds
//! and open files without a name. They can be written by any process that has them, by
//! calls and through any mapping, so each page's checksum is kept, and at the stop all of
//! them are read: what has another one than in the base is stored. Of what is new, or changes
//! much, most is stored before the stop: then only what has another checksum than there.
//!
//! Contents are addressed like memory ([`ObjectSpace`]): each object has a space of
//! addresses of its own, far above the program's. Which object had a space before does not
//! matter: a page counts as the base's only if the base's page there has these very bytes.
//!
//! Helper thread. Not in the image: after a restore everything is stored once.

use crate::image::state::{OBJECTS_AT, ObjectSpace};
use xxhash_rust::xxh3::xxh3_128;

const PAGE: u64 = 4096;
/// Addresses of one object.
const SPACE: u64 = 1 << 44;
const SPACES: u64 = 1 << 12;
/// Checksums that lie together: where none of them is known they take no memory.
const GROUP: u64 = 512;

/// Device and inode.
pub type Id = (u64, u64);

/// Checksums by page; 0: a page of zeroes, or none.
#[derive(Debug, Default)]
struct Sums(Vec<Vec<u128>>);

impl Sums {
    fn get(&self, page: u64) -> u128 {
        let group = self.0.get((page / GROUP) as usize);
        let sum = group.and_then(|group| group.get((page % GROUP) as usize));
        sum.copied().unwrap_or(0)
    }

    /// False where there is no memory.
    fn set(&mut self, page: u64, sum: u128) -> bool {
        let (group, at) = ((page / GROUP) as usize, (page % GROUP) as usize);
        if group >= self.0.len() {
            if self.0.try_reserve(group + 1 - self.0.len()).is_err() {
                return false;
            }
            self.0.resize_with(group + 1, Vec::new);
        }
        let group = &mut self.0[group];
        if group.is_empty() {
            if group.try_reserve_exact(GROUP as usize).is_err() {
                return false;
            }
            group.resize(GROUP as usize, 0);
        }
        group[at] = sum;
        true
    }
}

#[derive(Debug, Default)]
struct Object {
    id: Id,
    at: u64,
    /// Of pages behind these nothing is known.
    npages: u64,
    sums: Sums,
    /// Much of it was not as in the generation before.
    restless: bool,
}

fn find(objects: &[Object], id: Id) -> Option<usize> {
    objects.iter().position(|object| object.id == id)
}

/// An object's space, and runs of it in addresses and pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spaced {
    pub space: ObjectSpace,
    /// The copy that was stored ahead counts.
    pub kept: Vec<(u64, u64)>,
    /// Neither the image nor its base holds anything.
    pub dropped: Vec<(u64, u64)>,
}

/// What is known of the contents of objects.
#[derive(Debug, Default)]
pub struct Contents {
    /// In the generation that the next one may stand on.
    base: Vec<Object>,
    /// Stored in the image before the stop.
    ahead: Vec<Object>,
    /// In the generation that is being taken.
    made: Vec<Object>,
    /// The object of `made` that was met last, and its places in `base` and `ahead`.
    last: (usize, Option<usize>, Option<usize>),
    on: bool,
    /// There was no memory for the checksums once.
    given_up: bool,
}

impl Contents {
    /// Before anything of a generation is stored. `on`: increments are made at all; `based`: the
    /// image stands on the generation published last.
    pub fn begin(&mut self, on: bool, based: bool) {
        self.on = on && !self.given_up;
        self.ahead.clear();
        if !(self.on && based) {
            self.base.clear();
        }
        self.stopped();
    }

    /// At the stop, before anything is read.
    pub fn stopped(&mut self) {
        self.made.clear();
        self.last = (usize::MAX, None, None);
    }

    /// Is it worth to store this object before the stop? That it is read twice is.
    pub fn wants_ahead(&self, id: Id) -> bool {
        let known = find(&self.base, id).map(|at| &self.base[at]);
        self.on && !self.given_up && known.is_none_or(|object| object.restless)
    }

    /// Before the stop: this page is not zero, and may change. Where it is to be stored now;
    /// `None`: it need not be.
    pub fn before(&mut self, id: Id, page: u64, bytes: &[u8]) -> Option<u64> {
        if page >= SPACE / PAGE {
            return None;
        }
        let base = find(&self.base, id).map(|at| &self.base[at]);
        let sum = xxh3_128(bytes).max(1);
        if base.is_some_and(|base| page < base.npages && base.sums.get(page) == sum) {
            return None;
        }
        let k = match find(&self.ahead, id) {
            Some(k) => k,
            None => {
                let at = self.space_of(id)?;
                self.ahead.push(Object {
                    id,
                    at,
                    ..Object::default()
                });
                self.ahead.len() - 1
            }
        };
        let object = &mut self.ahead[k];
        // Met before, by another mapping: what it is in the end the stop finds out.
        if object.sums.get(page) != 0 {
            return None;
        }
        if !object.sums.set(page, sum) {
            self.given_up = true;
            return None;
        }
        Some(object.at + page * PAGE)
    }

    /// The space that the object has, or a free one.
    fn space_of(&self, id: Id) -> Option<u64> {
        let all = || self.base.iter().chain(&self.ahead).chain(&self.made);
        if let Some(known) = all().find(|object| object.id == id && object.at != 0) {
            return Some(known.at);
        }
        let mut spaces = (0..SPACES).map(|slot| OBJECTS_AT + slot * SPACE);
        spaces.find(|&at| all().all(|object| object.at != at))
    }

    /// At the stop: this page is not zero. True: it need not be stored, the base or the image
    /// holds it.
    pub fn same(&mut self, id: Id, page: u64, bytes: &[u8]) -> bool {
        if !self.on {
            return false;
        }
        if self.made.get(self.last.0).is_none_or(|o| o.id != id) {
            let at = find(&self.made, id).unwrap_or_else(|| {
                self.made.push(Object {
                    id,
                    ..Object::default()
                });
                self.made.len() - 1
            });
            self.last = (at, find(&self.base, id), find(&self.ahead, id));
        }
        let sum = xxh3_128(bytes).max(1);
        let (made, base, ahead) = self.last;
        if !self.made[made].sums.set(page, sum) {
            self.given_up = true;
        }
        let base = base.map(|at| &self.base[at]);
        let ahead = ahead.map(|at| &self.ahead[at]);
        base.is_some_and(|base| page < base.npages && base.sums.get(page) == sum)
            || ahead.is_some_and(|ahead| ahead.sums.get(page) == sum)
    }

    /// When all has been read: the spaces of these objects (size in bytes), ascending. Of one
    /// that has none the contents are whole. `None`: there was no memory, nothing of this counts.
    pub fn spaces(&mut self, objects: &[(Id, u64)]) -> Option<Vec<Spaced>> {
        if !self.on {
            return Some(Vec::new());
        }
        if self.given_up {
            self.forget();
            return None;
        }
        let mut read = std::mem::take(&mut self.made);
        for &(id, bytes) in objects {
            let npages = bytes.div_ceil(PAGE);
            if npages == 0 || find(&self.made, id).is_some() {
                continue;
            }
            let sums = find(&read, id).map(|k| std::mem::take(&mut read[k].sums));
            let at = self.space_of(id).filter(|_| npages <= SPACE / PAGE);
            let Some(at) = at else {
                // Pages of it may have been left out.
                self.given_up = true;
                self.forget();
                return None;
            };
            self.made.push(Object {
                id,
                at,
                npages,
                sums: sums.unwrap_or_default(),
                restless: false,
            });
        }
        self.made.sort_unstable_by_key(|object| object.at);
        self.last = (usize::MAX, None, None);
        let mut made = std::mem::take(&mut self.made);
        let spaced = made.iter_mut().map(|object| self.spaced(object)).collect();
        self.made = made;
        Some(spaced)
    }

    fn spaced(&self, object: &mut Object) -> Spaced {
        let base = find(&self.base, object.id).map(|at| &self.base[at]);
        let ahead = find(&self.ahead, object.id).map(|at| &self.ahead[at]);
        let (mut kept, mut dropped) = (Vec::new(), Vec::new());
        let mut changed = 0;
        for page in 0..object.npages {
            let sum = object.sums.get(page);
            let known = base.filter(|base| page < base.npages);
            let known = known.map(|base| base.sums.get(page));
            if known == Some(sum) {
                continue;
            }
            changed += 1;
            let run = if sum == 0 {
                &mut dropped
            } else if ahead.is_some_and(|ahead| ahead.sums.get(page) == sum) {
                &mut kept
            } else {
                continue;
            };
            push(run, object.at + page * PAGE);
        }
        object.restless = changed * 8 > object.npages;
        Spaced {
            space: ObjectSpace {
                dev: object.id.0,
                ino: object.id.1,
                at: object.at,
                npages: object.npages,
            },
            kept,
            dropped,
        }
    }

    /// The generation that was taken last is durable.
    pub fn published(&mut self) {
        self.base = std::mem::take(&mut self.made);
        self.ahead.clear();
    }

    /// The next generation holds everything.
    pub fn forget(&mut self) {
        self.base.clear();
        self.ahead.clear();
        self.made.clear();
    }
}

fn push(runs: &mut Vec<(u64, u64)>, addr: u64) {
    match runs.last_mut() {
        Some(last) if last.0 + last.1 * PAGE == addr => last.1 += 1,
        _ => runs.push((addr, 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Id = (1, 10);
    const B: Id = (1, 11);

    fn page(value: u8) -> Vec<u8> {
        vec![value; PAGE as usize]
    }

    /// Takes a generation in which `A` holds these values (0: nothing), and returns what is
    /// stored and dropped of it, by page.
    fn take(contents: &mut Contents, based: bool, values: &[u8]) -> (Vec<u64>, Vec<(u64, u64)>) {
        contents.begin(true, based);
        contents.stopped();
        let mut stored = Vec::new();
        for (k, &value) in values.iter().enumerate().filter(|(_, value)| **value != 0) {
            if !contents.same(A, k as u64, &page(value)) {
                stored.push(k as u64);
            }
        }
        let bytes = values.len() as u64 * PAGE - 5;
        let spaced = contents.spaces(&[(A, bytes), (B, 1), (A, bytes)]).unwrap();
        assert_eq!(spaced.len(), 2);
        let a = spaced.iter().find(|s| s.space.ino == A.1).unwrap();
        assert_eq!(a.space.npages, values.len() as u64);
        let runs = a.dropped.iter();
        let runs = runs.map(|run| ((run.0 - a.space.at) / PAGE, run.1));
        (stored, runs.collect())
    }

    #[test]
    fn what_the_base_holds_is_not_stored_again() {
        let mut contents = Contents::default();
        let first = take(&mut contents, false, &[1, 0, 3, 4]);
        assert_eq!(first, (vec![0, 2, 3], vec![(1, 1)]));
        contents.published();
        assert_eq!(take(&mut contents, true, &[1, 0, 3, 4]), (vec![], vec![]));
        // It was not published: the base is still the first.
        let third = take(&mut contents, true, &[1, 2, 0, 5]);
        assert_eq!(third, (vec![1, 3], vec![(2, 1)]));
        let again = take(&mut contents, true, &[1, 2, 0, 5]);
        assert_eq!(again, third);
        contents.published();
        assert_eq!(take(&mut contents, true, &[1, 2, 0, 5]), (vec![], vec![]));
        // A base that does not count.
        let whole = take(&mut contents, false, &[1, 2, 0, 5]);
        assert_eq!(whole, (vec![0, 1, 3], vec![(2, 1)]));
    }

    /// What is behind the end is not the base's when the object has grown again.
    #[test]
    fn an_object_that_shrinks_and_grows() {
        let mut contents = Contents::default();
        take(&mut contents, false, &[1, 2, 3, 4]);
        contents.published();
        assert_eq!(take(&mut contents, true, &[1, 2]), (vec![], vec![]));
        contents.published();
        let grown = take(&mut contents, true, &[1, 2, 0, 4, 0]);
        assert_eq!(grown, (vec![3], vec![(2, 1), (4, 1)]));
    }

    /// Another object that gets the number, or the space, of one that is gone.
    #[test]
    fn an_object_in_the_place_of_another() {
        let mut contents = Contents::default();
        take(&mut contents, false, &[1, 2, 3]);
        contents.published();
        contents.begin(true, true);
        let c = (1, 12);
        assert!(!contents.same(c, 0, &page(1)));
        let spaced = contents.spaces(&[(c, 3 * PAGE)]).unwrap();
        // Not the space of one that the base has.
        assert_eq!(spaced[0].space.at, OBJECTS_AT + 2 * SPACE);
        assert_eq!(spaced[0].dropped, [(spaced[0].space.at + PAGE, 2)]);
        contents.published();
        let back = take(&mut contents, true, &[1, 0, 3]);
        assert_eq!(back, (vec![0, 2], vec![(1, 1)]));
    }

    #[test]
    fn without_increments_there_are_no_spaces() {
        let mut contents = Contents::default();
        contents.begin(false, false);
        assert!(!contents.same(A, 0, &page(1)));
        assert_eq!(contents.spaces(&[(A, PAGE)]), Some(Vec::new()));
    }

    /// What was stored before the stop counts where it is still the same.
    #[test]
    fn what_was_stored_ahead() {
        let mut contents = Contents::default();
        contents.begin(true, false);
        assert!(contents.wants_ahead(A));
        let at = OBJECTS_AT;
        assert_eq!(contents.before(A, 0, &page(1)), Some(at));
        assert_eq!(contents.before(A, 0, &page(1)), None);
        for k in 1..5 {
            assert_eq!(contents.before(A, k, &page(9)), Some(at + k * PAGE));
        }
        assert_eq!(contents.before(B, 0, &page(1)), Some(at + SPACE));
        // The stop: page 1 has changed, page 2 is zero now, page 4 is gone.
        contents.stopped();
        assert!(contents.same(A, 0, &page(1)));
        assert!(!contents.same(A, 1, &page(2)));
        assert!(contents.same(A, 3, &page(9)));
        let spaced = contents.spaces(&[(A, 4 * PAGE), (B, PAGE)]).unwrap();
        assert_eq!(spaced[0].kept, [(at, 1), (at + 3 * PAGE, 1)]);
        assert_eq!(spaced[0].dropped, [(at + 2 * PAGE, 1)]);
        // What B had was gone at the stop.
        assert_eq!((&spaced[1].kept[..], spaced[1].dropped.len()), (&[][..], 1));
        contents.published();
        assert!(contents.wants_ahead(A));
        // Changed, and changed back.
        contents.begin(true, true);
        assert_eq!(contents.before(A, 0, &page(1)), None);
        assert_eq!(contents.before(A, 1, &page(7)), Some(at + PAGE));
        contents.stopped();
        for (k, value) in [(0, 1), (1, 2), (3, 9)] {
            assert!(contents.same(A, k, &page(value)));
        }
        let spaced = contents.spaces(&[(A, 4 * PAGE)]).unwrap();
        assert!(spaced[0].kept.is_empty() && spaced[0].dropped.is_empty());
        contents.published();
        assert!(!contents.wants_ahead(A));
    }
}
