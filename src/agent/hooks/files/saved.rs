//! Which blocks of an inode are known to be saved since the table began: a bitmap an inode, so
//! that the second and every later overwrite of a block needs no lock and no record. `pwrite64`
//! of a block or less is decided by stage 1 itself, from the same bits.
//!
//! Maps are made and filled inside a `Recording` ([`note`]) and read without a lock inside an
//! `InHook` ([`Map::covers`]). A map is freed by the first recording after its table, which
//! is after a stop, and no stop finds a thread inside a hook: so nobody reads it then.

use super::guard::Recording;
use crate::persist::{Id, recorder};
use ckpt_sys::callsite::SavedBlocks;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, Ordering::*};

const BLOCK: u64 = 4096;
/// No map for more blocks than this (a bitmap of 4 MiB, a file of 128 GiB).
const MOST: u64 = 1 << 25;

/// Stage 1 of the call-site net reads the first field and the bits.
#[repr(C)]
pub struct Map {
    blocks: SavedBlocks,
    id: Id,
    /// The file's size when the map was made, which was the checkpoint's: a write that goes
    /// beyond it makes the file longer, which is to be recorded.
    size: u64,
    bits: Vec<AtomicU64>,
}

/// In a descriptor's place for a map: its inode was made since the table began.
static BORN: Map = Map {
    blocks: SavedBlocks::NONE,
    id: Id { dev: 0, ino: 0 },
    size: 0,
    bits: Vec::new(),
};

/// See [`BORN`].
pub fn born() -> *const Map {
    &raw const BORN
}

impl Map {
    pub fn id(&self) -> Id {
        self.id
    }

    /// Are all blocks that `start..end` touches saved?
    pub fn covers(&self, start: u64, end: u64) -> bool {
        let saved = |block: u64| {
            let word = self.bits.get((block / 64) as usize);
            word.is_some_and(|word| word.load(Relaxed) & 1 << (block % 64) != 0)
        };
        start < end && end <= self.size && (start / BLOCK..end.div_ceil(BLOCK)).all(saved)
    }

    fn set(&self, start: u64, end: u64) {
        let room = self.bits.len() as u64 * 64;
        for block in start / BLOCK..end.div_ceil(BLOCK).min(room) {
            if let Some(word) = self.bits.get((block / 64) as usize) {
                word.fetch_or(1 << (block % 64), Relaxed);
            }
        }
    }
}

// Boxed: descriptors' entries point at a map while the list grows.
#[allow(clippy::vec_box)]
struct Maps {
    table: u32,
    #[expect(clippy::vec_box, reason = "readers hold pointers")]
    maps: Vec<Box<Map>>,
}

struct Guarded(UnsafeCell<Maps>);

// SAFETY: only reached inside a `Recording`, that is, under the recorder's lock.
unsafe impl Sync for Guarded {}

static MAPS: Guarded = Guarded(UnsafeCell::new(Maps {
    table: 0,
    maps: Vec::new(),
}));

/// The blocks of `start..end` of an inode of `size` bytes are saved. Its map, valid as long
/// as the table is open; `None`: no room.
pub fn note(_: &mut Recording, id: Id, size: u64, start: u64, end: u64) -> Option<*const Map> {
    // SAFETY: the caller's recording holds the lock.
    let all = unsafe { &mut *MAPS.0.get() };
    let table = recorder::table_number();
    if all.table != table {
        all.maps = Vec::new();
        all.table = table;
    }
    if let Some(map) = all.maps.iter().find(|map| map.id == id) {
        map.set(start, end);
        return Some(&raw const **map);
    }
    let blocks = size.div_ceil(BLOCK).min(MOST);
    let words = usize::try_from(blocks.div_ceil(64)).ok()?;
    let mut bits = Vec::new();
    bits.try_reserve_exact(words).ok()?;
    bits.resize_with(words, || AtomicU64::new(0));
    all.maps.try_reserve(1).ok()?;
    let blocks = SavedBlocks::of(&bits, size);
    let map = Box::new(Map {
        blocks,
        id,
        size,
        bits,
    });
    map.set(start, end);
    all.maps.push(map);
    all.maps.last().map(|map| &raw const **map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_covered_when_all_are_set() {
        let map = Map {
            blocks: SavedBlocks::NONE,
            id: Id::default(),
            size: 128 * BLOCK - 1,
            bits: (0..2).map(|_| AtomicU64::new(0)).collect(),
        };
        map.set(4095, 4097);
        assert!(map.covers(0, 8192) && map.covers(1, 2));
        assert!(!map.covers(0, 8193) && !map.covers(8192, 8193) && !map.covers(5, 5));
        map.set(0, u64::MAX);
        assert!(map.covers(0, 128 * BLOCK - 1) && !map.covers(0, 128 * BLOCK));
    }
}
