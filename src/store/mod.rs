//! Where checkpoints live.
//!
//! ```text
//! $CKPT_DIR or ${XDG_STATE_HOME:-~/.local/state}/ckpt     0700
//!   jobs/<key>/lock          held (flock) while any member lives; names its owner
//!              journal       append-only; the authority on what is committed
//!              gen-000042/   member-0.img, manifest (the generation's record)
//!              gen-000043.tmp/   being written, or left by a crash
//!              table-, shadow-, kept-000007   modifications of files (`persist`)
//!              stream-000001   contents of an output of the program
//!   run/<pid>.json           answers of running programs to the command
//! ```
//!
//! | file | owns |
//! |---|---|
//! | `fs` | the few file operations needed, behind a trait that tests make fail |
//! | `job` | the store's root, job keys, one job's directory |
//! | `lock` | who may write to a job |
//! | `generation` | the record of one generation |
//! | `journal` | the append-only journal |
//! | `publish` | writing and committing a generation |
//! | `find` | the latest valid generation, chains of images |
//! | `merge` | an increment becomes complete |
//! | `files`, `stream` | tables and streams: what they lead back to, when they go |
//! | `working_set` | what a program touched soon after a restart |
//! | `retention` | removing generations and whole jobs |
//! | `start` | what a starting process does: recover, or begin afresh |
//! | `report` | the file by which a running program answers the command |
//!
//! All of it runs in the target (constructor: one thread; helper thread: its own
//! descriptor table, all signals blocked) and in the command. So it makes raw
//! system calls only, and never touches the program's files or `std::fs`.
//! Nothing here is called between "threads stopped" and "threads released" except
//! [`publish::Pending`]'s creation, which is done before the stop.

mod files;
pub mod find;
pub mod fs;
pub mod generation;
pub mod history;
pub mod job;
pub mod journal;
pub mod lock;
pub mod merge;
pub mod owner;
pub mod publish;
pub mod report;
pub mod retention;
pub mod start;
pub mod stream;
pub mod template;
pub mod working_set;

#[cfg(test)]
mod chain_tests;
#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod damage_tests;
#[cfg(test)]
mod fault_fs;

pub use find::{FindError, Found, Skipped};
pub use fs::{Fs, RawFs};
pub use generation::{GenerationKind, GenerationRecord, MemberRecord};
pub use job::{Job, JobKey, store_root};
pub use lock::{JobLock, LockError};
pub use merge::{Merge, MergeError};
pub use owner::Owner;
pub use publish::{Pending, PublishError};
pub use start::{Claimed, Start, StartError};

use crate::errno::Errno;
use std::path::{Path, PathBuf};

/// A file operation of the store that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot {verb} {}: {errno}", path.display())]
pub struct StoreError {
    pub verb: &'static str,
    pub path: PathBuf,
    pub errno: Errno,
}

/// Puts verb and path to an error number.
pub(crate) trait Context<T> {
    fn on(self, verb: &'static str, path: &Path) -> Result<T, StoreError>;
}

impl<T> Context<T> for Result<T, Errno> {
    fn on(self, verb: &'static str, path: &Path) -> Result<T, StoreError> {
        self.map_err(|errno| StoreError {
            verb,
            path: path.to_owned(),
            errno,
        })
    }
}
