//! Private copies of signal masks, without the reserved signal.
//!
//! A call that is forwarded to its site runs after the hook has returned, and a
//! signal handler may run in between, so the copy can live neither on the hook's
//! stack nor in one place per thread. Programs use few masks: each distinct one is
//! kept for ever in a table of our own `.bss` and handed out by address. Any
//! context; lock-free.

use std::sync::atomic::{AtomicU64, Ordering::*};

/// A mask, and the `{pointer, size}` pair that pselect6 and io_pgetevents take.
#[repr(C)]
pub struct Interned {
    mask: AtomicU64,
    pair: [AtomicU64; 2],
}

impl Interned {
    const fn empty() -> Interned {
        Interned {
            mask: AtomicU64::new(0),
            pair: [const { AtomicU64::new(0) }; 2],
        }
    }

    /// Where the kernel reads the mask.
    pub fn mask_address(&'static self) -> u64 {
        self.mask.as_ptr() as u64
    }

    /// Where the kernel reads the pair.
    pub fn pair_address(&'static self) -> u64 {
        // Idempotent, and complete before the address is known to anybody.
        self.pair[0].store(self.mask_address(), Relaxed);
        self.pair[1].store(8, Release);
        self.pair[0].as_ptr() as u64
    }
}

const SLOTS: usize = 1024;
static ZERO: Interned = Interned::empty();
static TABLE: [Interned; SLOTS] = [const { Interned::empty() }; SLOTS];

/// The table's copy of `mask`; `None` when a program has used more than a thousand
/// different ones (its mask is then passed as it is, and a thread that waits with
/// the reserved signal blocked makes the checkpoint be refused).
pub fn intern(mask: u64) -> Option<&'static Interned> {
    if mask == 0 {
        return Some(&ZERO);
    }
    let start = (mask.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54) as usize;
    for i in 0..SLOTS {
        let slot = &TABLE[(start + i) % SLOTS];
        let seen = slot.mask.load(Acquire);
        if seen == mask {
            return Some(slot);
        }
        if seen == 0 {
            match slot.mask.compare_exchange(0, mask, AcqRel, Acquire) {
                Ok(_) => return Some(slot),
                Err(other) if other == mask => return Some(slot),
                Err(_) => {}
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_mask_same_address() {
        let a = intern(0xfff0).unwrap();
        let b = intern(0xfff0).unwrap();
        assert_eq!(a.mask_address(), b.mask_address());
        assert_eq!(a.mask.load(Relaxed), 0xfff0);
        assert_ne!(intern(1).unwrap().mask_address(), a.mask_address());
        a.pair_address();
        assert_eq!(a.pair[0].load(Relaxed), a.mask_address());
        assert_eq!(intern(0).unwrap().mask.load(Relaxed), 0);
    }
}
