//! `ckpt list`: jobs and their generations.

use super::output::{self, Obstacle, Table};
use super::{Cli, Outcome, select};
use serde_json::json;
use std::process::ExitCode;

/// List jobs and their checkpoints
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this job (key, name or beginning of one)
    job: Option<String>,
}

pub fn run(cli: &Cli, args: &Args) -> Outcome {
    let root = select::root(cli)?;
    let jobs = select::jobs_or(&root, args.job.as_deref())?;
    if cli.json {
        let jobs: Vec<_> = jobs
            .iter()
            .map(|job| {
                let generations = job.generations();
                let generations = generations.iter().map(|g| output::generation_json(job, g));
                json!({
                    "job": job.name(),
                    "dir": job.dir.to_string_lossy(),
                    "command": output::words(&select::cmdline(job)),
                    "running": select::owner(job).map(|owner| owner.pid),
                    "generations": generations.collect::<Vec<_>>(),
                })
            })
            .collect();
        output::print_json(&json!({ "jobs": jobs }));
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&[
        "JOB", ">GEN", ">ID", "TAKEN", "KIND", ">SIZE", ">STOP", "STATE", "COMMAND",
    ]);
    let mut rows = 0;
    for job in &jobs {
        let running = select::owner(job).is_some();
        for generation in job.generations() {
            let obstacle = output::obstacle(job, generation);
            let files = output::files_incomplete(job, generation);
            let state = match (obstacle, files, running) {
                (Some(Obstacle::Damaged(_)), ..) => "damaged".to_owned(),
                (Some(Obstacle::NotHere(reason)), ..) => format!("not here: {reason}"),
                (None, Some(reason), _) => format!("files incomplete: {reason}"),
                (None, None, true) => "running".to_owned(),
                (None, None, false) => "restorable".to_owned(),
            };
            table.row(vec![
                job.name(),
                generation.generation.to_string(),
                generation.id.to_string(),
                output::age(generation.time_ns),
                output::kind(job, generation),
                output::size(generation.stored_now()),
                output::micros(generation.stop_us),
                state,
                output::command(&select::cmdline(job), 60),
            ]);
            rows += 1;
        }
    }
    if rows == 0 {
        eprintln!("ckpt: no checkpoints in {}", root.display());
    } else {
        table.print();
    }
    Ok(ExitCode::SUCCESS)
}
