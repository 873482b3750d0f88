//! `ckpt run`: starts a program under the library by becoming it.

use super::exec::{self, Environment};
use super::{Cli, Outcome};
use std::ffi::OsString;

/// Run a program under the library; go on from its latest checkpoint if it has one
///
/// The command becomes the program (exec): process id, exit status and signals are the
/// program's own. Options override the CKPT_* variables of the environment.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Checkpoint by the clock: 90, 500ms, 15m, 1h30m, default, auto, off
    #[arg(long, value_name = "TIME")]
    interval: Option<String>,
    /// Name of the job [default: made from the command line]
    #[arg(long, value_name = "NAME")]
    job: Option<OsString>,
    /// Generations to keep
    #[arg(long, value_name = "N")]
    keep: Option<String>,
    /// Keep checkpoints after an exit: failure, always, never
    #[arg(long, value_name = "WHEN")]
    keep_on_exit: Option<String>,
    /// Where to go on: auto, never, a generation, id:N
    #[arg(long, value_name = "FROM")]
    resume: Option<String>,
    /// Signal that asks for a checkpoint
    #[arg(long, value_name = "SIGNAL")]
    trigger: Option<String>,
    /// How a recovery brings memory back: auto, lazy, eager
    #[arg(long, value_name = "METHOD")]
    restore: Option<String>,
    /// Verify all page data before a recovery
    #[arg(long)]
    verify: bool,
    /// Leave these files as they are: an absolute path pattern, * for all (repeatable)
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<OsString>,
    /// Exceptions from --exclude (repeatable)
    #[arg(long, value_name = "GLOB")]
    include: Vec<OsString>,
    /// Log: a level, an absolute path, stderr, or LEVEL:PATH
    #[arg(long, value_name = "LOG")]
    log: Option<String>,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

pub fn run(cli: &Cli, args: &Args, sigpipe_ignored: bool) -> Outcome {
    let mut env = Environment::inherited();
    let options = [
        ("CKPT_INTERVAL", &args.interval),
        ("CKPT_KEEP", &args.keep),
        ("CKPT_KEEP_ON_EXIT", &args.keep_on_exit),
        ("CKPT_RESUME", &args.resume),
        ("CKPT_TRIGGER", &args.trigger),
        ("CKPT_RESTORE", &args.restore),
        ("CKPT_LOG", &args.log),
    ];
    for (name, value) in options {
        if let Some(value) = value {
            env.set(name, value);
        }
    }
    env.set_list("CKPT_EXCLUDE", &args.exclude)?;
    env.set_list("CKPT_INCLUDE", &args.include)?;
    if let Some(job) = &args.job {
        env.set("CKPT_JOB", job);
    }
    if args.verify {
        env.set("CKPT_VERIFY", "1");
    }
    if let Some(dir) = &cli.dir {
        env.set("CKPT_DIR", std::path::absolute(dir)?);
    }
    env.validate()?;
    let library = exec::library()?;
    env.preload(&library)?;
    let path = exec::resolve(&args.command[0])?;
    tracing::info!("{} under {}", path.display(), library.display());
    Err(exec::become_program(
        &path,
        &args.command,
        &env,
        sigpipe_ignored,
    ))
}
