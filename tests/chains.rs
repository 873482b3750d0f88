//! Chains of images: restored, merged, damaged, killed (issue line "increments and merge").

mod common;

#[path = "chains/split.rs"]
mod split;

/// A full generation of a real program is made a chain by hand, with other contents in
/// all that newer images replace or drop; the program must not notice.
mod restored {
    use crate::common::*;
    use crate::split;

    fn survives(guest: &str, setting: Setting, links: u64) {
        let program = Program::guest(guest).seconds(4.0);
        let mut trial = Trial::new(program, setting)
            .ckpt("CKPT_INTERVAL", "40ms")
            .ckpt("CKPT_TRACKER", "full");
        let bare = trial.bare();
        for round in 0..2 {
            let mut started = trial.start();
            let mut known = trial.generation();
            while known <= links || trial.notes("begin") == 0 {
                match trial.await_generation(&mut started, known) {
                    Some(generation) => known = generation,
                    None => trial.fail("it ended too early"),
                }
            }
            if trial.await_generation(&mut started, known).is_none() {
                trial.fail("it ended too early");
            }
            started.kill(true);
            let seed = trial.random(u64::MAX) | 1;
            let text = match split::split(&trial.dir.join("store"), links, seed) {
                Ok(text) => text,
                Err(error) => trial.fail(&format!("{error:#}")),
            };
            trial.note(format!("round {round}: {text}, seed {seed}"));
        }
        let life = trial.finish();
        trial.compare(&bare, &life);
        let log = std::fs::read_to_string(trial.dir.join("ckpt.log")).unwrap_or_default();
        if log.matches("restored: ").count() < 2 {
            trial.fail("it was not restored from both chains");
        }
    }

    macro_rules! tests {
        ($($name:ident)*) => { $(
            mod $name {
                use super::*;
                #[test]
                fn lazy() {
                    survives(stringify!($name), LAZY_FORK, 3);
                }
                #[test]
                fn eager() {
                    survives(stringify!($name), EAGER_COPY, 3);
                }
            }
        )* };
    }

    tests! { mem_heap mem_maps mem_big mem_objects storm_threads }
}

/// What the store holds after a kill: the newest generation, every byte verified.
fn newest(trial: &mut common::Trial) -> u64 {
    use ckpt::config::Resume;
    use ckpt::store::{Job, RawFs};
    let jobs = trial.dir.join("store/jobs");
    let Some(job) = std::fs::read_dir(&jobs).into_iter().flatten().next() else {
        return 0;
    };
    let dir = job.expect("an entry").path();
    let searched = Job::open(RawFs, dir)
        .map_err(|error| error.to_string())
        .and_then(|job| job.find(Resume::Auto, true).map_err(|e| e.to_string()));
    match searched {
        Ok((Some(found), skipped)) if skipped.is_empty() => found.record.generation,
        Ok((None, _)) => 0,
        Ok((_, skipped)) => trial.fail(&format!("damaged: {skipped:?}")),
        Err(error) => trial.fail(&error),
    }
}

fn merges(trial: &common::Trial) -> usize {
    let log = std::fs::read_to_string(trial.dir.join("ckpt.log")).unwrap_or_default();
    log.matches(": merged, ").count()
}

/// Is a complete image being written beside an increment?
fn merging(trial: &common::Trial) -> bool {
    let entries = |path: &std::path::Path| -> Vec<std::path::PathBuf> {
        let list = std::fs::read_dir(path).into_iter().flatten();
        list.filter_map(|entry| Some(entry.ok()?.path())).collect()
    };
    let jobs = entries(&trial.dir.join("store/jobs"));
    let mut generations = jobs.iter().flat_map(|job| entries(job));
    generations.any(|dir| dir.join("member-0.full.tmp").exists())
}

