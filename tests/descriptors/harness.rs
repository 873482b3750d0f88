//! Runs the two phases of a case in child processes.

use ckpt::agent::collect::descriptors::{self as collect, ContentSink, Known, Target};
use ckpt::agent::recover::files::FilesBack;
use ckpt::agent::restore::descriptors::{self as restore, ContentSource, Context, Restored};
use ckpt::image::state::{DescriptorTable, Extent, FileKind};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

pub struct Case {
    pub name: &'static str,
    /// Makes the descriptors, in the case's directory.
    pub setup: fn(),
    /// Looks at them in the new process.
    pub check: fn(&Restored),
    /// Part of the reason why the case cannot be collected or restored.
    pub refused: Option<&'static str>,
    /// Run between the phases, in the test process.
    pub between: fn(&Path),
}

impl Case {
    pub fn new(name: &'static str, setup: fn(), check: fn(&Restored)) -> Case {
        Case {
            name,
            setup,
            check,
            refused: None,
            between: |_| {},
        }
    }
}

const NOBODY: u32 = 65534;

pub fn run(name: &str, cases: &[Case]) {
    let case = cases.iter().find(|c| c.name == name).expect("case");
    // SAFETY: no arguments.
    let users: &[Option<u32>] = match unsafe { libc::geteuid() } {
        0 => &[None, Some(NOBODY)],
        _ => &[None],
    };
    for &user in users {
        let dir = std::env::temp_dir().join(format!(
            "ckpt-fds-{}-{}-{}",
            std::process::id(),
            name,
            user.unwrap_or(0)
        ));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).unwrap();
        if let Some(id) = user {
            std::os::unix::fs::chown(&dir, Some(id), Some(id)).unwrap();
        }
        child("save", case, &dir, user);
        (case.between)(&dir);
        child("load", case, &dir, user);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

fn child(phase: &str, case: &Case, dir: &Path, user: Option<u32>) {
    let _ = std::fs::remove_file(dir.join("stderr"));
    let mut appending = std::fs::OpenOptions::new();
    let log = appending.create(true).append(true).open(dir.join("stderr"));
    let log = log.unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["phase", "--exact", "--nocapture", "--test-threads=1"])
        .env("CKPT_TEST_PHASE", phase)
        .env("CKPT_TEST_CASE", case.name)
        .env("CKPT_TEST_DIR", dir)
        .env("RUST_BACKTRACE", "0")
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(dir.join("stdout")).unwrap())
        .stderr(log);
    if let Some(id) = user {
        command.uid(id).gid(id);
    }
    let status = command.status().unwrap();
    let text = std::fs::read_to_string(dir.join("stderr")).unwrap_or_default();
    assert!(
        status.code() == Some(73),
        "{} {phase} as {user:?}: {status}\n{text}\n(in {})",
        case.name,
        dir.display()
    );
    if !text.is_empty() {
        eprintln!("{} {phase} as {user:?}: {text}", case.name);
    }
}

