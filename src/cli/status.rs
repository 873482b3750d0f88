//! `ckpt status`: what running programs say about themselves, and what is left of
//! those that run no more.

use super::ask::{self, Target};
use super::output::{self, Table};
use super::{Cli, Outcome, select};
use crate::store::report::{REQUEST_REPORT, Report};
use crate::store::{Job, RawFs};
use serde_json::{Value, json};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// How long a program may take to say how it is.
const PATIENCE: Duration = Duration::from_secs(2);

/// Show the state of running programs and of jobs
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Process id, or job [default: all]
    #[arg(value_name = "PID|JOB")]
    target: Option<String>,
}

pub fn run(cli: &Cli, args: &Args) -> Outcome {
    let root = select::root(cli)?;
    let mut states = Vec::new();
    match &args.target {
        Some(name) => match Target::find(cli, name) {
            Ok(target) => states.push(State::of_target(&target)),
            // No such process: perhaps a job that does not run.
            Err(error) => match select::job(&root, Some(name)) {
                Ok(job) if select::owner(&job).is_none() => states.push(State::of_job(job)),
                _ => return Err(error),
            },
        },
        None => {
            let pids = reporting(&root);
            for &pid in &pids {
                if let Ok(target) = Target::open(cli, pid) {
                    states.push(State::of_target(&target));
                }
            }
            for job in select::jobs(&root)? {
                match select::owner(&job) {
                    Some(owner) if pids.contains(&owner.pid) => {}
                    Some(owner) => {
                        if let Ok(target) = Target::open(cli, owner.pid) {
                            states.push(State::of_target(&target));
                        }
                    }
                    None => states.push(State::of_job(job)),
                }
            }
        }
    }
    if cli.json {
        let list: Vec<Value> = states.iter().map(State::json).collect();
        output::print_json(&json!({ "status": list }));
    } else if let ([state], Some(_)) = (&states[..], &args.target) {
        state.print();
    } else if states.is_empty() {
        eprintln!("ckpt: nothing runs, no checkpoints in {}", root.display());
    } else {
        print_all(&states);
    }
    Ok(ExitCode::SUCCESS)
}