/// Waits for that, but not for ever: a machine without a tracker merges nothing.
fn wait(condition: impl Fn() -> bool) {
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while !condition() && std::time::Instant::now() < limit {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Kills at any instant while images are written and chains are merged: there is always a
/// whole newest generation, and never an older one than before.
mod killed {
    use crate::common::*;
    use std::time::Duration;

    /// `CKPT_CHAIN_KILLS`: so many of them (scripts/soak --chains).
    fn kills() -> u64 {
        let kills = std::env::var("CKPT_CHAIN_KILLS").ok();
        kills.and_then(|n| n.parse().ok()).unwrap_or(15)
    }

    /// Kills in one life of a job: its program must not take longer than any test's.
    const ONE_JOB: u64 = 60;

    fn survives(guest: &str, compress: &str, restore: &'static str) {
        let mut left = kills();
        while left > 0 {
            let kills = left.min(ONE_JOB);
            one_job_survives(kills, guest, compress, restore);
            left -= kills;
        }
    }

    fn one_job_survives(kills: u64, guest: &str, compress: &str, restore: &'static str) {
        let setting = Setting {
            restore,
            snapshot: "auto",
        };
        // A hundred rounds a second, and each life is killed within some 200 ms.
        // More where many merges are waited for.
        let each = if kills > 15 { 1.0 } else { 0.5 };
        let program = Program::guest(guest).seconds(8.0 + kills as f64 * each);
        let mut trial = Trial::new(program, setting)
            .ckpt("CKPT_INTERVAL", "20ms")
            .ckpt("CKPT_CHAIN", "6")
            .ckpt("CKPT_COMPRESS", compress);
        let bare = trial.bare();
        let mut known = 0;
        let mut hits = 0;
        for kill in 0..kills {
            let mut started = trial.start();
            // Every other time something new is waited for first, or there is no progress.
            if kill % 2 == 0 && trial.await_generation(&mut started, known).is_none() {
                trial.fail("it ended before it was killed");
            }
            // Now and then a merge is waited for, or the beginning of one.
            let merged = crate::merges(&trial);
            let under_way = |trial: &Trial| crate::merging(trial);
            match kill % 5 {
                2 => crate::wait(|| crate::merges(&trial) > merged),
                4 => crate::wait(|| under_way(&trial)),
                _ => {}
            }
            let most = if kill % 5 == 4 { 8_000 } else { 150_000 };
            let wait = trial.random(most);
            std::thread::sleep(Duration::from_micros(wait));
            let life = started.kill(true);
            hits += usize::from(life.status.is_none());
            let now = crate::newest(&mut trial);
            trial.note(format!("kill {kill}: generation {known} -> {now}"));
            if now < known {
                trial.fail("the newest generation is an older one than before");
            }
            known = now;
        }
        let merges = crate::merges(&trial);
        let life = trial.finish();
        trial.compare(&bare, &life);
        if hits < kills as usize {
            trial.fail("it ended before it was killed");
        }
        let log = std::fs::read_to_string(trial.dir.join("ckpt.log")).unwrap_or_default();
        if merges == 0 && log.contains(": increment,") {
            trial.fail("nothing was merged: this proves little");
        }
        eprintln!("{kills} kills, {merges} merges, generation {known}");
    }

    #[test]
    fn heap() {
        survives("mem_heap", "none", "lazy");
    }

    #[test]
    fn heap_lz4() {
        survives("mem_heap", "lz4", "auto");
    }

    #[test]
    fn threads() {
        survives("storm_threads", "none", "auto");
    }

    #[test]
    fn threads_zstd() {
        survives("storm_threads", "zstd", "eager");
    }
}

/// `ckpt merge`: a chain at rest becomes one image; the rest goes; the program goes on.
#[test]
fn merged_at_rest() {
    use common::*;
    let program = Program::guest("mem_heap").seconds(4.0);
    let mut trial = Trial::new(program, LAZY_FORK).ckpt("CKPT_TRACKER", "full");
    let bare = trial.bare();
    let mut started = trial.start();
    let mut known = 0;
    while known < 7 || trial.notes("begin") == 0 {
        known = match trial.await_generation(&mut started, known) {
            Some(generation) => generation,
            None => trial.fail("it ended too early"),
        };
    }
    let ckpt = |trial: &Trial, args: &[&str]| {
        let mut command = std::process::Command::new(build::command());
        let store = trial.dir.join("store");
        let output = command.args(args).env("CKPT_DIR", store).output();
        let output = output.expect("ckpt runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code(), text)
    };
    // Its own business as long as it runs.
    assert_eq!(ckpt(&trial, &["merge"]).0, Some(1));
    started.kill(true);
    split::split(&trial.dir.join("store"), 4, 77).expect("split");
    let before = newest(&mut trial);
    let (status, text) = ckpt(&trial, &["merge", "--json", "--keep", "1"]);
    assert_eq!(status, Some(0));
    let said: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(said["merged"], true);
    assert_eq!(said["generation"], before);
    assert_eq!(said["removed"].as_array().map(Vec::len), Some(4));
    assert_eq!(newest(&mut trial), before);
    assert_eq!(ckpt(&trial, &["verify"]).0, Some(0));
    let (_, list) = ckpt(&trial, &["list", "--json"]);
    let list: serde_json::Value = serde_json::from_str(&list).expect("JSON");
    let generations = &list["jobs"][0]["generations"];
    assert_eq!(generations.as_array().map(Vec::len), Some(1));
    assert_eq!(generations[0]["kind"], "full");
    // Once more: nothing to do.
    let (status, text) = ckpt(&trial, &["merge", "--json"]);
    let said: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(
        (status, &said["merged"]),
        (Some(0), &serde_json::json!(false))
    );
    let life = trial.finish();
    trial.compare(&bare, &life);
}

/// A damaged image in the middle of a chain: `ckpt verify` and `ckpt list` name it, and the
/// program goes on from the newest generation that does not need it.
#[test]
fn damage_in_the_middle() {
    use common::*;
    let program = Program::guest("mem_heap").seconds(4.0);
    let mut trial = Trial::new(program, LAZY_FORK).ckpt("CKPT_TRACKER", "full");
    let mut started = trial.start();
    let mut known = 0;
    while known < 7 || trial.notes("begin") == 0 {
        known = match trial.await_generation(&mut started, known) {
            Some(generation) => generation,
            None => trial.fail("it ended too early"),
        };
    }
    started.kill(true);
    split::split(&trial.dir.join("store"), 4, 78).expect("split");
    let newest = newest(&mut trial);
    let jobs = trial.dir.join("store/jobs");
    let job = std::fs::read_dir(jobs).expect("jobs").next();
    let job = job.expect("one").expect("one").path();
    let image = job.join(format!("gen-{:06}/member-0.img", newest - 2));
    let mut bytes = std::fs::read(&image).expect("an image");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&image, bytes).expect("written");
    let verify = std::process::Command::new(build::command())
        .args(["verify", "--json"])
        .env("CKPT_DIR", trial.dir.join("store"))
        .output()
        .expect("ckpt verify");
    assert_eq!(verify.status.code(), Some(1));
    let said: serde_json::Value = serde_json::from_slice(&verify.stdout).expect("JSON");
    let bad: Vec<(u64, String)> = said["verified"]
        .as_array()
        .expect("a list")
        .iter()
        .filter(|v| v["ok"] == false)
        .map(|v| {
            let generation = v["generation"].as_u64().expect("a number");
            (generation, v["reason"].as_str().expect("text").to_owned())
        })
        .collect();
    let numbers: Vec<u64> = bad.iter().map(|b| b.0).collect();
    assert_eq!(numbers, [newest - 2, newest - 1, newest]);
    let named = format!("it stands on generation {}", newest - 2);
    assert!(bad[1..].iter().all(|b| b.1.contains(&named)), "{bad:?}");
    // Generations below are decoys of the test, not of this program: it is enough that it
    // is not started afresh.
    let life = trial.start().end(std::time::Duration::from_secs(60));
    let log = std::fs::read_to_string(trial.dir.join("ckpt.log")).unwrap_or_default();
    assert!(log.contains("falling back to an older checkpoint"), "{log}");
    assert_eq!(life.status, Some(125));
    assert_eq!(trial.notes("begin"), 1);
}
