//! `ckpt prune`: removes old generations, whole jobs, and what crashes left behind.

use super::output::{self, Table};
use super::{Cli, FAILED, Outcome, select};
use crate::store::report::Report;
use crate::store::{Job, JobLock, LockError, Owner, RawFs, retention};
use anyhow::bail;
use serde_json::json;
use std::path::Path;
use std::process::ExitCode;

/// Remove old checkpoints and leftovers
///
/// Jobs of running processes are left alone. Without options all but the newest
/// generations of each job go.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this job (key, name or beginning of one)
    job: Option<String>,
    /// Generations to keep [default: $CKPT_KEEP or 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    keep: Option<u32>,
    /// Remove this generation only
    #[arg(long, value_name = "N", requires = "job", conflicts_with = "keep")]
    generation: Option<u64>,
    /// Remove the whole job
    #[arg(long, requires = "job", conflicts_with_all = ["keep", "generation"])]
    all: bool,
    /// Say what would be removed, remove nothing
    #[arg(long)]
    dry_run: bool,
}

struct Removal {
    job: String,
    generation: u64,
    bytes: u64,
}

pub fn run(cli: &Cli, args: &Args) -> Outcome {
    let root = select::root(cli)?;
    let keep = args.keep.unwrap_or(select::config(cli)?.keep);
    let jobs = select::jobs_or(&root, args.job.as_deref())?;
    let bar = super::verify::progress_bar(jobs.len() as u64);
    let mut removed = Vec::new();
    let mut failed = false;
    for job in jobs {
        let name = job.name();
        match prune(args, keep, job) {
            Ok(removals) => removed.extend(removals),
            Err(error) if args.job.is_some() => return Err(error),
            Err(error) => {
                let busy = matches!(error.downcast_ref(), Some(LockError::Busy { .. }));
                failed |= !busy;
                tracing::info!("{name}: {error:#}");
                if !busy {
                    eprintln!("ckpt: {name}: {error:#}");
                }
            }
        }
        bar.inc(1);
    }
    if !args.dry_run && args.job.is_none() {
        retention::empty_trash(&RawFs, &root.join("jobs"))?;
        remove_stale_reports(&root);
    }
    bar.finish_and_clear();
    print(cli, args, &removed);
    Ok(ExitCode::from(if failed { FAILED } else { 0 }))
}

fn prune(args: &Args, keep: u32, job: Job<RawFs>) -> anyhow::Result<Vec<Removal>> {
    let name = job.name();
    let lock = match args.dry_run {
        true => None,
        false => Some(JobLock::take(&job.dir, true, &Owner::current()?)?),
    };
    // What was read before the lock was taken may be old.
    let mut job = Job::open(RawFs, job.dir)?;
    let records: Vec<_> = job.journal.order().into_iter().cloned().collect();
    let valid = records
        .iter()
        .rev()
        .find(|record| job.open_generation(record, false).is_ok())
        .map(|record| record.generation);
    let going: Vec<u64> = if args.all {
        records.iter().map(|record| record.generation).collect()
    } else if let Some(n) = args.generation {
        if !records.iter().any(|record| record.generation == n) {
            bail!("there is no generation {n} in job {name}");
        }
        let orphan = records.iter().find(|record| record.needs() == Some(n));
        if let Some(record) = orphan {
            bail!("generation {} needs generation {n}", record.generation);
        }
        vec![n]
    } else {
        let held = retention::Held {
            valid,
            wanted: None,
            left: job.journal.left(),
        };
        retention::plan(&records.iter().collect::<Vec<_>>(), keep, &held)
    };
    let removals = records
        .iter()
        .filter(|record| going.contains(&record.generation))
        .map(|record| Removal {
            job: name.clone(),
            generation: record.generation,
            bytes: record.stored_now(),
        })
        .collect();
    if let Some(lock) = lock {
        if args.all {
            let owner = Owner::current()?;
            job.remove(&format!("{}-{}", owner.pid, owner.start_time))?;
        } else {
            job.remove_leftovers()?;
            for generation in going {
                job.remove_generation(generation, output::now_ns())?;
            }
            job.prune_files()?;
        }
        drop(lock);
    }
    Ok(removals)
}

fn print(cli: &Cli, args: &Args, removed: &[Removal]) {
    let bytes = removed.iter().map(|r| r.bytes).sum();
    if cli.json {
        let list: Vec<_> = removed
            .iter()
            .map(|r| json!({ "job": r.job, "generation": r.generation, "bytes": r.bytes }))
            .collect();
        output::print_json(&json!({
            "removed": list, "bytes": bytes, "dry_run": args.dry_run
        }));
        return;
    }
    if !removed.is_empty() {
        let mut table = Table::new(&["JOB", ">GEN", ">SIZE"]);
        for r in removed {
            let generation = r.generation.to_string();
            table.row(vec![r.job.clone(), generation, output::size(r.bytes)]);
        }
        table.print();
    }
    let verb = if args.dry_run {
        "would remove"
    } else {
        "removed"
    };
    let count = removed.len();
    let plural = if count == 1 { "" } else { "s" };
    eprintln!(
        "ckpt: {verb} {count} generation{plural}, {}",
        output::size(bytes)
    );
}

/// Reports of processes that are gone.
fn remove_stale_reports(root: &Path) {
    let Ok(entries) = std::fs::read_dir(root.join("run")) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let name = path.file_stem().and_then(|stem| stem.to_str());
        let Some(pid) = name.and_then(|stem| stem.parse::<i32>().ok()) else {
            continue;
        };
        let start = procfs::process::Process::new(pid).and_then(|p| p.stat());
        let report = super::ask::read_report(root, pid);
        let live = match (start, report) {
            (Ok(stat), Ok(report)) => stat.starttime == report.start_time,
            (Ok(_), Err(_)) => true,
            _ => false,
        };
        if !live {
            Report::remove(&RawFs, root, pid);
        }
    }
}
