//! Ids in the arguments and results of system calls. See [`super`].
//! Any thread of the restored process and of its forked children.

use super::super::frame::{CallFrame, Verdict};
use super::super::{senders, user};
use super::*;
use crate::agent::state::InHook;
use ckpt_sys::callsite::LifeCall;

/// The numbers this file acts on, `paths` included.
pub const NUMBERS: &[libc::c_long] = &[
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getppid,
    libc::SYS_set_tid_address,
    libc::SYS_set_robust_list,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_tgkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_pidfd_open,
    libc::SYS_getpgid,
    libc::SYS_setpgid,
    libc::SYS_getsid,
    libc::SYS_getpgrp,
    libc::SYS_setsid,
    libc::SYS_sched_setparam,
    libc::SYS_sched_getparam,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_rr_get_interval,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setattr,
    libc::SYS_sched_getattr,
    libc::SYS_setpriority,
    libc::SYS_getpriority,
    libc::SYS_ioprio_set,
    libc::SYS_ioprio_get,
    libc::SYS_prlimit64,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    libc::SYS_get_robust_list,
    libc::SYS_ptrace,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_getsockopt,
    libc::SYS_timer_create,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
];

const F_OWNER_PGRP: i32 = 2;

/// Executes the call of the frame as it now is.
pub(super) fn execute(f: &CallFrame) -> i64 {
    let [a, b, c, d, e, g] = f.args;
    // SAFETY: the program's own call, arguments valid as far as it made them so; none
    // of the calls that come here plays with the stack.
    unsafe { syscall!(f.rax, a, b, c, d, e, g) as i64 }
}

fn result(f: &mut CallFrame, value: i64) -> Verdict {
    f.rax = value;
    Verdict::Done
}

fn arg(f: &mut CallFrame, i: usize) {
    f.args[i] = i64::from(to_real(f.args[i] as i32)) as u64;
}

fn group_arg(f: &mut CallFrame, i: usize) {
    f.args[i] = i64::from(group_to_real(f.args[i] as i32)) as u64;
}

/// `which`, `who`: whose `who` is a process if `which` is `process`, a group one above.
fn by_kind(f: &mut CallFrame, process: u64) -> Verdict {
    if f.args[0] == process {
        arg(f, 1);
    } else if f.args[0] == process + 1 {
        group_arg(f, 1);
    }
    Verdict::Forward
}

/// A pid where negative means a group (kill, F_SETOWN, wait4).
fn signed(id: i32) -> i32 {
    if id < -1 && id != i32::MIN {
        -group_to_real(-id)
    } else {
        to_real(id)
    }
}

/// Clock ids of other processes' and threads' CPU time hold the id, inverted.
fn cpu_clock(f: &mut CallFrame) {
    let clock = f.args[0] as i32;
    if clock < 0 && clock & 7 != 3 {
        let id = to_real(!(clock >> 3));
        f.args[0] = i64::from((!id << 3) | (clock & 7)) as u64;
    }
}

/// Calls that may wait: not under a guard.
const UNGUARDED: &[libc::c_long] = &[
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_clock_nanosleep,
    libc::SYS_ioctl,
];

/// Calls that may end in a handler of the program's: not under a guard either.
pub(super) const SENDERS: &[libc::c_long] = &[
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_tgkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
];

