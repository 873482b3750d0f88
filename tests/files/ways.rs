//! Ways to a file that are not its plain path (`guests/files_ways.c`).

use super::common::user;
use super::{Entry, build, tree};
use std::collections::BTreeMap;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

/// One case of the guest: its files as they are to be, and as they are.
struct Case {
    name: &'static str,
    root: PathBuf,
    exclude: String,
    resume: &'static str,
}

impl Case {
    fn new(name: &'static str) -> Case {
        let root = format!("ckpt-ways-{name}-{}", std::process::id());
        let root = std::env::temp_dir().join(root);
        let _ = std::fs::remove_dir_all(&root);
        let exclude = format!("{0}/ex/*:{0}/out/*", root.join("work").display());
        let case = Case {
            name,
            root,
            exclude,
            resume: "auto",
        };
        for dir in ["", "model", "work"] {
            user::make_own(case.root.join(dir));
        }
        let setup = case.guest("setup", "model").status();
        assert!(setup.expect("the guest starts").success());
        case
    }

    /// The guest, as the tests' user.
    fn guest(&self, what: &str, dir: &str) -> Command {
        let mut command = Command::new(build::guest("files_ways"));
        command.arg(what).current_dir(self.root.join(dir));
        if let Some(user) = user::ordinary() {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    fn go(&self) -> ExitStatus {
        self.guest(self.name, "work")
            .env("LD_PRELOAD", build::library())
            .env("CKPT_DIR", self.root.join("store"))
            .env("CKPT_LOG", self.root.join("log"))
            .env("CKPT_EXCLUDE", &self.exclude)
            .env("CKPT_RESUME", self.resume)
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

/// The same with a whole directory, or with one whose contents alone are excluded under its new name:
/// what is done to the files in it is not recorded, so the recovery says so, and does nothing.
#[test]
fn a_directory_that_leaves_is_told() {
    let leaves = "a directory was moved to where files are left alone";
    let contents = "a directory was moved, and other files in it are left alone there";
    for (name, reason, moved) in [
        ("directory-moved-out", leaves, "ex/d/f"),
        ("touched-moved-out", leaves, "ex/d/f"),
        ("inside-moved-out", contents, "ex/born/d/f"),
        ("contents-excluded", contents, "out/f"),
    ] {
        let case = Case::new(name);
        assert_eq!(case.go().signal(), Some(libc::SIGKILL), "{}", case.log());
        assert_eq!(case.go().code(), Some(125), "{name}: {}", case.log());
        assert!(case.log().contains(reason), "{name}: {}", case.log());
        let moved = case.root.join("work").join(moved);
        assert_eq!(std::fs::metadata(moved).expect("the file").len(), 5000);
        let _ = std::fs::remove_dir_all(&case.root);
    }
}

/// A finished file is moved to the excluded archive; then the program makes another rule, of
/// something else, or of a file that it is about to change further. A file whose modifications
/// were recorded half came back as a mixture.
#[test]
fn later_rules_do_not_break_what_has_begun() {
    is_taken_back(&["rule-later", "rule-half-way", "born-moved-out"]);
}

/// A file is moved to the excluded archive, and changed there after the next checkpoint: the one before
/// takes it back out of there, as it was.
#[test]
fn an_archived_file_is_followed_by_later_checkpoints() {
    let mut case = Case::new("archived");
    assert_eq!(case.go().signal(), Some(libc::SIGKILL), "{}", case.log());
    case.resume = "1";
    assert_eq!(case.go().code(), Some(73), "{}", case.log());
    assert!(case.differences().is_empty(), "{}", case.log());
    let _ = std::fs::remove_dir_all(&case.root);
}

/// `CKPT_EXCLUDE=/scratch/tmp/*`, where /scratch is a link.
#[test]
fn a_glob_through_a_link() {
    let mut case = Case::new("excluded-left");
    let link = case.root.join("link");
    std::os::unix::fs::symlink("work", &link).expect("a link");
    case.exclude = format!("{}/ex/*", link.display());
    assert_eq!(case.go().signal(), Some(libc::SIGKILL), "{}", case.log());
    assert_eq!(case.differences(), ["f"]);
    assert_eq!(case.go().code(), Some(73), "{}", case.log());
    assert!(case.differences().is_empty(), "{}", case.log());
    let left = std::fs::metadata(case.root.join("work/ex/have")).expect("the file");
    assert_eq!(left.len(), 5000, "{}", case.log());
    let _ = std::fs::remove_dir_all(&case.root);
}

/// mkdir of a name with a slash behind it, where a symbolic link that leads nowhere has the name,
/// fails; the recovery removed the link.
#[test]
fn names_with_a_slash_behind_them() {
    is_taken_back(&["slash"]);
}

/// AT_EMPTY_PATH without a descriptor means the working directory.
#[test]
fn the_working_directory_without_a_path() {
    is_taken_back(&["here"]);
}

/// A program maps a file for reading, and makes the mapping writable when the file has lost its
/// name, has another one where files are left alone, or is called as if it had lost it.
#[test]
fn mappings_that_become_writable_late() {
    is_taken_back(&["view-removed", "view-called-so", "view-moved-out"]);
}

/// A file is mapped, unlinked by that name, and has another: what is stored in it can neither be
/// followed nor kept apart, so there is no checkpoint.
#[test]
fn a_mapped_file_without_its_name_but_with_another() {
    let case = Case::new("mapped-twin");
    assert_eq!(case.go().code(), Some(74), "{}", case.log());
    let _ = std::fs::remove_dir_all(&case.root);
}

/// A file of the program's that is called as a process's memory is in /proc.
#[test]
fn a_file_called_mem_is_cut_off() {
    is_taken_back(&["called-mem"]);
}

/// A name that is made and removed over and over is made with O_EXCL at once, in the hope that it is
/// not there: the program must not notice where it is.
#[test]
fn a_name_that_was_made_again_and_again() {
    is_taken_back(&["made-again"]);
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
