//! Checkpoints that are increments come back exactly, in every combination of tracker,
//! snapshot and restore (docs/INCREMENTS.md).

mod common;

#[path = "increments/group.rs"]
mod group;

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

/// Eight kills, and another order of everything in each run.
fn storm(tracker: &str, snapshot: &'static str, restore: &'static str) {
    let setting = Setting { restore, snapshot };
    let mut trial = Trial::new(Program::guest("inc_storm"), setting)
        .ckpt("CKPT_INTERVAL", "20ms")
        .ckpt("CKPT_TRACKER", tracker);
    let seed = trial.random(1 << 30).to_string();
    let chain = ["3", "5", "16"][trial.random(3) as usize];
    trial.note(format!("storm {seed}, chains of {chain}"));
    trial.program = trial.program.clone().seconds(3.0).arg(&seed);
    trial.ckpt("CKPT_CHAIN", chain).survives(8);
}

/// Every snapshot with every restore.
macro_rules! combinations {
    ($($tracker:ident = $name:literal;)*) => { $(
        mod $tracker {
            combinations! { in $name:
                copy_lazy = "copy", "lazy";
                copy_eager = "copy", "eager";
                fork_lazy = "fork", "lazy";
                fork_eager = "fork", "eager";
                priority_lazy = "priority", "lazy";
                priority_eager = "priority", "eager";
                auto_lazy = "auto", "lazy";
                auto_eager = "auto", "eager";
            }
        }
    )* };
    (in $name:literal: $($test:ident = $snapshot:literal, $restore:literal;)*) => { $(
        mod $test {
            #[test]
            fn threads() {
                crate::survives("inc_threads", $name, $snapshot, $restore);
            }
            #[test]
            fn model() {
                crate::survives("inc_model", $name, $snapshot, $restore);
            }
            #[test]
            fn shared() {
                crate::survives("inc_shared", $name, $snapshot, $restore);
            }
            #[test]
            fn storm() {
                crate::storm($name, $snapshot, $restore);
            }
        }
    )* };
}

combinations! {
    uffd = "uffd";
    mprotect = "mprotect";
    full = "full";
}

/// A stop between the hook of a call that changes mappings and the call let the writer of a
/// `priority` snapshot guard pages that were gone when the program went on: it died of a
/// SIGSEGV, or waited for a page that nobody could store. Under `uffd` half of a range was
/// moved and the rest refused, since part of it had been registered meanwhile; and a map
/// that changed while it was read told ranges twice, so that the image was refused.
mod remapped {
    macro_rules! remapped {
        ($($test:ident = $tracker:literal, $snapshot:literal, $restore:literal;)*) => { $(
            #[test]
            fn $test() {
                crate::survives("inc_remap", $tracker, $snapshot, $restore);
            }
        )* };
    }
    remapped! {
        uffd_priority = "uffd", "priority", "lazy";
        mprotect_priority = "mprotect", "priority", "lazy";
        mprotect_priority_eager = "mprotect", "priority", "eager";
        mprotect_fork = "mprotect", "fork", "lazy";
        uffd_copy = "uffd", "copy", "lazy";
        uffd_copy_eager = "uffd", "copy", "eager";
    }
}

/// What grew in its place between the look at the map and the sweep of a complete generation was
/// watched from then on, and in no image: 11 of 12 lives of `mem_grows` were wrong.
mod grown {
    use super::*;

    fn survives(tracker: &str, snapshot: &'static str, restore: &'static str) {
        let program = Program::guest("mem_grows").seconds(2.0);
        let trial = Trial::new(program, Setting { restore, snapshot });
        let trial = trial.ckpt("CKPT_TRACKER", tracker);
        let trial = trial.ckpt("CKPT_CHAIN", "2");
        trial.ckpt("CKPT_INTERVAL", "20ms").survives(3);
    }

    #[test]
    fn uffd() {
        survives("uffd", "copy", "eager");
    }

    #[test]
    fn mprotect() {
        survives("mprotect", "fork", "lazy");
    }
}

/// A private mapping of a file without a name was memory of its own after a restart: what was
/// given back was zero, and what was written to the file was not seen. Its pages are the file's
/// in each increment, and change sides while the program runs.
mod nameless {
    macro_rules! nameless {
        ($($test:ident = $tracker:literal, $snapshot:literal, $restore:literal;)*) => { $(
            #[test]
            fn $test() {
                crate::survives("mem_nameless", $tracker, $snapshot, $restore);
            }
        )* };
    }
    nameless! {
        uffd_copy = "uffd", "copy", "lazy";
        uffd_fork = "uffd", "fork", "eager";
        uffd_priority = "uffd", "priority", "lazy";
        mprotect_copy = "mprotect", "copy", "eager";
        mprotect_fork = "mprotect", "fork", "lazy";
        mprotect_priority = "mprotect", "priority", "lazy";
        full_copy = "full", "copy", "lazy";
        full_fork = "full", "fork", "eager";
    }
    #[test]
    fn written() {
        for (tracker, snapshot) in [("uffd", "copy"), ("uffd", "fork"), ("mprotect", "fork")] {
            crate::survives("mem_written", tracker, snapshot, "lazy");
        }
    }
}

