//! Every call that modifies files, by every route (libc's functions and their checked forms,
//! stdio, `syscall(2)`), is seen and taken back: after a kill and a recovery the
//! directory is what it was at the checkpoint, names, contents, attributes and times. What goes
//! another way, by a program's own `syscall` instructions, is named by `ckpt status`.

mod common;

use common::build;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Everything about an inode that can be put back.
#[derive(Debug, PartialEq)]
struct Entry {
    mode: u32,
    owner: (u32, u32),
    links: u64,
    modified: (i64, i64),
    content: Vec<u8>,
    attributes: Vec<Option<Vec<u8>>>,
}

fn attributes(path: &Path) -> Vec<Option<Vec<u8>>> {
    let names = [
        c"user.ckpt",
        c"security.capability",
        c"system.posix_acl_access",
        c"system.posix_acl_default",
    ];
    names.iter().map(|name| attribute(path, name)).collect()
}

fn attribute(path: &Path, name: &CStr) -> Option<Vec<u8>> {
    let path = CString::new(path.as_os_str().as_bytes()).expect("a path");
    let mut value = [0u8; 64];
    // SAFETY: strings and a buffer of this function.
    let got = unsafe {
        libc::lgetxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    usize::try_from(got).ok().map(|len| value[..len].to_vec())
}

fn tree(base: &Path) -> BTreeMap<String, Entry> {
    let mut found = BTreeMap::new();
    let mut todo = vec![base.to_owned()];
    while let Some(path) = todo.pop() {
        let meta = path.symlink_metadata().expect("metadata");
        let content = if meta.is_dir() {
            let entries = std::fs::read_dir(&path).expect("a directory");
            todo.extend(entries.flatten().map(|entry| entry.path()));
            Vec::new()
        } else if meta.is_symlink() {
            let target = std::fs::read_link(&path).expect("a link");
            target.as_os_str().as_bytes().to_vec()
        } else if meta.is_file() {
            std::fs::read(&path).expect("a file")
        } else {
            Vec::new()
        };
        let name = path.strip_prefix(base).expect("below").to_string_lossy();
        found.insert(
            name.into_owned(),
            Entry {
                mode: meta.mode(),
                owner: (meta.uid(), meta.gid()),
                links: meta.nlink(),
                modified: (meta.mtime(), meta.mtime_nsec()),
                content,
                attributes: attributes(&path),
            },
        );
    }
    found
}

/// Names whose entries differ.
fn differences(a: &BTreeMap<String, Entry>, b: &BTreeMap<String, Entry>) -> Vec<String> {
    let mut names: Vec<&String> = a.keys().chain(b.keys()).collect();
    names.sort();
    names.dedup();
    let short = |entry: &Entry| {
        format!(
            "mode {:o} owner {:?} links {} modified {:?} {} bytes {:?}",
            entry.mode,
            entry.owner,
            entry.links,
            entry.modified,
            entry.content.len(),
            entry.attributes
        )
    };
    let differs = |name: &&String| a.get(*name) != b.get(*name);
    let text = |name: &String| {
        let (was, is) = (a.get(name).map(short), b.get(name).map(short));
        format!("{name}: {was:?} / {is:?}")
    };
    names.into_iter().filter(differs).map(text).collect()
}

fn every_route(guest: &str, least: usize, restore: &str, snapshot: &str) {
    let root = std::env::temp_dir().join(format!(
        "ckpt-{guest}-{restore}-{snapshot}-{}",
        std::process::id()
    ));
    let _ = std::fs::remove_dir_all(&root);
    let (model, work) = (root.join("model"), root.join("work"));
    std::fs::create_dir_all(&model).expect("a directory");
    std::fs::create_dir_all(&work).expect("a directory");
    let guest = build::guest(guest);
    let status = Command::new(&guest)
        .arg("setup")
        .current_dir(&model)
        .status()
        .expect("the guest starts");
    assert!(status.success(), "{status}");
    let go = || {
        Command::new(&guest)
            .arg("go")
            .current_dir(&work)
            .env("LD_PRELOAD", build::library())
            .env("CKPT_DIR", root.join("store"))
            .env("CKPT_LOG", root.join("log"))
            .env("CKPT_RESTORE", restore)
            .env("CKPT_SNAPSHOT", snapshot)
            .status()
            .expect("the guest starts")
    };
    let log = || std::fs::read_to_string(root.join("log")).unwrap_or_default();
    let status = go();
    assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}\n{}", log());
    let wanted = tree(&model);
    let changed = differences(&wanted, &tree(&work));
    assert!(changed.len() > least, "only {} changes", changed.len());
    let status = go();
    assert_eq!(status.code(), Some(73), "{status}\n{}", log());
    let wrong = differences(&wanted, &tree(&work));
    assert!(wrong.is_empty(), "{}\n{}", wrong.join("\n"), log());
    let _ = std::fs::remove_dir_all(&root);
}

