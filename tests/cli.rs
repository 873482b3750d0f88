//! The `ckpt` command from outside: exit statuses, what goes to which stream, and
//! stores in every state of damage. Nothing here needs the library's own work: where
//! one must be preloaded, libc stands in for it.

use ckpt::image::ImageWriter;
use ckpt::image::state::Manifest;
use ckpt::store::fs::FileOf;
use ckpt::store::start::claim;
use ckpt::store::{GenerationRecord, JobKey, MemberRecord, Owner, RawFs};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

struct Store(PathBuf);

impl Store {
    fn new(name: &str) -> Store {
        let path = std::env::temp_dir().join(format!("ckpt-cli-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        Store(path)
    }

    /// A job with `count` generations of two pages each.
    fn with_job(name: &str, count: u64) -> Store {
        let store = Store::new(name);
        let owner = Owner::current().unwrap();
        let key = JobKey::named(b"demo");
        let mut claimed = claim(&store.0, &key, &owner, false).unwrap();
        for _ in 0..count {
            let job = &mut claimed.job;
            let mut pending = job.begin().unwrap();
            let generation = pending.generation;
            let file = pending.create_member(&RawFs).unwrap();
            let mut writer = ImageWriter::new(FileOf(&RawFs, file), generation);
            writer.write_bytes_as_pages(&[7; 8192]).unwrap();
            let mut manifest = Manifest {
                identity: ckpt::agent::collect::identity::collect(),
                ..Manifest::default()
            };
            manifest.process.cmdline = b"sh\0-c\0exit 9\0".to_vec();
            manifest.process.exe = b"/bin/sh".to_vec();
            manifest.process.cwd = b"/".to_vec();
            let written = writer.finish(&manifest, false).unwrap();
            let record = GenerationRecord {
                generation,
                members: vec![MemberRecord {
                    pid: 5,
                    cmdline: manifest.process.cmdline.clone(),
                    threads: 1,
                    bytes: written.bytes,
                    header_crc: written.header_crc,
                }],
                bytes_stored: written.bytes,
                ..Default::default()
            };
            job.publish(pending, &record).unwrap();
        }
        store
    }

    fn ckpt(&self, args: &[&str]) -> Output {
        command(args).env("CKPT_DIR", &self.0).output().unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.ckpt(&[args, &["--json"]].concat());
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn image(&self, generation: u64) -> PathBuf {
        self.0
            .join(format!("jobs/demo/gen-{generation:06}/member-0.img"))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ckpt"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CKPT_") || name == "LD_PRELOAD" {
            command.env_remove(name);
        }
    }
    command.env("CKPT_LIB", libc_path()).args(args);
    command
}

fn libc_path() -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.contains("/libc.so")).unwrap();
    line[line.find('/').unwrap()..].to_owned()
}

