//! `ckpt rollback`: what it asks for, and the answer. A signal's value has no room for it,
//! so it lies in a file beside the report (`store::report::Ask`). Helper thread.

use super::order::{Wanted, Which};
use crate::agent::state::AGENT;
use crate::store::RawFs;
use crate::store::report::{Ask, Goal};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

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
    })
}

/// In the restored helper: requests to be answered by the worker.
pub fn adopt(asked: &[u32]) {
    GRANTED.store(asked.first().copied().unwrap_or(0), Ordering::SeqCst);
}

/// Takes what [`adopt`] has left, once.
pub fn granted() -> Option<u32> {
    Some(GRANTED.swap(0, Ordering::SeqCst)).filter(|&nonce| nonce != 0)
}
