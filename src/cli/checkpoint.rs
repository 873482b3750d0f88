//! `ckpt checkpoint`: asks a running program for a checkpoint.

use super::ask::Target;
use super::output::{self, print_json};
use super::{Cli, Outcome};
use crate::config::parse_duration;
use crate::store::report::REQUEST_CHECKPOINT;
use anyhow::bail;
use serde_json::json;
use std::process::ExitCode;
use std::time::Duration;

/// Ask a running program for a checkpoint
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Process id, or job
    #[arg(value_name = "PID|JOB")]
    target: String,
    /// Wait until it is committed (or refused)
    #[arg(long)]
    wait: bool,
    /// How long to wait: 90, 500ms, 2m [default: without end]
    #[arg(long, value_name = "TIME", requires = "wait", value_parser = duration)]
    timeout: Option<Duration>,
}

pub fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| "expected a duration like 90, 500ms, 15m, 1h30m".to_owned())
}

pub fn run(cli: &Cli, args: &Args) -> Outcome {
    let target = Target::find(cli, &args.target)?;
    let nonce = target.send(REQUEST_CHECKPOINT)?;
    if !args.wait {
        if cli.json {
            print_json(&json!({ "pid": target.pid, "requested": true }));
        } else {
            eprintln!("ckpt: process {} has been asked", target.pid);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let (report, result) = target.wait(nonce, args.timeout)?;
    if cli.json {
        target.print_answer(&report, &result);
    }
    match (result.generation, result.error) {
        (Some(generation), _) => {
            if !cli.json {
                let job = &report.job;
                eprintln!(
                    "ckpt: generation {generation} of job {job}, {}",
                    output::age(report.last_checkpoint_ns)
                );
            }
            Ok(ExitCode::SUCCESS)
        }
        (None, error) => {
            let reason = error.unwrap_or_else(|| "no reason given".to_owned());
            bail!("process {} was not checkpointed: {reason}", target.pid)
        }
    }
}
