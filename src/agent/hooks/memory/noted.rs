//! What the program has asked for that the helper must know when it looks at memory: sticky
//! flags, and numbers that grow.
//!
//! Set by the hooks in any thread, and by the helper for what it finds itself; read by the helper.

use crate::agent::hooks;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::*};

static SPECIAL_ADVICE: AtomicBool = AtomicBool::new(false);
/// Grows with every call that may change the flags of what is mapped at some place.
static ADVICE: AtomicU32 = AtomicU32::new(0);

/// As long as this number stays the same, flags that were read of a mapping are its flags.
pub fn advice_number() -> u32 {
    ADVICE.load(SeqCst)
}

/// After a call that may have changed flags, before a stop can come.
pub fn note_advice() {
    ADVICE.fetch_add(1, SeqCst);
}

/// Grows with every call after which pages may change, or cannot be written, without any
/// tracker seeing it: the kernel may take pages with MADV_FREE away later, and guarded pages
/// stay so whatever is discarded.
static UNSEEN: AtomicU32 = AtomicU32::new(0);

/// As long as this number stays the same, trackers see all there is to be seen.
pub fn unseen_number() -> u32 {
    UNSEEN.load(SeqCst)
}

/// Before such a call.
pub fn note_unseen() {
    UNSEEN.fetch_add(1, SeqCst);
}

/// Sticky: the program has made guard regions.
static GUARDED: AtomicBool = AtomicBool::new(false);

/// May there be guard regions (MADV_GUARD_INSTALL)?
pub fn guards_seen() -> bool {
    GUARDED.load(Relaxed)
}

/// There are some, or will be.
pub fn note_guards() {
    GUARDED.store(true, Relaxed);
}

/// Sticky: the program used MADV_DONTFORK, MADV_WIPEONFORK or the mlock family, so
/// the flags of its mappings must be read from smaps.
pub fn special_advice_seen() -> bool {
    SPECIAL_ADVICE.load(Relaxed)
}

/// Sets that flag (also for a restored process whose manifest has such flags).
pub fn note_special_advice() {
    if !SPECIAL_ADVICE.swap(true, SeqCst) {
        hooks::look_at_placing();
    }
    note_advice();
}

/// Sticky: the program has mappings that grow down. The kernel's list of mappings does not tell,
/// so that VmFlags must be read at each look.
static GROWS_DOWN: AtomicBool = AtomicBool::new(false);

pub fn grows_down_seen() -> bool {
    GROWS_DOWN.load(Relaxed)
}

/// There is one, or will be.
pub fn note_grows_down() {
    GROWS_DOWN.store(true, Relaxed);
}
