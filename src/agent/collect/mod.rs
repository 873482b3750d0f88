//! Collectors: kernel state of the stopped program -> `image::state` structs.
//!
//! Helper thread, all program threads stopped; some parts (VmFlags, [`objects`])
//! run in the forked writer instead, to keep the stop short.

pub mod cpu;
pub mod credentials;
pub mod descriptors;
pub mod identity;
pub mod keys;
pub mod memory;
pub mod objects;
pub mod process;
pub mod rare;
pub mod signals;
pub mod threads;
pub mod timers;
pub mod unfrozen;

/// Why a checkpoint cannot be taken now, in words for the log and `ckpt status`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    pub reason: String,
}
