//! What the new start provides: standard output by `>`, `>>`, a pipe, a terminal, a file
//! that the program could not open itself; standard input from a file, a pipe, a terminal.
//!
//! A life that is resumed repeats what it wrote between its checkpoint and the kill, so
//! the oracle here is: each life's output is a piece of the undisturbed output, and the
//! last life's piece reaches the end.

mod common;

use common::run::{self, Life, Started};
use common::*;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const KILLS: usize = 3;
const LIMIT: Duration = Duration::from_secs(60);

fn given(args: &[&str]) -> Program {
    let program = Program::guest("fd_given").seconds(1.2);
    args.iter().fold(program, |p, arg| p.arg(arg))
}

/// One test for each setting.
macro_rules! both {
    ($($name:ident)*) => { $(
        mod $name {
            #[test]
            fn lazy_fork() {
                super::cases::$name(crate::common::LAZY_FORK);
            }
            #[test]
            fn eager_copy() {
                super::cases::$name(crate::common::EAGER_COPY);
            }
        }
    )* };
}

both! { truncated appended piped unreachable deleted replaced here_document input_from_pipe terminal }

/// Lives of one trial: killed after a new checkpoint, the last one left to its end.
/// `open` fills in the descriptors of each, `after` is told when a life is over.
fn lives(
    trial: &mut Trial,
    mut open: impl FnMut(usize, &mut Command, &Path),
    mut after: impl FnMut(usize),
) {
    let dir = trial.dir.join("run");
    for life in 0..=KILLS {
        let known = trial.generation();
        let mut command = trial.prepare();
        open(life, &mut command, &dir);
        let mut started = run::spawn(command, &dir);
        if life < KILLS {
            if trial.await_generation(&mut started, known).is_none() {
                trial.fail("it ended by itself, or was refused");
            }
            let wait = Duration::from_micros(trial.random(80_000));
            std::thread::sleep(wait);
            let ended = started.kill(true);
            trial.note(format!("life {life}: {}", ended.describe()));
        } else {
            end(trial, started);
        }
        after(life);
    }
    if trial.notes("begin") != 1 {
        trial.fail("its beginning did not run exactly once");
    }
}

fn end(trial: &mut Trial, started: Started) -> Life {
    let life = started.end(LIMIT);
    trial.note(format!("last life: {}", life.describe()));
    if life.status != Some(trial.program.status) {
        trial.fail("the last life's status is wrong");
    }
    life
}

/// The piece must be in the whole output, and at its end for the last life.
fn is_piece(trial: &mut Trial, life: usize, piece: &[u8], whole: &[u8]) {
    let text = String::from_utf8_lossy(piece).into_owned();
    let whole = String::from_utf8_lossy(whole).into_owned();
    trial.note(format!("life {life} wrote {} bytes", text.len()));
    let good = if life == KILLS {
        whole.ends_with(&text) && !text.is_empty() && text.len() < whole.len()
    } else {
        whole.contains(&text)
    };
    if !good {
        trial.fail(&format!(
            "life {life} wrote {text:?}, not a piece of {whole:?}"
        ));
    }
}

fn own(file: &File) -> Stdio {
    Stdio::from(file.try_clone().expect("a duplicate"))
}

/// Also gives the descriptor to the program, at `number`.
fn give(command: &mut Command, file: &File, number: i32) {
    let file: OwnedFd = file.try_clone().expect("a duplicate").into();
    // SAFETY: dup2 is async-signal-safe; the descriptor lives in the closure.
    unsafe {
        command.pre_exec(move || match libc::dup2(file.as_raw_fd(), number) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        })
    };
}

fn pipe() -> (File, File) {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors, which nobody else owns.
    unsafe {
        assert_eq!(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC), 0);
        (File::from_raw_fd(fds[0]), File::from_raw_fd(fds[1]))
    }
}

/// A pty with its slave.
fn terminal() -> (File, File) {
    let (mut master, mut slave) = (0, 0);
    let none = std::ptr::null_mut();
    // SAFETY: room for two descriptors, which nobody else owns.
    unsafe {
        let made = libc::openpty(&mut master, &mut slave, none, none.cast(), none.cast());
        assert_eq!(made, 0, "openpty: {}", std::io::Error::last_os_error());
        libc::fcntl(master, libc::F_SETFD, libc::FD_CLOEXEC);
        libc::fcntl(slave, libc::F_SETFD, libc::FD_CLOEXEC);
        (File::from_raw_fd(master), File::from_raw_fd(slave))
    }
}

/// Everything that comes out of a pipe or pty, until its other end is closed.
fn reader(mut from: File) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        let mut piece = [0; 4096];
        // A pty whose slave is closed gives EIO.
        while let Ok(n @ 1..) = from.read(&mut piece) {
            all.extend_from_slice(&piece[..n]);
        }
        all
    })
}

