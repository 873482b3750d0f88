//! Rollback in the running process (WO 97/00476 FIG. 8A and 8B): a test for each rule, by
//! the guests `roll_*`, which check everything themselves and say how it went.
//!
//! | step | what | test |
//! |---|---|---|
//! | 800 | entered: from the program, from outside; explicit id, latest | `from_cpp`, `from_outside`, `model` |
//! | 810 | the table of that checkpoint | `files_and_open_file_table`, `model`; damaged or foreign: `refused_in_time` ones |
//! | 815, 820 | "modify the table?" no, yes | `table_modified_or_not_815_820` |
//! | 825 | persistent state | `files_and_open_file_table`, `model`, `no_room_to_write_files_back_is_refused_in_time` |
//! | 830, 835 | "rollback, protected variables valid?" yes, no, recovery | `mode_and_protected_variables_830_850`, `return_value_given_and_protected_variables_kept`, `return_value_absent_and_protected_variables_invalid` |
//! | 840, 845 | the image is read, data restored | `maps`, `pages`, `model`, `many_in_a_row`, `attributes_go_back` |
//! | 850, 855 | the same question again, protected variables put back | as 830, `a_large_protected_region` |
//! | 865, 870 | "modify the open file table?" no, yes | `open_file_table_modified_or_not_865_870` |
//! | 875 | descriptors | `files_and_open_file_table`, `connections_to_the_outside_stay`, `given_by_the_latest_start` |
//! | 880, 885 | stacks | `threads`, `threads::in_a_storm_of_rollbacks` |
//! | 890 | registers, signals, timers; the return value (620) | `threads`, `timers_go_back`, `pending_signals_go_back`; given, absent: as 830 |

mod common;

use common::run::{Life, Started};
use common::*;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(100);

fn trial(guest: &str, args: &[&str], setting: Setting) -> Trial {
    let mut program = Program::guest(guest);
    for arg in args {
        program = program.arg(arg);
    }
    Trial::new(program, setting).ckpt("CKPT_INTERVAL", "off")
}

/// Runs it to its end: status, one beginning, and this on standard output.
fn ends_with(trial: Trial, stdout: &str) -> Trial {
    let started = trial.start();
    check_end(trial, started.end(LIMIT), stdout)
}

fn check_end(mut trial: Trial, life: Life, stdout: &str) -> Trial {
    if life.status != Some(trial.program.status) {
        let how = life.describe();
        trial.fail(&format!("it ended with {how}"));
    }
    if trial.notes("begin") != 1 {
        trial.fail("it began more than once");
    }
    let said = String::from_utf8_lossy(&life.stdout).into_owned();
    if said != stdout {
        trial.fail(&format!("it said {said:?}, not {stdout:?}"));
    }
    trial
}

/// 830-855, 890: return value given, protected variables valid, each wherever it may lie.
#[test]
fn return_value_given_and_protected_variables_kept() {
    for setting in [LAZY_FORK, EAGER_COPY] {
        ends_with(trial("roll_count", &["5"], setting), "5 times\n");
    }
}

/// 890, no return value given (1), and 830 "protected variables valid?" No: each error before
/// anything is touched; 800, explicit id, and one that is not there.
#[test]
fn return_value_absent_and_protected_variables_invalid() {
    ends_with(trial("roll_errors", &[], LAZY_FORK), "errors ok\n");
}

/// The header in C++; 800 "which checkpoint?", explicit id and the latest, from inside.
#[test]
fn from_cpp() {
    let bare = Command::new(build::guest("roll_cpp")).arg("bare").output();
    let bare = bare.expect("the guest");
    assert_eq!(String::from_utf8_lossy(&bare.stdout), "not loaded\n");
    let said = "4 times, 88 destroyed\n";
    for setting in [LAZY_FORK, EAGER_COPY] {
        ends_with(trial("roll_cpp", &[], setting), said);
    }
}

/// 810-825: contents, names, modes; excluded files are left alone. 875: descriptors closed,
/// opened, moved, positions.
#[test]
fn files_and_open_file_table() {
    for setting in [LAZY_FORK, EAGER_COPY] {
        ends_with(trial("roll_files", &[], setting), "before\nafter 3\n");
    }
}