#[test]
fn every_route_is_seen_and_taken_back() {
    every_route("files_routes", 85, "lazy", "fork");
}

#[test]
fn every_route_after_an_eager_restore() {
    every_route("files_routes", 85, "eager", "copy");
}

/// RWF_NOAPPEND, bind, setxattrat, open_by_handle_at, ioctl, mremap, and what the kernel changes
/// along with a call.
#[test]
fn unusual_calls_are_taken_back() {
    every_route("files_calls", 12, "lazy", "fork");
}

/// A life of a guest: in `work` below `root`, with a store there.
fn life(root: &Path, guest: &str, argument: &str, settings: &[(&str, &str)]) -> Output {
    std::fs::create_dir_all(root.join("work")).expect("a directory");
    Command::new(build::guest(guest))
        .arg(argument)
        .current_dir(root.join("work"))
        .env("LD_PRELOAD", build::library())
        .env("CKPT_DIR", root.join("store"))
        .env("CKPT_LOG", root.join("log"))
        .envs(settings.iter().copied())
        .output()
        .expect("the guest starts")
}

fn fresh(name: &str) -> PathBuf {
    let root = std::env::temp_dir().join(format!("ckpt-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&root);
    root
}

/// A program makes an AIO context (an io_uring) after the checkpoint and is killed. What the
/// kernel wrote for it is not known, so it is told, and nothing goes on with half of the files.
#[test]
fn what_the_kernel_writes_by_itself_is_told() {
    for (facility, reason) in [("aio", "kernel AIO"), ("uring", "io_uring")] {
        let root = fresh(facility);
        let first = life(&root, "files_calls", facility, &[]);
        assert_eq!(first.status.signal(), Some(libc::SIGKILL), "{first:?}");
        if String::from_utf8_lossy(&first.stderr).contains("io_") {
            // Not on this machine.
            continue;
        }
        let second = life(&root, "files_calls", facility, &[]);
        let said = String::from_utf8_lossy(&second.stderr);
        assert_eq!(second.status.code(), Some(125), "{said}");
        assert!(said.contains(reason), "{said}");
        let _ = std::fs::remove_dir_all(&root);
    }
}

/// Without the call-site net no modification is seen: the files of every generation are marked
/// incomplete, a recovery says so and does nothing, and the memory alone can be had.
#[test]
fn what_cannot_be_seen_is_told() {
    let root = fresh("blind");
    let first = life(&root, "files_blind", "", &[]);
    assert_eq!(first.status.signal(), Some(libc::SIGKILL), "{first:?}");
    let list = Command::new(build::command())
        .args(["list", "--json"])
        .env("CKPT_DIR", root.join("store"))
        .output()
        .expect("the command starts");
    let list: Value = serde_json::from_slice(&list.stdout).expect("JSON");
    let generations = list["jobs"][0]["generations"].as_array().expect("a list");
    assert_eq!(generations.len(), 2, "{list}");
    let reason = "the call-site net was not laid";
    for generation in generations {
        let why = generation["files_incomplete"].as_str().unwrap_or_default();
        assert!(why.contains(reason), "{list}");
    }
    let second = life(&root, "files_blind", "", &[]);
    let said = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(125), "{said}");
    assert!(said.contains(reason), "{said}");
    let out = || std::fs::read_to_string(root.join("work/out")).expect("the file");
    assert_eq!(out(), "before after before after ");
    let alone = [("CKPT_RESTORE_EXCLUDE", "*")];
    let third = life(&root, "files_blind", "", &alone);
    assert_eq!(third.status.code(), Some(73), "{third:?}");
    let _ = std::fs::remove_dir_all(&root);
}

/// A restore that fails when the new start's descriptors have given way to the program's, which
/// has closed its standard error: the reason is still to be seen there.
#[test]
fn a_late_failure_is_told_though_stderr_was_closed() {
    let root = fresh("late");
    let first = life(&root, "files_late", "", &[]);
    assert_eq!(first.status.signal(), Some(libc::SIGKILL), "{first:?}");
    let locked = std::fs::File::open(root.join("work/locked")).expect("the file");
    locked.lock().expect("nobody has it");
    let second = life(&root, "files_late", "", &[]);
    let said = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(125), "{said}");
    assert!(said.contains("held by someone else"), "{said:?}");
    drop(locked);
    let third = life(&root, "files_late", "", &[]);
    assert_eq!(third.status.code(), Some(73), "{third:?}");
    let _ = std::fs::remove_dir_all(&root);
}

