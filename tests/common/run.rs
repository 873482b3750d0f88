//! One life of a test program: started in a session of its own, killed or left to end,
//! with a deadline on everything. Nothing is concluded from zombies.

use super::{Program, contained, user};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

pub struct Started {
    child: Child,
    /// Process id, group and session alike.
    pub id: i32,
    dir: PathBuf,
    begun: Instant,
    ended: Option<ExitStatus>,
}

/// What a process takes of the machine; sizes in KiB.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub mappings: usize,
    pub descriptors: usize,
    pub resident: usize,
    pub address_space: usize,
}

/// What a life left behind.
pub struct Life {
    pub status: Option<i32>,
    pub signal: Option<i32>,
    pub stdout: Vec<u8>,
    pub lived: Duration,
}

impl Life {
    pub fn describe(&self) -> String {
        let end = match (self.status, self.signal) {
            (Some(status), _) => format!("status {status}"),
            (_, Some(signal)) => format!("signal {signal}"),
            _ => "no end".to_owned(),
        };
        format!("{end} after {} ms", self.lived.as_millis())
    }
}

/// Starts it in `dir`, with standard output to `dir/stdout`, which is not truncated: a
/// resumed program goes on where it was.
pub fn start(program: &Program, dir: &Path, env: &BTreeMap<String, String>) -> Started {
    let input = match &program.input {
        None => PathBuf::from("/dev/null"),
        Some(content) => {
            let path = dir.join("stdin");
            if !path.exists() {
                std::fs::write(&path, content).expect("the input file");
            }
            path
        }
    };
    let mut command = prepare(program, dir, env);
    command
        .stdin(Stdio::from(File::open(input).expect("the input")))
        .stdout(Stdio::from(output(dir, "stdout", false)));
    spawn(command, dir)
}

/// A file of the program's user in `dir`, not truncated.
pub fn output(dir: &Path, name: &str, append: bool) -> File {
    let mut options = OpenOptions::new();
    options.create(true).mode(0o666).append(append).write(true);
    let path = dir.join(name);
    let file = options
        .open(&path)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    if let Some(user) = user::ordinary() {
        std::os::unix::fs::chown(&path, Some(user.uid), Some(user.gid)).expect("chown");
    }
    file
}

/// Everything but standard input and output.
pub fn prepare(program: &Program, dir: &Path, env: &BTreeMap<String, String>) -> Command {
    for (name, content) in &program.files {
        let path = dir.join(name);
        if !path.exists() {
            std::fs::write(&path, content).expect("an input file");
        }
    }
    let mut command = Command::new(&program.path);
    command
        .args(&program.args)
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
        .env("HOME", dir)
        .env("LANG", "C.UTF-8")
        .env("TMPDIR", dir)
        .envs(env)
        .current_dir(dir)
        .stdin(Stdio::null())
        .stderr(Stdio::from(output(dir, "stderr", true)));
    if program.ahead > 0 {
        be_ahead(&mut command, program.ahead);
    }
    let user = user::ordinary();
    // SAFETY: only system calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            if libc::setsid() < 0 {
                return Err(std::io::Error::last_os_error());
            }
            if let Some(user) = user
                && (libc::setgroups(0, std::ptr::null()) < 0
                    || libc::setgid(user.gid) < 0
                    || libc::setuid(user.uid) < 0)
            {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    if program.contained {
        contained::contain(&mut command);
    }
    command
}

/// A time namespace whose clocks that count from the machine's start are ahead by so many
/// seconds. Entered by exec (Linux 6.1).
pub fn be_ahead(command: &mut Command, seconds: u64) {
    const CLONE_NEWTIME: i32 = 0x80;
    let text = format!("monotonic {seconds} 0\nboottime {seconds} 0\n");
    // SAFETY: only system calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            let path = c"/proc/self/timens_offsets";
            let failed = libc::unshare(CLONE_NEWTIME) < 0 || {
                let fd = libc::open(path.as_ptr(), libc::O_WRONLY);
                let written = libc::write(fd, text.as_ptr().cast(), text.len());
                libc::close(fd);
                written != text.len() as isize
            };
            match failed {
                true => Err(std::io::Error::last_os_error()),
                false => Ok(()),
            }
        });
    }
}

pub fn spawn(mut command: Command, dir: &Path) -> Started {
    let child = command
        .spawn()
        .unwrap_or_else(|e| panic!("{:?}: {e}", command.get_program()));
    Started {
        id: child.id() as i32,
        child,
        dir: dir.to_owned(),
        begun: Instant::now(),
        ended: None,
    }
}

