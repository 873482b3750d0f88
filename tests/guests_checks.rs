//! What is looked at before a program is restored: another build, another machine, another
//! user, damaged images. Each ends with the right memory or with one line and 125, never with
//! a wrong restore or a fresh start.

mod common;

#[path = "checks/forge.rs"]
mod forge;

use common::run::Life;
use common::*;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

/// Started and killed once; what it says when it is refused is in `run/stderr`.
fn killed_once(program: Program) -> (Trial, Life) {
    let mut trial = Trial::new(program, LAZY_FORK).ckpt("CKPT_TRACKER", "full");
    let bare = trial.bare();
    trial.kill_and_resume(1);
    (trial, bare)
}

fn said(trial: &Trial) -> String {
    std::fs::read_to_string(trial.dir.join("run/stderr")).unwrap_or_default()
}

/// The next start must end with 125 and one line that holds `words`.
fn refused(trial: &mut Trial, words: &str) {
    let before = said(trial);
    let life = trial.start().end(LIMIT);
    let after = said(trial);
    let new = after.strip_prefix(before.as_str()).unwrap_or(&after);
    trial.note(format!("{}: {new}", life.describe()));
    if life.status != Some(125) {
        trial.fail(&format!("{words}: it should have ended with 125"));
    }
    if new.lines().count() != 1 || !new.contains(words) {
        trial.fail(&format!("not one line with {words:?}: {new:?}"));
    }
    if trial.notes("begin") != 1 {
        trial.fail("it was started afresh");
    }
}

fn copied(from: &Path, to: &Path) {
    let aside = to.with_extension("aside");
    std::fs::copy(from, &aside).expect("copied");
    std::fs::rename(&aside, to).expect("renamed");
}

/// The source compiled once more, another way.
fn built_again(source: &str, out: &Path, shared: bool) {
    let aside = out.with_extension("aside");
    let dir = build::guests_dir();
    let mut cc = Command::new("cc");
    cc.args(["-std=gnu11", "-O0", "-pthread", "-Wl,--build-id=sha1", "-I"])
        .arg(&dir)
        .args(if shared {
            &["-shared", "-fPIC"][..]
        } else {
            &[]
        })
        .arg("-o")
        .arg(&aside)
        .arg(dir.join(source));
    let output = cc.output().expect("cc");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    std::fs::rename(&aside, out).expect("renamed");
}

mod builds {
    use super::*;

    /// A directory in which the test changes what the program is made of.
    fn own_copy(program: &Path) -> PathBuf {
        let dir = user::fresh_dir("builds");
        let copy = dir.join(program.file_name().expect("a name"));
        copied(program, &copy);
        copy
    }

    #[test]
    fn another_executable() {
        let mut program = Program::guest("mem_heap").seconds(2.0);
        let original = program.path.clone();
        program.path = own_copy(&original);
        let path = program.path.clone();
        let (mut trial, bare) = killed_once(program);
        built_again("mem_heap.c", &path, false);
        refused(&mut trial, "is another build than the one");
        // The old one again: on it goes.
        copied(&original, &path);
        let life = trial.finish();
        trial.compare(&bare, &life);
    }

    #[test]
    fn another_library() {
        let program = Program::guest("mem_dlopen").seconds(2.0);
        let original = PathBuf::from(&program.env["GUEST_PLUGIN"]);
        let path = own_copy(&original);
        let program = program.env("GUEST_PLUGIN", path.to_str().expect("UTF-8"));
        let (mut trial, bare) = killed_once(program);
        built_again("guest_plugin.c", &path, true);
        refused(&mut trial, "is another build than the one");
        std::fs::remove_file(&path).expect("removed");
        refused(&mut trial, "is gone");
        copied(&original, &path);
        let life = trial.finish();
        trial.compare(&bare, &life);
    }
}

