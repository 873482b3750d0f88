//! Checkpoints that are increments come back exactly, in every combination of tracker,
//! snapshot and restore (docs/INCREMENTS.md).

mod common;

use common::*;

/// Killed three times with a checkpoint every 20 ms. `CKPT_CHAIN` is short, so that
/// complete generations and merged ones take part.
fn survives(guest: &str, tracker: &str, snapshot: &'static str, restore: &'static str) {
    let setting = Setting { restore, snapshot };
    let trial = Trial::new(Program::guest(guest).seconds(1.2), setting)
        .ckpt("CKPT_INTERVAL", "20ms")
        .ckpt("CKPT_CHAIN", "5")
        .ckpt("CKPT_TRACKER", tracker);
    trial.survives(3);
}

macro_rules! combinations {
    ($($tracker:ident / $name:literal { $($test:ident = $snapshot:literal, $restore:literal;)* })*) => { $(
        mod $tracker {
            $(mod $test {
                #[test]
                fn threads() {
                    crate::survives("inc_threads", $name, $snapshot, $restore);
                }
                #[test]
                fn model() {
                    crate::survives("inc_model", $name, $snapshot, $restore);
                }
            })*
        }
    )* };
}

combinations! {
    uffd / "uffd" {
        copy_lazy = "copy", "lazy";
        copy_eager = "copy", "eager";
        fork_lazy = "fork", "lazy";
        fork_eager = "fork", "eager";
        auto_lazy = "auto", "lazy";
        auto_eager = "auto", "eager";
    }
    mprotect / "mprotect" {
        copy_lazy = "copy", "lazy";
        copy_eager = "copy", "eager";
        fork_lazy = "fork", "lazy";
        fork_eager = "fork", "eager";
        auto_lazy = "auto", "lazy";
        auto_eager = "auto", "eager";
    }
    full / "full" {
        copy_lazy = "copy", "lazy";
        fork_eager = "fork", "eager";
        auto_lazy = "auto", "lazy";
    }
}

/// A generation of which the store says this.
fn generations(trial: &Trial) -> Vec<serde_json::Value> {
    let output = std::process::Command::new(build::command())
        .args(["list", "--json"])
        .env("CKPT_DIR", trial.dir.join("store"))
        .output()
        .expect("ckpt list");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let all: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let jobs = all["jobs"].as_array().expect("jobs").clone();
    let of = |job: &serde_json::Value| job["generations"].as_array().cloned().unwrap_or_default();
    jobs.iter().flat_map(of).collect()
}

/// What the list says of a program that changes little: increments, small, on a base;
/// and the split of the stop adds up.
#[test]
fn what_is_stored_is_what_changed() {
    let big = Program::guest("mem_big")
        .seconds(3.0)
        .env("GUEST_MIB", "128");
    let mut trial = Trial::new(big, LAZY_FORK)
        .ckpt("CKPT_INTERVAL", "20ms")
        .ckpt("CKPT_KEEP", "100")
        .ckpt("CKPT_SNAPSHOT", "auto");
    let mut started = trial.start();
    let mut known = 0;
    for _ in 0..15 {
        known = trial
            .await_generation(&mut started, known)
            .expect("it runs long enough");
    }
    started.kill(true);
    let all = generations(&trial);
    let increments: Vec<_> = all.iter().filter(|g| g["kind"] == "increment").collect();
    if increments.is_empty() && all.iter().all(|g| g["tracker"] == "full") {
        eprintln!("SKIPPED: no tracker works here, so all generations are complete");
        return;
    }
    assert!(increments.len() >= 3, "{all:#?}");
    for g in &increments {
        assert!(g["parent"].as_u64() < g["generation"].as_u64(), "{g:#?}");
        let number = |name: &str| g["phases"][name].as_u64().expect(name);
        let names = ["park_us", "collect_us", "scan_us", "copy_us"];
        let sum: u64 = names.iter().map(|name| number(name)).sum();
        let stop = g["stop_us"].as_u64().expect("stop_us");
        assert!(sum <= stop + 10 && sum > 0, "{g:#?}");
    }
    // The first ones are taken while the guest fills its memory.
    let bytes = |g: &serde_json::Value, name: &str| g[name].as_u64().expect("bytes");
    let logical = all.iter().map(|g| bytes(g, "bytes_logical")).max();
    let smallest = increments.iter().map(|g| bytes(g, "bytes_stored")).min();
    assert!(
        smallest.expect("some") * 4 < logical.expect("some"),
        "{smallest:?} of {logical:?} bytes"
    );
}