impl Started {
    pub fn has_ended(&mut self) -> bool {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().expect("wait for the program");
        }
        self.ended.is_some()
    }

    fn wait(&mut self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while !self.has_ended() {
            if Instant::now() > until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(3));
        }
        true
    }

    /// Waits for its end by itself. After the deadline it is killed and has neither status
    /// nor signal.
    pub fn end(mut self, limit: Duration) -> Life {
        let in_time = self.wait(limit);
        let lived = self.begun.elapsed();
        if !in_time {
            // The last words of a hang: what each thread waits for.
            let stacks = hang_report(self.id);
            eprintln!("hangs after {limit:?}:\n{stacks}");
        }
        self.reap();
        self.life(in_time, lived)
    }

    /// SIGKILL for the whole group, or for the process alone, after which nothing of it
    /// may go on living.
    pub fn kill(mut self, whole_group: bool) -> Life {
        let target = if whole_group { -self.id } else { self.id };
        let lived = self.begun.elapsed();
        // SAFETY: kill has no memory effects; the id is our unreaped child's.
        unsafe { libc::kill(target, libc::SIGKILL) };
        assert!(
            self.wait(Duration::from_secs(20)),
            "process {} does not die of SIGKILL",
            self.id
        );
        // Who waits for a disk that others keep busy can die no earlier than it answers: 8 s were
        // seen. That does not count, up to a point.
        let patience = [Duration::from_secs(5), Duration::from_secs(60)];
        let (dead, mut runnable) = (Instant::now(), Duration::ZERO);
        let step = Duration::from_millis(2);
        let mut left = members(self.id);
        while !left.is_empty() && runnable < patience[0] && dead.elapsed() < patience[1] {
            std::thread::sleep(step);
            left = members(self.id);
            if left.iter().any(|&id| !waits_for_a_disk(id)) {
                runnable += step;
            }
        }
        assert!(
            left.is_empty(),
            "{left:?} of the session outlive the killed process {}:\n{}",
            self.id,
            hang_report(self.id)
        );
        self.life(true, lived)
    }

    fn life(&self, in_time: bool, lived: Duration) -> Life {
        let status = self.ended.filter(|_| in_time);
        Life {
            status: status.and_then(|s| s.code()),
            signal: status.and_then(|s| s.signal()),
            stdout: std::fs::read(self.dir.join("stdout")).unwrap_or_default(),
            lived,
        }
    }

    /// The process that runs the program: after a recovery with set_tid it is a child of
    /// the started process. (The library's writer is a child of the program.)
    fn program(&self) -> i32 {
        let is_it = |id: &i32| {
            let read = |name| std::fs::read_to_string(format!("/proc/{id}/{name}"));
            let stat = read("stat").unwrap_or_default();
            let parent = stat
                .rsplit(')')
                .next()
                .and_then(|r| r.split_whitespace().nth(1));
            parent.and_then(|p| p.parse().ok()) == Some(self.id)
                && read("comm").is_ok_and(|name| name.trim() != "ckpt-writer")
        };
        members(self.id).into_iter().find(is_it).unwrap_or(self.id)
    }

    pub fn sizes(&self) -> Sizes {
        let id = self.program();
        let maps = std::fs::read_to_string(format!("/proc/{id}/maps")).unwrap_or_default();
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let kilobytes = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
                .unwrap_or(0)
        };
        Sizes {
            mappings: maps.lines().count(),
            descriptors: std::fs::read_dir(format!("/proc/{id}/fd")).map_or(0, Iterator::count),
            resident: kilobytes("VmRSS:"),
            address_space: kilobytes("VmSize:"),
        }
    }

    fn reap(&mut self) {
        // SAFETY: as above; the group is this test's own.
        unsafe { libc::kill(-self.id, libc::SIGKILL) };
        if self.ended.is_none() {
            self.wait(Duration::from_secs(20));
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        self.reap();
    }
}

/// Living (not zombie) processes of the session.
pub fn members(session: i32) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let Some((_, rest)) = stat.rsplit_once(')') else {
            continue;
        };
        let fields: Vec<_> = rest.split_whitespace().collect();
        let alive = !matches!(fields.first(), Some(&"Z") | Some(&"X"));
        if alive && fields.get(3).and_then(|s| s.parse().ok()) == Some(session) {
            found.push(id);
        }
    }
    found
}

/// Is a thread of it in an uninterruptible wait (state D)?
fn waits_for_a_disk(id: i32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{id}/task"));
    tasks.into_iter().flatten().flatten().any(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        rest.trim_start().starts_with('D')
    })
}

fn hang_report(session: i32) -> String {
    let mut text = String::new();
    for id in members(session) {
        let tasks = std::fs::read_dir(format!("/proc/{id}/task"))
            .into_iter()
            .flatten();
        for task in tasks.flatten().take(20) {
            let read = |name: &str| {
                let content = std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
                content.trim().replace('\n', " ")
            };
            let stat = read("stat");
            let state = stat.rsplit(')').next().unwrap_or("").trim().chars().next();
            text += &format!(
                "  {} {} state {} wchan {} syscall {}\n",
                task.path().display(),
                read("comm"),
                state.unwrap_or('?'),
                read("wchan"),
                read("syscall")
            );
        }
    }
    text
}