/// Handles one call; `None` = this file has nothing to do with it.
///
/// A checkpoint between the look at a table and the kernel's answer would leave the thread
/// with an id of the life before: a thread read its id 18778 from the kernel, was
/// checkpointed, and found no such id in the next life's tables; a signal that a process sent
/// itself went to the stranger who had its pid of before. So both lie in one guard, or the call
/// is a [`LifeCall`].
pub fn dispatch(f: &mut CallFrame) -> Option<Verdict> {
    if !NUMBERS.contains(&f.rax) {
        return None;
    }
    if SENDERS.contains(&f.rax) {
        let value = send(f);
        return Some(result(f, value));
    }
    if UNGUARDED.contains(&f.rax) || (f.rax == libc::SYS_fcntl && !is_about_owners(f)) {
        return translate(f);
    }
    let _guard = InHook::enter();
    let mut call = CallFrame {
        rax: f.rax,
        args: f.args,
        rbp: f.rbp,
        slot: f.slot,
    };
    let verdict = translate(&mut call)?;
    if verdict == Verdict::Forward {
        if f.rax == libc::SYS_set_robust_list {
            return Some(verdict);
        }
        call.rax = execute(&call);
    }
    // The registers of the arguments stay the program's.
    Some(result(f, call.rax))
}

/// Sends a signal, in the life that the ids of the call are those of.
fn send(f: &CallFrame) -> i64 {
    let mut info = [0; 16];
    in_life(|| addressed(f, &mut info))
}

/// Makes a call, which may wait, in the life that `prepare` has prepared it in.
pub(super) fn in_life(mut prepare: impl FnMut() -> (i64, [u64; 6])) -> i64 {
    loop {
        let guard = InHook::enter();
        let expected = EPOCH.load(SeqCst);
        let (nr, args) = prepare();
        drop(guard);
        let word = &EPOCH;
        let call = LifeCall {
            nr,
            args,
            word,
            expected,
        };
        // SAFETY: the program's own call; `callsites::rewind` does what is asked for.
        if let Some(value) = unsafe { call.make() } {
            return value;
        }
    }
}

/// The call of [`SENDERS`] with the kernel's ids; `info` is where a siginfo may be put.
pub(super) fn addressed(f: &CallFrame, info: &mut [u64; 16]) -> (i64, [u64; 6]) {
    let [a, b, c, ..] = f.args;
    match f.rax {
        libc::SYS_kill if a as i32 > 0 && b != 0 && is_own_process(a) => {
            return senders::to_self(b as i32, false, info);
        }
        libc::SYS_tgkill if is_own_thread(f) => return senders::to_self(c as i32, true, info),
        libc::SYS_tkill if is_own_thread(f) => return senders::to_self(b as i32, true, info),
        _ => {}
    }
    let mut args = f.args;
    args[0] = i64::from(match f.rax {
        libc::SYS_kill => signed(a as i32),
        _ => to_real(a as i32),
    }) as u64;
    if matches!(f.rax, libc::SYS_tgkill | libc::SYS_rt_tgsigqueueinfo) {
        args[1] = i64::from(to_real(b as i32)) as u64;
    }
    (f.rax, args)
}

