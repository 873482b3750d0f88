//! `ckpt diff`: what a recovery would change in the files now.

use super::output::{self, Table};
use super::{Cli, Outcome, select};
use crate::config::Resume;
use crate::persist::diff;
use serde_json::json;
use std::process::ExitCode;

/// Show what a recovery would change in the files now
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Key, name or beginning of one [default: the only job there is]
    job: Option<String>,
    /// Generation [default: the latest valid one]
    generation: Option<u64>,
}

pub fn run(cli: &Cli, args: &Args) -> Outcome {
    let root = select::root(cli)?;
    let job = select::job(&root, args.job.as_deref())?;
    let resume = args.generation.map_or(Resume::Auto, Resume::Generation);
    let (found, skipped) = job.find(resume, false)?;
    for skipped in skipped {
        tracing::warn!("{skipped}");
    }
    let Some(found) = found else {
        anyhow::bail!("job {} has no checkpoint", job.name());
    };
    let generation = found.record.generation;
    if let Some(owner) = select::owner(&job) {
        tracing::warn!("process {} is running: this changes", owner.pid);
    }
    if let Some(reason) = job.files_obstacle(&found.record)? {
        anyhow::bail!("the files cannot go back to generation {generation}: {reason}");
    }
    let changes = diff::diff(&job.dir, generation)?;
    if cli.json {
        let list: Vec<_> = changes
            .iter()
            .map(|change| {
                json!({
                    "path": output::text(&change.path),
                    "change": change.what,
                    "foreign": change.foreign,
                })
            })
            .collect();
        output::print_json(&json!({
            "job": job.name(), "generation": generation, "changes": list
        }));
        return Ok(ExitCode::SUCCESS);
    }
    if changes.is_empty() {
        eprintln!("ckpt: the files are as they were at generation {generation}");
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&["CHANGE", "BY", "FILE"]);
    for change in &changes {
        let by = if change.foreign {
            "others"
        } else {
            "the program"
        };
        table.row(vec![
            change.what.clone(),
            by.to_owned(),
            output::text(&change.path),
        ]);
    }
    table.print();
    Ok(ExitCode::SUCCESS)
}
