//! Which store, which job: from options, environment and the JOB argument.

use super::Cli;
use super::output;
use crate::config::Config;
use crate::store::{Job, JobKey, Owner, RawFs, lock, store_root};
use anyhow::{Context, bail};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The settings of the command's own environment, `--dir` applied.
pub fn config(cli: &Cli) -> anyhow::Result<Config> {
    let vars: Vec<(Vec<u8>, Vec<u8>)> = std::env::vars_os()
        .map(|(name, value)| (name.into_vec(), value.into_vec()))
        .collect();
    let pairs = vars.iter().map(|(n, v)| (n.as_slice(), v.as_slice()));
    let mut config = Config::from_env(pairs)?;
    if let Some(dir) = &cli.dir {
        let absolute = std::path::absolute(dir).context("--dir")?;
        config.dir = Some(absolute.into_os_string().into_vec());
    }
    Ok(config)
}

pub fn root(cli: &Cli) -> anyhow::Result<PathBuf> {
    Ok(store_root(&config(cli)?)?)
}

/// All jobs of the store, by name.
pub fn jobs(root: &Path) -> anyhow::Result<Vec<Job<RawFs>>> {
    let dir = root.join("jobs");
    let entries = match std::fs::read_dir(&dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("list {}", dir.display()))?,
    };
    let mut jobs = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("list {}", dir.display()))?;
        let hidden = entry.file_name().as_bytes().starts_with(b".");
        if hidden || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        match Job::open(RawFs, entry.path()) {
            Ok(job) => jobs.push(job),
            Err(error) => tracing::warn!("{error}"),
        }
    }
    jobs.sort_by(|a, b| a.dir.cmp(&b.dir));
    Ok(jobs)
}

/// The job that an argument names: its key, a CKPT_JOB name, the beginning of a key, or
/// the pid of its running process. Without an argument, the only job there is.
pub fn job(root: &Path, name: Option<&str>) -> anyhow::Result<Job<RawFs>> {
    // The beginning of every key: of the only job, too.
    if name == Some("") {
        bail!("an empty name means no job");
    }
    let mut jobs = jobs(root)?;
    let Some(name) = name else {
        return match jobs.len() {
            0 => bail!("there are no checkpoints in {}", root.display()),
            1 => Ok(jobs.remove(0)),
            n => bail!("there are {n} jobs; name one: {}", names(&jobs)),
        };
    };
    let sanitised = JobKey::named(name.as_bytes());
    let exact = jobs
        .iter()
        .position(|job| job.name() == name)
        .or_else(|| jobs.iter().position(|job| job.name() == sanitised.as_str()));
    if let Some(at) = exact {
        return Ok(jobs.swap_remove(at));
    }
    if let Ok(pid) = name.parse::<i32>()
        && let Some(at) = jobs
            .iter()
            .position(|job| owner(job).is_some_and(|o| o.pid == pid))
    {
        return Ok(jobs.swap_remove(at));
    }
    let mut begins: Vec<Job<RawFs>> = jobs
        .into_iter()
        .filter(|job| job.name().starts_with(name))
        .collect();
    match begins.len() {
        0 => bail!("there is no job {name} in {}", root.display()),
        1 => Ok(begins.remove(0)),
        _ => bail!("{name} may be any of: {}", names(&begins)),
    }
}

/// The named job, or all.
pub fn jobs_or(root: &Path, name: Option<&str>) -> anyhow::Result<Vec<Job<RawFs>>> {
    match name {
        Some(_) => Ok(vec![job(root, name)?]),
        None => jobs(root),
    }
}

/// The live process that holds the job.
pub fn owner(job: &Job<RawFs>) -> Option<Owner> {
    lock::live_owner(&job.dir)
}

/// The command line of the job's first process.
pub fn cmdline(job: &Job<RawFs>) -> Vec<u8> {
    let generations = job.generations();
    let member = generations.last().and_then(|g| g.members.first());
    member.map(|m| m.cmdline.clone()).unwrap_or_default()
}

fn names(jobs: &[Job<RawFs>]) -> String {
    let shown = jobs
        .iter()
        .take(10)
        .map(|job| format!("{} ({})", job.name(), output::command(&cmdline(job), 40)));
    shown.collect::<Vec<_>>().join(", ")
}
