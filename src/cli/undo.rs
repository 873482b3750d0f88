//! `ckpt undo`: back to the state that the last going back has left.

use super::{Cli, Outcome, restore, rollback, select};
use anyhow::Context;
use std::time::Duration;

/// Go back to the state that a rollback or restore has left
///
/// With CKPT_UNDO=1 in its environment a rollback, and a restore of a generation other than the
/// latest, first keep a generation of the state that they leave. A running program goes
/// back to the newest of them in place, as by ckpt rollback; a job that does not run is started
/// there, as by ckpt restore. The state that this leaves is kept too: undo again undoes the undo.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Process id, or job [default: the only job there is]
    #[arg(value_name = "PID|JOB")]
    target: Option<String>,
    /// How long to wait for it: 90, 500ms, 2m [default: without end]
    #[arg(long, value_name = "TIME", value_parser = super::checkpoint::duration)]
    timeout: Option<Duration>,
}

pub fn run(cli: &Cli, args: &Args, sigpipe_ignored: bool) -> Outcome {
    let root = select::root(cli)?;
    let name = args.target.as_deref();
    let is_pid = |name: &str| name.parse::<i32>().is_ok();
    let running = match name {
        Some(name) if is_pid(name) => Some(name.to_owned()),
        name => {
            let job = select::job(&root, name)?;
            if select::owner(&job).is_none() {
                let left = job.journal.left();
                let left = left.last().copied();
                let left = left.context(crate::agent::rollback::order::NOTHING_LEFT)?;
                return restore::undo(cli, job.name(), left, sigpipe_ignored);
            }
            Some(job.name())
        }
    };
    rollback::undo(cli, &running.unwrap_or_default(), args.timeout)
}