mod cases {
    use super::*;

    /// The file holds the whole output.
    fn is_whole(trial: &mut Trial, got: &[u8], whole: &[u8]) {
        if got != whole {
            let text = String::from_utf8_lossy(got).into_owned();
            trial.fail(&format!("it has {} bytes: {text:?}", got.len()));
        }
    }

    /// `program > out`: the shell truncates the file before the program resumes; what it
    /// held at the checkpoint is put back.
    pub fn truncated(setting: Setting) {
        let mut trial = Trial::new(given(&[]), setting);
        let whole = trial.bare().stdout;
        lives(
            &mut trial,
            |_, command, dir| {
                let file = run::output(dir, "out", false);
                file.set_len(0).expect("truncate");
                command.stdout(Stdio::from(file));
            },
            |_| {},
        );
        let got = std::fs::read(trial.dir.join("run/out")).expect("out");
        is_whole(&mut trial, &got, &whole);
    }

    /// `program >> out`: what was written after the checkpoint is taken back.
    pub fn appended(setting: Setting) {
        let mut trial = Trial::new(given(&[]), setting);
        let whole = trial.bare().stdout;
        lives(
            &mut trial,
            |_, command, dir| {
                command.stdout(Stdio::from(run::output(dir, "out", true)));
            },
            |_| {},
        );
        let got = std::fs::read(trial.dir.join("run/out")).expect("out");
        is_whole(&mut trial, &got, &whole);
    }

    /// `program | reader`: each life has a pipe of its own.
    pub fn piped(setting: Setting) {
        let mut trial = Trial::new(given(&[]), setting);
        let whole = trial.bare().stdout;
        let mut readers = Vec::new();
        lives(
            &mut trial,
            |_, command, _| {
                let (read, write) = pipe();
                command.stdout(Stdio::from(write));
                readers.push(reader(read));
            },
            |_| {},
        );
        for (life, reader) in readers.into_iter().enumerate() {
            let piece = reader.join().expect("the reader");
            is_piece(&mut trial, life, &piece, &whole);
        }
    }

