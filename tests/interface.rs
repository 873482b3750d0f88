//! The small calls of the C interface, the header without the library, and what `ckpt
//! status` makes of it (issue line "execution control").

mod common;

use common::*;
use std::process::Command;
use std::time::{Duration, Instant};

fn inserted(guest: &str) -> Trial {
    let trial = Trial::new(Program::guest(guest).seconds(1.0), LAZY_FORK);
    trial.ckpt("CKPT_INTERVAL", "off")
}

#[test]
fn sections_events_and_texts() {
    let mut trial = inserted("api_calls");
    let bare = trial.bare();
    let mut started = trial.start();
    trial.await_generation(&mut started, 0);
    let limit = Instant::now() + Duration::from_secs(30);
    while trial.notes("taken") == 0 && Instant::now() < limit && !started.has_ended() {
        std::thread::sleep(Duration::from_millis(5));
    }
    if trial.notes("taken") != 1 || started.has_ended() {
        trial.fail("the guest did not come to its checkpoint");
    }

    // What it has said of itself, before it dies.
    let status = || {
        let shown = Command::new(build::command())
            .args(["--json", "status", &started.id.to_string()])
            .env("CKPT_DIR", trial.dir.join("store"))
            .output()
            .expect("ckpt status");
        let value: serde_json::Value = serde_json::from_slice(&shown.stdout).expect("JSON");
        value["status"][0].clone()
    };
    let first = status();
    assert!(first["ready_ns"].as_u64().unwrap() > 1 << 60, "{first}");
    assert!(first["heartbeats"].as_u64().unwrap() > 0, "{first}");
    std::thread::sleep(Duration::from_millis(150));
    let second = status();
    assert!(
        second["heartbeats"].as_u64() > first["heartbeats"].as_u64()
            && second["heartbeat_ns"].as_u64() > first["heartbeat_ns"].as_u64(),
        "{first} {second}"
    );
    // A helper that saw the call before the wish that came with it took a second checkpoint,
    // behind the call, and the recovery did not come back to the call.
    assert_eq!(trial.generation(), 1, "one call, one checkpoint");
    started.kill(true);
    let life = trial.finish();
    trial.compare(&bare, &life);
    assert_eq!(trial.notes("restored"), 2, "two handlers, once each");
}

#[test]
fn handlers_of_a_clock_checkpoint_run_at_the_next_call() {
    let mut trial = Trial::new(Program::guest("api_clock").seconds(3.0), LAZY_FORK);
    let bare = trial.bare();
    let mut lives = 0;
    for _ in 0..3 {
        let known = trial.generation();
        let mut started = trial.start();
        if trial.await_generation(&mut started, known.max(1)).is_none() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        started.kill(true);
        lives += 1;
    }
    let life = trial.finish();
    trial.compare(&bare, &life);
    assert!(lives > 0, "it was never killed");
    assert_eq!(trial.notes("wrong"), 0);
    assert_eq!(trial.notes("restored"), lives, "once in each life");
}
