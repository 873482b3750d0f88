//! The same process id again: where permitted, the image is restored in a child that
//! gets the old id (clone3 with set_tid), and the process that was started becomes
//! its proxy: it forwards signals and ends as the child ends.
//!
//! Constructor of the new process, one thread. Uses std and libc freely.

use crate::agent::{log, procfs};
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

/// What became of the attempt.
#[derive(Debug, PartialEq, Eq)]
pub enum Identity {
    /// This process has the old id now (it already had, or it is the child).
    Same,
    /// Not permitted, or the id is taken: ids must be translated.
    Other,
}

/// `struct clone_args` up to set_tid_size (clone3(2)).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
}

/// A process that dies gives its memory back first, which takes a while where it is much.
const PATIENCE: Duration = Duration::from_secs(2);
/// A killed process stays a zombie until its parent reaps it. Most do at once; the first
/// process of many a container looks for zombies every other second, or never.
const UNBURIED: Duration = Duration::from_millis(50);
/// Somebody alive has the id, or a process group or session is named by it; it might just
/// be on its way out.
const GRACE: Duration = Duration::from_millis(40);

/// Who has an id: the process itself, or those whose group or session it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Holder {
    /// All of it is dead; its parent must reap it.
    Dead,
    Dying,
    Alive,
}

impl Holder {
    fn of(pid: i32) -> Holder {
        match stat_of(&pid.to_string()) {
            Some((holder, _)) => holder,
            None => std::fs::read_dir("/proc")
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(|entry| stat_of(entry.file_name().to_str()?))
                .filter(|(_, groups)| groups.contains(&i64::from(pid)))
                .map(|(holder, _)| holder)
                .max()
                .unwrap_or(Holder::Dying),
        }
    }

    fn patience(self) -> Duration {
        match self {
            Holder::Dead => UNBURIED,
            Holder::Dying => PATIENCE,
            Holder::Alive => GRACE,
        }
    }
}

/// Is this task dead or dying, and which are its group and session?
fn stat_of(id: &str) -> Option<(Holder, [i64; 2])> {
    const PF_EXITING: i64 = 0x4;
    let stat = procfs::read_file(format!("/proc/{id}/stat").as_bytes()).ok()?;
    let fields = procfs::stat_fields(&stat);
    // Fields 3 (state), 5 (group), 6 (session), 9 (flags) and 20 (threads) of proc(5).
    let number = |n: usize| fields.get(n - 3).and_then(|f| procfs::number(f));
    let dead = matches!(fields.first()?.first(), Some(b'Z' | b'X'));
    let holder = if dead && number(20).unwrap_or(0) <= 1 {
        Holder::Dead
    } else if dead || number(9).unwrap_or(0) & PF_EXITING != 0 {
        Holder::Dying
    } else {
        Holder::Alive
    };
    Some((holder, [number(5)?, number(6)?]))
}

/// The process that stands in for this one, or 0.
static STARTER: AtomicI32 = AtomicI32::new(0);

/// The process that stands in for this one, or 0: this is the process that was started.
pub fn starter() -> i32 {
    STARTER.load(Ordering::Relaxed)
}

