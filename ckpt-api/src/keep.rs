//! Values that come through a rollback: their own allocation, made before the checkpoint,
//! holding nothing but plain bytes.

use std::cell::Cell;
use std::ffi::c_void;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Types without references, invalid bit patterns or owners: any bytes that one value of it
/// had may be put over another.
///
/// # Safety
/// Implementors consist of such bytes only, padding included.
pub unsafe trait Plain: 'static {}

macro_rules! plain { ($($t:ty),*) => { $(
    // SAFETY: numbers.
    unsafe impl Plain for $t {}
)* } }
plain!(
    u8, u16, u32, u64, u128, usize, i8, i16, i32, i64, i128, isize, f32, f64
);
// SAFETY: a sequence of plain values.
unsafe impl<T: Plain> Plain for [T] {}
// SAFETY: as above.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// Counts the [`Keep`]s made so far: a value's birth.
static BORN: AtomicU64 = AtomicU64::new(0);

/// How many there were at the checkpoint with an id. Part of memory, so a rollback puts the
/// list back together with what it describes.
static SEEN: Mutex<Vec<(i32, u64)>> = Mutex::new(Vec::new());

fn seen() -> std::sync::MutexGuard<'static, Vec<(i32, u64)>> {
    SEEN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The latest checkpoint of any id.
const LATEST: i32 = -1;

/// Before a checkpoint, so that its image says it; returns what was there.
pub(crate) fn about_to_take(id: i32) -> Option<u64> {
    let now = BORN.load(Ordering::SeqCst);
    let mut list = seen();
    match list.iter_mut().find(|row| row.0 == id) {
        Some(row) => Some(std::mem::replace(&mut row.1, now)),
        None => {
            list.push((id, now));
            None
        }
    }
}

/// The checkpoint has failed: the id means the one before again.
pub(crate) fn not_taken(id: i32, before: Option<u64>) {
    let mut list = seen();
    match before {
        None => list.retain(|row| row.0 != id),
        Some(before) => list
            .iter_mut()
            .filter(|row| row.0 == id)
            .for_each(|row| row.1 = before),
    }
}

/// How many values existed at the latest checkpoint with this id that this crate has taken
/// (one of the clock is younger still).
pub(crate) fn seen_by(id: i32) -> Option<u64> {
    let list = seen();
    // Births only grow: the latest checkpoint of all has seen the most.
    let meant = list.iter().filter(|row| id == LATEST || row.0 == id);
    meant.map(|row| row.1).max()
}

/// A value that [`Rollback::keep`](crate::Rollback::keep) can bring through. It has an
/// allocation of its own for as long as it lives, so what is there now was there at every
/// checkpoint since it was made.
#[derive(Debug)]
pub struct Keep<T: Plain + ?Sized> {
    born: u64,
    value: Box<Slot<T>>,
}

/// Written from outside of the language (by a rollback): never assumed unchanged.
#[derive(Debug)]
#[repr(transparent)]
struct Slot<T: ?Sized>(std::cell::UnsafeCell<T>);

fn next_birth() -> u64 {
    BORN.fetch_add(1, Ordering::SeqCst) + 1
}

impl<T: Plain> Keep<T> {
    pub fn new(value: T) -> Keep<T> {
        let value = Box::new(Slot(value.into()));
        Keep {
            born: next_birth(),
            value,
        }
    }

    pub fn set(&self, value: T) {
        // SAFETY: not `Sync`, and no reference into the slot outlives a call of `&self`.
        unsafe { *self.value.0.get() = value }
    }

    pub fn get(&self) -> T
    where
        T: Copy,
    {
        // SAFETY: as in `set`.
        unsafe { *self.value.0.get() }
    }
}

impl<T: Plain + Copy> Keep<[T]> {
    /// `len` times `value`.
    pub fn slice(value: T, len: usize) -> Keep<[T]> {
        let values: Box<[T]> = vec![value; len].into_boxed_slice();
        // SAFETY: `Slot` and `UnsafeCell` are transparent.
        let value = unsafe { Box::from_raw(Box::into_raw(values) as *mut Slot<[T]>) };
        Keep {
            born: next_birth(),
            value,
        }
    }

    /// The values one by one.
    pub fn cells(&self) -> &[Cell<T>] {
        // SAFETY: `Cell` is a transparent `UnsafeCell`; the slot is never borrowed otherwise
        // through `&self`.
        unsafe { &*(self.value.0.get() as *const [Cell<T>]) }
    }
}

impl<T: Plain + ?Sized> Keep<T> {
    pub fn get_mut(&mut self) -> &mut T {
        self.value.0.get_mut()
    }

    pub(crate) fn born(&self) -> u64 {
        self.born
    }

    pub(crate) fn region(&self) -> (*mut c_void, usize) {
        let value = self.value.0.get();
        // SAFETY: the box is alive.
        (value.cast(), size_of_val(unsafe { &*value }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // One test: births and checkpoints are counted for the whole process.
    #[test]
    fn what_a_checkpoint_has_seen() {
        let mut old = Keep::new(7u32);
        let before = about_to_take(5);
        assert_eq!(before, None);
        let young = Keep::slice(1u8, 100);
        assert!(old.born() <= seen_by(5).unwrap());
        assert!(young.born() > seen_by(5).unwrap());
        let before = about_to_take(5);
        assert!(young.born() <= seen_by(5).unwrap());
        not_taken(5, before);
        assert!(young.born() > seen_by(5).unwrap());
        assert_eq!(about_to_take(6), None);
        not_taken(6, None);
        assert_eq!(seen_by(6), None);

        // Of any id: the latest.
        assert_eq!(seen_by(-1), seen_by(5));
        old.set(9);
        *old.get_mut() += 1;
        assert_eq!(old.get(), 10);
        young.cells()[99].set(3);
        let (at, len) = young.region();
        assert_eq!((at.cast_const().cast(), len), (young.cells().as_ptr(), 100));
    }
}