/// Processes that have written a report.
fn reporting(root: &Path) -> Vec<i32> {
    let entries = std::fs::read_dir(root.join("run")).into_iter().flatten();
    let mut pids: Vec<i32> = entries
        .flatten()
        .filter_map(|entry| entry.path().file_stem()?.to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    pids.dedup();
    pids
}

enum State {
    Running {
        report: Box<Report>,
        /// False: this is what it said last, it did not answer now.
        fresh: bool,
    },
    Ended(Box<Job<RawFs>>),
}

impl State {
    fn of_target(target: &Target) -> State {
        let answer = target
            .send(REQUEST_REPORT)
            .and_then(|nonce| target.wait(nonce, Some(PATIENCE)));
        let fresh = answer.is_ok();
        let report = answer
            .map(|(report, _)| report)
            .or_else(|_| ask::read_report(&target.root, target.pid));
        let report = report.unwrap_or_else(|_| Report {
            pid: target.pid,
            program_pid: target.pid,
            state: "silent".to_owned(),
            ..Report::default()
        });
        State::Running {
            report: Box::new(report),
            fresh,
        }
    }

    fn of_job(job: Job<RawFs>) -> State {
        State::Ended(Box::new(job))
    }

    fn json(&self) -> Value {
        match self {
            State::Running { report, fresh } => {
                let mut value = json!(report);
                value["running"] = json!(true);
                value["answered"] = json!(fresh);
                value
            }
            State::Ended(job) => {
                let generations = job.generations();
                let last = generations.last();
                let refusal = job.journal.last_refusal();
                json!({
                    "running": false,
                    "job": job.name(),
                    "job_dir": job.dir.to_string_lossy(),
                    "command": output::words(&select::cmdline(job)),
                    "last_generation": last.map(|g| g.generation),
                    "last_checkpoint_ns": last.map(|g| g.time_ns),
                    "files_incomplete": last.and_then(|g| output::files_incomplete(job, g)),
                    "last_refusal": refusal.map(|r| json!({
                        "reason": r.reason, "time_ns": r.time_ns
                    })),
                })
            }
        }
    }

    /// One item a line.
    fn print(&self) {
        let mut table = Table::new(&["", ""]);
        let mut line = |name: &str, value: String| table.row(vec![name.to_owned(), value]);
        match self {
            State::Running { report, fresh } => {
                line("pid", report.pid.to_string());
                if report.program_pid != report.pid {
                    line("pid seen by the program", report.program_pid.to_string());
                }
                line("state", report.state.clone());
                if !fresh {
                    line("", "(did not answer; this is what it said last)".to_owned());
                }
                if !report.job.is_empty() {
                    line("job", report.job.clone());
                }
                line("interval", interval(report.interval_ms));
                line("checkpoints", report.checkpoints.to_string());
                if let Some(n) = report.last_generation {
                    let age = output::age(report.last_checkpoint_ns);
                    line("last generation", format!("{n}, {age}"));
                }
                if let Some(n) = report.recovered_from {
                    line("recovered from generation", n.to_string());
                }
                if report.ready_ns != 0 {
                    line("ready", output::age(report.ready_ns));
                }
                if report.heartbeats != 0 {
                    let age = output::age(report.heartbeat_ns);
                    line(
                        "heartbeats",
                        format!("{}, the last {age}", report.heartbeats),
                    );
                }
                line("refused", report.refused.to_string());
                if let Some(refusal) = &report.last_refusal {
                    let age = output::age(refusal.time_ns);
                    line("last refusal", format!("{} ({age})", refusal.reason));
                }
                if let Some(reason) = &report.files_incomplete {
                    line("files incomplete", reason.clone());
                }
                for unseen in &report.unseen {
                    let calls: Vec<String> = unseen.calls.iter().map(i64::to_string).collect();
                    let (path, calls) = (&unseen.path, calls.join(", "));
                    let what = match calls.is_empty() {
                        true => format!("{path}: what they do to files"),
                        false => format!("{path}: system calls {calls} of its own"),
                    };
                    line("not seen", what);
                }
                let net = &report.net;
                line(
                    "call-site net",
                    match (net.installed, net.note.as_str()) {
                        (true, "") => format!("{} sites", net.sites),
                        (true, note) => format!("{} sites; {note}", net.sites),
                        (false, note) => format!("not installed; {note}"),
                    },
                );
            }
            State::Ended(job) => {
                line("job", job.name());
                line("state", "not running".to_owned());
                line("command", output::command(&select::cmdline(job), 200));
                if let Some(g) = job.generations().last() {
                    let age = output::age(g.time_ns);
                    line("last generation", format!("{}, {age}", g.generation));
                    if let Some(reason) = output::files_incomplete(job, g) {
                        line("files incomplete", reason);
                    }
                }
                if let Some(refusal) = job.journal.last_refusal() {
                    let age = output::age(refusal.time_ns);
                    line("last refusal", format!("{} ({age})", refusal.reason));
                }
            }
        }
        table.print_body();
    }
}

fn interval(ms: u64) -> String {
    match ms {
        0 => "none (on request)".to_owned(),
        ms => output::micros(ms.saturating_mul(1000)),
    }
}

fn print_all(states: &[State]) {
    let mut table = Table::new(&["PID", "STATE", "JOB", ">LAST", "TAKEN", "LAST REFUSAL"]);
    for state in states {
        let row = match state {
            State::Running { report, .. } => vec![
                report.pid.to_string(),
                report.state.clone(),
                report.job.clone(),
                report.last_generation.map_or("-".into(), |n| n.to_string()),
                match report.last_generation {
                    Some(_) => output::age(report.last_checkpoint_ns),
                    None => "-".to_owned(),
                },
                report
                    .last_refusal
                    .as_ref()
                    .map_or(String::new(), |r| r.reason.clone()),
            ],
            State::Ended(job) => {
                let generations = job.generations();
                let last = generations.last();
                vec![
                    "-".to_owned(),
                    "not running".to_owned(),
                    job.name(),
                    last.map_or("-".into(), |g| g.generation.to_string()),
                    last.map_or("-".into(), |g| output::age(g.time_ns)),
                    job.journal
                        .last_refusal()
                        .map_or(String::new(), |r| r.reason.clone()),
                ]
            }
        };
        table.row(row);
    }
    table.print();
}