/// "Modify the persistent checkpoint table?" No; yes: by a name, a pattern with an exception, all.
#[test]
fn table_modified_or_not_815_820() {
    for setting in [LAZY_FORK, EAGER_COPY] {
        ends_with(trial("roll_steps", &["table"], setting), "table ok\n");
    }
}

/// "Modify the open file table?" No; yes: inputs and an output.
#[test]
fn open_file_table_modified_or_not_865_870() {
    for setting in [LAZY_FORK, EAGER_COPY] {
        ends_with(trial("roll_steps", &["open"], setting), "open ok\n");
    }
}

/// "Rollback, and protected variables valid?" Yes; not given; not valid; a recovery, in which there
/// are none.
#[test]
fn mode_and_protected_variables_830_850() {
    for setting in [LAZY_FORK, EAGER_COPY] {
        let trial = trial("roll_steps", &["mode"], setting);
        let mut trial = trial.ckpt("CKPT_RETURN_VALUE", "9");
        let first = trial.start().end(LIMIT);
        if first.status.is_some() {
            let how = first.describe();
            trial.fail(&format!("it was to be killed: {how}"));
        }
        let trial = ends_with(trial, "mode ok\n");
        assert_eq!(trial.notes("life"), 1);
    }
}

/// 875 for what cannot be opened again: it stays as it is.
#[test]
fn connections_to_the_outside_stay() {
    ends_with(trial("roll_fds", &[], LAZY_FORK), "");
}

/// 845 and 890, for what is the kernel's: areas that grow down, CPUs, memory to come that is locked,
/// what threads have forbidden themselves. None of it went back.
#[test]
fn attributes_go_back() {
    for setting in [LAZY_FORK, EAGER_COPY] {
        ends_with(trial("roll_attributes", &[], setting), "back 3 times\n");
    }
    ends_with(
        trial("roll_attributes", &["mdwe"], LAZY_FORK),
        "no way back\n",
    );
}

/// 890, timers: setitimer, timer_create with a signal and a thread, timerfd; changed, stopped,
/// deleted and made since.
#[test]
fn timers_go_back() {
    for setting in [LAZY_FORK, EAGER_COPY] {
        ends_with(trial("roll_timers", &[], setting), "4 times\n");
    }
}

/// 890, signals that are pending at the checkpoint or since then. The thread that asked for
/// the checkpoint has some of its own.
#[test]
fn pending_signals_go_back() {
    for setting in [LAZY_FORK, EAGER_COPY] {
        ends_with(trial("roll_pending", &[], setting), "4 times\n");
    }
}

/// 875 for terminals: modes and window size.
#[test]
fn terminal_modes_go_back() {
    ends_with(trial("roll_tty", &[], LAZY_FORK), "3 times\n");
}

/// 875, a file that cannot be opened again: found before anything is touched.
#[test]
fn a_file_that_cannot_be_opened_again_is_refused_in_time() {
    ends_with(trial("roll_reopen", &[], LAZY_FORK), "reopen ok\n");
}

/// 875, what somebody else has taken away or taken the name of, other than files: the working
/// directory, FIFOs, what inotify watches, listeners; and what ckpt_redirect may not name.
#[test]
fn what_cannot_be_made_again_is_refused_in_time() {
    ends_with(trial("roll_gone", &[], LAZY_FORK), "gone ok\n");
}

/// Limits that were used up (out of memory: what a rollback is for) or lowered since. With the
/// right to raise them and without.
mod limits {
    use super::*;

    fn both(which: &str) {
        for setting in [LAZY_FORK, EAGER_COPY] {
            for args in [&[which][..], &[which, "bare"]] {
                ends_with(trial("roll_limits", args, setting), "limits ok\n");
            }
        }
    }

    #[test]
    fn out_of_address_space() {
        both("space");
    }

    #[test]
    fn out_of_data() {
        both("data");
    }

    #[test]
    fn less_address_space_than_at_the_checkpoint() {
        both("less");
    }

    #[test]
    fn fewer_open_files_than_at_the_checkpoint() {
        both("numbers");
    }

