//! `ckpt verify`: reads every byte and compares it with its checksum.
//!
//! It reads, it does not map: a sector that cannot be read is an error to report here,
//! where a mapping would be a signal. Tables of modifications are read too.

use super::output::{self, Table};
use super::{Cli, FAILED, Outcome, select};
use crate::persist::table;
use crate::store::find::Verify;
use crate::store::{Job, RawFs};
use anyhow::bail;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use std::io::IsTerminal;
use std::process::ExitCode;

/// Verify checkpoints, page data included
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this job (key, name or beginning of one)
    job: Option<String>,
    /// Only this generation
    #[arg(long, value_name = "N", requires = "job")]
    generation: Option<u64>,
}

pub fn run(cli: &Cli, args: &Args) -> Outcome {
    let root = select::root(cli)?;
    let jobs = select::jobs_or(&root, args.job.as_deref())?;
    let wanted = |n: u64| args.generation.is_none_or(|only| only == n);
    let mut work = Vec::new();
    for job in &jobs {
        if job.journal.is_damaged() {
            tracing::warn!("{}: the journal is damaged", job.name());
        }
        let generations = job.generations();
        let chosen = generations.into_iter().filter(|g| wanted(g.generation));
        work.extend(chosen.map(|generation| (job, generation)));
    }
    if let (Some(n), true) = (args.generation, work.is_empty()) {
        bail!("there is no generation {n}");
    }
    let total = work.iter().map(|(_, g)| g.stored_now()).sum();
    // Each image is read once: what an increment stands on was read before it.
    let verify = match args.generation {
        Some(_) => Verify::Chain,
        None => Verify::Own,
    };
    let mut bad: Vec<(String, u64)> = Vec::new();
    let bar = progress_bar(total);
    let mut table = Table::new(&["JOB", ">GEN/TABLE", ">SIZE", "STATE"]);
    let mut results = Vec::new();
    let mut damaged = 0;
    for (job, generation) in work {
        let before = bar.position();
        let mut seen = 0;
        let opened = job.open_with_progress(generation, verify, |done, _| {
            // `done` starts again with each image.
            bar.inc(done.saturating_sub(if done > seen { seen } else { 0 }));
            seen = done;
        });
        bar.set_position(before + generation.stored_now());
        let reason = match opened {
            Err(damage) => Some(damage.to_string()),
            Ok(found) => {
                let mut links = found.members.iter().flat_map(|m| &m.older);
                let broken = links.find(|l| bad.contains(&(job.name(), l.generation)));
                broken
                    .map(|l| format!("it stands on generation {}, which is damaged", l.generation))
            }
        };
        if reason.is_some() {
            bad.push((job.name(), generation.generation));
            damaged += 1;
        }
        table.row(vec![
            job.name(),
            generation.generation.to_string(),
            output::size(generation.stored_now()),
            reason
                .clone()
                .map_or("ok".to_owned(), |r| format!("damaged: {r}")),
        ]);
        results.push(json!({
            "job": job.name(),
            "generation": generation.generation,
            "bytes": generation.stored_now(),
            "ok": reason.is_none(),
            "reason": reason,
        }));
    }
    for job in &jobs {
        for (name, size, reason) in tables(job)? {
            damaged += usize::from(reason.is_some());
            table.row(vec![
                job.name(),
                name.clone(),
                output::size(size),
                reason
                    .clone()
                    .map_or("ok".to_owned(), |r| format!("damaged: {r}")),
            ]);
            results.push(json!({
                "job": job.name(),
                "table": name,
                "bytes": size,
                "ok": reason.is_none(),
                "reason": reason,
            }));
        }
    }
    bar.finish_and_clear();
    if cli.json {
        output::print_json(&json!({ "verified": results, "damaged": damaged }));
    } else if results.is_empty() {
        eprintln!("ckpt: no checkpoints in {}", root.display());
    } else {
        table.print();
    }
    Ok(ExitCode::from(if damaged == 0 { 0 } else { FAILED }))
}

/// The tables of a job: name, size, damage.
fn tables(job: &Job<RawFs>) -> anyhow::Result<Vec<(String, u64, Option<String>)>> {
    let mut list = Vec::new();
    for file in table::list(&job.dir)? {
        let size = std::fs::metadata(&file.path).map_or(0, |m| m.len());
        let reason = match table::read(&file.path) {
            Ok(Some(_)) => None,
            Ok(None) => Some("it cannot be read".to_owned()),
            Err(error) => Some(error.to_string()),
        };
        let name = file.path.file_name().unwrap_or_default();
        list.push((name.to_string_lossy().into_owned(), size, reason));
    }
    Ok(list)
}

/// A bar over bytes, on a terminal only.
pub fn progress_bar(bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    let template = "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}
