//! `ckpt rollback`: what it asks for, and the answer. A signal's value has no room for it,
//! so it lies in a file beside the report (`store::report::Ask`). Helper thread.

use super::order::{Wanted, Which};
use crate::agent::state::AGENT;
use crate::store::RawFs;
use crate::store::report::{Ask, Goal, RequestResult};
use std::path::Path;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

/// The nonce of a request that was granted: its answer comes from the life after it.
static GRANTED: AtomicU32 = AtomicU32::new(0);

/// What the request with this nonce asks for.
pub fn read(root: &Path, nonce: u32) -> Result<Wanted, String> {
    let pid = AGENT.real_pid.load(Ordering::Relaxed);
    let ask = Ask::take(&RawFs, root, pid, nonce)?;
    Ok(Wanted {
        which: match ask.goal {
            Goal::Latest => Which::Id(super::call::LATEST),
            Goal::Id(id) => Which::Id(id),
            Goal::Generation(generation) => Which::Generation(generation),
            Goal::Left => Which::Left,
        },
        value: ask.value,
        regions: (0, 0),
        asked: vec![nonce],
        ..Wanted::default()
    })
}

/// What the life before has answered. In the helper's heap, until [`answers`].
static ANSWERS: AtomicPtr<Vec<RequestResult>> = AtomicPtr::new(std::ptr::null_mut());

/// In the restored helper: requests to be answered by the worker, and those that are.
pub fn adopt(asked: &[u32], answers: &[RequestResult]) {
    GRANTED.store(asked.first().copied().unwrap_or(0), Ordering::SeqCst);
    // What the image has there led into another heap.
    ANSWERS.store(Box::into_raw(Box::new(answers.to_vec())), Ordering::SeqCst);
}

/// Takes the answers that [`adopt`] has left (a restored helper, once).
pub fn answers() -> Vec<RequestResult> {
    let left = ANSWERS.swap(std::ptr::null_mut(), Ordering::SeqCst);
    if left.is_null() {
        return Vec::new();
    }
    // SAFETY: from `adopt`, in this helper's own heap.
    *unsafe { Box::from_raw(left) }
}

/// Takes what [`adopt`] has left, once.
pub fn granted() -> Option<u32> {
    Some(GRANTED.swap(0, Ordering::SeqCst)).filter(|&nonce| nonce != 0)
}
