//! What is recorded already since the table began: inodes, names, blocks.
//!
//! In the agent heap, under the recorder's lock; void as soon as the table's number
//! changes. Growth can fail, never abort: what cannot be remembered is recorded again
//! or marks the table.

mod born;

use super::birth::Births;
use super::{Id, Which};
use born::Born;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

pub const BLOCK: u64 = 4096;
/// Blocks in one piece of a bitmap.
const PIECE: u64 = 512;

/// A fixed, cheap hash: keys are inode numbers and names, not an attacker's input to
/// anything but their own process.
#[derive(Default, Clone, Copy)]
pub struct Mix(u64);

impl Mix {
    fn mix(&mut self, v: u64) {
        self.0 = (self.0.rotate_left(5) ^ v).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

impl Hasher for Mix {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0u8; 8];
            for (place, byte) in word.iter_mut().zip(chunk) {
                *place = *byte;
            }
            self.mix(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, v: u64) {
        self.mix(v);
    }

    fn write_usize(&mut self, v: usize) {
        self.mix(v as u64);
    }

    fn write_u8(&mut self, v: u8) {
        self.mix(u64::from(v));
    }

    fn finish(&self) -> u64 {
        // The map takes its tag from the top bits, its place from the low ones.
        self.0 ^ (self.0 >> 32)
    }
}

type State = BuildHasherDefault<Mix>;
pub type Map<K, V> = HashMap<K, V, State>;
type Set<K> = HashSet<K, State>;

pub const fn empty<K, V>() -> Map<K, V> {
    Map::with_hasher(State::new())
}

/// What is known of one inode.
#[derive(Debug)]
pub enum Node<'a> {
    /// Made since the table began: nothing of it matters.
    Born {
        /// A directory has had this number since.
        was_dir: bool,
    },
    /// Its first modification was under an excluded path.
    Excluded,
    /// It existed.
    Row(&'a Row),
}

/// The same of those that were not made since.
#[derive(Debug)]
enum Old {
    Excluded,
    Row(Row),
}

/// An inode that existed and was modified.
#[derive(Debug)]
pub struct Row {
    pub row: u32,
    pub slot: u32,
    /// See `Identity`.
    pub birth: u64,
    /// Attributes that are recorded.
    pub which: Which,
    /// The size at the checkpoint.
    pub size0: u64,
    /// How many names it had when its row began, which is before a link to it is made.
    pub nlink0: u32,
    /// Its path in the journal is what it is called now.
    pub path_known: bool,
    /// All blocks below `size0` are saved.
    pub all: bool,
    /// It has been looked whether it has capabilities.
    pub capability_known: bool,
    saved: u64,
    blocks: Map<u64, [u64; (PIECE / 64) as usize]>,
    xattrs: Vec<Box<[u8]>>,
}

impl Row {
    pub fn new(row: u32, slot: u32, size0: u64, nlink0: u32) -> Row {
        Row {
            row,
            slot,
            birth: 0,
            which: 0,
            size0,
            nlink0,
            path_known: true,
            all: size0 == 0,
            capability_known: false,
            saved: 0,
            blocks: Map::with_hasher(State::new()),
            xattrs: Vec::new(),
        }
    }

    fn is_saved(&self, block: u64) -> bool {
        self.blocks
            .get(&(block / PIECE))
            .and_then(|piece| piece.get((block % PIECE / 64) as usize))
            .is_some_and(|word| word & (1 << (block % 64)) != 0)
    }

    /// The first run of blocks in `from..to` that is not saved.
    pub fn unsaved(&self, from: u64, to: u64) -> Option<(u64, u64)> {
        if self.all || from >= to {
            return None;
        }
        if self.blocks.is_empty() {
            return Some((from, to));
        }
        let start = (from..to).find(|b| !self.is_saved(*b))?;
        let end = (start..to).find(|b| self.is_saved(*b)).unwrap_or(to);
        Some((start, end))
    }

    /// Marks blocks as saved; what memory does not allow is saved again next time.
    pub fn mark(&mut self, from: u64, to: u64) {
        let count = self.size0.div_ceil(BLOCK);
        if from == 0 && to >= count {
            self.set_all();
            return;
        }
        let mut block = from;
        while block < to {
            let end = to.min((block / PIECE + 1) * PIECE);
            if self.blocks.try_reserve(1).is_err() {
                return;
            }
            let piece = self.blocks.entry(block / PIECE).or_default();
            for b in block..end {
                if let Some(word) = piece.get_mut((b % PIECE / 64) as usize) {
                    let bit = 1 << (b % 64);
                    self.saved += u64::from(*word & bit == 0);
                    *word |= bit;
                }
            }
            block = end;
        }
        if self.saved >= count {
            self.set_all();
        }
    }