/// What an O_DIRECT read had put into memory came back with its old contents (one restart
/// in fifty): a page was protected and stored, while the program ran, between the kernel's
/// look at it and the disk's answer. Writes to /proc/self/mem go through write protection
/// without a fault, so `mprotect` never knew of them.
mod written_late {
    use crate::common::*;

    fn survives(what: &str, tracker: &str, snapshot: &'static str) {
        let setting = Setting {
            restore: "lazy",
            snapshot,
        };
        let trial = Trial::new(Program::guest("inc_direct").arg(what).seconds(2.0), setting)
            .ckpt("CKPT_INTERVAL", "20ms")
            .ckpt("CKPT_TRACKER", tracker);
        trial.survives(6);
    }

    macro_rules! written_late {
        ($($test:ident = $what:literal, $tracker:literal, $snapshot:literal;)*) => { $(
            #[test]
            fn $test() {
                survives($what, $tracker, $snapshot);
            }
        )* };
    }
    written_late! {
        direct_uffd = "direct", "uffd", "auto";
        direct_mprotect = "direct", "mprotect", "priority";
        vm_uffd = "vm", "uffd", "auto";
        vm_mprotect = "vm", "mprotect", "auto";
        mem_uffd = "mem", "uffd", "priority";
        mem_mprotect = "mem", "mprotect", "auto";
        mem_mprotect_priority = "mem", "mprotect", "priority";
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

/// Of shared memory and memfds every generation stored everything. Now those behind the first
/// ones hold little, and a run that is killed goes on from them.
#[test]
fn of_shared_memory_what_changed_is_stored() {
    let big = Program::guest("inc_sharedbig").seconds(4.0);
    let mut trial = Trial::new(big, LAZY_FORK)
        .ckpt("CKPT_INTERVAL", "50ms")
        .ckpt("CKPT_KEEP", "100")
        .ckpt("CKPT_SNAPSHOT", "auto");
    let bare = trial.bare();
    let mut started = trial.start();
    let mut known = 0;
    for _ in 0..12 {
        known = trial
            .await_generation(&mut started, known)
            .expect("it runs long enough");
    }
    started.kill(true);
    let all = generations(&trial);
    if all.iter().all(|g| g["tracker"] == "full") {
        eprintln!("SKIPPED: no tracker works here, so all generations are complete");
        return;
    }
    let bytes = |g: &serde_json::Value| g["bytes_stored"].as_u64().expect("bytes");
    let sum: u64 = all.iter().map(bytes).sum();
    assert!(sum > 30 << 20, "{all:#?}");
    // The last ones were taken when it had long been filled.
    let last: Vec<_> = all.iter().rev().take(3).collect();
    let little = |g: &&serde_json::Value| g["kind"] != "increment" || bytes(g) < 8 << 20;
    assert!(last.iter().all(little), "{last:#?}");
    let increment = |g: &&serde_json::Value| g["kind"] == "increment";
    assert!(last.iter().any(increment), "{last:#?}");
    let life = trial.finish();
    trial.compare(&bare, &life);
}

/// A checkpoint that fails loses nothing: the program goes on, the next one is right.
mod trouble {
    use crate::common::*;
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::time::{Duration, Instant};

    fn trial(guest: &str, snapshot: &'static str) -> Trial {
        let setting = Setting {
            restore: "lazy",
            snapshot,
        };
        Trial::new(Program::guest(guest).seconds(3.0), setting).ckpt("CKPT_INTERVAL", "20ms")
    }

    struct Mounted(PathBuf);

    impl Drop for Mounted {
        fn drop(&mut self) {
            let mut umount = Command::new("umount");
            let _ = umount.args(["-l".as_ref(), self.0.as_os_str()]).status();
        }
    }

    fn mount(at: &Path, size: &str) -> Option<Mounted> {
        std::fs::create_dir_all(at).expect("a mount point");
        let mut mount = Command::new("mount");
        let options = format!("mode=1777,size={size}");
        mount.args(["-t", "tmpfs", "-o", &options, "none"]).arg(at);
        let done = mount.output().ok()?;
        done.status.success().then(|| Mounted(at.to_owned()))
    }

    /// The disk is full while images are written; later there is room again.
    fn disk_full(snapshot: &'static str) {
        let mut trial = trial("inc_threads", snapshot);
        let place = trial.dir.join("small");
        let Some(_mounted) = mount(&place, "110m") else {
            eprintln!("SKIPPED: nothing can be mounted here, so no disk gets full");
            return;
        };
        let filler = place.join("filler");
        std::fs::write(&filler, vec![1u8; 40 << 20]).expect("room for the filler");
        let store = place.join("store");
        std::os::unix::fs::symlink(&store, trial.dir.join("store")).expect("a link");
        let mut trial = {
            trial.note("the store is on 110 MiB, 40 of them taken");
            trial
                .ckpt("CKPT_DIR", &path_text(&store))
                .ckpt("CKPT_KEEP", "100")
                .ckpt("CKPT_CHAIN", "100")
        };
        let bare = trial.bare();
        let mut started = trial.start();
        let log = trial.dir.join("ckpt.log");
        let refusals = || {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let full = |l: &&str| l.contains("no space") || l.contains("bytes were taken");
            text.lines().filter(full).count()
        };
        let limit = Instant::now() + Duration::from_secs(60);
        while refusals() < 3 && !started.has_ended() && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(5));
        }
        if refusals() < 3 {
            trial.fail("the disk never got full");
        }
        let known = trial.generation();
        std::fs::remove_file(&filler).expect("remove the filler");
        if trial.await_generation(&mut started, known).is_none() {
            trial.fail("no checkpoint once there was room again");
        }
        started.kill(true);
        let life = trial.finish();
        trial.compare(&bare, &life);
    }

