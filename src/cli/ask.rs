//! Asking a running program: a signal with a value there, a file back.
//!
//! The signal is the library's reserved one (64), whose default action is death; so it
//! is only ever sent to a process that has the library loaded and catches it, through
//! a pidfd, so that it cannot reach a later process of the same number.

use super::output::print_json;
use super::{Cli, NO_ANSWER, exit, select};
use crate::agent::restore::proxy::STARTER_NAME;
use crate::config::Config;
use crate::store::report::{ASLEEP, Ask, Report, RequestResult, encode_request};
use crate::store::store_root;
use anyhow::{Context, bail};
use procfs::process::Process;
use serde_json::json;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const RESERVED_SIGNAL: i32 = crate::agent::state::RESERVED_SIGNAL;

/// A process with the library in it.
pub struct Target {
    pub pid: i32,
    pidfd: OwnedFd,
    start_time: u64,
    pub root: PathBuf,
}

impl Target {
    /// The process that `name` means: a pid, or a job with a live owner.
    pub fn find(cli: &Cli, name: &str) -> anyhow::Result<Target> {
        let root = select::root(cli)?;
        let pid = match name.parse::<i32>() {
            Ok(pid) if Path::new(&format!("/proc/{pid}")).exists() => pid,
            number => {
                let job = select::job(&root, Some(name)).map_err(|error| match number {
                    Ok(pid) => anyhow::anyhow!("there is no process and no job {pid}"),
                    Err(_) => error,
                })?;
                match select::owner(&job) {
                    Some(owner) => owner.pid,
                    None => bail!("job {} is not running", job.name()),
                }
            }
        };
        Target::open(cli, pid)
    }

    /// Checks that the process can be asked.
    pub fn open(cli: &Cli, pid: i32) -> anyhow::Result<Target> {
        // SAFETY: pidfd_open takes two integers and returns a new descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let error = std::io::Error::last_os_error();
        if fd < 0 {
            return Err(error).with_context(|| format!("process {pid}"));
        }
        // SAFETY: the descriptor is new and ours.
        let pidfd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let process = Process::new(pid).with_context(|| format!("process {pid}"))?;
        let status = process.status().with_context(|| format!("process {pid}"))?;
        if status.name == STARTER_NAME
            && let Some(program) = only_child(pid)
        {
            return Target::open(cli, program);
        }
        let loaded = process.maps().with_context(|| format!("process {pid}"))?;
        let loaded = loaded.into_iter().any(|map| match map.pathname {
            procfs::process::MMapPath::Path(path) => {
                path.file_name().is_some_and(|name| name == "libckpt.so")
            }
            _ => false,
        });
        if !loaded {
            bail!("process {pid} does not run under the library (libckpt.so is not loaded)");
        }
        if status.sigcgt >> (RESERVED_SIGNAL - 1) & 1 == 0 {
            bail!("the library is asleep in process {pid}");
        }
        let start_time = process
            .stat()
            .with_context(|| format!("process {pid}"))?
            .starttime;
        let root = match &cli.dir {
            Some(_) => select::root(cli)?,
            None => root_of(&process).unwrap_or(select::root(cli)?),
        };
        Ok(Target {
            pid,
            pidfd,
            start_time,
            root,
        })
    }

    /// Sends a request and returns its nonce.
    pub fn send(&self, kind: u64) -> anyhow::Result<u32> {
        self.send_as(kind, nonce())
    }

    /// Sends a request that has more to say than a signal can carry.
    pub fn ask(&self, kind: u64, ask: &Ask) -> anyhow::Result<u32> {
        let nonce = nonce();
        let path = Ask::path(&self.root, self.pid, nonce);
        self.make_run_directory()?;
        let writing = || format!("write {}", path.display());
        std::fs::write(&path, ask.to_line()).with_context(writing)?;
        // Root asks for others too.
        let readable = std::fs::Permissions::from_mode(0o644);
        std::fs::set_permissions(&path, readable).with_context(writing)?;
        self.send_as(kind, nonce)
    }

