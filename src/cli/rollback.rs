//! `ckpt rollback`: tells a running program to go back to one of its checkpoints.

use super::ask::Target;
use super::checkpoint::duration;
use super::{Cli, Outcome};
use crate::store::report::{Ask, Goal, REQUEST_ROLLBACK};
use anyhow::Context;
use std::process::ExitCode;
use std::time::Duration;

/// Take a running program back to one of its checkpoints
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Process id, or job
    #[arg(value_name = "PID|JOB")]
    target: String,
    /// The id that the program gave the checkpoint [default: the newest checkpoint]
    #[arg(value_parser = clap::value_parser!(i32).range(0..))]
    id: Option<i32>,
    /// A generation, as `ckpt list` shows them
    #[arg(long, value_name = "N", conflicts_with = "id")]
    generation: Option<u64>,
    /// What ckpt_checkpoint returns there
    #[arg(long, value_name = "V", default_value_t = 1, value_parser = clap::value_parser!(i32).range(1..))]
    value: i32,
    /// How long to wait for it: 90, 500ms, 2m [default: without end]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
}

pub fn run(cli: &Cli, args: &Args) -> Outcome {
    let goal = match (args.generation, args.id) {
        (Some(generation), _) => Goal::Generation(generation),
        (None, Some(id)) => Goal::Id(id),
        (None, None) => Goal::Latest,
    };
    let ask = Ask {
        goal,
        value: args.value,
    };
    go_back(cli, &args.target, &ask, args.timeout)
}

/// `ckpt undo` in a running program.
pub fn undo(cli: &Cli, target: &str, timeout: Option<Duration>) -> Outcome {
    let goal = Goal::Left;
    go_back(cli, target, &Ask { goal, value: 1 }, timeout)
}

fn go_back(cli: &Cli, target: &str, ask: &Ask, timeout: Option<Duration>) -> Outcome {
    let target = Target::find(cli, target)?;
    let nonce = target.ask(REQUEST_ROLLBACK, ask)?;
    let answer = target.wait(nonce, timeout);
    let _ = std::fs::remove_file(Ask::path(&target.root, target.pid, nonce));
    let (report, result) = answer?;
    if cli.json {
        target.print_answer(&report, &result);
    }
    match (result.generation, result.error) {
        (Some(generation), _) => {
            if !cli.json {
                let (pid, job) = (target.pid, &report.job);
                eprintln!("ckpt: process {pid} is back at generation {generation} of job {job}");
            }
            Ok(ExitCode::SUCCESS)
        }
        (None, error) => {
            let reason = error.unwrap_or_else(|| "no reason given".to_owned());
            Err::<ExitCode, _>(anyhow::anyhow!(reason))
                .with_context(|| format!("process {} did not go back", target.pid))
        }
    }
}
