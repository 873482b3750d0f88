//! The `ckpt` command: one file per verb; this one parses and dispatches.
//!
//! Data goes to standard output, talk to standard error; `--json` gives every verb's
//! data as JSON. Runs in a process of its own, never in the target: libc, `std::fs`,
//! `nix` and `procfs` are fine here.
//!
//! Exit statuses: 0 done; 1 failed, refused, damaged or not found; 2 wrong usage; 3 no
//! answer in time. `ckpt run` and `ckpt restore`: the program's own, or 125 for a
//! failure of ours, 126 for a program that cannot be run, 127 for one not found.

mod ask;
mod chart;
mod checkpoint;
mod diff;
mod doctor;
mod elf;
mod exec;
mod list;
mod manual;
mod merge;
mod output;
mod plot;
mod probe;
mod prune;
mod restore;
mod rollback;
mod run;
mod select;
mod show;
mod status;
mod undo;
mod verify;

use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// Checkpoint and restore of unmodified programs.
#[derive(Debug, Parser)]
#[command(name = "ckpt", version, max_term_width = 100, after_help = AFTER_HELP)]
pub struct Cli {
    /// Where checkpoints live [default: $CKPT_DIR, or ckpt below ${XDG_STATE_HOME:-~/.local/state}]
    #[arg(long, global = true, value_name = "PATH")]
    dir: Option<PathBuf>,
    /// Print data as JSON
    #[arg(long, global = true)]
    json: bool,
    /// Say more on standard error (twice: still more); RUST_LOG overrides
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    verb: Verb,
}

const AFTER_HELP: &str = "Exit status: 0 done; 1 failed, refused, damaged or not found; 2 wrong \
usage; 3 no answer in time. run and restore: the program's own status (128+n for a signal, as the \
shell shows it), 125 for a failure of ckpt itself, 126 for a program that cannot be run, 127 for \
one that is not found.";

#[derive(Debug, Subcommand)]
enum Verb {
    Run(run::Args),
    Checkpoint(checkpoint::Args),
    Restore(restore::Args),
    Rollback(rollback::Args),
    Undo(undo::Args),
    List(list::Args),
    Show(show::Args),
    Diff(diff::Args),
    Status(status::Args),
    Verify(verify::Args),
    Prune(prune::Args),
    Plot(plot::Args),
    Merge(merge::Args),
    Doctor(doctor::Args),
    #[command(hide = true)]
    GenMan(manual::ManArgs),
    #[command(hide = true)]
    Completions(manual::CompletionArgs),
}

/// What a verb ends with.
type Outcome = anyhow::Result<ExitCode>;

const FAILED: u8 = 1;
const NO_ANSWER: u8 = 3;
const OWN_FAILURE: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// An error with an exit status of its own.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
struct Exit {
    status: u8,
    message: String,
}

fn exit(status: u8, message: impl Into<String>) -> anyhow::Error {
    let message = message.into();
    Exit { status, message }.into()
}

/// Runs the command. `sigpipe_ignored`: the disposition that this process was started
/// with, which a program started by `run` must get back.
pub fn main(args: Vec<OsString>, sigpipe_ignored: bool) -> ExitCode {
    let starts_program =
        |verb: &OsString| verb.as_os_str() == "run" || verb.as_os_str() == "restore";
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            // As env(1): wrong usage must not look like the program's own status.
            let own = error.use_stderr() && verb(&args).is_some_and(starts_program);
            let status = if own {
                OWN_FAILURE
            } else {
                error.exit_code() as u8
            };
            return ExitCode::from(status);
        }
    };
    start_log(cli.verbose);
    let default_failure = match cli.verb {
        Verb::Run(_) | Verb::Restore(_) => OWN_FAILURE,
        _ => FAILED,
    };
    let outcome = match &cli.verb {
        Verb::Run(args) => run::run(&cli, args, sigpipe_ignored),
        Verb::Checkpoint(args) => checkpoint::run(&cli, args),
        Verb::Restore(args) => restore::run(&cli, args, sigpipe_ignored),
        Verb::Rollback(args) => rollback::run(&cli, args),
        Verb::Undo(args) => undo::run(&cli, args, sigpipe_ignored),
        Verb::List(args) => list::run(&cli, args),
        Verb::Show(args) => show::run(&cli, args),
        Verb::Diff(args) => diff::run(&cli, args),
        Verb::Status(args) => status::run(&cli, args),
        Verb::Verify(args) => verify::run(&cli, args),
        Verb::Prune(args) => prune::run(&cli, args),
        Verb::Plot(args) => plot::run(&cli, args),
        Verb::Merge(args) => merge::run(&cli, args),
        Verb::Doctor(args) => doctor::run(&cli, args),
        Verb::GenMan(args) => manual::man(args),
        Verb::Completions(args) => manual::completions(args),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("ckpt: {error:#}");
        let status = error.downcast_ref::<Exit>().map(|exit| exit.status);
        ExitCode::from(status.unwrap_or(default_failure))
    })
}

/// What stands where the verb belongs: behind the options that all verbs have.
fn verb(args: &[OsString]) -> Option<&OsString> {
    let mut rest = args.iter().skip(1);
    loop {
        let arg = rest.next()?;
        match arg.to_str() {
            Some("--dir") => _ = rest.next(),
            Some(option) if option.starts_with('-') => {}
            _ => return Some(arg),
        }
    }
}

fn start_log(verbose: u8) {
    use tracing_subscriber::EnvFilter;
    let default = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .try_init();
}