    /// The directory of reports, which belongs to whom the store belongs.
    fn make_run_directory(&self) -> anyhow::Result<()> {
        let run = self.root.join("run");
        let store = std::fs::metadata(&self.root);
        let store = store.with_context(|| format!("store {}", self.root.display()))?;
        match std::fs::create_dir(&run) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
            other => other.with_context(|| format!("create {}", run.display()))?,
        }
        std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o700))?;
        std::os::unix::fs::chown(&run, Some(store.uid()), Some(store.gid()))?;
        Ok(())
    }

    fn send_as(&self, kind: u64, nonce: u32) -> anyhow::Result<u32> {
        if let Ok(report) = read_report(&self.root, self.pid)
            && report.start_time == self.start_time
            && report.state == ASLEEP
        {
            let reason = report.last_refusal.map_or(String::new(), |r| r.reason);
            bail!("the library is asleep in process {}: {reason}", self.pid);
        }
        let mut info = [0u8; 128];
        let mut put = |at: usize, bytes: &[u8]| info[at..at + bytes.len()].copy_from_slice(bytes);
        // siginfo_t of a queued signal: si_signo, si_code, si_pid, si_uid, si_value.
        put(0, &RESERVED_SIGNAL.to_ne_bytes());
        put(8, &libc::SI_QUEUE.to_ne_bytes());
        put(16, &(std::process::id() as i32).to_ne_bytes());
        put(20, &nix::unistd::getuid().as_raw().to_ne_bytes());
        put(24, &encode_request(kind, nonce).to_ne_bytes());
        // SAFETY: `info` has the size of a siginfo_t and outlives the call.
        let sent = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                RESERVED_SIGNAL,
                info.as_ptr(),
                0,
            )
        };
        let error = std::io::Error::last_os_error();
        if sent != 0 {
            return Err(error).with_context(|| format!("ask process {}", self.pid));
        }
        Ok(nonce)
    }

    /// An answer as JSON.
    pub fn print_answer(&self, report: &Report, result: &RequestResult) {
        print_json(&json!({
            "pid": self.pid,
            "job": report.job,
            "generation": result.generation,
            "error": result.error,
        }));
    }

    /// Waits for the report that answers `nonce`.
    pub fn wait(
        &self,
        nonce: u32,
        timeout: Option<Duration>,
    ) -> anyhow::Result<(Report, RequestResult)> {
        let begun = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            if let Ok(report) = read_report(&self.root, self.pid)
                && report.start_time == self.start_time
                && let Some(answer) = report.requests.iter().find(|r| r.nonce == nonce)
            {
                let answer = answer.clone();
                return Ok((report, answer));
            }
            if !self.is_alive() {
                bail!("process {} ended before it answered", self.pid);
            }
            if timeout.is_some_and(|timeout| begun.elapsed() >= timeout) {
                let refusal = read_report(&self.root, self.pid).ok();
                let refusal = refusal.and_then(|report| report.last_refusal);
                let reason = refusal.map_or(String::new(), |r| format!(": {}", r.reason));
                let message = format!("process {} has not answered in time{reason}", self.pid);
                return Err(exit(NO_ANSWER, message));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    fn is_alive(&self) -> bool {
        let stat = Process::new(self.pid).and_then(|process| process.stat());
        stat.is_ok_and(|s| s.starttime == self.start_time && !matches!(s.state, 'Z' | 'X'))
    }
}

/// The program behind a starter that stands in for it.
fn only_child(pid: i32) -> Option<i32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

/// The store that the process itself uses: its environment decides.
fn root_of(process: &Process) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let environment = process.environ().ok()?;
    let pairs = environment
        .iter()
        .map(|(n, v)| (n.as_bytes(), v.as_bytes()));
    store_root(&Config::from_env(pairs).ok()?).ok()
}

/// The report of a process, as it last wrote it.
pub fn read_report(root: &Path, pid: i32) -> anyhow::Result<Report> {
    let path = Report::path(root, pid);
    let bytes = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("read {}", path.display()))
}

/// Different for every request that one program may get at a time.
fn nonce() -> u32 {
    let mut bytes = [0; 4];
    let random = std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes));
    match random {
        Ok(()) => u32::from_ne_bytes(bytes).max(1),
        Err(_) => std::process::id(),
    }
}