fn status(args: &[&str]) -> i32 {
    command(args).output().unwrap().status.code().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn run_has_the_programs_status_or_its_own() {
    assert_eq!(status(&["run", "--", "sh", "-c", "exit 7"]), 7);
    assert_eq!(status(&["run", "sh", "-c", "exit 0"]), 0);
    assert_eq!(status(&["run", "--interval", "1m", "--", "true"]), 0);
    assert_eq!(status(&["run", "--", "/no/such/program"]), 127);
    assert_eq!(status(&["run", "--", "no-such-program-here"]), 127);
    assert_eq!(status(&["run", "--", "/etc/passwd"]), 126);
    assert_eq!(status(&["run", "--", "/etc"]), 126);
    assert_eq!(status(&["run"]), 125);
    assert_eq!(status(&["run", "--keep", "0", "--", "true"]), 125);
    // Wrong usage of a verb that starts a program is no status of the program's, wherever the
    // verb stands.
    for usage in [
        &["restore", "--nonsense"][..],
        &["--json", "restore", "--nonsense"],
    ] {
        assert_eq!(status(usage), 125, "{usage:?}");
    }
    assert_eq!(status(&["--dir", "run", "list", "--nonsense"]), 2);
    assert_eq!(status(&["list", "--nonsense"]), 2);
    let killed = command(&["run", "--", "sh", "-c", "kill -TERM $$"]).output();
    let signal = std::os::unix::process::ExitStatusExt::signal(&killed.unwrap().status);
    assert_eq!(signal, Some(15));
}

#[test]
fn run_passes_the_environment_on() {
    let script = "echo $LD_PRELOAD $CKPT_INTERVAL $CKPT_JOB $CKPT_OWNER end";
    let output = command(&[
        "run",
        "--interval",
        "90s",
        "--job",
        "x",
        "--",
        "sh",
        "-c",
        script,
    ])
    .env("CKPT_OWNER", "1")
    .env("LD_PRELOAD", "")
    .output()
    .unwrap();
    let expected = format!("{} 90s x end\n", libc_path());
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
}

/// Rust's start-up ignores SIGPIPE; a program that is run must not inherit that.
#[test]
fn run_leaves_sigpipe_as_it_was() {
    let ignored = |command: &mut Command| {
        let output = command.stderr(Stdio::inherit()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        u64::from_str_radix(text.trim(), 16).unwrap() >> 12 & 1
    };
    // Not awk: it changes the disposition itself.
    let show = "sed -n s/^SigIgn://p /proc/self/status";
    let default = &mut command(&["run", "--", "sh", "-c", show]);
    assert_eq!(ignored(default), 0);
    let line = format!(
        "trap '' PIPE; exec {} run -- {show}",
        env!("CARGO_BIN_EXE_ckpt")
    );
    let mut shell = Command::new("sh");
    assert_eq!(
        ignored(shell.args(["-c", &line]).env("CKPT_LIB", libc_path())),
        1
    );
}

#[test]
fn a_wrong_variable_is_one_line() {
    let output = command(&["run", "--", "true"])
        .env("CKPT_SYNC", "often")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(
        stderr(&output),
        "ckpt: CKPT_SYNC=often: expected kill or power\n"
    );
}

#[test]
fn an_empty_store() {
    let store = Store::new("empty");
    let output = store.ckpt(&["list"]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0), 0));
    assert_eq!(store.json(&["list"])["jobs"], Value::Array(vec![]));
    assert_eq!(store.ckpt(&["show"]).status.code(), Some(1));
    assert_eq!(store.ckpt(&["show", "nothing"]).status.code(), Some(1));
    assert_eq!(store.ckpt(&["restore"]).status.code(), Some(125));
    assert_eq!(store.ckpt(&["verify"]).status.code(), Some(0));
    assert_eq!(store.ckpt(&["prune"]).status.code(), Some(0));
    assert_eq!(store.ckpt(&["status"]).status.code(), Some(0));
}

#[test]
fn list_has_every_promised_key() {
    let store = Store::with_job("list", 2);
    let list = store.json(&["list"]);
    let generations = list["jobs"][0]["generations"].as_array().unwrap();
    assert_eq!(generations.len(), 2);
    for key in [
        "generation",
        "id",
        "parent",
        "time",
        "kind",
        "members",
        "stop_us",
        "persist_us",
        "bytes_logical",
        "bytes_stored",
        "pages_dirty",
        "tracker",
        "snapshot",
        "restorable",
    ] {
        assert!(generations[1].get(key).is_some(), "{key}");
        assert!(store.json(&["show", "demo"]).get(key).is_some(), "{key}");
    }
    assert_eq!(generations[1]["restorable"], true);
    assert_eq!(list["jobs"][0]["command"][2], "exit 9");
}

#[test]
fn restore_starts_the_recorded_command() {
    let store = Store::with_job("restore", 1);
    assert_eq!(store.ckpt(&["restore", "demo"]).status.code(), Some(9));
    assert_eq!(
        store
            .ckpt(&["restore", "dem", "--generation", "1"])
            .status
            .code(),
        Some(9)
    );
    let output = store.ckpt(&["restore", "demo", "--generation", "4"]);
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(
        stderr(&output),
        "ckpt: there is no generation 4 (there are: 1)\n"
    );
}