/// The system calls that collecting a case's table takes the second time, by name (strace
/// is needed).
pub fn calls_of_collecting(case: &Case) -> std::collections::BTreeMap<String, usize> {
    let dir = std::env::temp_dir().join(format!("ckpt-fds-{}-calls", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("stderr"), "").unwrap();
    let status = Command::new("strace")
        .args(["-f", "-q", "-o", "trace", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["phase", "--exact", "--nocapture", "--test-threads=1"])
        .env("CKPT_TEST_PHASE", "save")
        .env("CKPT_TEST_CASE", case.name)
        .env("CKPT_TEST_DIR", &dir)
        .current_dir(&dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .expect("strace is needed");
    let trace = std::fs::read_to_string(dir.join("trace")).unwrap();
    let said = std::fs::read_to_string(dir.join("stderr")).unwrap();
    assert_eq!(status.code(), Some(73), "{said}");
    std::fs::remove_dir_all(&dir).unwrap();
    // The collecting thread is the one that takes a table of its own.
    let helper = trace
        .lines()
        .find(|line| line.contains("unshare(CLONE_FILES"));
    let helper = helper.and_then(|line| line.split_once(' ')).unwrap().0;
    let mut calls = std::collections::BTreeMap::new();
    let begin = trace.lines().position(|line| line.contains("getppid("));
    for line in trace.lines().skip(begin.unwrap() + 1) {
        let Some((thread, call)) = line.split_once(' ') else {
            continue;
        };
        if call.contains("getppid(") {
            break;
        }
        let name = call.trim_start().split_once('(').unwrap_or_default().0;
        if thread == helper && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            *calls.entry(name.to_owned()).or_insert(0) += 1;
        }
    }
    calls
}

/// Are tests' files on a file system with a device of its own?
pub fn has_device() -> bool {
    use std::os::unix::fs::MetadataExt;
    let dev = std::env::temp_dir().metadata().unwrap().dev();
    libc::major(dev) != 0
}

/// Says something to the test's log: 2 may be anything in a case.
pub fn say(line: &str) {
    use std::io::Write;
    let path = PathBuf::from(std::env::var("CKPT_TEST_DIR").unwrap()).join("stderr");
    let mut log = std::fs::OpenOptions::new().append(true).open(path);
    if let Ok(log) = &mut log {
        let _ = writeln!(log, "{line}");
    }
}

pub fn phase(cases: &[Case]) {
    let Ok(phase) = std::env::var("CKPT_TEST_PHASE") else {
        return;
    };
    std::panic::set_hook(Box::new(|info| say(&format!("{info}"))));
    // SAFETY: plain calls; every descriptor of the test harness but 0-2 is closed.
    unsafe {
        libc::close_range(3, u32::MAX, 0);
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        libc::alarm(30);
    }
    let name = std::env::var("CKPT_TEST_CASE").unwrap();
    let case = cases.iter().find(|c| c.name == name).unwrap();
    let code = match &phase[..] {
        "save" => save(case),
        _ => load(case),
    };
    // SAFETY: ends the process at once.
    unsafe { libc::_exit(code) };
}

struct Pages(Vec<u8>);

impl ContentSink for Pages {
    fn append(&mut self, pages: &[u8]) -> Result<u64, i32> {
        let at = self.0.len() as u64;
        self.0.extend_from_slice(pages);
        Ok(at)
    }
}

impl ContentSource for Pages {
    fn read(&self, extent: &Extent, skip: u64, buf: &mut [u8]) -> Result<(), i32> {
        let at = (extent.offset + skip) as usize;
        buf.copy_from_slice(&self.0[at..at + buf.len()]);
        Ok(())
    }
}

/// What a collection says of descriptors and files (timers and the like go on).
fn steady<E: std::fmt::Debug>(table: &Result<DescriptorTable, E>) -> String {
    let table = match table {
        Ok(table) => table,
        Err(refusal) => return format!("{refusal:?}"),
    };
    let files = table.files.iter().filter(|file| {
        matches!(
            file.kind,
            FileKind::Regular { .. } | FileKind::Directory { .. }
        )
    });
    let files: Vec<_> = files.collect();
    format!("{:?} {files:?} {:?}", table.fds, table.locks)
}

fn save(case: &Case) -> i32 {
    let inherited = collect::inherited_now();
    // Low numbers are taken while the case is set up, so that what it opens does
    // not land where it puts something else.
    // SAFETY: no memory is involved.
    let marker = at(3, unsafe { libc::eventfd(0, 0) });
    (4..50).for_each(|fd| dup(marker, fd));
    dup(marker, 999);
    (case.setup)();
    for fd in (3..50).chain([999]) {
        if same_description(fd, 999) {
            // SAFETY: no memory is involved.
            unsafe { libc::close(fd) };
        }
    }
    // SAFETY: no arguments.
    let (pid, tid) = unsafe { (libc::getpid(), libc::gettid()) };
    let target = Target {
        pid,
        tid,
        program_pid: pid,
        inherited,
        path_hints: Vec::new(),
        job: std::path::PathBuf::new(),
    };
    let helper = std::thread::spawn(move || {
        // SAFETY: gives this thread a descriptor table of its own, emptied.
        unsafe {
            assert_eq!(libc::unshare(libc::CLONE_FILES), 0);
            libc::close_range(0, u32::MAX, 0);
        }
        let mut pages = Pages(Vec::new());
        let mut known = Known::default();
        let table = collect::collect(&target, &mut known, &mut pages);
        // Once more, with what the first time has left, as at the next checkpoint.
        // SAFETY: no arguments; a mark in traces.
        unsafe { libc::getppid() };
        let mut again = Pages(Vec::new());
        let start = Instant::now();
        let next = collect::collect(&target, &mut known, &mut again);
        let took = start.elapsed();
        // SAFETY: no arguments; the other mark.
        unsafe { libc::getppid() };
        drop(known);
        assert_eq!(steady(&table), steady(&next));
        let left = collect::inherited_now();
        assert_eq!(left, [], "descriptors left open in the helper");
        (table, pages.0, took)
    });
    let (table, pages, took) = helper.join().unwrap();
    let table = match (table, case.refused) {
        (Err(refusal), Some(part)) if refusal.reason.contains(part) => {
            say(&format!("refused: {refusal}"));
            std::fs::write("refused", "").unwrap();
            return 73;
        }
        (Err(refusal), _) => {
            say(&format!("refused: {refusal}"));
            return 1;
        }
        (Ok(table), _) => table,
    };
    if table.fds.len() > 500 {
        say(&format!(
            "collected {} descriptors in {took:?}",
            table.fds.len()
        ));
    }
    let coded = bincode::serde::encode_to_vec(&table, bincode::config::standard()).unwrap();
    std::fs::write("table", coded).unwrap();
    std::fs::write("pages", pages).unwrap();
    std::fs::write("pid", pid.to_string()).unwrap();
    73
}

fn load(case: &Case) -> i32 {
    if std::fs::exists("refused").unwrap() {
        return 73;
    }
    let coded = std::fs::read("table").unwrap();
    let table: DescriptorTable =
        bincode::serde::decode_from_slice(&coded, bincode::config::standard())
            .unwrap()
            .0;
    let pages = Pages(std::fs::read("pages").unwrap());
    let program_pid = std::fs::read_to_string("pid").unwrap().parse().unwrap();
    // A descriptor to be kept, in the way of what the image needs; and some that
    // must be closed.
    let probe = std::fs::File::open("pid").unwrap();
    let keep = std::os::fd::IntoRawFd::into_raw_fd(probe);
    for _ in 0..5 {
        let _ = std::os::fd::IntoRawFd::into_raw_fd(std::fs::File::open("pid").unwrap());
    }
    let mut kept = [keep];
    let files = FilesBack::default();
    let mut ctx = Context {
        files: &files,
        keep: &mut kept,
        inside: false,
        program_pid,
        warn: &mut |line| say(&format!("warning: {line}")),
    };
    let start = Instant::now();
    let result = restore::restore(&table, &pages, &mut ctx);
    let took = start.elapsed();
    let restored = match (result, case.refused) {
        (Err(e), Some(part)) if e.to_string().contains(part) => {
            say(&format!("refused: {e}"));
            return 73;
        }
        (Err(e), _) => {
            say(&format!("cannot restore: {e}"));
            return 1;
        }
        (Ok(_), Some(part)) => {
            say(&format!("should have been refused: {part}"));
            return 1;
        }
        (Ok(restored), None) => restored,
    };
    if table.fds.len() > 500 {
        say(&format!(
            "restored {} descriptors in {took:?}",
            table.fds.len()
        ));
    }
    // Exactly the image's numbers, with their close-on-exec flags, and the kept one.
    let mut open: Vec<i32> = collect::inherited_now().iter().map(|i| i.fd).collect();
    open.sort_unstable();
    let mut want: Vec<i32> = table.fds.iter().map(|d| d.fd).chain(kept).collect();
    want.sort_unstable();
    assert_eq!(open, want, "open descriptors");
    for d in &table.fds {
        // SAFETY: no memory is involved.
        let flags = unsafe { libc::fcntl(d.fd, libc::F_GETFD) };
        assert_eq!(
            flags & libc::FD_CLOEXEC != 0,
            d.cloexec,
            "cloexec of {}",
            d.fd
        );
        // SAFETY: as above.
        let flags = unsafe { libc::fcntl(d.fd, libc::F_GETFL) } as u32;
        let compared = (libc::O_ACCMODE
            | libc::O_APPEND
            | libc::O_NONBLOCK
            | libc::O_DIRECT
            | libc::O_PATH
            | libc::O_SYNC) as u32;
        if d.fd > 2 {
            let want = table.files[d.file as usize].flags;
            assert_eq!(flags & compared, want & compared, "flags of {}", d.fd);
        }
    }
    (case.check)(&restored);
    73
}

// What the cases are written with.

/// Moves a fresh descriptor to `number`.
pub fn at(number: i32, fd: i32) -> i32 {
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    if fd != number {
        // SAFETY: no memory is involved.
        unsafe {
            assert_eq!(libc::dup2(fd, number), number);
            libc::close(fd);
        }
    }
    number
}

pub fn dup(from: i32, to: i32) {
    // SAFETY: no memory is involved.
    assert_eq!(unsafe { libc::dup2(from, to) }, to);
}

pub fn open(path: &str, flags: i32) -> i32 {
    let path = std::ffi::CString::new(path).unwrap();
    // SAFETY: a live path.
    let fd = unsafe { libc::open(path.as_ptr(), flags, 0o644) };
    assert!(fd >= 0, "{path:?}: {}", std::io::Error::last_os_error());
    fd
}

pub fn write(fd: i32, data: &[u8]) -> isize {
    // SAFETY: live data.
    unsafe { libc::write(fd, data.as_ptr().cast(), data.len()) }
}

/// One read of up to `n` bytes; an error is its errno.
pub fn read(fd: i32, n: usize) -> Result<Vec<u8>, i32> {
    let mut buf = vec![0u8; n];
    // SAFETY: live buffer.
    let got = unsafe { libc::read(fd, buf.as_mut_ptr().cast(), n) };
    if got < 0 {
        return Err(std::io::Error::last_os_error().raw_os_error().unwrap());
    }
    buf.truncate(got as usize);
    Ok(buf)
}

pub fn pos(fd: i32) -> i64 {
    // SAFETY: no memory is involved.
    unsafe { libc::lseek(fd, 0, libc::SEEK_CUR) }
}

pub fn seek(fd: i32, to: i64) {
    // SAFETY: no memory is involved.
    assert_eq!(unsafe { libc::lseek(fd, to, libc::SEEK_SET) }, to);
}

pub fn fcntl(fd: i32, cmd: i32, arg: i32) -> i32 {
    // SAFETY: integer commands only.
    unsafe { libc::fcntl(fd, cmd, arg) }
}

pub fn stat(fd: i32) -> libc::stat {
    // SAFETY: a live, plain struct.
    unsafe {
        let mut st = std::mem::zeroed();
        assert_eq!(libc::fstat(fd, &raw mut st), 0);
        st
    }
}

/// Events ready now.
pub fn poll(fd: i32) -> i16 {
    let events = libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP;
    let mut p = libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    // SAFETY: one live pollfd.
    unsafe { libc::poll(&raw mut p, 1, 0) };
    p.revents
}

pub fn same_description(a: i32, b: i32) -> bool {
    // SAFETY: no memory is involved.
    unsafe {
        let pid = libc::getpid();
        libc::syscall(libc::SYS_kcmp, pid, pid, 0, a, b) == 0
    }
}
