//! What a starting process does with the store, and what a process without a job
//! does at its first checkpoint.
//!
//! Instances: the job's key, then key`.2`, key`.3`... A start recovers the first
//! instance that has a generation and whose lock is free, so that two copies of one
//! command that died together come back as two. A process that did not recover
//! claims, at its first checkpoint, the first instance that is free and empty.

use super::find::{FindError, Found, Skipped};
use super::fs::RawFs;
use super::job::{self, Job, JobKey, MOST_INSTANCES};
use super::journal::JournalError;
use super::lock::{JobLock, LockError};
use super::owner::Owner;
use super::{StoreError, retention};
use crate::config::Resume;
use std::path::Path;

/// Instances looked at behind a gap in the numbers: `.2` may live on after the first
/// instance has ended and is gone.
const LOOK_AHEAD: u32 = 8;

/// What a start has to do.
#[derive(Debug)]
pub enum Start {
    /// Begin at the beginning. `busy`: the process that runs the same command line.
    Fresh {
        busy: Option<i32>,
    },
    Recover(Box<Recovery>),
}

/// A generation to go on from, and the lock that keeps others from doing the same.
#[derive(Debug)]
pub struct Recovery {
    pub lock: JobLock,
    pub job: Job<RawFs>,
    pub found: Found<RawFs>,
    /// Damaged generations that were passed over: to be warned about.
    pub skipped: Vec<Skipped>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    #[error("recover job {job}: {error}")]
    Find { job: String, error: FindError },
    #[error("recover job {job}: there is no checkpoint")]
    NoJob { job: String },
    #[error("recover: {0}")]
    Lock(#[from] LockError),
    #[error("recover: {0}")]
    Journal(#[from] JournalError),
}

/// Decides between a normal start and a recovery. Writes nothing unless it recovers.
pub fn start(
    root: &Path,
    key: &JobKey,
    resume: Resume,
    verify_data: bool,
) -> Result<Start, StartError> {
    let mut busy = None;
    let mut missing = None;
    if resume == Resume::Never {
        return Ok(Start::Fresh { busy });
    }
    let mut owner = None;
    let mut last_seen = 0;
    let mut instance = 1;
    while instance <= last_seen + LOOK_AHEAD && instance <= MOST_INSTANCES {
        let dir = key.dir(root, instance);
        instance += 1;
        // The common case, no job at all, must stay cheap: no owner is made up for it.
        if rustix::fs::access(&dir, rustix::fs::Access::EXISTS).is_err() {
            continue;
        }
        last_seen = instance;
        let owner = match &owner {
            Some(owner) => owner,
            None => owner.insert(Owner::current().map_err(LockError::from)?),
        };
        let lock = match JobLock::take(&dir, false, owner) {
            Err(LockError::NoJob(_)) => continue,
            Err(LockError::Busy { pid, .. }) => {
                busy = Some(pid);
                continue;
            }
            other => other?,
        };
        let job = Job::open(RawFs, dir)?;
        match job.find(resume, verify_data) {
            Ok((Some(found), skipped)) => {
                return Ok(Start::Recover(Box::new(Recovery {
                    lock,
                    job,
                    found,
                    skipped,
                })));
            }
            // Began, and never committed: nothing to recover.
            Ok((None, _)) => {}
            Err(error) => {
                let (job, empty) = (job.name(), job.generations().is_empty());
                let another = matches!(error, FindError::NoGeneration { .. } | FindError::NoId(_));
                let error = StartError::Find { job, error };
                if !another {
                    return Err(error);
                }
                // Perhaps the next instance has it; else the answer of one that has any.
                if !empty {
                    missing = missing.or(Some(error));
                }
            }
        }
    }
    if let Some(error) = missing {
        return Err(error);
    }
    match (resume, busy) {
        (Resume::Generation(_) | Resume::Id(_), None) => Err(StartError::NoJob {
            job: key.as_str().to_owned(),
        }),
        (Resume::Generation(_) | Resume::Id(_), Some(pid)) => {
            let dir = key.dir(root, 1);
            Err(LockError::Busy { dir, pid }.into())
        }
        _ => Ok(Start::Fresh { busy }),
    }
}

/// A job to write checkpoints to.
#[derive(Debug)]
pub struct Claimed {
    pub lock: JobLock,
    pub job: Job<RawFs>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    #[error("open the job: {0}")]
    Io(#[from] StoreError),
    #[error("open the job: {0}")]
    Lock(#[from] LockError),
    #[error("open the job: {0}")]
    Journal(#[from] JournalError),
    #[error("open the job: {MOST_INSTANCES} instances of {0} are in use")]
    TooMany(String),
}

/// Claims a job for a process that did not recover one, at its first checkpoint.
/// `supersede` (`CKPT_RESUME=never`): an instance with generations will do; the new
/// ones become its latest.
pub fn claim(
    root: &Path,
    key: &JobKey,
    owner: &Owner,
    supersede: bool,
) -> Result<Claimed, ClaimError> {
    for instance in 1..=MOST_INSTANCES {
        let dir = key.dir(root, instance);
        job::create_dir(&RawFs, root, &dir)?;
        let lock = match JobLock::take(&dir, true, owner) {
            Err(LockError::Busy { .. }) => continue,
            // Removed by its owner in this very moment.
            Err(LockError::NoJob(_)) => {
                job::create_dir(&RawFs, root, &dir)?;
                JobLock::take(&dir, true, owner)?
            }
            other => other?,
        };
        let job = Job::open(RawFs, dir)?;
        let (found, _) = match job.find(Resume::Auto, false) {
            Ok(search) => search,
            // Damaged ones are somebody's too.
            Err(_) if !supersede => continue,
            Err(_) => (None, Vec::new()),
        };
        if found.is_some() && !supersede {
            continue;
        }
        job.remove_leftovers()?;
        job.remove_all_files()?;
        job.note_unrecorded()?;
        return Ok(Claimed { lock, job });
    }
    Err(ClaimError::TooMany(key.as_str().to_owned()))
}

impl Claimed {
    /// The clean-up of a program that has ended successfully (FIG. 9).
    pub fn remove(self, owner: &Owner) -> Result<(), StoreError> {
        self.job
            .remove(&format!("{}-{}", owner.pid, owner.start_time))
    }
}

impl Recovery {
    /// Goes on in the recovered job.
    pub fn into_claimed(self) -> Claimed {
        Claimed {
            lock: self.lock,
            job: self.job,
        }
    }
}

pub use retention::empty_trash;
