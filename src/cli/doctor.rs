//! `ckpt doctor`: what this kernel, libc and user permit, and what will be used.

use super::output::{self, Table};
use super::{Cli, FAILED, Outcome, elf, exec, probe, select};
use crate::agent::track::probe::{self as tracker, Probe as Trackers};
use crate::config::{Config, TrackerChoice};
use nix::sys::resource::{Resource, getrlimit};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Show what this system permits, and what will be used
#[derive(Debug, clap::Args)]
pub struct Args {}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Good,
    /// Works, with less.
    Limited,
    /// Checkpoint or restore cannot work.
    Bad,
}

struct Finding {
    subject: &'static str,
    state: State,
    detail: String,
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, subject: &'static str, state: State, detail: impl Into<String>) {
        let detail = detail.into();
        self.0.push(Finding {
            subject,
            state,
            detail,
        });
    }

    /// A probe: what its success is good for, what its failure means.
    fn probe(
        &mut self,
        subject: &'static str,
        probe: &probe::Probe,
        worst: State,
        good: &str,
        bad: &str,
    ) {
        match probe {
            Ok(()) => self.add(subject, State::Good, good),
            Err(error) => self.add(subject, worst, format!("{bad} ({error})")),
        }
    }
}

pub fn run(cli: &Cli, _args: &Args) -> Outcome {
    let mut found = Findings::default();
    system(&mut found);
    let set_tid = probe::set_tid();
    let trackers = Trackers::run();
    kernel(&mut found, &set_tid, &trackers);
    limits(&mut found);
    let store = store(cli, &mut found);
    let plan = plan(&set_tid, store.as_deref(), &trackers);

    let bad = found.0.iter().any(|f| f.state == State::Bad);
    if cli.json {
        let checks: Vec<Value> = found
            .0
            .iter()
            .map(|f| json!({ "check": f.subject, "state": word(f.state), "detail": f.detail }))
            .collect();
        let uses: serde_json::Map<String, Value> = plan
            .iter()
            .map(|(what, choice, why)| ((*what).to_owned(), json!({ "use": choice, "why": why })))
            .collect();
        output::print_json(&json!({ "ok": !bad, "checks": checks, "uses": uses }));
    } else {
        let mut table = Table::new(&["CHECK", "STATE", "DETAIL"]);
        for finding in found.0 {
            let state = word(finding.state).to_owned();
            table.row(vec![finding.subject.to_owned(), state, finding.detail]);
        }
        table.print();
        println!();
        let mut table = Table::new(&["WILL BE USED", "", "BECAUSE"]);
        for (what, choice, why) in plan {
            table.row(vec![what.to_owned(), choice, why]);
        }
        table.print();
    }
    Ok(ExitCode::from(if bad { FAILED } else { 0 }))
}

fn word(state: State) -> &'static str {
    match state {
        State::Good => "ok",
        State::Limited => "limited",
        State::Bad => "missing",
    }
}

fn system(found: &mut Findings) {
    let machine = std::env::consts::ARCH;
    let kernel = read("/proc/sys/kernel/osrelease");
    let state = if machine == "x86_64" {
        State::Good
    } else {
        State::Bad
    };
    found.add("kernel", state, format!("Linux {kernel}, {machine}"));
    found.add(
        "libc",
        State::Good,
        format!("glibc {}", probe::libc_version()),
    );
    match exec::library() {
        Ok(path) => {
            let id = elf::build_id(&path).unwrap_or_else(|| "none".to_owned());
            let detail = format!("{}, build id {id}", path.display());
            found.add("library", State::Good, detail);
        }
        Err(error) => found.add("library", State::Bad, format!("{error:#}")),
    }
    let features = [
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ("xsavec", std::arch::is_x86_feature_detected!("xsavec")),
        ("sse4.2", std::arch::is_x86_feature_detected!("sse4.2")),
    ];
    let names = features.iter().filter(|f| f.1).map(|f| f.0);
    let names: Vec<_> = names.collect();
    let detail = format!(
        "{} (an image needs all that its program saw)",
        names.join(" ")
    );
    found.add("processor", State::Good, detail);
}

fn kernel(found: &mut Findings, set_tid: &probe::Probe, trackers: &Trackers) {
    use State::{Bad, Good, Limited};
    found.probe(
        "PAGEMAP_SCAN",
        &probe::pagemap_scan(),
        Limited,
        "present pages are found quickly",
        "present pages are found by reading pagemap; Linux 6.7 has it",
    );
    let mut tracker = |subject, result: &Result<(), String>, good: &str| match result {
        Ok(()) => found.add(subject, Good, good),
        Err(why) => found.add(subject, Limited, format!("cannot be used: {why}")),
    };
    tracker(
        "tracker uffd",
        &trackers.uffd,
        "userfaultfd: written pages are noted by the kernel",
    );
    tracker(
        "tracker soft-dirty",
        &trackers.soft_dirty,
        "written pages are noted by the kernel",
    );
    tracker(
        "tracker mprotect",
        &trackers.mprotect,
        "write protection and SIGSEGV",
    );
    found.probe(
        "chosen process ids",
        set_tid,
        Limited,
        "clone3 with set_tid: the old pid comes back",
        "clone3 with set_tid: ids are translated instead",
    );
    found.probe(
        "PR_SET_MM_MAP",
        &probe::set_mm_map(),
        Bad,
        "heap end and argument area can be set",
        "no restore: the kernel lacks CONFIG_CHECKPOINT_RESTORE",
    );
    found.probe(
        "ARCH_MAP_VDSO_64",
        &probe::map_vdso(),
        Bad,
        "the vdso can be placed, another kernel's led to it",
        "no restore: the kernel lacks CONFIG_CHECKPOINT_RESTORE",
    );
    match probe::sealed_system_mappings() {
        true => found.add(
            "system mappings",
            Bad,
            "no restore: the vdso is sealed (mseal)",
        ),
        false => found.add("system mappings", Good, "not sealed"),
    }
    found.probe(
        "kcmp",
        &probe::kcmp(),
        Limited,
        "descriptors that share an open file are told apart",
        "shared open files are guessed from position and flags",
    );
    found.probe(
        "pidfd_getfd",
        &probe::pidfd_getfd(),
        Bad,
        "the helper thread can examine descriptors",
        "no checkpoint of open files",
    );
    let seccomp = procfs::process::Process::myself().and_then(|p| p.status());
    match seccomp.ok().and_then(|status| status.seccomp) {
        Some(0) | None => found.add("seccomp", Good, "no filter"),
        Some(_) => found.add("seccomp", Bad, "this shell runs under a filter: refused"),
    }
}

