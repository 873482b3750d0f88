//! Ways to a file that are not its plain path (`guests/files_ways.c`).

use super::{Entry, build, tree};
use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

/// One case of the guest: its files as they are to be, and as they are.
struct Case {
    name: &'static str,
    root: PathBuf,
}

impl Case {
    fn new(name: &'static str) -> Case {
        let root = format!("ckpt-ways-{name}-{}", std::process::id());
        let root = std::env::temp_dir().join(root);
        let _ = std::fs::remove_dir_all(&root);
        let case = Case { name, root };
        for dir in ["model", "work"] {
            std::fs::create_dir_all(case.root.join(dir)).expect("a directory");
        }
        let setup = Command::new(build::guest("files_ways"))
            .arg("setup")
            .current_dir(case.root.join("model"))
            .status();
        assert!(setup.expect("the guest starts").success());
        case
    }

    fn go(&self) -> ExitStatus {
        let work = self.root.join("work");
        Command::new(build::guest("files_ways"))
            .arg(self.name)
            .current_dir(&work)
            .env("LD_PRELOAD", build::library())
            .env("CKPT_DIR", self.root.join("store"))
            .env("CKPT_LOG", self.root.join("log"))
            .env("CKPT_EXCLUDE", work.join("ex/*"))
            .status()
            .expect("the guest starts")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.root.join("log")).unwrap_or_default()
    }

    /// What is not as it was at the checkpoint.
    fn differences(&self) -> Vec<String> {
        let (wanted, got) = (
            files(&self.root.join("model")),
            files(&self.root.join("work")),
        );
        let mut names: Vec<&String> = wanted.keys().chain(got.keys()).collect();
        names.sort();
        names.dedup();
        let differ = |name: &&&String| wanted.get(**name) != got.get(**name);
        names.iter().filter(differ).map(|n| n.to_string()).collect()
    }
}

/// All but what is excluded.
fn files(base: &Path) -> BTreeMap<String, Entry> {
    let mut found = tree(base);
    found.retain(|name, _| !name.starts_with("ex/"));
    found
}

fn is_taken_back(names: &[&'static str]) {
    for name in names {
        let case = Case::new(name);
        let status = case.go();
        let told = |status| format!("{name}: {status}\n{}", case.log());
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{}", told(status));
        // Else it would show nothing.
        assert!(!case.differences().is_empty(), "{name} changed nothing");
        let status = case.go();
        assert_eq!(status.code(), Some(73), "{}", told(status));
        let wrong = case.differences();
        assert!(wrong.is_empty(), "{name}: {wrong:?}\n{}", case.log());
        let _ = std::fs::remove_dir_all(&case.root);
    }
}

/// A job whose working directory is an excluded one writes results as "../f", or through links in
/// there: what counts is where the file is.
#[test]
fn what_is_excluded_is_decided_by_the_real_path() {
    is_taken_back(&["excluded-cwd", "excluded-link"]);
}

/// A shell's or a container tool's paths, /proc/self/cwd/f, /dev/fd/N/f, are no files of /proc.
#[test]
fn paths_through_proc_are_followed() {
    is_taken_back(&["proc-cwd", "proc-directory"]);
}

/// A program works on a file that has lost its name by /proc/self/fd/N, while the store keeps
/// that very inode.
#[test]
fn files_without_a_name_are_followed() {
    is_taken_back(&[
        "proc-removed",
        "proc-removed-cut",
        "proc-other-name",
        "proc-linked-again",
    ]);
}

/// "current" is a link to the newest directory of results, made anew for each: what was changed
/// through it is taken back where it is, not where the link leads now.
#[test]
fn links_and_directories_on_the_way_may_change() {
    is_taken_back(&["link-turned", "old-link-turned", "directory-gone"]);
}

/// A finished file is moved to an excluded archive, linked or exchanged into it, and changed there,
/// or removed; one is moved out of a directory of temporary files.
#[test]
fn files_that_cross_the_border_of_what_is_excluded() {
    is_taken_back(&[
        "moved-out-and-written",
        "moved-out-and-removed",
        "linked-out-and-written",
        "moved-in",
        "exchanged",
    ]);
}

/// The same with a whole directory: what is done to the files in it is not recorded, so
/// the recovery says so, and does nothing.
#[test]
fn a_directory_that_leaves_is_told() {
    let case = Case::new("directory-moved-out");
    assert_eq!(case.go().signal(), Some(libc::SIGKILL), "{}", case.log());
    assert_eq!(case.go().code(), Some(125), "{}", case.log());
    let reason = "a directory was moved to where files are left alone";
    assert!(case.log().contains(reason), "{}", case.log());
    let moved = case.root.join("work/ex/d/f");
    assert_eq!(std::fs::metadata(moved).expect("the file").len(), 5000);
    let _ = std::fs::remove_dir_all(&case.root);
}

/// A server opens what its clients name with openat2, in a root of its own.
#[test]
fn roots_of_openat2_are_roots() {
    is_taken_back(&["root"]);
}

/// Files called "f (deleted)", or with a line feed or what looks like its escape in the name.
#[test]
fn names_that_look_like_the_kernels_words() {
    is_taken_back(&["odd-names", "odd-mapped"]);
}
