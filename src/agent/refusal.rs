//! Why no checkpoint can be taken from now on, what was seen that the checkpointer
//! must ask about, and how the helper thread is told to go.
//!
//! Written by hooks (any thread, any context), read by the helper. Atomics only.

use crate::agent::starter;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering::*};

static REASON: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static REASON_LEN: AtomicUsize = AtomicUsize::new(0);
static DECIDED: AtomicBool = AtomicBool::new(false);
static SANDBOXED: AtomicBool = AtomicBool::new(false);
static NOTED: AtomicU32 = AtomicU32::new(0);

/// The helper must end (it leaves its loop when this is set).
pub static RETIRE: AtomicBool = AtomicBool::new(false);
/// Non-zero while the helper thread exists; the kernel clears it and wakes waiters
/// when the thread is gone if it is given as CLONE_CHILD_CLEARTID.
pub static HELPER_ALIVE: AtomicU32 = AtomicU32::new(0);
/// `fn()` that wakes the helper (set by whoever starts it), or null.
static WAKE: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());

/// A facility whose use may stand in the way of a checkpoint. Those that keep a
/// descriptor are also found by the descriptors' examination; this is for the rest
/// and for the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    IoUring = 1,
    PerfEvent = 1 << 1,
    Userfaultfd = 1 << 2,
    /// io_setup: kernel AIO, leaves no descriptor.
    Aio = 1 << 3,
    Bpf = 1 << 4,
    /// pkey_mprotect: a mapping has a memory protection key.
    ProtectionKeys = 1 << 5,
    /// modify_ldt, iopl, ioperm: processor state that only the kernel knows.
    ProcessorState = 1 << 6,
    /// memfd_secret: memory nobody else can read.
    SecretMemory = 1 << 7,
    /// arch_prctl(ARCH_REQ_XCOMP_PERM): AMX permission, to be asked for again.
    TileRegisters = 1 << 8,
    /// setuid, capset and the like: for the kernel threads have credentials of their own.
    Credentials = 1 << 9,
    /// prctl(PR_SET_KEEPCAPS, PR_SET_TSC), which a thread alone can tell of itself.
    ThreadSwitches = 1 << 10,
    /// prctl(PR_SET_SECUREBITS), likewise.
    SecureBits = 1 << 11,
    /// pkey_alloc: there may be memory protection keys, though no mapping has one.
    KeyAllocated = 1 << 12,
    /// O_DIRECT, process_vm_writev on itself: memory is filled after its page was looked up
    /// (`hooks::pinned`).
    DirectIo = 1 << 13,
    /// /proc/self/mem, for writing: likewise, and through write protection.
    MemoryFile = 1 << 14,
}

/// A facility was used.
pub fn note(kind: Kind) {
    NOTED.fetch_or(kind as u32, Relaxed);
}

/// Every [`Kind`] seen so far, as bits; sticky.
pub fn noted() -> u32 {
    NOTED.load(Relaxed)
}

/// Was `kind` used?
pub fn was_noted(kind: Kind) -> bool {
    noted() & kind as u32 != 0
}

/// A facility that was used, leaves nothing to examine and cannot be saved.
pub fn noted_reason() -> Option<&'static str> {
    if was_noted(Kind::ProtectionKeys) {
        return Some("the program uses memory protection keys");
    }
    if was_noted(Kind::ProcessorState) {
        return Some("the program has changed processor state (LDT or I/O permissions)");
    }
    None
}

/// No checkpoint can be taken any more, for good; the first reason stays.
pub fn disable(reason: &'static str) {
    if !DECIDED.swap(true, AcqRel) {
        REASON_LEN.store(reason.len(), Relaxed);
        REASON.store(reason.as_ptr().cast_mut(), Release);
    }
}

/// The reason given to [`disable`], if any.
pub fn disabled() -> Option<&'static str> {
    let at = REASON.load(Acquire);
    if at.is_null() {
        return None;
    }
    // SAFETY: address and length of one `&'static str`; the length was stored
    // before the address was published.
    unsafe {
        let bytes = std::slice::from_raw_parts(at, REASON_LEN.load(Relaxed));
        Some(std::str::from_utf8_unchecked(bytes))
    }
}

/// A system-call filter is about to be in force: our own calls may be fatal.
pub fn set_sandboxed() {
    SANDBOXED.store(true, Release);
}

/// Hooks make no call that the program itself did not ask for.
pub fn sandboxed() -> bool {
    SANDBOXED.load(Relaxed)
}

/// Says how the helper is woken; `None` when there is none.
pub fn set_wake(wake: Option<fn()>) {
    let at = wake.map_or(std::ptr::null_mut(), |f| f as *mut ());
    WAKE.store(at, Release);
}

/// Asks the helper to end, without waiting.
pub fn ask_to_retire() {
    RETIRE.store(true, SeqCst);
    let at = WAKE.load(Acquire);
    if !at.is_null() {
        // SAFETY: only `set_wake` stores here, from a `fn()`.
        let wake: fn() = unsafe { std::mem::transmute(at) };
        wake();
    }
}

/// Asks the helper to end and waits until it is gone, a second at the most.
pub fn retire_and_wait() -> bool {
    starter::hand_over();
    ask_to_retire();
    for _ in 0..100 {
        let alive = HELPER_ALIVE.load(SeqCst);
        if alive == 0 {
            return true;
        }
        let step = [0u64, 10_000_000];
        // SAFETY: waits on our own static. A shared futex: the kernel's wake for
        // CLONE_CHILD_CLEARTID is a shared one.
        unsafe {
            syscall!(
                libc::SYS_futex,
                HELPER_ALIVE.as_ptr(),
                libc::FUTEX_WAIT,
                alive,
                &raw const step
            );
        }
    }
    HELPER_ALIVE.load(SeqCst) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;

    #[test]
    fn the_first_reason_stays() {
        in_child(|| {
            assert_eq!(disabled(), None);
            disable("one");
            disable("two");
            assert_eq!(disabled(), Some("one"));
            note(Kind::Aio);
            assert!(was_noted(Kind::Aio) && !was_noted(Kind::Bpf));
        });
    }

    #[test]
    fn retiring_waits_for_the_helper() {
        in_child(|| {
            HELPER_ALIVE.store(1, SeqCst);
            set_wake(Some(|| HELPER_ALIVE.store(0, SeqCst)));
            assert!(retire_and_wait());
            assert!(RETIRE.load(SeqCst));
        });
    }
}