fn limits(found: &mut Findings) {
    use State::{Good, Limited};
    match read("/proc/sys/vm/overcommit_memory").as_str() {
        "2" => {
            let detail = "strict (2): a forked writer of a large program may be refused memory";
            found.add("overcommit", Limited, detail);
        }
        mode => found.add("overcommit", Good, format!("mode {mode}")),
    }
    let count = read("/proc/sys/vm/max_map_count");
    found.add(
        "memory areas",
        Good,
        format!("at most {count} (vm.max_map_count)"),
    );
    let limit = |resource| {
        getrlimit(resource)
            .map(|(soft, _)| soft)
            .unwrap_or(u64::MAX)
    };
    match limit(Resource::RLIMIT_FSIZE) {
        u64::MAX => found.add("file size", Good, "unlimited"),
        soft => {
            let detail = format!(
                "images of more than {} fail (ulimit -f)",
                output::size(soft)
            );
            found.add("file size", Limited, detail);
        }
    }
    match limit(Resource::RLIMIT_AS) {
        u64::MAX => found.add("address space", Good, "unlimited"),
        soft => {
            let detail = format!("limited to {} (ulimit -v)", output::size(soft));
            found.add("address space", Limited, detail);
        }
    }
    let pending = limit(Resource::RLIMIT_SIGPENDING);
    let detail = format!("{pending} queued signals for this user (ulimit -i)");
    let state = if pending < 1024 { Limited } else { Good };
    found.add("signals", state, detail);
    let files = limit(Resource::RLIMIT_NOFILE);
    found.add("descriptors", Good, format!("{files} (ulimit -n)"));
}

/// Examines the store's place; the nearest directory that exists.
fn store(cli: &Cli, found: &mut Findings) -> Option<PathBuf> {
    let root = match select::root(cli) {
        Ok(root) => root,
        Err(error) => {
            found.add("store", State::Bad, format!("{error:#}"));
            return None;
        }
    };
    let existing = root.ancestors().find(|path| path.is_dir());
    let existing = existing.unwrap_or(Path::new("/")).to_owned();
    let writable = nix::unistd::access(&existing, nix::unistd::AccessFlags::W_OK).is_ok();
    let kind = probe::file_system(&existing);
    let free = probe::free_space(&existing).map_or("?".to_owned(), output::size);
    let detail = format!(
        "{}, {free} free, {}",
        root.display(),
        kind.unwrap_or("local")
    );
    match (writable, kind) {
        (false, _) => {
            let detail = format!("{detail}: {} cannot be written", existing.display());
            found.add("store", State::Bad, detail);
        }
        (true, Some("tmpfs")) => {
            found.add(
                "store",
                State::Limited,
                format!("{detail}: lost at a reboot"),
            );
        }
        (true, _) => found.add("store", State::Good, detail),
    }
    match probe::is_noexec(&existing) {
        true => found.add(
            "store mount",
            State::Limited,
            "noexec: executable pages are read instead of mapped",
        ),
        false => found.add(
            "store mount",
            State::Good,
            "pages can be mapped as they are",
        ),
    }
    Some(existing)
}

/// `(what, choice, why)`.
fn plan(
    set_tid: &probe::Probe,
    store: Option<&Path>,
    trackers: &Trackers,
) -> Vec<(&'static str, String, String)> {
    let mut plan = Vec::new();
    let mut add = |what, choice: &str, why: String| plan.push((what, choice.to_owned(), why));
    match set_tid {
        Ok(()) => add(
            "process ids",
            "the old ones",
            "clone3 with set_tid is permitted".into(),
        ),
        Err(error) => add(
            "process ids",
            "translated",
            format!("clone3 with set_tid: {error}"),
        ),
    }
    match store.is_some_and(probe::is_noexec) {
        true => add(
            "restore",
            "mapped, executable pages read",
            "the store is mounted noexec".into(),
        ),
        false => add(
            "restore",
            "mapped (lazy)",
            "CKPT_RESTORE=eager reads instead".into(),
        ),
    }
    let asked = std::env::var("CKPT_TRACKER").unwrap_or_else(|_| "auto".to_owned());
    let pairs = [(&b"CKPT_TRACKER"[..], asked.as_bytes())];
    let choice = Config::from_env(pairs).map_or(TrackerChoice::Auto, |config| config.tracker);
    let taken = trackers.taken(choice);
    let why = match (choice, trackers.objection(choice), taken) {
        (_, Some((name, why)), _) => format!("CKPT_TRACKER={name} cannot be used: {why}"),
        (TrackerChoice::Auto, _, TrackerChoice::Full) => "no tracker works here".to_owned(),
        (TrackerChoice::Auto, ..) => "the best that works here".to_owned(),
        _ => format!("CKPT_TRACKER={asked}"),
    };
    add("tracker", tracker::name(taken), why);
    plan
}

fn read(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_else(|_| "?".to_owned());
    text.trim().to_owned()
}
