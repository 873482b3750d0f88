//! Rollback in the running process (FIG. 8, `ckpt_rollback`; docs/ROLLBACK.md): the order,
//! and the words that the threads in it share.
//!
//! | file | context | owns |
//! |---|---|---|
//! | [`call`] | any thread of the program | `ckpt_rollback` until it is answered |
//! | [`check`] | helper thread | protected regions: may they be kept, their bytes |
//! | [`order`] | helper thread | the order: what can be refused, then the point of no return |
//! | [`pass`] | helper, leader | descriptors from the helper's table to the program's |
//! | [`leader`] | stop handler of the leader | its part, and the ends of the other threads |
//! | [`reopen`] | helper thread | files that must be opened again: can they be? |
//! | [`limits`] | helper, leader | limits of the process that are in the way |
//! | [`rights`] | helper thread | what an ordinary user cannot take back |
//! | [`named`] | helper thread | the same of objects with names that are no files |
//! | [`redirect`] | any thread; helper | `ckpt_redirect` |
//! | [`ask`] | helper thread | requests of the `ckpt` command |
//!
//! Laws: until [`COMMIT`] everything can be called off and the program goes on; behind it
//! nothing can, and every error is one line and exit status 125. What the leader does in
//! its handler before [`COMMIT`] is raw system calls only.

pub mod ask;
pub mod call;
pub mod check;
pub mod leader;
mod limits;
mod named;
pub mod order;
pub mod pass;
pub mod redirect;
mod reopen;
mod rights;

use ckpt_sys::syscall;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, Ordering};

/// What stopped threads are told to do ([`Control::order`]).
pub const NO_ORDER: u32 = 0;
/// The leader: to make a connection and to wait for what comes over it.
pub const SERVE: u32 = 1;
/// All others: to end.
pub const END: u32 = 2;

/// The steps between helper and leader ([`Control::step`], a futex).
pub const IDLE: u32 = 0;
/// The leader has made the two ends ([`Control::ends`]).
pub const CONNECTED: u32 = 1;
/// The helper has sent so many descriptors ([`Control::count`]).
pub const SENT: u32 = 2;
/// The leader has them all.
pub const RECEIVED: u32 = 3;
/// The leader could not ([`Control::error`]).
pub const FAILED: u32 = 4;
/// It is called off: the leader closes what it has.
pub const OFF: u32 = 5;
/// There is no way back.
pub const COMMIT: u32 = 6;

/// Shared by the helper and the stopped threads. In the image like all of this library's
/// data, always idle there: no checkpoint is taken during a rollback.
pub struct Control {
    pub order: AtomicU32,
    pub step: AtomicU32,
    pub ends: [AtomicI32; 2],
    pub count: AtomicU32,
    pub error: AtomicI32,
    /// Numbers in the program's table of what was sent.
    pub received: [AtomicI32; pass::MOST],
    /// What the leader goes on with, in the helper's heap.
    pub handover: AtomicPtr<leader::Handover>,
}

pub static CONTROL: Control = Control {
    order: AtomicU32::new(NO_ORDER),
    step: AtomicU32::new(IDLE),
    ends: [const { AtomicI32::new(-1) }; 2],
    count: AtomicU32::new(0),
    error: AtomicI32::new(0),
    received: [const { AtomicI32::new(-1) }; pass::MOST],
    handover: AtomicPtr::new(std::ptr::null_mut()),
};

const FUTEX_WAIT_PRIVATE: i32 = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
const FUTEX_WAKE_PRIVATE: i32 = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;

/// Takes the next step and wakes the other side.
pub fn step(to: u32) {
    CONTROL.step.store(to, Ordering::SeqCst);
    // SAFETY: a futex word of ours.
    unsafe {
        let (word, all) = (&CONTROL.step, i32::MAX);
        syscall!(libc::SYS_futex, word, FUTEX_WAKE_PRIVATE, all, 0, 0, 0)
    };
}

/// Waits until the step is no longer `from`; returns what it is.
pub fn await_step(from: u32) -> u32 {
    loop {
        let now = CONTROL.step.load(Ordering::SeqCst);
        if now != from {
            return now;
        }
        // SAFETY: as above.
        unsafe {
            let word = &CONTROL.step;
            syscall!(libc::SYS_futex, word, FUTEX_WAIT_PRIVATE, from, 0, 0, 0)
        };
    }
}

/// Is there no way back any more? Then an internal error cannot be survived.
pub fn is_final() -> bool {
    CONTROL.step.load(Ordering::SeqCst) == COMMIT
}

/// In the restored helper, before the program's threads run.
pub fn reset_after_restore() {
    CONTROL.order.store(NO_ORDER, Ordering::SeqCst);
    CONTROL.step.store(IDLE, Ordering::SeqCst);
    let none = std::ptr::null_mut();
    CONTROL.handover.store(none, Ordering::SeqCst);
    call::reset_after_restore();
}
