//! Output that the shell opens anew for each life: `>` truncates it, `>>` appends to it.
//! In the end it is byte for byte that of an undisturbed run.

use super::common::run::{self, Started};
use super::common::*;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// A life of the program by `sh -c 'exec ... > out'`.
fn shell(trial: &Trial, redirection: &str) -> Started {
    let program = trial.prepare();
    let env = program.get_envs();
    let env = env.filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())));
    // The library is for the program, not for the shell that becomes it.
    let (library, env): (Vec<_>, Vec<_>) = env.partition(|(name, _)| name == "LD_PRELOAD");
    let (_, library) = library.first().expect("the library");
    let library = library.to_str().expect("a path");
    let script = format!("exec env LD_PRELOAD='{library}' \"$0\" \"$@\" {redirection}");
    let dir = trial.dir.join("run");
    let mut command = Command::new(build::find_command("dash"));
    command
        .arg("-c")
        .arg(script)
        .arg(program.get_program())
        .args(program.get_args())
        .env_clear()
        .envs(env)
        .current_dir(&dir)
        .stdin(Stdio::null());
    // SAFETY: only a system call between fork and exec.
    unsafe {
        command.pre_exec(|| match libc::setsid() {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        })
    };
    run::spawn(command, &dir)
}

/// Killed and started again with the same redirection; the output in the end.
fn output_of(program: Program, setting: Setting, redirections: &[&str], out: &str) {
    let mut trial = Trial::new(program, setting);
    let whole = trial.bare().stdout;
    let lives = super::kills();
    for life in 0..=lives {
        let redirection = redirections[life.min(redirections.len() - 1)];
        let known = trial.generation();
        let mut started = shell(&trial, redirection);
        if life < lives {
            if life % 3 != 2 && trial.await_generation(&mut started, known).is_none() {
                trial.fail("it ended by itself, or was refused");
            }
            let wait = Duration::from_micros(trial.random(120_000));
            std::thread::sleep(wait);
            let ended = started.kill(true);
            trial.note(format!("life {life}: {}", ended.describe()));
            if ended.status.is_some() {
                trial.fail("it ended by itself");
            }
        } else {
            let ended = started.end(Duration::from_secs(60));
            trial.note(format!("last life: {}", ended.describe()));
            if ended.status != Some(trial.program.status) {
                trial.fail("the last life's status is wrong");
            }
        }
    }
    same(&mut trial, out, &whole);
}

fn same(trial: &mut Trial, out: &str, whole: &[u8]) {
    let got = std::fs::read(trial.dir.join("run").join(out)).expect("the output");
    if got == whole {
        return;
    }
    let at = got.iter().zip(whole).take_while(|(a, b)| a == b).count();
    let near = |bytes: &[u8]| {
        let piece = &bytes[at.saturating_sub(60)..(at + 60).min(bytes.len())];
        String::from_utf8_lossy(piece).into_owned()
    };
    let text = format!(
        "{out} differs at byte {at} ({} bytes, not {})\n  got      {:?}\n  expected {:?}",
        got.len(),
        whole.len(),
        near(&got),
        near(whole)
    );
    trial.fail(&text);
}

/// Prints a lot by stdio, some of it to standard error.
fn printing() -> Program {
    Program::guest("files_print").seconds(super::seconds())
}

fn header() -> Program {
    super::pattern("header").seconds(super::seconds())
}

macro_rules! outputs {
    ($($test:ident = $program:expr, [$($redirection:literal),*], $out:literal;)*) => { $(
        mod $test {
            use super::*;
            #[test]
            fn lazy_fork() {
                output_of($program, LAZY_FORK, &[$($redirection),*], $out);
            }
            #[test]
            fn eager_copy() {
                output_of($program, EAGER_COPY, &[$($redirection),*], $out);
            }
        }
    )* };
}

