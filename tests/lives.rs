//! Many short lives: killed 50 to 300 ms after each start, whatever it is doing, and the store as
//! it was at each of the last kills is kept. A page that one generation in hundreds lacks shows so:
//! the guest looks at its memory soon after each restart, and the store that it came from is
//! still there to be looked into.
//!
//! `soak` (ignored here, run by scripts/soak --lives) does it with many guests, trackers,
//! snapshots and ways to restore, and prints a table.

mod common;

use common::{Program, Setting, Trial};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// So many stores are kept: what is wrong may have been so for some generations.
const KEPT: usize = 14;

/// Seconds of work of one run; with lives as short as these it takes many times as long.
const SECONDS: f64 = 6.0;

#[derive(Clone, Copy)]
struct Way {
    tracker: &'static str,
    snapshot: &'static str,
    restore: &'static str,
}

const fn way(tracker: &'static str, snapshot: &'static str, restore: &'static str) -> Way {
    Way {
        tracker,
        snapshot,
        restore,
    }
}

const WAYS: [Way; 6] = [
    way("auto", "auto", "lazy"),
    way("mprotect", "fork", "lazy"),
    way("auto", "priority", "auto"),
    way("auto", "copy", "eager"),
    way("mprotect", "auto", "eager"),
    way("full", "fork", "auto"),
];

fn copy(from: &Path, to: &Path) {
    let done = std::process::Command::new("cp")
        .arg("-a")
        .args([from, to])
        .status();
    assert!(done.expect("cp").success());
}

/// One run from its beginning to its end, or to so many kills. Returns how many there were.
fn run(guest: &str, way: Way, most: usize) -> usize {
    let setting = Setting {
        restore: way.restore,
        snapshot: way.snapshot,
    };
    let mut trial = Trial::new(Program::guest(guest).seconds(SECONDS), setting)
        .ckpt("CKPT_INTERVAL", "20ms")
        .ckpt("CKPT_CHAIN", "6")
        .ckpt("CKPT_TRACKER", way.tracker);
    if guest == "inc_storm" {
        let seed = trial.random(1 << 30).to_string();
        trial.note(format!("storm {seed}"));
        trial.program = trial.program.clone().arg(&seed);
    }
    let bare = trial.bare();
    let mut stores: VecDeque<PathBuf> = VecDeque::new();
    for kill in 0..most {
        let mut started = trial.start();
        // Without a first generation, and now and then one more, it gets nowhere.
        let known = trial.generation();
        if (known == 0 || kill % 4 == 3) && trial.await_generation(&mut started, known).is_none() {
            let life = started.end(Duration::from_secs(1));
            trial.compare(&bare, &life);
            return kill;
        }
        let wait = 50_000 + trial.random(250_000);
        std::thread::sleep(Duration::from_micros(wait));
        let life = started.kill(true);
        trial.note(format!(
            "kill {kill}: {}, generation {}",
            life.describe(),
            trial.generation()
        ));
        if life.status.is_some() {
            trial.compare(&bare, &life);
            return kill;
        }
        let kept = trial.dir.join(format!("store-{kill}"));
        copy(&trial.dir.join("store"), &kept);
        stores.push_back(kept);
        if stores.len() > KEPT
            && let Some(oldest) = stores.pop_front()
        {
            let _ = std::fs::remove_dir_all(oldest);
        }
    }
    let life = trial.finish();
    trial.compare(&bare, &life);
    most
}

#[test]
fn heap() {
    run("mem_heap", WAYS[0], 12);
}

/// `SOAK_CYCLES` kills (default 100) of each guest in each way; `SOAK_PROGRAMS`: these guests.
#[test]
#[ignore = "long: scripts/soak --lives runs it"]
fn soak() {
    const GUESTS: [&str; 13] = [
        "mem_heap",
        "mem_grows",
        "mem_maps",
        "mem_objects",
        "mem_ops",
        "mem_discards",
        "mem_exchanged",
        "mem_written",
        "inc_storm",
        "inc_remap",
        "inc_shared",
        "storm_malloc",
        "storm_threads",
    ];
    let cycles = std::env::var("SOAK_CYCLES").ok();
    let cycles: usize = cycles.and_then(|n| n.parse().ok()).unwrap_or(100);
    let only = std::env::var("SOAK_PROGRAMS").unwrap_or_default();
    let only: Vec<&str> = only.split_whitespace().collect();
    let guests: Vec<&str> = match only.is_empty() {
        true => GUESTS.to_vec(),
        false => only,
    };
    println!(
        "{:<16} {:<9} {:<9} {:<6} {:>6} {:>6}  note",
        "guest", "tracker", "snapshot", "restore", "kills", "wrong"
    );
    let mut wrong = 0;
    for guest in guests {
        for way in WAYS {
            let (mut done, mut bad, mut runs) = (0, 0, 0);
            let mut note = String::new();
            while done < cycles && bad == 0 && runs < cycles {
                runs += 1;
                let most = cycles - done;
                match std::panic::catch_unwind(|| run(guest, way, most)) {
                    Ok(kills) => done += kills,
                    Err(panic) => {
                        bad += 1;
                        let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                        let directory = text.lines().last().unwrap_or_default();
                        let first = text.lines().next().unwrap_or("failed");
                        note = format!("{first} {directory}");
                    }
                }
            }
            wrong += bad;
            println!(
                "{guest:<16} {:<9} {:<9} {:<6} {done:>6} {bad:>6}  {note}",
                way.tracker, way.snapshot, way.restore
            );
        }
    }
    assert_eq!(wrong, 0, "wrong lives");
}
