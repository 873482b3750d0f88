//! Every call that modifies files, by every route (libc's functions and their checked forms,
//! stdio, `syscall(2)`), is seen and taken back: after a kill and a recovery the
//! directory is what it was at the checkpoint, names, contents, attributes and times.

mod common;

use common::build;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

/// Everything about an inode that can be put back.
#[derive(Debug, PartialEq)]
struct Entry {
    mode: u32,
    owner: (u32, u32),
    links: u64,
    modified: (i64, i64),
    content: Vec<u8>,
    attribute: Option<Vec<u8>>,
}

fn attribute(path: &Path) -> Option<Vec<u8>> {
    let path = CString::new(path.as_os_str().as_bytes()).expect("a path");
    let mut value = [0u8; 64];
    // SAFETY: strings and a buffer of this function.
    let got = unsafe {
        libc::lgetxattr(
            path.as_ptr(),
            c"user.ckpt".as_ptr(),
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
                attribute: attribute(&path),
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
            entry.attribute
        )
    };
    let differs = |name: &&String| a.get(*name) != b.get(*name);
    let text = |name: &String| {
        let (was, is) = (a.get(name).map(short), b.get(name).map(short));
        format!("{name}: {was:?} / {is:?}")
    };
    names.into_iter().filter(differs).map(text).collect()
}

fn every_route(restore: &str, snapshot: &str) {
    let root = std::env::temp_dir().join(format!(
        "ckpt-routes-{restore}-{snapshot}-{}",
        std::process::id()
    ));
    let _ = std::fs::remove_dir_all(&root);
    let (model, work) = (root.join("model"), root.join("work"));
    std::fs::create_dir_all(&model).expect("a directory");
    std::fs::create_dir_all(&work).expect("a directory");
    let guest = build::guest("files_routes");
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
    assert!(changed.len() > 85, "only {} changes", changed.len());
    let status = go();
    assert_eq!(status.code(), Some(73), "{status}\n{}", log());
    let wrong = differences(&wanted, &tree(&work));
    assert!(wrong.is_empty(), "{}\n{}", wrong.join("\n"), log());
    let _ = std::fs::remove_dir_all(&root);
}

#[test]
fn every_route_is_seen_and_taken_back() {
    every_route("lazy", "fork");
}

#[test]
fn every_route_after_an_eager_restore() {
    every_route("eager", "copy");
}