pub(super) fn translate(f: &mut CallFrame) -> Option<Verdict> {
    let verdict = match f.rax {
        libc::SYS_getpid => result(f, i64::from(own_pid())),
        libc::SYS_gettid => result(f, i64::from(own_tid())),
        libc::SYS_getppid => {
            // A child of the restored process knows its parent by the old id.
            let (parent, ours) = (execute(f), process().1);
            let shown = if ours {
                parent as i32
            } else {
                to_virtual(parent as i32)
            };
            result(f, i64::from(shown))
        }
        libc::SYS_set_tid_address => {
            execute(f);
            result(f, i64::from(own_tid()))
        }
        libc::SYS_set_robust_list => {
            at_birth();
            Verdict::Forward
        }
        libc::SYS_wait4 => {
            let id = f.args[0] as i32;
            if id < -1 {
                f.args[0] = i64::from(signed(id)) as u64;
            }
            Verdict::Forward
        }
        libc::SYS_waitid => {
            if f.args[0] == 2 {
                group_arg(f, 1);
            }
            Verdict::Forward
        }
        libc::SYS_pidfd_open
        | libc::SYS_sched_setparam
        | libc::SYS_sched_getparam
        | libc::SYS_sched_setscheduler
        | libc::SYS_sched_getscheduler
        | libc::SYS_sched_rr_get_interval
        | libc::SYS_sched_setaffinity
        | libc::SYS_sched_getaffinity
        | libc::SYS_sched_setattr
        | libc::SYS_sched_getattr
        | libc::SYS_prlimit64
        | libc::SYS_process_vm_readv
        | libc::SYS_process_vm_writev
        | libc::SYS_move_pages
        | libc::SYS_migrate_pages
        | libc::SYS_get_robust_list => {
            arg(f, 0);
            Verdict::Forward
        }
        libc::SYS_kcmp => {
            arg(f, 0);
            arg(f, 1);
            Verdict::Forward
        }
        libc::SYS_ptrace => {
            arg(f, 1);
            Verdict::Forward
        }
        libc::SYS_getpriority | libc::SYS_setpriority => by_kind(f, 0),
        libc::SYS_ioprio_get | libc::SYS_ioprio_set => by_kind(f, 1),
        libc::SYS_getpgrp => {
            let value = group_to_virtual(execute(f) as i32);
            result(f, i64::from(value))
        }
        libc::SYS_getpgid | libc::SYS_getsid => {
            arg(f, 0);
            let value = execute(f) as i32;
            let shown = match f.rax {
                libc::SYS_getsid => session_to_virtual(value),
                _ => group_to_virtual(value),
            };
            result(f, i64::from(shown))
        }
        libc::SYS_setsid => {
            let value = execute(f) as i32;
            if value > 0 && process().1 {
                forget_groups(true);
            }
            result(f, i64::from(to_virtual(value)))
        }
        libc::SYS_setpgid => setpgid(f),
        libc::SYS_clock_gettime | libc::SYS_clock_getres | libc::SYS_clock_nanosleep => {
            cpu_clock(f);
            Verdict::Forward
        }
        libc::SYS_timer_create => timer_create(f),
        libc::SYS_fcntl => fcntl(f),
        libc::SYS_ioctl => ioctl(f),
        libc::SYS_getsockopt => getsockopt(f),
        _ => return None,
    };
    Some(verdict)
}

/// Is the restored process, which makes this call, meant by `id`?
fn is_own_process(id: u64) -> bool {
    let (pid, ours) = process();
    ours && to_real(id as i32) == pid
}

/// Does a tgkill or tkill of the restored process with a signal mean the calling thread?
fn is_own_thread(f: &CallFrame) -> bool {
    let own = |id: u64| {
        // SAFETY: no arguments.
        to_real(id as i32) == unsafe { syscall!(libc::SYS_gettid) } as i32
    };
    let [a, b, c, ..] = f.args;
    match f.rax {
        libc::SYS_tgkill => c != 0 && own(b) && is_own_process(a),
        _ => b != 0 && own(a) && process().1,
    }
}

fn setpgid(f: &mut CallFrame) -> Verdict {
    arg(f, 0);
    group_arg(f, 1);
    let value = execute(f);
    let (pid, ours) = process();
    let whom = f.args[0] as i32;
    if value == 0 && ours && (whom == 0 || whom == pid) {
        forget_groups(false);
    }
    result(f, value)
}

/// SIGEV_THREAD_ID names a thread inside the structure.
fn timer_create(f: &mut CallFrame) -> Verdict {
    cpu_clock(f);
    const SIGEV_THREAD_ID: i32 = 4;
    let Ok(mut event) = user::read::<[u64; 8]>(f.args[1]) else {
        return Verdict::Forward;
    };
    if (event[1] >> 32) as i32 != SIGEV_THREAD_ID {
        return Verdict::Forward;
    }
    let real = to_real(event[2] as i32);
    event[2] = event[2] >> 32 << 32 | u64::from(real as u32);
    f.args[1] = event.as_ptr() as u64;
    let value = execute(f);
    result(f, value)
}

const F_SETOWN: i32 = 8;
const F_GETOWN: i32 = 9;
const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;

