//! Kernel state -> `image::state` structs. Run by the helper thread while all the
//! program's threads are stopped.

pub mod descriptors;

/// Why a checkpoint cannot be taken now, in words for the log and `ckpt status`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    pub reason: String,
}