    #[test]
    fn no_file_may_be_written() {
        both("files");
    }

    #[test]
    fn soft_limits() {
        both("soft");
    }
}

/// What an ordinary user cannot take back: found before anything is touched. As root only: the guest
/// becomes another user by itself.
#[test]
fn rights_that_were_given_up_are_refused_in_time() {
    for what in ["tasks", "locked", "privileges"] {
        for args in [&[what][..], &[what, "other"]] {
            ends_with(trial("roll_rights", args, LAZY_FORK), "rights ok\n");
        }
    }
}

/// A full disk: found before anything is touched, where the files are and where the store is. As
/// root only: it mounts one.
#[test]
fn no_room_to_write_files_back_is_refused_in_time() {
    use std::os::unix::process::CommandExt;
    for store_too in [false, true] {
        let dir = std::env::temp_dir().join(format!("ckpt-full-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("small")).unwrap();
        let small = std::ffi::CString::new(dir.join("small").to_str().unwrap()).unwrap();
        let store = dir.join(if store_too { "small/store" } else { "store" });
        let mut command = Command::new(build::guest("roll_full"));
        command.arg(dir.join("small"));
        command.args(store_too.then_some("store"));
        command.env("CKPT_DIR", store).env("CKPT_INTERVAL", "off");
        command.env("LD_PRELOAD", build::library());
        let mount = move || {
            let (none, tmpfs) = (std::ptr::null(), c"tmpfs".as_ptr());
            // SAFETY: constant strings, in the child before it executes the program.
            let result = unsafe {
                let private = libc::MS_REC | libc::MS_PRIVATE;
                let own = libc::unshare(libc::CLONE_NEWNS) == 0
                    && libc::mount(none, c"/".as_ptr(), none, private, none.cast()) == 0;
                let size = c"size=24m".as_ptr().cast();
                own && libc::mount(tmpfs, small.as_ptr(), tmpfs, 0, size) == 0
            };
            match result {
                true => Ok(()),
                false => Err(std::io::Error::last_os_error()),
            }
        };
        // SAFETY: only system calls.
        unsafe { command.pre_exec(mount) };
        match command.output() {
            Ok(output) => {
                let errors = String::from_utf8_lossy(&output.stderr);
                assert_eq!(output.stdout, b"full ok\n", "{errors}");
                assert_eq!(output.status.code(), Some(73), "{errors}");
            }
            Err(error) => eprintln!("*** NOT TESTED: a full disk ({error})"),
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

/// 845, files that memory maps privately and that were written, moved or removed since: the files
/// go back, so they are no obstacle (it was taken for another build).
#[test]
fn files_mapped_privately_go_back() {
    for tracker in ["uffd", "mprotect", "full"] {
        let trial = trial("roll_mapped", &[], LAZY_FORK);
        ends_with(trial.ckpt("CKPT_TRACKER", tracker), "mapped ok\n");
    }
}

/// Files without a name that are mapped writable, but open to read only, or to read as well: neither
/// a rollback nor a recovery could map them.
#[test]
fn mapped_writable_and_open_to_read() {
    for setting in [LAZY_FORK, EAGER_COPY] {
        let mut trial = trial("roll_readers", &[], setting);
        let first = trial.start().end(LIMIT);
        if first.status.is_some() {
            let how = first.describe();
            trial.fail(&format!("it was to be killed: {how}"));
        }
        ends_with(trial, "readers ok\n");
    }
}

/// What a rollback has made anew (a removed directory has another number then) was taken for
/// somebody else's at the next rollback to the same checkpoint, and refused for ever. And what was
/// renamed while it was excluded counted as brought back: exit status 125.
#[test]
fn what_was_made_anew_is_known_again() {
    let elsewhere = Path::new("/dev/shm").join(format!("ckpt-anew-{}", std::process::id()));
    for other_file_system in [false, true] {
        let mut trial = trial("roll_anew", &[], LAZY_FORK);
        if other_file_system {
            trial = trial.ckpt("CKPT_DIR", &path_text(&elsewhere));
        }
        ends_with(trial, "anew ok\n");
    }
    let _ = std::fs::remove_dir_all(&elsewhere);
}

/// Another directory in the place of the working directory: refused in time (the program went
/// on in it without a word).
#[test]
fn another_working_directory_is_refused_in_time() {
    ends_with(trial("roll_cwd", &[], LAZY_FORK), "cwd ok\n");
}

/// What the latest start has at the standard descriptors is taken at a rollback to a checkpoint
/// of an earlier life as well: output went into the first life's file, or was lost.
mod given_by_the_latest_start {
    use super::*;
    use std::fs::File;
    use std::process::Stdio;

    struct Place(Trial);

    impl Place {
        fn new() -> Place {
            Place(trial("roll_given", &[], LAZY_FORK))
        }

        fn path(&self, name: &str) -> std::path::PathBuf {
            self.0.dir.join(name)
        }

        fn start(&self, stdin: Stdio, stdout: Stdio) -> Output {
            let mut command = Command::new(build::guest("roll_given"));
            command
                .env("LD_PRELOAD", build::library())
                .env("CKPT_DIR", self.path("store"))
                .env("CKPT_INTERVAL", "off")
                .current_dir(&self.0.dir)
                .stdin(stdin)
                .stdout(stdout)
                .stderr(Stdio::inherit());
            command.output().expect("the guest")
        }

        fn first(&self, stdout: Stdio) {
            std::fs::write(self.path("in1"), "one\n").unwrap();
            let in1 = File::open(self.path("in1")).unwrap();
            let first = self.start(in1.into(), stdout);
            assert_eq!(first.status.code(), None, "{first:?}");
        }

        fn again(&self, stdout: Stdio) -> Output {
            std::fs::write(self.path("in2"), "two\nthree\n").unwrap();
            let in2 = File::open(self.path("in2")).unwrap();
            let again = self.start(in2.into(), stdout);
            assert_eq!(again.status.code(), Some(73), "{again:?}");
            again
        }
    }

    const SECOND: &str = "1 reads two\n5 reads three\nend\n";

    #[test]
    fn pipe_after_file() {
        let place = Place::new();
        let a = File::create(place.path("a")).unwrap();
        place.first(a.into());
        let again = place.again(Stdio::piped());
        assert_eq!(String::from_utf8_lossy(&again.stdout), SECOND);
        let a = std::fs::read_to_string(place.path("a")).unwrap();
        assert!(a.starts_with("begin\n") && !a.contains("reads"), "{a}");
    }

    #[test]
    fn pipe_after_pipe() {
        let place = Place::new();
        place.first(Stdio::piped());
        let again = place.again(Stdio::piped());
        assert_eq!(String::from_utf8_lossy(&again.stdout), SECOND);
    }

    #[test]
    fn file_after_file() {
        let place = Place::new();
        place.first(File::create(place.path("a")).unwrap().into());
        place.again(File::create(place.path("b")).unwrap().into());
        let b = std::fs::read_to_string(place.path("b")).unwrap();
        // A file goes back with the rest.
        assert_eq!(b, "begin\n5 reads three\nend\n");
    }
}

/// A start from a template is killed and started again: it goes on with the input and the arguments
/// that it was given (it went on with the template's).
#[test]
fn a_start_from_a_template_keeps_what_it_was_given() {
    let place = trial("roll_template", &[], LAZY_FORK);
    let path = |name: &str| path_text(&place.dir.join(name));
    for (name, text) in [("in1", "one"), ("in2", "two")] {
        std::fs::write(place.dir.join(name), text).unwrap();
    }
    let template = Command::new(build::guest("roll_template"))
        .arg(path("in1"))
        .env("LD_PRELOAD", build::library())
        .env("CKPT_DIR", path("store"))
        .env("CKPT_JOB", "it")
        .env("CKPT_INTERVAL", "off")
        .current_dir(&place.dir)
        .status();
    assert_eq!(template.expect("the guest").code(), None);
    let restore = |args: &[&str]| {
        let mut command = Command::new(build::command());
        command.env("CKPT_LIB", build::library());
        command.env("CKPT_INTERVAL", "off");
        command.arg("--dir").arg(path("store")).arg("restore");
        let output = command.args(args).output().expect("the command");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code(), said, says(&output))
    };
    let redirect = format!("{}={}", path("in1"), path("in2"));
    let made = restore(&["--template", "it", "--redirect", &redirect, "--", "this"]);
    let twice = "two with this\ntwo with this\n";
    assert_eq!((made.0, &made.1[..]), (None, twice), "{}", made.2);
    std::fs::write(place.dir.join("end"), "").unwrap();
    let again = restore(&["it~1"]);
    assert_eq!((again.0, &again.1[..]), (Some(73), twice), "{}", again.2);
}

mod threads {
    use super::*;

    #[test]
    fn one() {
        ends_with(
            trial("roll_threads", &["1", "3"], LAZY_FORK),
            "1 threads, 4 times\n",
        );
    }

    #[test]
    fn eight() {
        ends_with(
            trial("roll_threads", &["8", "3"], EAGER_COPY),
            "8 threads, 4 times\n",
        );
    }

    #[test]
    fn sixty_four() {
        ends_with(
            trial("roll_threads", &["64", "3"], LAZY_FORK),
            "64 threads, 4 times\n",
        );
    }

    /// With mprotect two threads had one signal stack after a rollback, where the id of one of them
    /// had been taken by somebody else: wrong registers, a mutex overwritten.
    #[test]
    fn whose_id_is_taken() {
        for tracker in ["mprotect", "uffd"] {
            let trial = trial("roll_ids", &[], LAZY_FORK);
            ends_with(trial.ckpt("CKPT_TRACKER", tracker), "ids ok\n");
        }
    }

    /// The same without any help, by chance: many threads, checkpoints and rollbacks. The leader
    /// of a rollback to before it had a signal stack kept the one it had got since, which was not
    /// mapped any more: one run in three ended with SIGSEGV at the next stop.
    #[test]
    fn in_a_storm_of_rollbacks() {
        for tracker in ["mprotect", "uffd"] {
            let trial = trial("roll_storm", &["6", "60"], LAZY_FORK);
            ends_with(trial.ckpt("CKPT_TRACKER", tracker), "60 rollbacks\n");
        }
    }

    /// Mutexes of every type, timed and kernel waits, a join: each of them once or often.
    #[test]
    fn in_every_other_wait() {
        for (tracker, threads) in [("uffd", "64"), ("mprotect", "19"), ("full", "8")] {
            let trial = trial("roll_waits", &[threads, "3"], LAZY_FORK);
            let said = format!("{threads} waits, 3 times\n");
            ends_with(trial.ckpt("CKPT_TRACKER", tracker), &said);
        }
    }

    /// Called by a thread that is not the first, which waits at a barrier.
    #[test]
    fn called_by_a_worker() {
        for caller in ["1", "5"] {
            let trial = trial("roll_threads", &["8", "3", caller], LAZY_FORK);
            ends_with(trial, "8 threads, 3 times\n");
        }
    }
}

/// Nothing grows: pages, mappings, descriptors.
#[test]
fn many_in_a_row() {
    for tracker in ["uffd", "mprotect", "full"] {
        let trial = trial("roll_many", &["150", "3"], LAZY_FORK);
        ends_with(trial.ckpt("CKPT_TRACKER", tracker), "150 rollbacks\n");
    }
}

/// 840-845: memory that stays mapped, and memory that has become something else since.
mod maps {
    use super::*;

    #[test]
    fn every_tracker() {
        for tracker in ["uffd", "mprotect", "full"] {
            let trial = trial("roll_maps", &[], LAZY_FORK);
            ends_with(trial.ckpt("CKPT_TRACKER", tracker), "maps ok\n");
        }
    }

    /// On memory that is mapped from the image after a recovery.
    #[test]
    fn of_an_image() {
        let mut trial = trial("roll_maps", &["die"], LAZY_FORK);
        let first = trial.start().end(LIMIT);
        if first.status.is_some() {
            let how = first.describe();
            trial.fail(&format!("it was to be killed: {how}"));
        }
        ends_with(trial, "maps ok\n");
    }
}

/// Regions of a mapping that no one may touch, without pages; after a rollback, and after a
/// recovery from a generation of its own or from an increment.
mod guard_regions {
    use super::*;

    /// Linux 6.13 has them, 6.15 tells where they are.
    fn kernel_has_them() -> bool {
        let text = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel");
        let mut numbers = text.split(['.', '-']).map_while(|n| n.parse::<u32>().ok());
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if version < (6, 15) {
            println!("NOT RUN: Linux {text} does not tell of guard regions");
        }
        version >= (6, 15)
    }

    #[test]
    fn go_back() {
        if !kernel_has_them() {
            return;
        }
        for tracker in ["uffd", "mprotect", "full"] {
            for (setting, how) in [
                (LAZY_FORK, "libc"),
                (EAGER_COPY, "libc"),
                (EAGER_COPY, "raw"),
            ] {
                let trial = trial("roll_guards", &["live", how], setting);
                ends_with(trial.ckpt("CKPT_TRACKER", tracker), "guards ok\n");
            }
        }
    }

    #[test]
    fn come_back() {
        if !kernel_has_them() {
            return;
        }
        for tracker in ["uffd", "mprotect", "full"] {
            for setting in [LAZY_FORK, EAGER_COPY] {
                let trial = trial("roll_guards", &["die"], setting);
                let mut trial = trial.ckpt("CKPT_TRACKER", tracker);
                let first = trial.start().end(LIMIT);
                if first.status.is_some() {
                    let how = first.describe();
                    trial.fail(&format!("it was to be killed: {how}"));
                }
                ends_with(trial, "guards ok\n");
            }
        }
    }
}

/// Many pages are put back by two threads, and stay open: the same pages each time, others each
/// time, checkpoints in between.
mod pages {
    use super::*;

    fn run(tracker: &str, rounds: &str, seed: &str) {
        let trial = trial("roll_pages", &["16", rounds, seed], LAZY_FORK);
        ends_with(trial.ckpt("CKPT_TRACKER", tracker), "pages ok\n");
    }

    #[test]
    fn uffd() {
        run("uffd", "60", "1");
    }

    #[test]
    fn mprotect() {
        run("mprotect", "30", "2");
    }

    #[test]
    fn full() {
        run("full", "10", "3");
    }
}

mod model {
    use super::*;

    fn run(tracker: &str, seed: &str, setting: Setting) {
        let trial = trial("roll_model", &["700", seed], setting);
        ends_with(trial.ckpt("CKPT_TRACKER", tracker), "model ok\n");
    }

    fn packed(method: &str, seed: &str) {
        for tracker in ["auto", "mprotect"] {
            let trial = trial("roll_model", &["300", seed], LAZY_FORK);
            let trial = trial.ckpt("CKPT_TRACKER", tracker);
            ends_with(trial.ckpt("CKPT_COMPRESS", method), "model ok\n");
        }
    }

    /// Images that must be unpacked before memory can be put back.
    #[test]
    fn lz4() {
        packed("lz4", "4");
    }

    #[test]
    fn zstd() {
        packed("zstd", "5");
    }

    #[test]
    fn uffd() {
        run("uffd", "1", LAZY_FORK);
    }

    #[test]
    fn mprotect() {
        run("mprotect", "2", LAZY_FORK);
    }

    #[test]
    fn full() {
        run("full", "3", EAGER_COPY);
    }
}

fn ckpt(trial: &Trial, args: &[&str]) -> Output {
    let mut command = Command::new(build::command());
    command.arg("--dir").arg(trial.dir.join("store")).args(args);
    command.output().expect("the command")
}

fn says(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn await_note(trial: &mut Trial, line: &str, times: usize, started: &mut Started) {
    let limit = Instant::now() + LIMIT;
    while trial.notes(line) < times {
        if Instant::now() > limit || started.has_ended() {
            trial.fail(&format!("there is no {line:?} in its log"));
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// From outside, 800 "which checkpoint?": explicit id, latest; a value; what is not there.
#[test]
fn from_outside() {
    let trial = trial("roll_loop", &["2", "own"], LAZY_FORK);
    let excluded = format!(
        "{0}/values:{0}/../guest.log",
        path_text(&trial.dir.join("run"))
    );
    let log = path_text(&trial.dir.join("guest.log"));
    let mut trial = trial.ckpt("CKPT_EXCLUDE", &format!("{excluded}:{log}"));
    let mut started = trial.start();
    trial.await_generation(&mut started, 0);
    let pid = started.id.to_string();
    for (args, reason) in [
        (&["rollback", &pid, "17"][..], "no checkpoint with id 17"),
        (
            &["rollback", &pid, "--generation", "99"][..],
            "no generation 99",
        ),
    ] {
        let refused = ckpt(&trial, args);
        if refused.status.code() != Some(1) || !says(&refused).contains(reason) {
            trial.fail(&format!("{args:?}: {refused:?}"));
        }
    }
    let back = ckpt(&trial, &["rollback", &pid, "9", "--value", "5"]);
    if !back.status.success() {
        trial.fail(&says(&back));
    }
    await_note(&mut trial, "back", 1, &mut started);
    let back = ckpt(&trial, &["rollback", &pid, "--value", "4711"]);
    // It may end before it is asked for the answer.
    if !back.status.success() && !says(&back).contains("ended before") {
        trial.fail(&says(&back));
    }
    let life = started.end(LIMIT);
    check_end(trial, life, "5 4711 \n");
}

/// Of several commands that ask at the same time some were never answered: what is open when the
/// process goes back is not in the image, and an answer was gone before it was read.
#[test]
fn several_commands_at_once() {
    let trial = trial("roll_loop", &["16", "own"], LAZY_FORK);
    let (run, log) = (trial.dir.join("run"), trial.dir.join("guest.log"));
    let excluded = format!("{}/values:{}", path_text(&run), path_text(&log));
    let mut trial = trial.ckpt("CKPT_EXCLUDE", &excluded);
    let mut started = trial.start();
    trial.await_generation(&mut started, 0);
    let pid = started.id.to_string();
    let asked: Vec<_> = (1..=12)
        .map(|k| {
            let value = k.to_string();
            let args: &[&str] = match k % 4 {
                0 => &["checkpoint", &pid, "--wait", "--timeout", "60"],
                _ => &["rollback", &pid, "9", "--value", &value, "--timeout", "60"],
            };
            let mut command = Command::new(build::command());
            command.arg("--dir").arg(trial.dir.join("store")).args(args);
            let command = command.stderr(std::process::Stdio::piped());
            command.spawn().expect("the command")
        })
        .collect();
    for asked in asked {
        let answered = asked.wait_with_output().expect("the command");
        if !answered.status.success() {
            trial.fail(&says(&answered));
        }
    }
    started.kill(true);
}

/// A region that did not fit into the library's own heap (1 GiB, less where the address space is
/// limited) was refused.
#[test]
fn a_large_protected_region() {
    ends_with(trial("roll_large", &[], LAZY_FORK), "large ok\n");
}

/// "Rollback or recovery?": killed between rollbacks it goes on from its newest checkpoint,
/// and a rollback after a recovery works as before it.
#[test]
fn recovery_and_rollback() {
    let mut trial = trial("roll_loop", &["3", "own"], LAZY_FORK);
    let values = path_text(&trial.dir.join("run/values"));
    let log = path_text(&trial.dir.join("guest.log"));
    trial = trial
        .ckpt("CKPT_EXCLUDE", &format!("{values}:{log}"))
        .ckpt("CKPT_RETURN_VALUE", "8");
    let mut started = trial.start();
    trial.await_generation(&mut started, 0);
    let back = ckpt(
        &trial,
        &["rollback", &started.id.to_string(), "9", "--value", "5"],
    );
    if !back.status.success() {
        trial.fail(&says(&back));
    }
    await_note(&mut trial, "back", 1, &mut started);
    started.kill(true);
    let mut started = trial.start();
    await_note(&mut trial, "back", 2, &mut started);
    let back = ckpt(
        &trial,
        &["rollback", &started.id.to_string(), "--value", "6"],
    );
    if !back.status.success() && !says(&back).contains("ended before") {
        trial.fail(&says(&back));
    }
    let life = started.end(LIMIT);
    check_end(trial, life, "5 8 6 \n");
}