/// Tries to become process `pid`. Returns in the process that is to be restored; the
/// starter stays inside, as the proxy, until the end. `death_signal` is what the program wants
/// to get when its parent dies, or 0: its parent is the proxy's.
pub fn become_pid(pid: i32, death_signal: i32) -> Identity {
    // SAFETY: no arguments.
    let own = unsafe { syscall!(libc::SYS_getpid) } as i32;
    if own == pid {
        return Identity::Same;
    }
    let set_tid = [pid];
    let args = CloneArgs {
        exit_signal: libc::SIGCHLD as u64,
        set_tid: set_tid.as_ptr() as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    let started = Instant::now();
    let mut pause = Duration::from_micros(200);
    loop {
        // SAFETY: clone3 without CLONE_VM is a fork: the child continues here on a
        // copy of this stack.
        let ret = unsafe { syscall!(libc::SYS_clone3, &args, size_of::<CloneArgs>()) };
        match ret {
            0 => {
                die_with(own);
                return Identity::Same;
            }
            child if child > 0 => stand_in_for(child as i32, death_signal),
            error if error == -(libc::EEXIST as isize) => {
                let holder = Holder::of(pid);
                if started.elapsed() > holder.patience() {
                    let why = match holder {
                        Holder::Dead => "dead, and its parent does not reap it",
                        Holder::Dying => "dying",
                        Holder::Alive => "alive",
                    };
                    log::line(format_args!(
                        "the program gets a new process id, and is shown the old one: who has {pid} is {why}"
                    ));
                    return Identity::Other;
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(2));
            }
            _ => return Identity::Other,
        }
    }
}

/// The program dies with its proxy: a user who kills the process that was started
/// means the program. From the restored helper's start on it is the helper's death signal
/// (`agent::starter`).
fn die_with(proxy: i32) {
    STARTER.store(proxy, Ordering::Relaxed);
    // SAFETY: plain system calls.
    unsafe {
        syscall!(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if syscall!(libc::SYS_getppid) as i32 != proxy {
            syscall!(libc::SYS_exit_group, 125);
        }
    }
}

/// Goes on in a child of whatever id, without the other threads of this process, which
/// becomes the proxy. Where no child can be made it goes on here.
pub fn leave_threads() {
    // SAFETY: without CLONE_VM it is a fork: the child continues here on a copy of this stack.
    let (own, ret) = unsafe {
        let no_stack = 0u64;
        (
            syscall!(libc::SYS_getpid) as i32,
            syscall!(libc::SYS_clone, libc::SIGCHLD, no_stack, 0, 0, 0),
        )
    };
    match ret {
        0 => die_with(own),
        child if child > 0 => stand_in_for(child as i32, 0),
        _ => {}
    }
}
/// The starter's name in /proc/PID/comm while it stands in: the `ckpt` command knows it by that,
/// and who signals the program by name does not reach it twice.
pub const STARTER_NAME: &str = "ckpt-starter";

static CHILD: AtomicI32 = AtomicI32::new(0);

/// Signals from a terminal reach the child directly (same process group); what a
/// process sent to the proxy alone is passed on.
unsafe extern "C" fn forward(signo: i32, info: *mut libc::siginfo_t, _uc: *mut libc::c_void) {
    let child = CHILD.load(Ordering::Relaxed);
    // SAFETY: the kernel passes a valid siginfo.
    unsafe {
        match (*info).si_code {
            code if code > 0 => {}
            // With its value; a claim to come from kill(2) is not permitted to us.
            code if code < 0 && code != libc::SI_TKILL => {
                syscall!(libc::SYS_rt_sigqueueinfo, child, signo, info);
            }
            _ => {
                syscall!(libc::SYS_kill, child, signo);
            }
        }
    }
}

fn stand_in_for(child: i32, death_signal: i32) -> ! {
    CHILD.store(child, Ordering::Relaxed);
    let keep_default = [
        libc::SIGKILL,
        libc::SIGSTOP,
        libc::SIGCHLD,
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGTTIN,
        libc::SIGTTOU,
        32,
        33,
    ];
    // SAFETY: plain system calls with valid structs; this process has one thread and
    // will do nothing but wait.
    unsafe {
        for signo in (1..=64).filter(|s| !keep_default.contains(s)) {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = forward as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            libc::sigaction(signo, &action, std::ptr::null_mut());
        }
        if death_signal != 0 && starter() == 0 {
            syscall!(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, death_signal);
        }
        syscall!(libc::SYS_prctl, libc::PR_SET_NAME, c"ckpt-starter".as_ptr());
        let none = 0u64;
        syscall!(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &none, 0, 8);
        // The program's descriptors are the child's alone: a pipe must end when it ends.
        syscall!(libc::SYS_close_range, 0, u32::MAX, 0);
        loop {
            let mut status = 0;
            let got = syscall!(
                libc::SYS_wait4,
                child,
                &mut status,
                libc::WUNTRACED | libc::WCONTINUED | libc::__WALL,
                0
            );
            if got == -(libc::EINTR as isize) {
                continue;
            }
            if got < 0 {
                syscall!(libc::SYS_exit_group, 125);
            }
            if libc::WIFSTOPPED(status) {
                syscall!(libc::SYS_kill, syscall!(libc::SYS_getpid), libc::SIGSTOP);
                syscall!(libc::SYS_kill, child, libc::SIGCONT);
            } else if libc::WIFEXITED(status) {
                syscall!(libc::SYS_exit_group, libc::WEXITSTATUS(status));
            } else if libc::WIFSIGNALED(status) {
                end_by(libc::WTERMSIG(status));
            }
        }
    }
}

/// Ends as the child did, without a second core file.
unsafe fn end_by(signo: i32) -> ! {
    // SAFETY: plain system calls; the default action of `signo` ends the process.
    unsafe {
        syscall!(libc::SYS_prctl, libc::PR_SET_DUMPABLE, 0);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(signo, &action, std::ptr::null_mut());
        syscall!(libc::SYS_kill, syscall!(libc::SYS_getpid), signo);
        syscall!(libc::SYS_exit_group, 128 + signo);
    }
    unreachable!("exit_group does not return")
}
