//! The applications of the patent in `examples/`, run as a person would run them. Each
//! script compares its results with an undisturbed run itself; here is what its lines say.

mod common;

use common::*;
use std::path::Path;
use std::process::Command;

/// The script's standard output; it must end with 0.
fn run(example: &str, args: &[&str]) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = root.join("examples").join(example).join("run");
    let dir = user::fresh_dir(&format!("example-{example}-{}", args.join("-")));
    let done = Command::new(&script)
        .args(args)
        .env("CKPT", build::command())
        .env("CKPT_LIB", build::library())
        .env("TMPDIR", &dir)
        .env("CKPT_LOG", format!("debug:{}/ckpt.log", dir.display()))
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}", script.display()));
    let out = String::from_utf8_lossy(&done.stdout).into_owned();
    let log = std::fs::read_to_string(dir.join("ckpt.log")).unwrap_or_default();
    assert!(
        done.status.success(),
        "{example} {args:?}: {}\n{out}{}\n-- log:\n{log}",
        done.status,
        String::from_utf8_lossy(&done.stderr)
    );
    let _ = std::fs::remove_dir_all(&dir);
    out
}

fn has(out: &str, part: &str) {
    assert!(out.contains(part), "{part:?} is not in:\n{out}");
}

fn premature_exit(language: &str) {
    let out = run("premature-exit", &[language]);
    has(&out, "limit of 200000 KiB: status 1 ");
    has(&out, "1 beginning, no memory for block ");
    has(&out, "limit of 800000 KiB: status 0 ");
    // The second process did not begin anew (what the first had said is put back): it came
    // back and tried the same block again.
    has(&out, "1 beginnings, back, to try block ");
    has(&out, "result equal: 64 blocks, sum ");
}

#[test]
fn premature_exit_c() {
    premature_exit("c");
}

#[test]
fn premature_exit_python() {
    premature_exit("python");
}

fn templates(language: &str) {
    let out = run("long-initialisation", &[language, "100000", "4"]);
    has(&out, "template: ");
    has(&out, " for 4 inputs side by side, parsed 1 time");
    has(&out, "by rollback: ");
    has(&out, "answers equal, 5 seeds of 5, jobs left: 1");
}

fn rejuvenation(language: &str) {
    let out = run("rejuvenation", &[language, "3000", "50"]);
    has(&out, "60 rollbacks");
    has(&out, "output complete and in order: 3000 lines");
    let most = |line: &str| -> u64 {
        let line = out.lines().find(|l| l.starts_with(line)).expect(line);
        let rest = line.split("most resident ").nth(1).expect("its memory");
        let kib = rest.split(' ').next().and_then(|n| n.parse().ok());
        kib.expect("a number")
    };
    // 3000 times 64 KiB are lost bare, 50 times under the library.
    let (bare, under) = (most("bare: "), most("under ckpt: "));
    assert!(bare > 180_000 && under < 30_000, "{out}");
}

#[test]
fn rejuvenation_c() {
    rejuvenation("c");
}

#[test]
fn rejuvenation_rust() {
    rejuvenation("rust");
}

#[test]
fn long_initialisation_templates_c() {
    templates("c");
}

#[test]
fn long_initialisation_templates_python() {
    templates("python");
}
