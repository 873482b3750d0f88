//! A control group limits memory, and copies made by writing (the forked writer's, the lazily
//! mapped image's) reach the limit: the program lives on and its checkpoints are good.

use crate::common::*;
use std::path::{Path, PathBuf};

/// Names of a version of control groups.
struct Version {
    limit: &'static str,
    /// The file, and the line in it, that counts how often the limit was met.
    met: (&'static str, &'static str),
    /// Where nothing may be swapped out.
    swap: (&'static str, &'static str),
}

const V1: Version = Version {
    limit: "memory.limit_in_bytes",
    met: ("memory.failcnt", ""),
    swap: ("memory.swappiness", "0"),
};
const V2: Version = Version {
    limit: "memory.max",
    met: ("memory.events", "max "),
    swap: ("memory.swap.max", "0"),
};

/// The test process inside a group inside a limited group; it goes back when dropped.
struct Group {
    version: Version,
    before: PathBuf,
    outer: PathBuf,
}

/// Where this process is, and by which controller.
fn present() -> Option<(PathBuf, Version)> {
    let text = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
        let v1 = controllers.split(',').any(|name| name == "memory");
        let (root, version) = match v1 {
            true => ("/sys/fs/cgroup/memory", V1),
            false if controllers.is_empty() => ("/sys/fs/cgroup", V2),
            false => continue,
        };
        // Inside a container the path may be the host's.
        let here = Path::new(root).join(path);
        let here = if here.is_dir() { here } else { root.into() };
        if v1 || here.join("cgroup.controllers").exists() {
            return Some((here, version));
        }
    }
    None
}

impl Group {
    fn enter(bytes: u64) -> Result<Group, String> {
        let (here, version) = present().ok_or("no memory controller is mounted")?;
        let outer = here.join(format!("ckpt-test-{}", std::process::id()));
        let inner = outer.join("inner");
        let fail = |what: &str, error: std::io::Error| format!("{what}: {error}");
        std::fs::create_dir(&outer).map_err(|e| fail("make a group", e))?;
        let group = Group {
            version,
            before: here,
            outer: outer.clone(),
        };
        let write = |file: PathBuf, text: &str| {
            std::fs::write(&file, text).map_err(|e| fail(&file.display().to_string(), e))
        };
        if group.version.limit == V2.limit {
            write(outer.join("cgroup.subtree_control"), "+memory")?;
        }
        std::fs::create_dir(&inner).map_err(|e| fail("make a group inside", e))?;
        write(outer.join(group.version.limit), &bytes.to_string())?;
        let (file, text) = group.version.swap;
        let _ = std::fs::write(outer.join(file), text);
        write(inner.join("cgroup.procs"), "0")?;
        Ok(group)
    }

    /// How often the limit was met.
    fn met(&self) -> u64 {
        let (file, key) = self.version.met;
        let text = std::fs::read_to_string(self.outer.join(file)).unwrap_or_default();
        let mut values = text.lines().filter_map(|line| line.strip_prefix(key));
        values
            .next()
            .and_then(|v| v.trim().parse().ok())
            .unwrap_or(0)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::write(self.before.join("cgroup.procs"), "0");
        // What has just ended is still counted for a moment.
        for _ in 0..100 {
            let _ = std::fs::remove_dir(self.outer.join("inner"));
            if std::fs::remove_dir(&self.outer).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

/// 96 MiB are written all over again and again; to have all of them twice is not possible.
fn limited(snapshot: &'static str, restore: &'static str) {
    let setting = Setting { restore, snapshot };
    let program = Program::guest("mem_big")
        .seconds(2.5)
        .env("GUEST_MIB", "96");
    let mut trial = Trial::new(program, setting).ckpt("CKPT_INTERVAL", "20ms");
    // What other tests use is built outside of the group.
    let bare = trial.bare();
    let group = match Group::enter(136 << 20) {
        Ok(group) => group,
        Err(why) => {
            eprintln!("SKIPPED: memory cannot be limited by a control group here: {why}");
            return;
        }
    };
    trial.kill_and_resume(3);
    let life = trial.finish();
    trial.compare(&bare, &life);
    assert!(group.met() > 0, "the limit was never met");
}

#[test]
fn auto_lazy() {
    limited("auto", "lazy");
}

#[test]
fn fork_lazy() {
    limited("fork", "lazy");
}

#[test]
fn fork_eager() {
    limited("fork", "eager");
}
