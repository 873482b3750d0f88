//! `ckpt merge`: the newest checkpoint of a job at rest becomes complete by itself.
//!
//! What a running program does in the background, done at once: the chain of increments is
//! copied into one image, every block compared with its checksum, and what nobody needs
//! then goes as `ckpt prune` would do it.

use super::{Cli, Outcome, output, select};
use crate::store::{Job, JobLock, Owner, RawFs};
use anyhow::Context;
use serde_json::json;
use std::process::ExitCode;

/// Make the newest checkpoint of a job complete by itself
///
/// An increment stands on older checkpoints; merging copies what it needs of them into one
/// image, so that they can go and a restart reads one file. Running programs do this in the
/// background (CKPT_CHAIN); their jobs are left alone.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The job (key, name or beginning of one) [default: the only one]
    job: Option<String>,
    /// Generations to keep afterwards [default: $CKPT_KEEP or 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    keep: Option<u32>,
}

pub fn run(cli: &Cli, args: &Args) -> Outcome {
    let root = select::root(cli)?;
    let keep = args.keep.unwrap_or(select::config(cli)?.keep);
    let job = select::job(&root, args.job.as_deref())?;
    let name = job.name();
    let lock = JobLock::take(&job.dir, true, &Owner::current()?)?;
    // What was read before the lock was taken may be old.
    let mut job = Job::open(RawFs, job.dir)?;
    job.remove_leftovers()?;
    let newest = job.generations().last().map(|r| (r.generation, r.needs()));
    let (generation, needs) = newest.with_context(|| format!("job {name} has no checkpoints"))?;
    let before: u64 = job.generations().iter().map(|r| r.stored_now()).sum();
    let mut copied = 0;
    if needs.is_some() {
        let mut merge = job.begin_merge(generation)?;
        copied = merge.progress().1;
        let bar = super::verify::progress_bar(copied);
        loop {
            match merge.slice(&RawFs) {
                Ok(false) => bar.set_position(merge.progress().0),
                Ok(true) => break,
                Err(error) => {
                    merge.abort(&RawFs);
                    return Err(error.into());
                }
            }
        }
        merge.finish(&mut job, output::now_ns())?;
        bar.finish_and_clear();
    }
    let removed = job.prune(keep, Some(generation), output::now_ns())?;
    job.prune_files()?;
    let after: u64 = job.generations().iter().map(|r| r.stored_now()).sum();
    drop(lock);
    if cli.json {
        output::print_json(&json!({
            "job": name,
            "generation": generation,
            "merged": needs.is_some(),
            "bytes": copied,
            "removed": removed,
            "stored_before": before,
            "stored": after,
        }));
    } else if needs.is_none() {
        eprintln!("ckpt: generation {generation} of job {name} is complete already");
    } else {
        let (copied, before) = (output::size(copied), output::size(before));
        let after = output::size(after);
        eprintln!(
            "ckpt: merged generation {generation} of job {name}, {copied}; stored {before} before, {after} now"
        );
    }
    Ok(ExitCode::SUCCESS)
}