    #[test]
    fn disk_full_copy() {
        disk_full("copy");
    }

    #[test]
    fn disk_full_fork() {
        disk_full("fork");
    }

    /// Something (the kernel, short of memory) kills the forked writer.
    #[test]
    fn writer_killed() {
        let mut trial = trial("inc_threads", "fork");
        let bare = trial.bare();
        let mut started = trial.start();
        let mut killed = 0;
        let limit = Instant::now() + Duration::from_secs(60);
        while killed < 5 && !started.has_ended() && Instant::now() < limit {
            for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
                let Some(id) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
                    continue;
                };
                let read = |name| std::fs::read_to_string(entry.path().join(name));
                let ours = read("stat").is_ok_and(|stat| {
                    let rest = stat.rsplit(')').next().unwrap_or_default().to_owned();
                    let parent = rest.split_whitespace().nth(1).and_then(|p| p.parse().ok());
                    parent == Some(started.id)
                });
                if ours && read("comm").is_ok_and(|name| name.trim() == "ckpt-writer") {
                    // SAFETY: a child of our own test program.
                    unsafe { libc::kill(id, libc::SIGKILL) };
                    killed += 1;
                }
            }
        }
        if killed < 5 {
            trial.fail("no writer was seen");
        }
        let known = trial.generation();
        if trial.await_generation(&mut started, known).is_none() {
            trial.fail("no checkpoint after the last writer was killed");
        }
        started.kill(true);
        let life = trial.finish();
        trial.compare(&bare, &life);
    }

    fn limits(which: &str) {
        let setting = Setting {
            restore: "lazy",
            snapshot: "auto",
        };
        let program = Program::guest("inc_limits").arg(which).seconds(1.2);
        let trial = Trial::new(program, setting).ckpt("CKPT_INTERVAL", "20ms");
        trial.survives(3);
    }

    #[test]
    fn limited_address_space() {
        limits("space");
    }

    #[test]
    fn limited_file_size() {
        limits("file");
    }

    #[test]
    fn limited_processes() {
        limits("processes");
    }

    /// A program limited its address space to 300 MB, or its data to 200 MB, and its next malloc
    /// failed: the library had reserved a gigabyte and more, all of it writable.
    #[test]
    fn little_address_space_or_data() {
        for tracker in ["auto", "mprotect"] {
            for which in ["small-space", "small-data"] {
                let program = Program::guest("inc_limits").arg(which).seconds(1.2);
                let trial = Trial::new(program, LAZY_FORK).ckpt("CKPT_TRACKER", tracker);
                trial.ckpt("CKPT_INTERVAL", "20ms").survives(2);
            }
        }
    }

    /// A program with 8 MiB that calls mlockall(MCL_CURRENT | MCL_FUTURE) had 1.1 GB locked and in
    /// memory after a restart: what a restore reserves was brought in.
    #[test]
    fn locked_memory_is_the_programs() {
        for tracker in ["auto", "mprotect"] {
            let program = Program::guest("inc_limits").arg("locked").seconds(1.2);
            let trial = Trial::new(program, LAZY_FORK).ckpt("CKPT_TRACKER", tracker);
            trial.ckpt("CKPT_INTERVAL", "20ms").survives(2);
        }
    }

    /// Under the program's RLIMIT_FSIZE the helper's merges failed with "no space left on device",
    /// though the disk had plenty, and every sixteenth checkpoint was complete.
    #[test]
    fn merged_under_a_limited_file_size() {
        let program = Program::guest("inc_limits").arg("file").seconds(2.5);
        let trial = Trial::new(program, LAZY_FORK).ckpt("CKPT_CHAIN", "4");
        let mut trial = trial.ckpt("CKPT_INTERVAL", "20ms");
        let bare = trial.bare();
        let mut started = trial.start();
        let mut known = 0;
        while known < 5 {
            known = match trial.await_generation(&mut started, known) {
                Some(generation) => generation,
                None => trial.fail("it ended too early"),
            };
        }
        started.kill(true);
        let life = trial.finish();
        trial.compare(&bare, &life);
        let log = std::fs::read_to_string(trial.dir.join("ckpt.log")).unwrap_or_default();
        if !log.contains(": merged, ") || log.contains("no space left") {
            trial.fail("it was not merged");
        }
    }
}

