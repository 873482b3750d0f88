//! The settings in force and what the agent knows of its job; set by the constructor,
//! and anew by the restored helper (the environment of the latest start counts).
//!
//! In the agent heap, thus in the image. Read by the helper; hooks only use the few
//! atomics in `state`.

use crate::agent::resume::Payload;
use crate::agent::state::AGENT;
use crate::agent::{globs, log, start};
use crate::config::{Config, LogTarget};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicPtr, Ordering};

/// A file that the process was given to write: one that was empty, as a shell's `>` leaves it, or
/// that a recovery has filled.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenOutput {
    pub dev: u64,
    pub ino: u64,
    /// As it was called then.
    pub path: Vec<u8>,
}

/// Everything the helper starts from.
#[derive(Debug)]
pub struct Settings {
    pub config: Config,
    /// `(name, value)` of the variables that the configuration was read from.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// The job's key without an instance suffix.
    pub job_key: Vec<u8>,
    /// The store's root directory.
    pub store_root: Vec<u8>,
    /// Set after a restore: the directory of the job and the generation restored.
    pub restored: Option<(Vec<u8>, u64)>,
    /// Ids, groups, capabilities at the start (`collect::credentials`).
    pub credentials: Vec<u8>,
    /// Descriptors that the process was started with: (fd, dev, ino).
    pub inherited: Vec<(i32, u64, u64)>,
    /// Files that the process was given to write, and which are streams whether they are open or not.
    pub outputs: Vec<GivenOutput>,
    /// Resource limits that the process was started with: (resource, soft, hard).
    pub limits: Vec<(u32, u64, u64)>,
    /// CPUs that the process was started with, 64 a word.
    pub affinity: Vec<u64>,
}

static SETTINGS: AtomicPtr<Settings> = AtomicPtr::new(std::ptr::null_mut());

/// Puts new settings in force; returns the old ones for dropping.
///
/// # Safety
/// While nobody else reads them: constructor, or restored helper before the barrier
/// opens; `settings` must be in the agent heap.
pub unsafe fn publish(settings: Box<Settings>) {
    let config = &settings.config;
    AGENT
        .return_value
        .store(config.return_value, Ordering::SeqCst);
    let path = match &config.log.target {
        LogTarget::File(path) => Some(path.as_slice()),
        LogTarget::Stderr => Some(&b"/dev/stderr"[..]),
        LogTarget::Job => None,
    };
    // SAFETY: per contract.
    unsafe { log::configure(path) };
    let old = SETTINGS.swap(Box::into_raw(settings), Ordering::SeqCst);
    if !old.is_null() {
        // SAFETY: made by Box::into_raw above; nobody reads it any more.
        drop(unsafe { Box::from_raw(old) });
    }
}

/// The settings in force, `None` before the constructor.
pub fn get() -> Option<&'static Settings> {
    // SAFETY: published settings live until the next `publish`, which runs while
    // nobody holds them.
    unsafe { SETTINGS.load(Ordering::SeqCst).as_ref() }
}

/// The settings of the new start, in a restored process; `None` where there were none.
pub fn restored(payload: &Payload) -> Option<Settings> {
    let old = get()?;
    let pairs = payload
        .env
        .iter()
        .map(|(name, value)| (name.as_slice(), value.as_slice()));
    // The constructor has validated these very pairs.
    let mut config = Config::from_env(pairs).unwrap_or_else(|_| old.config.clone());
    globs::follow_links(&mut config);
    Some(Settings {
        config,
        env: payload.env.clone(),
        job_key: payload.job_key.clone(),
        store_root: payload.store_root.clone(),
        restored: Some((payload.job_dir.clone(), payload.generation)),
        credentials: if payload.credentials.is_empty() {
            old.credentials.clone()
        } else {
            payload.credentials.clone()
        },
        inherited: payload.inherited.clone(),
        // Without limits it is not a new process (a rollback).
        outputs: if payload.limits.is_empty() {
            old.outputs.clone()
        } else {
            payload.outputs.clone()
        },
        limits: if payload.limits.is_empty() {
            old.limits.clone()
        } else {
            payload.limits.clone()
        },
        affinity: if payload.affinity.is_empty() {
            old.affinity.clone()
        } else {
            payload.affinity.clone()
        },
    })
}

/// The restored helper takes over the settings of the new start.
///
/// # Safety
/// As for [`publish`].
pub unsafe fn adopt(payload: &Payload) {
    let (Some(old), Some(settings)) = (get(), restored(payload)) else {
        return;
    };
    // Rules that the program has made since stay, so only what is new is added.
    let (new, before) = (&settings.config, &old.config);
    let changed = new.exclude != before.exclude || new.include != before.include;
    let (exclude, include): (&[_], &[_]) = if changed {
        (&new.exclude, &new.include)
    } else {
        (&[], &[])
    };
    start::exclude_files(exclude, include, &settings.store_root);
    // SAFETY: forwarded contract.
    unsafe { publish(Box::new(settings)) };
}
