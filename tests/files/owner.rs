//! What an ordinary user's rights have to do with it: read-only directories, files that may not
//! be read, other users' files. Run by root the programs are another user's.

use super::common::build;
use super::{Entry, tree};
use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

const USER: u32 = 65534;

struct Place {
    dir: PathBuf,
    files: PathBuf,
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = Command::new("chmod")
            .args(["-R", "u+rwx"])
            .arg(&self.dir)
            .status();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Place {
    fn new(name: &str) -> Place {
        let dir = std::env::temp_dir().join(format!("ckpt-owner-{name}-{}", std::process::id()));
        let files = dir.join("files");
        std::fs::create_dir_all(&files).expect("a directory");
        std::fs::create_dir(dir.join("store")).expect("a directory");
        if is_root() {
            for part in [&dir, &files, &dir.join("store")] {
                chown(part, Some(USER), Some(USER)).expect("chown");
            }
        }
        Place { dir, files }
    }

    /// Runs the guest; `foreign`: under the library, with that `CKPT_FOREIGN`.
    fn run(&self, what: &str, foreign: Option<&str>) -> (ExitStatus, String) {
        let mut command = Command::new(build::readable(&build::guest("files_owner")));
        command.arg(what).current_dir(&self.files).env_clear();
        if let Some(foreign) = foreign {
            command.env("LD_PRELOAD", build::readable(&build::library()));
            command.env("CKPT_DIR", self.dir.join("store"));
            command.env("CKPT_FOREIGN", foreign);
        }
        if is_root() {
            command.uid(USER).gid(USER);
        }
        let output = command.output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status, said)
    }

    /// What there is; as root, who may read all of it.
    fn tree(&self) -> BTreeMap<String, Entry> {
        tree(&self.files)
    }

    fn setup(&self) -> BTreeMap<String, Entry> {
        let (status, said) = self.run("setup", None);
        assert!(status.success(), "{said}");
        self.tree()
    }

    fn killed(&self, what: &str, foreign: &str) {
        let (status, said) = self.run(what, Some(foreign));
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}: {said}");
    }
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").expect("/proc").uid() == 0
}

fn goes_back(what: &str, foreign: &str) {
    if !is_root() {
        eprintln!("*** NOT TESTED: {what}: only root can look into all of it");
        return;
    }
    let place = Place::new(what);
    let before = place.setup();
    place.killed(what, foreign);
    assert!(before != place.tree(), "nothing was changed");
    let (status, said) = place.run(what, Some(foreign));
    assert_eq!(status.code(), Some(73), "{said}");
    assert!(before == place.tree(), "the files are not what they were");
    let mode = |name: &str| place.files.join(name).metadata().expect("it").mode() & 0o7777;
    assert_eq!((mode("d"), mode("d/e"), mode("w")), (0o500, 0, 0o200));
}

/// The program makes directories writable, changes what is in them and makes them read-only
/// again, one not even searchable; and leaves a tree behind that is read-only. All of it goes
/// back, modes included.
#[test]
fn directories_made_read_only_again() {
    goes_back("dirs", "restore");
}

/// A store through a mapping that was made after the checkpoint is the program's own work, which
/// nobody has to be asked about.
#[test]
fn stores_through_a_mapping_are_its_own() {
    goes_back("mapped", "refuse");
}

/// A file that only its descriptor can write to, and nobody read: what is overwritten is saved.
#[test]
fn overwritten_though_unreadable() {
    goes_back("unreadable", "restore");
}

/// The program removes another user's file from its directory, which it may, but could not make
/// it again as it was: it is told before, and nothing is tried by halves.
#[test]
fn another_users_file_removed() {
    if !is_root() || !may_not_link() {
        eprintln!("*** NOT TESTED: needs root and fs.protected_hardlinks");
        return;
    }
    let place = Place::new("theirs");
    place.setup();
    std::fs::write(place.files.join("theirs"), "root's").expect("a file");
    place.killed("theirs", "restore");
    let (status, said) = place.run("theirs", Some("restore"));
    assert_eq!(status.code(), Some(125), "{said}");
    let reason = "/theirs: it belongs to somebody else and could not be made again";
    assert!(said.contains(reason), "{said}");
    let left = std::fs::read_dir(&place.files).expect("it").flatten();
    let mut names = left.map(|entry| entry.file_name().to_string_lossy().into_owned());
    assert!(!names.any(|name| name.starts_with(".ckpt")));
}

fn may_not_link() -> bool {
    let path = Path::new("/proc/sys/fs/protected_hardlinks");
    std::fs::read_to_string(path).is_ok_and(|text| text.trim() == "1")
}