    fn set_all(&mut self) {
        self.all = true;
        self.blocks = Map::with_hasher(State::new());
    }

    pub fn has_xattr(&self, name: &[u8]) -> bool {
        self.xattrs.iter().any(|n| **n == *name)
    }

    pub fn add_xattr(&mut self, name: &[u8]) {
        if let Some(name) = boxed(name)
            && self.xattrs.try_reserve(1).is_ok()
        {
            self.xattrs.push(name);
        }
    }
}

fn boxed(bytes: &[u8]) -> Option<Box<[u8]>> {
    let mut copy = Vec::new();
    copy.try_reserve_exact(bytes.len()).ok()?;
    copy.extend_from_slice(bytes);
    Some(copy.into_boxed_slice())
}

/// The whole index.
#[derive(Debug)]
pub struct Index {
    old: Map<Id, Old>,
    born: Born,
    /// Names that a record leads back to, by directory.
    names: Map<Id, Set<Box<[u8]>>>,
    pub births: Births,
    /// A directory that existed was moved into one that was made since.
    pub holds_old: bool,
}

impl Index {
    pub const fn new() -> Index {
        Index {
            old: Map::with_hasher(State::new()),
            born: Born::new(),
            names: Map::with_hasher(State::new()),
            births: Births::new(),
            holds_old: false,
        }
    }

    pub fn node(&self, id: &Id) -> Option<Node<'_>> {
        if let Some(was_dir) = self.born.get(id) {
            return Some(Node::Born { was_dir });
        }
        Some(match self.old.get(id)? {
            Old::Excluded => Node::Excluded,
            Old::Row(row) => Node::Row(row),
        })
    }

    pub fn is_born(&self, id: &Id) -> bool {
        self.born.get(id).is_some()
    }

    pub fn row(&self, id: &Id) -> Option<&Row> {
        match self.old.get(id) {
            Some(Old::Row(row)) => Some(row),
            _ => None,
        }
    }

    pub fn row_mut(&mut self, id: &Id) -> Option<&mut Row> {
        match self.old.get_mut(id) {
            Some(Old::Row(row)) => Some(row),
            _ => None,
        }
    }

    /// Made since; `was_dir`: a directory has had this number since. Without memory for it, the
    /// worst is a record too many.
    pub fn set_born(&mut self, id: &Id, was_dir: bool) {
        self.old.remove(id);
        self.born.add(id, was_dir);
    }

    pub fn set_excluded(&mut self, id: Id) {
        self.set_old(id, Old::Excluded);
    }

    /// False: no memory.
    pub fn set_row(&mut self, id: Id, row: Row) -> bool {
        self.set_old(id, Old::Row(row))
    }

    fn set_old(&mut self, id: Id, old: Old) -> bool {
        let room = self.old.try_reserve(1).is_ok();
        if room {
            self.born.remove(&id);
            self.old.insert(id, old);
        }
        room
    }

    pub fn is_covered(&self, dir: &Id, name: &[u8]) -> bool {
        self.names
            .get(dir)
            .is_some_and(|names| names.contains(name))
    }

    /// A record leads this name back. Without memory it is recorded again.
    pub fn cover(&mut self, dir: &Id, name: &[u8]) {
        if self.names.try_reserve(1).is_err() {
            return;
        }
        let names = self.names.entry(*dir).or_default();
        if names.contains(name) || names.try_reserve(1).is_err() {
            return;
        }
        if let Some(name) = boxed(name) {
            names.insert(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsaved_runs() {
        let mut row = Row::new(0, 0, 2000 * BLOCK + 1, 1);
        assert_eq!(row.unsaved(3, 9), Some((3, 9)));
        row.mark(5, 7);
        assert_eq!(row.unsaved(3, 9), Some((3, 5)));
        assert_eq!(row.unsaved(5, 9), Some((7, 9)));
        assert_eq!(row.unsaved(5, 7), None);
        row.mark(0, 5);
        row.mark(7, 2000);
        assert!(!row.all);
        assert_eq!(row.unsaved(0, 2001), Some((2000, 2001)));
        row.mark(2000, 2001);
        assert!(row.all);
        assert_eq!(row.unsaved(0, 2001), None);
    }

    #[test]
    fn names_are_covered_by_directory() {
        let mut index = Index::new();
        let (a, b) = (Id { dev: 1, ino: 1 }, Id { dev: 1, ino: 2 });
        index.cover(&a, b"x");
        assert!(index.is_covered(&a, b"x"));
        assert!(!index.is_covered(&b, b"x"));
        assert!(!index.is_covered(&a, b"y"));
    }
}
