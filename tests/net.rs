//! The call-site net, tested alone: small C programs run under `netlib`, which installs
//! the net with test hooks (`tests/support/netlib`).

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A directory of this test run, and in it the guests, compiled on demand.
fn scratch() -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("net");
    std::fs::create_dir_all(&dir).expect("scratch directory");
    dir
}

fn run(command: &mut Command) {
    let output = command.output().expect("command starts");
    assert!(
        output.status.success(),
        "{command:?}:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// `CKPT_TEST_NETLIB`, or built once per process; cargo's own lock serialises processes.
fn netlib() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    if let Some(built) = std::env::var_os("CKPT_TEST_NETLIB") {
        return built.into();
    }
    BUILT
        .get_or_init(|| {
            let target = root().join("target/netlib");
            run(Command::new(env!("CARGO"))
                .args([
                    "build",
                    "--quiet",
                    "--release",
                    "-p",
                    "netlib",
                    "--target-dir",
                ])
                .arg(&target)
                .current_dir(root()));
            target.join("release/libnetlib.so")
        })
        .clone()
}

fn guest(source: &str) -> PathBuf {
    let source = root().join("tests/guests").join(source);
    let name = source.file_stem().expect("a name").to_owned();
    let compiler = if source.extension().is_some_and(|ext| ext == "cpp") {
        "c++"
    } else {
        "cc"
    };
    let program = scratch().join(name);
    let new = scratch().join(format!("tmp-{}", std::process::id()));
    run(Command::new(compiler)
        .args(["-O1", "-g", "-w", "-pthread", "-o"])
        .args([&new, &source]));
    std::fs::rename(&new, &program).expect("guest in place");
    program
}

/// Where the prepared copies come from in a run.
#[derive(Clone, Copy, PartialEq)]
enum Cache {
    None,
    Directory(&'static str),
}

fn under_net(program: &Path, args: &[&str], words: &str, cache: Cache) -> Output {
    let mut command = Command::new(program);
    command
        .args(args)
        .current_dir(scratch())
        .env("LD_PRELOAD", netlib())
        .env("NETLIB", words)
        .env("NETLIB_HOLD_US", "200");
    if let Cache::Directory(name) = cache {
        command.env("NETLIB_CACHE", scratch().join(name));
    }
    command.output().expect("guest starts")
}

#[track_caller]
fn passes(program: &Path, args: &[&str], words: &str, cache: Cache) -> String {
    let output = under_net(program, args, words, cache);
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        output.status.success(),
        "{words}: {}\n{text}",
        output.status
    );
    text
}

const CACHE: Cache = Cache::Directory("cache");

#[test]
fn libc_and_the_dynamic_linker_are_covered() {
    let text = passes(Path::new("/bin/true"), &[], "report", Cache::None);
    assert!(text.contains("libc.so.6 Analysed"), "{text}");
    assert!(text.contains("ld-linux-x86-64.so.2 Analysed"), "{text}");
}

#[test]
fn a_prepared_copy_is_made_and_used() {
    let cache = Cache::Directory("fresh");
    let _ = std::fs::remove_dir_all(scratch().join("fresh"));
    passes(Path::new("/bin/true"), &[], "report", cache);
    let mut said = String::new();
    let used = (0..SEVERAL).any(|_| {
        said = passes(Path::new("/bin/true"), &[], "report", cache);
        said.contains("libc.so.6 Mapped")
    });
    assert!(used, "{said}");
}

/// So many starts find the usual distance of slots from a library at least once: about one in
/// four hundred has another one (the kernel's random layout), and with it a copy of its own.
const SEVERAL: usize = 5;

/// A copy that is not exactly what was published is not used but replaced.
#[test]
fn damaged_copies_are_replaced() {
    let cache = Cache::Directory("damaged");
    let dir = scratch().join("damaged");
    let _ = std::fs::remove_dir_all(&dir);
    let copies = || -> Vec<(PathBuf, Vec<u8>)> {
        let mut all: Vec<_> = std::fs::read_dir(&dir)
            .expect("cache")
            .map(|entry| entry.expect("entry").path())
            .map(|path| (path.clone(), std::fs::read(path).expect("copy")))
            .collect();
        all.sort();
        all
    };
    passes(Path::new("/bin/true"), &[], "report", cache);
    let good = copies();
    assert_eq!(good.len(), 2);
    let are_replaced = || {
        (0..SEVERAL).any(|_| {
            passes(Path::new("/bin/true"), &[], "report", cache);
            let now = copies();
            good.iter().all(|copy| now.contains(copy))
        })
    };
    for (path, bytes) in &good {
        let mut bad = bytes.clone();
        bad[5000] ^= 1;
        std::fs::write(path, &bad).expect("damage");
    }
    assert!(are_replaced(), "a flipped bit was believed");
    for (path, _) in &good {
        let file = std::fs::File::options()
            .write(true)
            .open(path)
            .expect("copy");
        file.set_len(4096).expect("truncate");
    }
    assert!(are_replaced(), "a truncated copy was believed");
}

/// Unwind information is right at every instruction of slots, stages and stub; wrong, it would
/// skip destructors silently when a thread is cancelled there.
#[test]
fn unwinding_works_at_every_instruction() {
    let program = guest("net_step.c");
    for words in ["", "slow", "slow,around", "slow,clobber"] {
        passes(&program, &[], words, CACHE);
        passes(&program, &[], words, Cache::None);
    }
}

#[test]
fn cancellation_runs_destructors() {
    let program = guest("net_cancel.cpp");
    passes(&program, &["2"], "", CACHE);
    passes(&program, &["2"], "slow,clobber", CACHE);
}

#[test]
fn vector_registers_survive_hooks() {
    let program = guest("net_vector.c");
    passes(&program, &[], "slow,clobber", CACHE);
    passes(&program, &[], "slow,around,clobber", CACHE);
}

#[test]
fn everything_at_once() {
    let program = guest("net_stress.c");
    for words in ["slow,clobber", "slow,around,stop"] {
        passes(&program, &["2"], words, CACHE);
    }
}

#[test]
fn installing_late_does_no_harm() {
    let program = guest("net_late.c");
    passes(&program, &[], "late,report", CACHE);
    passes(&program, &[], "late,report", Cache::None);
}

#[test]
fn stops_are_invisible_to_blocking_calls() {
    let program = guest("net_restart.c");
    passes(&program, &["2000"], "stop", CACHE);
}

#[test]
fn handlers_return_through_the_counting_restorer() {
    let program = guest("net_restorer.c");
    passes(&program, &[], "", CACHE);
}
