//! Outputs that the program has closed, or that only whoever starts it may open; and files that
//! somebody else goes on writing to as soon as the program has ended.

use super::common::build;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::Duration;

const USER: u32 = 65534;

struct Place {
    dir: PathBuf,
    what: &'static str,
    /// As another user than the one who opens the outputs.
    other: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Place {
    fn new(name: &str, what: &'static str, other: bool) -> Place {
        let name = format!("ckpt-given-{name}-{}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        for part in [&dir, &dir.join("files"), &dir.join("store")] {
            std::fs::create_dir(part).expect("a directory");
            if other {
                chown(part, Some(USER), Some(USER)).expect("chown");
            }
        }
        Place { dir, what, other }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join("files").join(name)
    }

    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.file(name)).expect("the file")
    }

    /// As a shell does it for `>`.
    fn truncated(&self) -> File {
        File::create(self.file("out")).expect("out")
    }

    /// And for `>>`.
    fn appended(&self) -> File {
        let mut how = OpenOptions::new();
        how.append(true).create(true);
        how.open(self.file("out")).expect("out")
    }

    fn run(&self, output: File) -> (ExitStatus, String) {
        let mut command = Command::new(build::readable(&build::guest("files_given")));
        command
            .arg(self.what)
            .current_dir(self.dir.join("files"))
            .env_clear()
            .env("LD_PRELOAD", build::readable(&build::library()))
            .env("CKPT_DIR", self.dir.join("store"))
            .env("CKPT_LOG", self.dir.join("store/log"))
            .stdout(output);
        if self.other {
            command.uid(USER).gid(USER);
        }
        let output = command.output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status, said)
    }

    fn is_killed(&self, output: File) {
        let (status, said) = self.run(output);
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}: {said}");
    }

    fn comes_to_its_end(&self, output: File) {
        let (status, said) = self.run(output);
        assert_eq!(status.code(), Some(73), "{said}{}", self.log());
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("store/log")).unwrap_or_default()
    }
}

/// A program led its standard output elsewhere (`freopen`) before its first checkpoint, and what
/// it had printed until then was lost: `>` of the second start had cut it off, and the store kept
/// only what was open. Goes back twice, the second time over writes to that file by its name.
#[test]
fn an_output_that_is_closed_at_the_checkpoint() {
    let place = Place::new("closed", "freopen", false);
    place.is_killed(place.truncated());
    let first: String = (0..2000).map(|k| format!("first {k}\n")).collect();
    assert_eq!(place.text("out"), first);
    place.is_killed(place.truncated());
    place.comes_to_its_end(place.truncated());
    assert!(place.text("out") == first + "more\n", "{}", place.log());
    assert_eq!(place.text("second"), "second\nback once\nback twice\n");
}

/// `>>` cuts nothing off, and another file given at the second start is not the output of old.
#[test]
fn a_closed_output_that_is_not_cut_off() {
    let place = Place::new("not-cut", "freopen", false);
    place.is_killed(place.truncated());
    place.is_killed(place.appended());
    let other = place.file("other");
    std::fs::write(&other, "somebody's").expect("a file");
    let given = OpenOptions::new().append(true).open(&other).expect("it");
    place.comes_to_its_end(given);
    let first: String = (0..2000).map(|k| format!("first {k}\n")).collect();
    assert!(place.text("out") == first + "more\n", "{}", place.log());
    assert_eq!(place.text("other"), "somebody's");
}

/// Root opened the output and gave it to a program of another user (`su user -c app >>out`), which
/// could not open it: every recovery ended with exit status 125, since what had been
/// appended could not be cut off. It can, by the very descriptor that was given.
#[test]
fn an_output_that_the_user_may_not_open() {
    // SAFETY: no arguments.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("*** NOT TESTED: needs root, whose file is given to another user");
        return;
    }
    let opened = [Place::truncated, Place::appended];
    for (at, (first, then)) in opened.iter().zip(opened.iter().rev()).enumerate() {
        for (name, then) in [("as-before", first), ("otherwise", then)] {
            let place = Place::new(&format!("given-{at}-{name}"), "given", true);
            place.is_killed(first(&place));
            assert_eq!(place.file("out").metadata().expect("out").uid(), 0);
            assert_eq!(place.text("out"), "a\nb\nb\nb\n");
            place.comes_to_its_end(then(&place));
            assert_eq!(place.text("out"), "a\nc\n", "{}", place.log());
        }
    }
    // Taken away meanwhile, and given anew.
    let place = Place::new("given-anew", "given", true);
    place.is_killed(place.appended());
    std::fs::remove_file(place.file("out")).expect("it was there");
    place.comes_to_its_end(place.appended());
    assert_eq!(place.text("out"), "a\nc\n", "{}", place.log());
}

/// `./app || date >>log; ./app`: what came into a file that the program had been writing, within
/// three seconds of its end, passed for the program's own and was gone without a word. Now
/// the program says when it ends.
#[test]
fn somebody_else_writes_as_soon_as_it_has_ended() {
    let place = Place::new("ended", "ended", false);
    let (status, said) = place.run(place.truncated());
    assert_eq!(status.code(), Some(3), "{said}");
    // Longer than the clock of files takes from one tick to the next.
    theirs_is_saved(&place, Duration::from_millis(60));
}

/// Killed before the helper had had a round since the checkpoint, the program had given no sign of
/// life in its table: what somebody else did to its files was not told, however late.
#[test]
fn somebody_else_writes_after_a_kill_right_behind_the_checkpoint() {
    let place = Place::new("killed", "killed", false);
    place.is_killed(place.truncated());
    theirs_is_saved(&place, Duration::from_millis(3500));
}

fn theirs_is_saved(place: &Place, later: Duration) {
    assert_eq!(place.text("log"), "a\nb\nb\nb\n");
    std::thread::sleep(later);
    std::fs::write(place.file("log"), "a\nb\nb\nb\ntheirs\n").expect("log");
    std::thread::sleep(Duration::from_millis(60));
    place.comes_to_its_end(place.truncated());
    assert_eq!(place.text("log"), "a\nc\n");
    let log = place.log();
    let line = log
        .lines()
        .find(|line| line.contains("/log was changed by"));
    let line = line.unwrap_or_else(|| panic!("it is not told:\n{log}"));
    let aside = line.rsplit(' ').next().expect("a path");
    let saved = std::fs::read_to_string(aside).expect("their version");
    assert_eq!(saved, "a\nb\nb\nb\ntheirs\n");
}

/// What the program itself has written is its own however soon it is started again, also when a
/// thread was left that might have written behind the end.
#[test]
fn what_it_wrote_before_its_end_is_its_own() {
    for what in ["ended", "threads"] {
        let place = Place::new(&format!("own-{what}"), what, false);
        let (status, said) = place.run(place.truncated());
        assert_eq!(status.code(), Some(3), "{said}");
        place.comes_to_its_end(place.truncated());
        assert_eq!(place.text("log"), "a\nc\n");
        assert!(!place.log().contains("somebody else"), "{}", place.log());
    }
}