    /// A process whose output was opened by someone with more rights, in a directory that
    /// is closed to it, was refused: "cannot be reached by its path any more". Output and
    /// descriptor 5 are the same files in each life and come out as if nothing had
    /// happened. (For root nothing is closed.)
    pub fn unreachable(setting: Setting) {
        let mut trial = Trial::new(given(&[]), setting);
        let closed = trial.dir.join("closed");
        std::fs::create_dir(&closed).expect("a directory");
        let (out, five) = (
            run::output(&closed, "out", false),
            run::output(&closed, "5", false),
        );
        std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o000)).expect("chmod");
        let whole = trial.bare().stdout;
        lives(
            &mut trial,
            |_, command, _| {
                command.stdout(own(&out));
                give(command, &five, 5);
            },
            |_| {},
        );
        std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o700)).expect("chmod");
        let got = std::fs::read(closed.join("out")).expect("out");
        let five = std::fs::read(closed.join("5")).expect("5");
        if got != whole || five != whole.strip_suffix(b"given ok\n").unwrap_or_default() {
            let text = String::from_utf8_lossy(&got).into_owned();
            trial.fail(&format!("it wrote {text:?} and {} bytes", five.len()));
        }
    }

    /// Output to a file that is deleted while the program runs: each life has a file of its
    /// own, also when it goes on from a checkpoint that was taken after the deletion.
    pub fn deleted(setting: Setting) {
        let mut trial = Trial::new(given(&[]), setting);
        let whole = trial.bare().stdout;
        let mut files = Vec::new();
        lives(
            &mut trial,
            |_, command, dir| {
                let path = dir.join("out");
                let _ = std::fs::remove_file(&path);
                let writer = run::output(dir, "out", false);
                files.push(File::open(&path).expect("out"));
                std::fs::remove_file(&path).expect("remove");
                command.stdout(Stdio::from(writer));
            },
            |_| {},
        );
        for (life, file) in files.iter().enumerate() {
            let mut piece = vec![0; file.metadata().expect("its size").len() as usize];
            file.read_exact_at(&mut piece, 0).expect("read");
            // Each file has got what the one before held at the checkpoint.
            if life < KILLS && whole.starts_with(&piece) {
                continue;
            }
            is_whole(&mut trial, &piece, &whole);
        }
    }

    /// Another file is put in its place (as editors and log rotation do).
    pub fn replaced(setting: Setting) {
        let mut trial = Trial::new(given(&[]), setting);
        let whole = trial.bare().stdout;
        let mut files = Vec::new();
        lives(
            &mut trial,
            |_, command, dir| {
                let path = dir.join("out");
                let _ = std::fs::remove_file(&path);
                let writer = run::output(dir, "out", false);
                files.push(File::open(&path).expect("out"));
                command.stdout(Stdio::from(writer));
                std::fs::write(dir.join("other"), "another file").expect("write");
                std::fs::rename(dir.join("other"), &path).expect("rename");
            },
            |_| {},
        );
        for (life, file) in files.iter().enumerate() {
            let mut piece = vec![0; file.metadata().expect("its size").len() as usize];
            file.read_exact_at(&mut piece, 0).expect("read");
            // Each file has got what the one before held at the checkpoint.
            if life < KILLS && whole.starts_with(&piece) {
                continue;
            }
            is_whole(&mut trial, &piece, &whole);
        }
    }

    /// Input from a file without a name, as shells make for a here-document: the next
    /// start's is another file with the same lines, and reading goes on where it was.
    pub fn here_document(setting: Setting) {
        let lines: String = (0..1000).map(|n| format!("line {n}\n")).collect();
        let mut trial = Trial::new(given(&["input"]).input(lines.clone()), setting);
        let whole = trial.bare().stdout;
        lives(
            &mut trial,
            |_, command, dir| {
                let path = dir.join("document");
                run::output(dir, "document", false);
                std::fs::write(&path, &lines).expect("write");
                command.stdin(Stdio::from(File::open(&path).expect("document")));
                command.stdout(Stdio::from(run::output(dir, "out", false)));
                std::fs::remove_file(&path).expect("remove");
            },
            |_| {},
        );
        let got = std::fs::read(trial.dir.join("run/out")).expect("out");
        if got != whole {
            let text = String::from_utf8_lossy(&got).into_owned();
            trial.fail(&format!("it wrote {text:?}"));
        }
    }

    /// Input from a pipe: the next start's pipe is read on.
    pub fn input_from_pipe(setting: Setting) {
        let mut trial = Trial::new(given(&["input"]), setting);
        let mut ends = Vec::new();
        lives(
            &mut trial,
            |life, command, dir| {
                let (read, mut write) = pipe();
                let lines: String = (0..1000).map(|n| format!("{life}.{n}\n")).collect();
                write.write_all(lines.as_bytes()).expect("fits into a pipe");
                ends.push(write);
                command.stdin(Stdio::from(read));
                command.stdout(Stdio::from(run::output(dir, "out", false)));
            },
            |_| {},
        );
        let got = std::fs::read(trial.dir.join("run/out")).expect("out");
        let text = String::from_utf8_lossy(&got).into_owned();
        let last = format!("in {KILLS}.");
        let lines = text.lines().filter(|l| !l.starts_with("in "));
        for (round, line) in lines.enumerate() {
            if line != "given ok" && !line.starts_with(&format!("{round} ")) {
                trial.fail(&format!("round {round} is missing in {text:?}"));
            }
        }
        if !text.contains(&last) || !text.ends_with("given ok\n") {
            trial.fail(&format!("input of the last life is missing in {text:?}"));
        }
    }

    /// In a terminal: each life has a terminal of its own, whose modes are what the program
    /// had set in the earlier one.
    pub fn terminal(setting: Setting) {
        let mut trial = Trial::new(given(&["terminal"]), setting);
        // Bare in a terminal as well: the guest changes its modes.
        let (master, slave) = super::terminal();
        let bare = reader(master);
        let mut command = trial.prepare();
        command
            .env_remove("LD_PRELOAD")
            .env_remove("GUEST_LOG")
            .stdout(Stdio::from(slave));
        let dir = trial.dir.join("run");
        let started = run::spawn(command, &dir);
        end(&mut trial, started);
        let whole = bare.join().expect("the reader");
        let mut readers = Vec::new();
        lives(
            &mut trial,
            |_, command, _| {
                let (master, slave) = super::terminal();
                command.stdin(own(&slave)).stdout(own(&slave));
                controls(command, slave);
                readers.push(reader(master));
            },
            |_| {},
        );
        for (life, reader) in readers.into_iter().enumerate() {
            let piece = reader.join().expect("the reader");
            is_piece(&mut trial, life, &piece, &whole);
        }
    }

    /// Makes it the program's controlling terminal.
    fn controls(command: &mut Command, slave: File) {
        // SAFETY: ioctl is async-signal-safe; `setsid` has been called before.
        unsafe {
            command.pre_exec(
                move || match libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) {
                    -1 => Err(std::io::Error::last_os_error()),
                    _ => Ok(()),
                },
            )
        };
    }
}