#[test]
fn prune_keeps_what_it_should() {
    let store = Store::with_job("prune", 4);
    let numbers = || -> Vec<u64> {
        let list = store.json(&["list"]);
        let generations = list["jobs"][0]["generations"].as_array().cloned();
        let generations = generations.unwrap_or_default();
        generations
            .iter()
            .map(|g| g["generation"].as_u64().unwrap())
            .collect()
    };
    store.ckpt(&["prune", "--dry-run"]);
    assert_eq!(numbers(), [1, 2, 3, 4]);
    assert_eq!(
        store
            .ckpt(&["prune", "demo", "--generation", "2"])
            .status
            .code(),
        Some(0)
    );
    assert_eq!(numbers(), [1, 3, 4]);
    // The only valid one is not among the newest: it stays.
    for damaged in [3, 4] {
        std::fs::write(store.image(damaged), "nothing").unwrap();
    }
    assert_eq!(store.ckpt(&["prune", "--keep", "1"]).status.code(), Some(0));
    assert_eq!(numbers(), [1, 4]);
    assert_eq!(store.ckpt(&["verify"]).status.code(), Some(1));
    assert_eq!(
        store.ckpt(&["prune", "demo", "--all"]).status.code(),
        Some(0)
    );
    assert!(!Path::new(&store.0.join("jobs/demo")).exists());
}

#[test]
fn no_damage_crashes_the_command() {
    let store = Store::with_job("damage", 2);
    let check = |what: &str, may_hide: bool| {
        for args in [&["list"][..], &["show", "demo"], &["verify"], &["status"]] {
            let output = store.ckpt(&[args, &["--json"]].concat());
            let code = output.status.code();
            assert!(matches!(code, Some(0 | 1)), "{what}: {args:?}: {code:?}");
            assert!(!stderr(&output).contains("panicked"), "{what}");
        }
        let shown = store.json(&["show", "demo"])["generation"].as_u64();
        assert!(
            shown == Some(1) || (may_hide && shown == Some(2)),
            "{what}: {shown:?}"
        );
    };
    let files = ["journal", "gen-000002/manifest", "gen-000002/member-0.img"];
    for name in files {
        let path = store.0.join("jobs/demo").join(name);
        let good = std::fs::read(&path).unwrap();
        // Page data is only looked at by `verify`.
        let is_data = |at: usize| name.ends_with("img") && (4096..4096 + 8192).contains(&at);
        for at in (0..good.len()).step_by(good.len() / 12 + 1) {
            let mut bad = good.clone();
            bad[at] ^= 0x55;
            std::fs::write(&path, &bad).unwrap();
            check(
                &format!("{name} byte {at}"),
                name == "journal" || is_data(at),
            );
            if is_data(at) {
                assert_eq!(store.ckpt(&["verify"]).status.code(), Some(1));
            }
            std::fs::write(&path, &good[..at]).unwrap();
            check(&format!("{name} cut at {at}"), name == "journal");
        }
        std::fs::remove_file(&path).unwrap();
        check(&format!("{name} missing"), name == "journal");
        std::fs::write(&path, &good).unwrap();
    }
    assert_eq!(store.json(&["verify"])["damaged"], 0);
}

#[test]
fn manual_pages_and_completions_are_generated() {
    let store = Store::new("man");
    let dir = store.0.to_str().unwrap();
    assert_eq!(status(&["gen-man", dir]), 0);
    assert!(store.0.join("ckpt-run.1").exists());
    let output = command(&["completions", "bash"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("_ckpt"));
}

#[test]
fn doctor_reports() {
    let store = Store::new("doctor");
    let report = store.json(&["doctor"]);
    assert!(report["checks"].as_array().unwrap().len() > 10);
    assert!(report["uses"]["restore"]["use"].is_string());
    let checks = report["checks"].as_array().unwrap();
    for tracker in ["uffd", "soft-dirty", "mprotect"] {
        let name = format!("tracker {tracker}");
        assert!(checks.iter().any(|c| c["check"] == *name), "{name}");
    }
    assert!(report["uses"]["tracker"]["use"].is_string());
}

/// An unset variable of a script named the only job there was.
#[test]
fn an_empty_name_means_no_job() {
    let store = Store::with_job("empty-name", 2);
    for verb in [
        "rollback",
        "checkpoint",
        "undo",
        "restore",
        "show",
        "prune",
        "list",
    ] {
        let output = store.ckpt(&[verb, ""]);
        assert!(!output.status.success(), "{verb}");
        let said = stderr(&output);
        assert!(said.contains("an empty name"), "{verb}: {said}");
    }
}
