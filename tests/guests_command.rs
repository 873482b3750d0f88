//! The `ckpt` command and real programs: recovery through `ckpt run`, what `run` refuses, what
//! `show` and `list` tell of a real generation, jobs by their names, the progress bar.

mod common;

use common::*;
use serde_json::Value;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

fn ckpt(trial: &Trial, args: &[&str]) -> Output {
    Command::new(build::command())
        .args(args)
        .env("CKPT_DIR", trial.dir.join("store"))
        .output()
        .expect("ckpt runs")
}

fn json(trial: &Trial, args: &[&str]) -> Value {
    let output = ckpt(trial, &[args, &["--json"]].concat());
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// `ckpt run -- program`, in the trial's place.
fn under_run(trial: &Trial) -> run::Started {
    let mut program = trial.program.clone();
    let guest = program.path.to_str().expect("UTF-8").to_owned();
    program.path = build::command();
    program.args = [vec!["run".into(), "--".into(), guest], program.args].concat();
    let mut env = trial.ckpt.clone();
    env.extend(trial.program.env.clone());
    let library = build::library();
    env.insert("CKPT_LIB".into(), library.to_str().expect("UTF-8").into());
    let log = trial.dir.join("guest.log");
    env.insert("GUEST_LOG".into(), log.to_str().expect("UTF-8").into());
    run::start(&program, &trial.dir.join("run"), &env)
}

/// A killed program goes on when `ckpt run` starts it again, and its status is that of `run`.
#[test]
fn run_recovers() {
    for guest in ["mem_heap", "thr_locks"] {
        let mut trial = Trial::new(Program::guest(guest).seconds(2.0), LAZY_FORK);
        let bare = trial.bare();
        for _ in 0..3 {
            let known = trial.generation();
            let mut started = under_run(&trial);
            while trial.notes("begin") == 0 {
                std::thread::sleep(Duration::from_millis(3));
            }
            let known = known.max(trial.generation());
            if trial.await_generation(&mut started, known).is_none() {
                trial.fail("it ended too early");
            }
            started.kill(true);
        }
        let life = under_run(&trial).end(LIMIT);
        trial.note(life.describe());
        trial.compare(&bare, &life);
    }
}

/// Its own directory, which the user of the programs can reach.
fn place() -> PathBuf {
    user::fresh_dir("command")
}

fn compile(source: &Path, out: &Path, flags: &[&str]) {
    let mut cc = Command::new("cc");
    cc.args(flags).arg("-o").arg(out).arg(source);
    let output = cc.output().expect("cc");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
}

/// As the user of the programs.
fn refusal(dir: &Path, program: &str) -> (Option<i32>, String) {
    let mut run = Program::at(build::command(), &["run", "--", program]);
    run = run.env("CKPT_DIR", dir.join("store").to_str().expect("UTF-8"));
    let library = build::library();
    run = run.env("CKPT_LIB", library.to_str().expect("UTF-8"));
    let mut command = run::prepare(&run, dir, &run.env);
    let output = command.stderr(Stdio::piped()).output().expect("ckpt runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), text)
}

#[test]
fn run_refuses_static_and_set_uid_programs() {
    let dir = place();
    let source = dir.join("hello.c");
    std::fs::write(&source, "int main(void) { return 0; }\n").expect("a source");
    let fixed = dir.join("fixed");
    compile(&source, &fixed, &["-static"]);
    let (status, text) = refusal(&dir, fixed.to_str().expect("UTF-8"));
    assert!(text.contains("is statically linked"), "{text}");
    assert!(matches!(status, Some(125 | 126)), "{status:?}");
    // Somebody else's set-uid program: root's for a user, the user nobody's for root.
    let other = dir.join("other");
    compile(&source, &other, &[]);
    // SAFETY: no memory effects.
    let root = unsafe { libc::getuid() } == 0;
    let program = if root {
        let owner = if user::ordinary().is_some() { 0 } else { 65534 };
        std::os::unix::fs::chown(&other, Some(owner), None).expect("chown");
        let mode = std::fs::Permissions::from_mode(0o4755);
        std::fs::set_permissions(&other, mode).expect("chmod");
        other
    } else {
        build::find_command("su")
    };
    let (status, text) = refusal(&dir, program.to_str().expect("UTF-8"));
    assert!(text.contains("is set-user-id"), "{text}");
    assert!(matches!(status, Some(125 | 126)), "{status:?}");
    // The same without the bit runs.
    if root {
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&program, mode).expect("chmod");
        assert_eq!(refusal(&dir, program.to_str().expect("UTF-8")).0, Some(0));
    }
}

/// In a set-uid program the library does nothing at all: it is in the process, but takes no
/// checkpoint, makes no store, and does not even complain of a wrong variable. The loader preloads
/// nothing but set-uid libraries of the system's directories there: one of them is replaced by
/// ours, in a mount namespace of the test's own.
#[test]
fn set_uid_programs_are_let_alone() {
    const STANDS_IN: &str = "/usr/lib/x86_64-linux-gnu/libmemusage.so";
    // SAFETY: no memory effects.
    if unsafe { libc::getuid() } != 0
        || user::ordinary().is_some()
        || !Path::new(STANDS_IN).exists()
    {
        eprintln!("*** NOT TESTED: needs root (as itself) and {STANDS_IN}");
        return;
    }
    let dir = place();
    let open = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(&dir, open).expect("chmod");
    let (guest, library) = (dir.join("secure"), dir.join("library.so"));
    compile(&build::guests_dir().join("secure.c"), &guest, &[]);
    std::fs::copy(build::library(), &library).expect("a copy");
    let set_uid = || std::fs::Permissions::from_mode(0o4755);
    std::fs::set_permissions(&library, set_uid()).expect("chmod");
    let run = |interval: &str| {
        let script = format!(
            "mount --bind {} {STANDS_IN} && LD_PRELOAD=libmemusage.so CKPT_INTERVAL={interval} CKPT_DIR={} exec {}",
            library.display(),
            dir.join("store").display(),
            guest.display(),
        );
        Command::new("unshare")
            .args(["-m", "sh", "-c", &script])
            .output()
            .expect("unshare")
    };
    let text = |output: &Output| String::from_utf8_lossy(&output.stdout).into_owned();
    // Not set-uid: it is loaded and at work.
    let plain = run("20ms");
    if !text(&plain).starts_with("secure 0 loaded 1") {
        let errors = String::from_utf8_lossy(&plain.stderr);
        eprintln!("*** NOT TESTED: no mount namespace here: {errors}");
        return;
    }
    assert!(dir.join("store").exists(), "the control took no checkpoint");
    assert_eq!(run("often").status.code(), Some(125));
    std::fs::remove_dir_all(dir.join("store")).expect("removed");
    std::os::unix::fs::chown(&guest, Some(65534), None).expect("chown");
    std::fs::set_permissions(&guest, set_uid()).expect("chmod");
    for interval in ["20ms", "often"] {
        let output = run(interval);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        if text(&output).starts_with("secure 0") {
            eprintln!("*** NOT TESTED: this file system is mounted nosuid");
            return;
        }
        assert_eq!(text(&output), "secure 1 loaded 1 threads 1\n", "{errors}");
        assert_eq!((output.status.code(), errors.as_str()), (Some(0), ""));
        assert!(!dir.join("store").exists(), "a store was made");
    }
}

/// What the command tells of a generation of a real program.
#[test]
fn shows_a_real_generation() {
    let program = Program::guest("mem_dlopen").seconds(3.0);
    let mut trial = Trial::new(program, LAZY_FORK).ckpt("CKPT_JOB", "shown");
    let mut started = trial.start();
    while trial.generation() < 3 || trial.notes("begin") == 0 {
        let known = trial.generation();
        if trial.await_generation(&mut started, known).is_none() {
            trial.fail("it ended too early");
        }
    }
    // By the job's name, while it runs.
    let known = trial.generation();
    let asked = ckpt(
        &trial,
        &["checkpoint", "--wait", "--timeout", "20", "shown"],
    );
    if !asked.status.success() || trial.generation() <= known {
        trial.fail(&String::from_utf8_lossy(&asked.stderr));
    }
    let id = started.id;
    let status = String::from_utf8_lossy(&ckpt(&trial, &["status"]).stdout).into_owned();
    if !status.contains("shown") || !status.contains(&id.to_string()) {
        trial.fail(&format!(
            "ckpt status does not name job and process: {status}"
        ));
    }
    started.kill(true);
    listed(&mut trial);
    let shown = json(&trial, &["show", "shown"]);
    let contents = &shown["contents"][0];
    let rows = |part: &str| contents[part].as_array().cloned().unwrap_or_default();
    let has = |part: &str, key: &str, word: &str| {
        let rows = rows(part);
        rows.iter()
            .any(|row| row[key].as_str().is_some_and(|text| text.contains(word)))
    };
    let plugin = trial.program.env["GUEST_PLUGIN"].clone();
    let guest = trial.program.path.to_string_lossy().into_owned();
    for word in [&guest, &plugin, "[heap]", "[stack]", "libc.so.6"] {
        assert!(has("maps", "what", word), "no mapping of {word}");
    }
    let stored = rows("maps").iter().map(|m| m["stored"].as_u64()).max();
    assert!(stored.flatten() > Some(0), "no mapping has stored bytes");
    assert!(has("maps", "prot", "r-xp") && has("maps", "prot", "rw-p"));
    assert_eq!(rows("threads").len(), 2);
    assert!(rows("threads").iter().any(|t| t["tid"] == id), "{id}");
    assert!(has("threads", "name", "mem_dlopen") && has("threads", "policy", "other"));
    for fd in 0..3 {
        assert!(rows("descriptors").iter().any(|d| d["fd"] == fd), "no {fd}");
    }
    let uses: Vec<(String, String)> = rows("files")
        .iter()
        .map(|f| {
            let text = |key: &str| f[key].as_str().unwrap_or("").to_owned();
            (text("use"), text("path"))
        })
        .collect();
    assert!(
        uses.contains(&("program".into(), guest.clone())),
        "{uses:?}"
    );
    assert!(
        uses.contains(&("library".into(), plugin.clone())),
        "{uses:?}"
    );
    assert_eq!(contents["pid"], id);
    assert_eq!(contents["exe"], guest);
    // The same in words.
    let text = String::from_utf8_lossy(&ckpt(&trial, &["show", "shown"]).stdout).into_owned();
    for word in ["[heap]", "mem_dlopen", "taken", "stored", "stop", &plugin] {
        assert!(text.contains(word), "{word}: {text}");
    }
}

/// Every key that is promised, with a value that can be true of a real checkpoint.
fn listed(trial: &mut Trial) {
    let list = json(trial, &["list"]);
    let generations = list["jobs"][0]["generations"].as_array().cloned();
    let generations = generations.expect("generations");
    assert!(generations.len() >= 2, "{list}");
    for generation in &generations {
        for key in [
            "generation",
            "stop_us",
            "persist_us",
            "bytes_logical",
            "bytes_stored",
            "pages_dirty",
        ] {
            assert!(generation[key].as_u64() > Some(0), "{key}: {generation}");
        }
        for key in ["time", "kind", "tracker", "snapshot"] {
            let text = generation[key].as_str().unwrap_or("");
            assert!(!text.is_empty(), "{key}: {generation}");
        }
        // Here the command is root's: another user's job is not to be restored by it.
        let own = user::ordinary().is_none();
        assert_eq!(generation["restorable"], own, "{generation}");
        assert_eq!(generation["id"], 0);
        assert!(generation["members"][0]["threads"].as_u64() > Some(0));
        assert!(generation["members"][0]["bytes"].as_u64() > Some(0));
    }
    let last = generations.last().expect("a generation");
    assert_eq!(last["members"][0]["threads"], 2);
    let numbers: Vec<_> = generations.iter().map(|g| &g["generation"]).collect();
    for pair in generations.windows(2) {
        let parent = &pair[1]["parent"];
        assert!(numbers.contains(&parent), "{parent} of {pair:?}");
    }
}

/// Long work shows how far it is: on a terminal, and only there.
#[test]
fn progress_on_a_terminal() {
    let program = Program::guest("mem_big").seconds(2.0);
    let mut trial = Trial::new(program, LAZY_FORK);
    trial.kill_and_resume(1);
    let (mut master, mut slave) = (0, 0);
    // SAFETY: openpty writes two descriptors, which are ours from then on.
    let (master, slave) = unsafe {
        let none = std::ptr::null_mut();
        let size = libc::winsize {
            ws_row: 25,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let done = libc::openpty(&mut master, &mut slave, none, std::ptr::null(), &size);
        assert_eq!(done, 0, "openpty");
        (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave))
    };
    let mut child = Command::new(build::command())
        .arg("verify")
        .env("CKPT_DIR", trial.dir.join("store"))
        .env("TERM", "xterm")
        .stdout(Stdio::null())
        .stderr(slave)
        .spawn()
        .expect("ckpt verify");
    let mut shown = Vec::new();
    let mut master = std::fs::File::from(master);
    let mut part = [0; 4096];
    while let Ok(n @ 1..) = std::io::Read::read(&mut master, &mut part) {
        shown.extend_from_slice(&part[..n]);
    }
    assert!(child.wait().expect("its end").success());
    let shown = String::from_utf8_lossy(&shown).into_owned();
    assert!(shown.contains("iB/s") && shown.contains('\r'), "{shown:?}");
    let piped = ckpt(&trial, &["verify"]);
    assert_eq!(String::from_utf8_lossy(&piped.stderr), "");
}
