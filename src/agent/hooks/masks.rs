//! Private copies of signal masks, without the reserved signal.
//!
//! A call that is forwarded to its site runs after the hook has returned, and a
//! signal handler may run in between, so the copy can live neither on the hook's
//! stack nor in one place per thread. Programs use few masks: each distinct one is
//! kept for ever in a table of our own `.bss` and handed out by address. Any
//! context; lock-free.

use crate::agent::state::RESERVED_BIT;
use std::sync::atomic::{AtomicU64, Ordering::*};

/// A mask, and the `{pointer, size}` pair that pselect6 and io_pgetevents take.
#[repr(C)]
pub struct Interned {
    /// The mask, with the reserved signal where the program's has it; 0: free.
    key: AtomicU64,
    mask: AtomicU64,
    pair: [AtomicU64; 2],
}

impl Interned {
    const fn empty() -> Interned {
        Interned {
            key: AtomicU64::new(0),
            mask: AtomicU64::new(0),
            pair: [const { AtomicU64::new(0) }; 2],
        }
    }

    /// Where the kernel reads the mask.
    pub fn mask_address(&'static self) -> u64 {
        // Idempotent, and complete before the address is known to anybody.
        let key = self.key.load(Relaxed);
        self.mask.store(key & !RESERVED_BIT, Release);
        self.mask.as_ptr() as u64
    }

    /// Where the kernel reads the pair.
    pub fn pair_address(&'static self) -> u64 {
        self.pair[0].store(self.mask_address(), Relaxed);
        self.pair[1].store(8, Release);
        self.pair[0].as_ptr() as u64
    }
}

const SLOTS: usize = 1024;
static ZERO: Interned = Interned::empty();
static TABLE: [Interned; SLOTS] = [const { Interned::empty() }; SLOTS];

/// The table's copy of a mask of which the program wants `wanted`, and the kernel is to see `mask`
/// (without the reserved signal); `None` when a program has used more than a thousand
/// different ones (its mask is then passed as it is, and a thread that waits with
/// the reserved signal blocked makes the checkpoint be refused).
pub fn intern(wanted: u64, mask: u64) -> Option<&'static Interned> {
    let key = mask | wanted & RESERVED_BIT;
    if key == 0 {
        return Some(&ZERO);
    }
    let start = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54) as usize;
    for i in 0..SLOTS {
        let slot = &TABLE[(start + i) % SLOTS];
        let seen = slot.key.load(Acquire);
        if seen == key {
            return Some(slot);
        }
        if seen == 0 {
            match slot.key.compare_exchange(0, key, AcqRel, Acquire) {
                Ok(_) => return Some(slot),
                Err(other) if other == key => return Some(slot),
                Err(_) => {}
            }
        }
    }
    None
}

/// The mask at this address as the program wants it, where it is a copy of ours: a call that a stop
/// has interrupted may go through its hook again with what the hook has put there.
pub fn wanted(address: u64) -> Option<u64> {
    let offset = address.checked_sub(TABLE.as_ptr() as u64)? as usize;
    let slot = TABLE.get(offset / size_of::<Interned>())?;
    (address == slot.mask.as_ptr() as u64).then(|| slot.key.load(Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_mask_same_address() {
        let a = intern(0xfff0, 0xfff0).unwrap();
        let b = intern(0xfff0, 0xfff0).unwrap();
        assert_eq!(a.mask_address(), b.mask_address());
        assert_eq!(a.mask.load(Relaxed), 0xfff0);
        assert_ne!(intern(1, 1).unwrap().mask_address(), a.mask_address());
        a.pair_address();
        assert_eq!(a.pair[0].load(Relaxed), a.mask_address());
        let none = intern(0, 0).unwrap();
        none.mask_address();
        assert_eq!(none.mask.load(Relaxed), 0);
    }

    #[test]
    fn what_was_wanted_is_known() {
        for wanted_mask in [RESERVED_BIT, RESERVED_BIT | 6, 6] {
            let copy = intern(wanted_mask, wanted_mask & !RESERVED_BIT).unwrap();
            let at = copy.mask_address();
            assert_eq!(copy.mask.load(Relaxed), wanted_mask & !RESERVED_BIT);
            assert_eq!(wanted(at), Some(wanted_mask));
            assert_eq!(wanted(at + 8), None);
        }
        let mine = 5u64;
        assert_eq!(wanted(&raw const mine as u64), None);
        assert_eq!(wanted(0), None);
    }
}