/// The same image, said to be taken elsewhere; told the truth again it is restored.
#[test]
fn another_machine_or_user() {
    let (mut trial, bare) = killed_once(Program::guest("mem_heap").seconds(2.0));
    let store = trial.dir.join("store");
    let mut truth = None;
    forge::forge(&store, |m| truth = Some(m.identity.clone())).expect("forged");
    let truth = truth.expect("an identity");
    let lacks = truth.cpu_features.iter().position(|&word| word != u64::MAX);
    let word = lacks.expect("no CPU has every feature");
    let missing = truth.cpu_features[word] | !truth.cpu_features[word] & 0xffff_ffff;
    forge::forge(&store, |m| m.identity.cpu_features[word] = missing).expect("forged");
    refused(&mut trial, "this CPU lacks features");
    forge::forge(&store, |m| {
        m.identity = truth.clone();
        m.identity.arch = "riscv64".into();
    })
    .expect("forged");
    refused(&mut trial, "was taken on riscv64");
    forge::forge(&store, |m| {
        m.identity = truth.clone();
        m.identity.uid += 1;
    })
    .expect("forged");
    refused(&mut trial, "belongs to uid");
    forge::forge(&store, |m| {
        m.identity = truth.clone();
        m.identity.gid += 1;
    })
    .expect("forged");
    refused(&mut trial, "belongs to uid");
    forge::forge(&store, |m| m.identity = truth).expect("forged");
    let life = trial.finish();
    trial.compare(&bare, &life);
}

mod damage {
    use super::*;

    /// Flips a byte in every page of the data, or cuts the image off.
    fn spoil(image: &Path, cut: bool) {
        let (offset, length) = forge::data(image).expect("a header");
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(image)
            .expect("the image");
        if cut {
            file.set_len(offset + length / 2).expect("cut");
            return;
        }
        for page in (offset..offset + length).step_by(4096) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, page + 100).expect("read");
            file.write_all_at(&[byte[0] ^ 0x10], page + 100)
                .expect("written");
        }
    }

    fn goes_on_from_the_one_before(trial: &mut Trial, bare: &Life, cut: bool) {
        let image = forge::newest_image(&trial.dir.join("store")).expect("an image");
        spoil(&image, cut);
        let life = trial.finish();
        trial.compare(bare, &life);
        let log = std::fs::read_to_string(trial.dir.join("ckpt.log")).unwrap_or_default();
        if !log.contains("falling back to an older checkpoint") {
            trial.fail("no warning that the newest generation was passed over");
        }
        if !log.contains("] restored:") {
            trial.fail("it was not restored");
        }
    }

    /// Two bytes of the newest image were damaged on disk. With CKPT_COMPRESS the checksums
    /// are compared when it is unpacked, which was after the choice: the start ended with
    /// "unpack the image of generation 2: page data is damaged" though generation 1 was whole.
    #[test]
    fn a_byte_of_a_compressed_image() {
        for method in ["lz4", "zstd"] {
            let (mut trial, bare) = with_two_and(&[("CKPT_COMPRESS", method)]);
            goes_on_from_the_one_before(&mut trial, &bare, false);
        }
    }

    /// Killed when it has two generations at least: both whole.
    fn with_two() -> (Trial, Life) {
        with_two_and(&[])
    }

    fn with_two_and(settings: &[(&str, &str)]) -> (Trial, Life) {
        let program = Program::guest("mem_heap").seconds(2.5);
        let mut trial = Trial::new(program, LAZY_FORK).ckpt("CKPT_TRACKER", "full");
        for (name, value) in settings {
            trial = trial.ckpt(name, value);
        }
        let bare = trial.bare();
        let mut started = trial.start();
        while trial.generation() < 4 || trial.notes("begin") == 0 {
            let known = trial.generation();
            if trial.await_generation(&mut started, known).is_none() {
                trial.fail("it ended too early");
            }
        }
        started.kill(true);
        (trial, bare)
    }

    #[test]
    fn a_cut_image_is_passed_over() {
        let (mut trial, bare) = with_two();
        goes_on_from_the_one_before(&mut trial, &bare, true);
    }

    /// Page data is looked at only when that is asked for: then a flipped byte never becomes
    /// the program's memory.
    #[test]
    fn flipped_pages_are_passed_over_with_verify() {
        let (trial, bare) = with_two();
        let mut trial = trial.ckpt("CKPT_VERIFY", "1");
        goes_on_from_the_one_before(&mut trial, &bare, false);
    }

    #[test]
    fn nothing_but_flipped_pages_ends_with_125() {
        let (trial, _) = with_two();
        let mut trial = trial.ckpt("CKPT_VERIFY", "1");
        let job = forge::job(&trial.dir.join("store")).expect("a job");
        let mut spoiled = 0;
        for entry in std::fs::read_dir(job).expect("the job").flatten() {
            let image = entry.path().join("member-0.img");
            if image.exists() {
                spoil(&image, false);
                spoiled += 1;
            }
        }
        trial.note(format!("{spoiled} images"));
        refused(&mut trial, "none of the");
    }
}
