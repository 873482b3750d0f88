//! Tables for people: what an undo would change now (`ckpt diff`), and the rows of one
//! generation (`ckpt show --files`).

use super::undo::UndoError;
use std::path::Path;

/// One line of `ckpt diff`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub path: Vec<u8>,
    /// `removed`, `put back`, `moved to ...`, `contents`, `size`, `mode`, ...
    pub what: String,
    /// Somebody else changed it since.
    pub foreign: bool,
}

/// One row of the persistent checkpoint table (FIG. 4); `None`: not modified.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Row {
    pub path: Vec<u8>,
    pub mtime_ns: Option<i64>,
    pub mode: Option<u32>,
    pub owner: Option<(u32, u32)>,
    pub size: Option<u64>,
    /// `did not exist`, `link`, `copy`, `3 blocks, 12288 bytes`, `moved to ...`, or empty.
    pub kept: String,
}

/// What an undo to this generation would change now.
pub fn diff(job_dir: &Path, to_generation: u64) -> Result<Vec<Change>, UndoError> {
    let _ = (job_dir, to_generation);
    Ok(Vec::new())
}

/// The rows of the tables that lead back to this generation.
pub fn rows(job_dir: &Path, generation: u64) -> Result<Vec<Row>, UndoError> {
    let _ = (job_dir, generation);
    Ok(Vec::new())
}