outputs! {
    truncated = printing(), ["2>/dev/null >out"], "out";
    appended = printing(), ["2>/dev/null >>out"], "out";
    read_write = printing(), ["2>/dev/null 1<>out"], "out";
    both_in_one = printing().arg("both"), [">out 2>&1"], "out";
    header_overwritten = header(), ["2>/dev/null >out"], "out";
    put_away = printing().arg("silent"), ["2>/dev/null >out"], "out";
    another_file = printing(), ["2>/dev/null >out", "2>/dev/null >out2", "2>/dev/null >out3"], "out3";
}

/// A program that was killed some time after a checkpoint, and what it prints undisturbed.
fn killed_while_printing() -> (Trial, Vec<u8>) {
    let mut trial = Trial::new(printing(), LAZY_FORK);
    let whole = trial.bare().stdout;
    let known = trial.generation();
    let mut started = shell(&trial, "2>/dev/null >out");
    trial.await_generation(&mut started, known);
    std::thread::sleep(Duration::from_millis(200));
    started.kill(true);
    (trial, whole)
}

/// What another program had in the file that is given now is saved, not lost.
#[test]
fn a_file_with_other_contents_is_saved() {
    let (trial, whole) = killed_while_printing();
    saved_and_whole(trial, &whole, b"somebody's notes\n");
}

/// What the file began with was the program's output: what followed was cut off and nowhere to be
/// found.
#[test]
fn what_follows_the_output_in_another_file_is_saved() {
    let (trial, whole) = killed_while_printing();
    let mut other = std::fs::read(trial.dir.join("run/out")).expect("out");
    other.extend_from_slice(b"somebody's notes\n");
    saved_and_whole(trial, &whole, &other);
}

/// The next start is given a file that holds `held`.
fn saved_and_whole(mut trial: Trial, whole: &[u8], held: &[u8]) {
    let other: PathBuf = trial.dir.join("run/other");
    std::fs::write(&other, held).expect("write");
    let life = shell(&trial, "2>/dev/null >>other").end(Duration::from_secs(60));
    if life.status != Some(73) {
        trial.fail("the last life's status is wrong");
    }
    same(&mut trial, "other", whole);
    let log = std::fs::read_to_string(trial.dir.join("ckpt.log")).unwrap_or_default();
    let saved = log
        .split("saved as ")
        .nth(1)
        .and_then(|rest| rest.lines().next());
    let Some(saved) = saved else {
        trial.fail("the log does not say where the contents of `other` are");
    };
    if std::fs::read(saved.trim()).ok().as_deref() != Some(held) {
        trial.fail("what was saved is not what the file held");
    }
}

/// The start of `out` is what it was, whoever reads it while the program runs.
#[test]
fn the_beginning_is_there_at_once() {
    let mut trial = Trial::new(printing(), EAGER_COPY);
    let whole = trial.bare().stdout;
    for _ in 0..3 {
        let known = trial.generation();
        let mut started = shell(&trial, "2>/dev/null >out");
        trial.await_generation(&mut started, known);
        started.kill(true);
    }
    let path: &Path = &trial.dir.join("run/out");
    let file = std::fs::File::open(path).expect("out");
    let mut got = vec![0; file.metadata().expect("its size").len() as usize];
    file.read_exact_at(&mut got, 0).expect("read");
    if !whole.starts_with(&got) {
        trial.fail("a killed program's output is not a beginning of the whole");
    }
}

/// A Go program writes by `syscall` instructions of its own. With `>>` what it had printed since
/// the checkpoint stayed, and came once more.
#[test]
fn written_by_calls_that_nobody_sees() {
    for (redirection, setting) in [(">> out", LAZY_FORK), ("> out", EAGER_COPY)] {
        let program = Program::guest("out_own").seconds(super::seconds());
        output_of(program, setting, &[redirection], "out");
    }
}

/// The same of what its children print.
#[test]
fn written_by_children() {
    for (redirection, setting) in [(">> out", LAZY_FORK), ("> out", EAGER_COPY)] {
        let script = Program::guest("sh_children.sh").arg("print");
        let program = script.seconds(super::seconds());
        output_of(program, setting, &[redirection], "out");
    }
}