fn is_about_owners(f: &CallFrame) -> bool {
    matches!(
        f.args[1] as i32,
        F_SETOWN | F_GETOWN | F_SETOWN_EX | F_GETOWN_EX
    )
}

fn fcntl(f: &mut CallFrame) -> Verdict {
    match f.args[1] as i32 {
        F_SETOWN => {
            f.args[2] = i64::from(signed(f.args[2] as i32)) as u64;
            Verdict::Forward
        }
        F_GETOWN => {
            let value = execute(f);
            let id = value as i32;
            // A group comes back negative and may look like an error; the kernel has it so.
            let shown = if id < 0 {
                -group_to_virtual(-id)
            } else {
                to_virtual(id)
            };
            result(f, i64::from(shown))
        }
        F_SETOWN_EX => {
            let Ok(owner) = user::read::<u64>(f.args[2]) else {
                return Verdict::Forward;
            };
            let (kind, id) = (owner as i32, (owner >> 32) as i32);
            let real = if kind == F_OWNER_PGRP {
                group_to_real(id)
            } else {
                to_real(id)
            };
            let copy = owner & 0xffff_ffff | u64::from(real as u32) << 32;
            f.args[2] = &raw const copy as u64;
            let value = execute(f);
            result(f, value)
        }
        F_GETOWN_EX => {
            let value = execute(f);
            if value == 0
                && let Ok(owner) = user::read::<u64>(f.args[2])
            {
                let (kind, id) = (owner as i32, (owner >> 32) as i32);
                let shown = match kind {
                    F_OWNER_PGRP => group_to_virtual(id),
                    _ => to_virtual(id),
                };
                let _ = user::write(f.args[2] + 4, &shown);
            }
            result(f, value)
        }
        _ => Verdict::Forward,
    }
}

/// Groups and sessions of terminals, owners of sockets.
fn ioctl(f: &mut CallFrame) -> Verdict {
    const FIOSETOWN: u64 = 0x8901;
    const SIOCSPGRP: u64 = 0x8902;
    const FIOGETOWN: u64 = 0x8903;
    const SIOCGPGRP: u64 = 0x8904;
    let request = f.args[1] & 0xffff_ffff;
    match request {
        libc::TIOCSPGRP | FIOSETOWN | SIOCSPGRP => {
            let Ok(id) = user::read::<i32>(f.args[2]) else {
                return Verdict::Forward;
            };
            let mut real = id;
            let value = in_life(|| {
                real = match request {
                    libc::TIOCSPGRP => group_to_real(id),
                    _ => signed(id),
                };
                let [a, b, ..] = f.args;
                (f.rax, [a, b, &raw const real as u64, 0, 0, 0])
            });
            result(f, value)
        }
        libc::TIOCGPGRP | libc::TIOCGSID | FIOGETOWN | SIOCGPGRP => {
            let value = execute(f);
            if value == 0
                && let Ok(id) = user::read::<i32>(f.args[2])
            {
                let shown = match request {
                    libc::TIOCGSID => session_to_virtual(id),
                    libc::TIOCGPGRP => group_to_virtual(id),
                    _ if id < 0 => -group_to_virtual(-id),
                    _ => to_virtual(id),
                };
                let _ = user::write(f.args[2], &shown);
            }
            result(f, value)
        }
        _ => Verdict::Forward,
    }
}

/// SO_PEERCRED of a socket pair of our own.
fn getsockopt(f: &mut CallFrame) -> Verdict {
    let (level, name) = (f.args[1] as i32, f.args[2] as i32);
    if level != libc::SOL_SOCKET || name != libc::SO_PEERCRED {
        return Verdict::Forward;
    }
    let value = execute(f);
    if value == 0
        && let Ok(id) = user::read::<i32>(f.args[3])
    {
        let _ = user::write(f.args[3], &to_virtual(id));
    }
    result(f, value)
}