/// A program closes all descriptors that there are, in every way: it is tracked as before.
mod closed {
    use super::{generations, survives};
    use crate::common::*;

    #[test]
    fn uffd() {
        survives("inc_closed", "uffd", "auto", "lazy");
    }

    #[test]
    fn uffd_fork() {
        survives("inc_closed", "uffd", "fork", "eager");
    }

    #[test]
    fn mprotect() {
        survives("inc_closed", "mprotect", "priority", "lazy");
    }

    /// Before a kill and after it the generations behind the first one are small increments.
    #[test]
    fn goes_on_with_increments() {
        let program = Program::guest("inc_closed").seconds(6.0);
        let mut trial = Trial::new(program, LAZY_FORK)
            .ckpt("CKPT_INTERVAL", "20ms")
            .ckpt("CKPT_KEEP", "100")
            .ckpt("CKPT_CHAIN", "100")
            .ckpt("CKPT_SNAPSHOT", "auto");
        let bare = trial.bare();
        for _ in 0..2 {
            let mut started = trial.start();
            let first = trial.generation();
            let mut known = first;
            // A checkpoint takes two rounds and more: all ways to close have been gone.
            while known < first + 20 {
                known = match trial.await_generation(&mut started, known) {
                    Some(generation) => generation,
                    None => trial.fail("it ended too early"),
                };
            }
            started.kill(true);
            let all = generations(&trial);
            if all.iter().all(|g| g["tracker"] == "full") {
                eprintln!("SKIPPED: no tracker works here, so all generations are complete");
                return;
            }
            let new = all
                .iter()
                .filter(|g| g["generation"].as_u64() > Some(first + 10));
            for g in new {
                assert_eq!(g["kind"], "increment", "{g:#?}");
                assert!(g["bytes_stored"].as_u64() < Some(8 << 20), "{g:#?}");
            }
        }
        let life = trial.finish();
        trial.compare(&bare, &life);
    }
}

/// A tracker that was asked for by name and cannot work: one line, exit status 125, and
/// the program does not run. One that works: it runs.
#[test]
fn a_tracker_that_cannot_work_is_refused_at_the_start() {
    let store = std::env::temp_dir().join(format!("ckpt-trackers-{}", std::process::id()));
    let output = std::process::Command::new(build::command())
        .args(["doctor", "--json"])
        .env("CKPT_DIR", &store)
        .output()
        .expect("ckpt doctor");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let checks = report["checks"].as_array().unwrap();
    for tracker in ["uffd", "soft-dirty", "mprotect"] {
        let name = format!("tracker {tracker}");
        let check = checks.iter().find(|c| c["check"] == *name).expect("there");
        let output = std::process::Command::new("/bin/echo")
            .arg("it runs")
            .env("LD_PRELOAD", build::library())
            .env("CKPT_DIR", &store)
            .env("CKPT_TRACKER", tracker)
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        if check["state"] == "ok" {
            assert_eq!(output.status.code(), Some(0), "{errors}");
            assert_eq!(output.stdout, b"it runs\n");
        } else {
            assert_eq!(output.status.code(), Some(125), "{errors}");
            assert!(output.stdout.is_empty());
            assert_eq!(errors.lines().count(), 1, "{errors}");
            assert!(errors.contains(&format!("CKPT_TRACKER={tracker} cannot be used here")));
        }
    }
}