/// Threads write through one descriptor, over what the file held: each write moves the position of
/// the others. All of it is taken back.
#[test]
fn threads_that_share_a_position() {
    for _ in 0..3 {
        let root = fresh("threads");
        let first = life(&root, "files_threads", "", &[]);
        assert_eq!(first.status.signal(), Some(libc::SIGKILL), "{first:?}");
        let second = life(&root, "files_threads", "", &[]);
        assert_eq!(second.status.code(), Some(73), "{second:?}");
        let _ = std::fs::remove_dir_all(&root);
    }
}

/// A coroutine with a stack of 16 KiB, a handler on an alternate stack, a thread that is as small as is
/// allowed, aio_write: recording took 60 KiB of the program's stack, so that what lay below a
/// coroutine's was overwritten and threads died.
#[test]
fn stacks_may_be_small() {
    for stack in ["co", "alt", "thread", "aio"] {
        let root = fresh(&format!("stack-{stack}"));
        let first = life(&root, "files_stacks", stack, &[]);
        assert_eq!(first.status.signal(), Some(libc::SIGKILL), "{first:?}");
        let second = life(&root, "files_stacks", stack, &[]);
        assert_eq!(second.status.code(), Some(73), "{stack}: {second:?}");
        let _ = std::fs::remove_dir_all(&root);
    }
}

/// A program with a limit on the size of its files, which it respects: our own files are larger,
/// and it must not get the signal for them.
#[test]
fn a_limit_on_file_sizes_is_not_ours_to_break() {
    for limit in ["4096", "65536", "300000", "1000000"] {
        let root = fresh("limited");
        let once = life(&root, "files_limited", limit, &[("CKPT_INTERVAL", "100ms")]);
        let log = std::fs::read_to_string(root.join("log")).unwrap_or_default();
        assert_eq!(once.status.code(), Some(0), "{limit}: {once:?}\n{log}");
        let _ = std::fs::remove_dir_all(&root);
    }
}

/// Calls of the program's own are not seen: `ckpt status` and the log name the program and
/// those of them that modify files, and only those.
#[test]
fn status_names_calls_that_are_not_seen() {
    let root = std::env::temp_dir().join(format!("ckpt-unseen-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&root);
    std::fs::create_dir_all(&root).expect("a directory");
    let guest = build::guest("files_unseen");
    let mut running = Command::new(&guest)
        .current_dir(&root)
        .env("LD_PRELOAD", build::library())
        .env("CKPT_DIR", root.join("store"))
        .env("CKPT_LOG", root.join("log"))
        .stdout(Stdio::piped())
        .spawn()
        .expect("the guest starts");
    let mut said = String::new();
    let from = running.stdout.take().expect("a pipe");
    let read = BufReader::new(from).read_line(&mut said);
    let pid = running.id().to_string();
    let status = |format: &[&str]| {
        let output = Command::new(build::command())
            .args(["status", &pid])
            .args(format)
            .env("CKPT_DIR", root.join("store"))
            .output()
            .expect("the command starts");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let (text, machine) = (status(&[]), status(&["--json"]));
    running.kill().expect("it runs");
    let ended = running.wait().expect("it ends");
    let log = std::fs::read_to_string(root.join("log")).unwrap_or_default();
    assert!(read.is_ok() && said == "ready\n", "{said:?} {ended}\n{log}");
    let machine: Value = serde_json::from_str(&machine).expect("JSON");
    let path = guest.canonicalize().expect("a path");
    let wanted = json!([{ "path": path, "calls": [libc::SYS_write, libc::SYS_ftruncate] }]);
    assert_eq!(machine["status"][0]["unseen"], wanted, "{machine}\n{log}");
    let line = format!("{}: system calls 1, 77 of its own", path.display());
    let named = |text: &str| {
        text.lines()
            .any(|l| l.contains("not seen") && l.contains(&line))
    };
    assert!(named(&text), "{text}");
    let line = format!(
        "{} makes system calls of its own (numbers 1, 77)",
        path.display()
    );
    assert!(log.contains(&line), "{log}");
    let _ = std::fs::remove_dir_all(&root);
}
