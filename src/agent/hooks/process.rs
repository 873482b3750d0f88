//! The end of the process, its children, exec, sandboxes, namespaces, and the facilities whose
//! state nobody can save. Acts for the agent's own process only (not for forked,
//! vforked or other CLONE_VM children); everything is forwarded.

use super::files::cache;
use super::frame::{CallFrame, Verdict};
use super::{sigaction, signal, user};
use crate::agent::refusal::{self, Kind};
use crate::agent::state::{
    AGENT, InHook, RESERVED_BIT, RESERVED_SIGNAL, is_agents_process, is_on_lent_block,
};
use crate::agent::track::uffd;
use crate::agent::{ending, exit, request, starter, stop};
use crate::image::state::KernelSigaction;
use ckpt_sys::syscall;
use ckpt_sys::tls::{lent, thread_block};
use std::sync::atomic::Ordering::Relaxed;

/// The numbers this file acts on.
pub const NUMBERS: &[libc::c_long] = &[
    libc::SYS_exit_group,
    libc::SYS_exit,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_prctl,
    libc::SYS_arch_prctl,
    libc::SYS_seccomp,
    libc::SYS_unshare,
    libc::SYS_close_range,
    libc::SYS_setns,
    libc::SYS_io_uring_setup,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_setup,
    libc::SYS_bpf,
    libc::SYS_pkey_alloc,
    libc::SYS_pkey_mprotect,
    libc::SYS_modify_ldt,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_memfd_secret,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_clone,
    libc::SYS_clone3,
];

const SANDBOX: &str = "the program entered a system-call sandbox (seccomp)";
const NAMESPACE: &str = "the program entered other namespaces (unshare, setns)";
const USERFAULTFD: &str =
    "the program uses userfaultfd, as the page tracker did (CKPT_TRACKER=mprotect leaves it alone)";
const OWN_TABLES: &str = "a thread has a descriptor table or directory of its own (unshare)";
const CLOSE_RANGE_UNSHARE: u64 = 2;

pub fn dispatch(frame: &mut CallFrame) -> Verdict {
    let [a, b, ..] = frame.args;
    match frame.rax {
        libc::SYS_exit_group if is_agents_process() => exit::on_exit(a as i32),
        libc::SYS_exit if is_agents_process() => ending::thread_exits(a as i32),
        libc::SYS_execve | libc::SYS_execveat => return execve(frame),
        // Modes 1 and 2; what is invalid is told by the kernel, so a wrong guess here
        // only costs checkpoints.
        libc::SYS_prctl if a as i32 == libc::PR_SET_SECCOMP && is_agents_process() => sandbox(),
        libc::SYS_seccomp if seccomp_acts(a, frame.args[2]) && is_agents_process() => sandbox(),
        libc::SYS_arch_prctl => {
            const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
            if a == ARCH_REQ_XCOMP_PERM {
                refusal::note(Kind::TileRegisters);
            }
        }
        libc::SYS_unshare => return namespaces(frame, a),
        libc::SYS_close_range
            if frame.args[2] & CLOSE_RANGE_UNSHARE != 0 && is_agents_process() && !is_alone() =>
        {
            cache::tables_differ();
            refusal::disable(OWN_TABLES);
        }
        libc::SYS_setns => {
            let all = (libc::CLONE_NEWUSER | libc::CLONE_NEWNS) as u64;
            return namespaces(frame, if b == 0 { all } else { b });
        }
        libc::SYS_fork | libc::SYS_vfork | libc::SYS_clone | libc::SYS_clone3 => birth(frame),
        libc::SYS_io_uring_setup => refusal::note(Kind::IoUring),
        libc::SYS_perf_event_open => refusal::note(Kind::PerfEvent),
        libc::SYS_userfaultfd => {
            refusal::note(Kind::Userfaultfd);
            if uffd::in_use() && is_agents_process() {
                // A mapping can be registered with one of them only, and that is to be the
                // program's.
                refusal::disable(USERFAULTFD);
                refusal::retire_and_wait();
            }
        }
        libc::SYS_io_setup => refusal::note(Kind::Aio),
        libc::SYS_bpf => refusal::note(Kind::Bpf),
        libc::SYS_pkey_alloc => refusal::note(Kind::KeyAllocated),
        libc::SYS_modify_ldt | libc::SYS_iopl | libc::SYS_ioperm => {
            refusal::note(Kind::ProcessorState);
        }
        libc::SYS_memfd_secret => refusal::note(Kind::SecretMemory),
        _ => {}
    }
    Verdict::Forward
}

/// wait4 and waitid: a forked writer is a child with exit signal 0, which only __WALL and
/// __WCLONE see. While there is one (and a program with children has none), they are
/// taken off the call. True: answered here. No writer is born between the look and the kernel's
/// answer, for which there is a guard: a program without children was once told of one. A call that
/// waits for children is the kernel's again.
pub fn hide_writer(frame: &mut CallFrame) -> bool {
    let at = match frame.rax {
        libc::SYS_wait4 => 2,
        libc::SYS_waitid => 3,
        _ => return false,
    };
    let special = (libc::__WALL | libc::__WCLONE) as u32 as u64;
    let mut args = frame.args;
    let asked = args[at] & special;
    if asked == 0 || !is_agents_process() {
        return false;
    }
    let _guard = InHook::enter();
    if exit::WRITER_PID.load(std::sync::atomic::Ordering::SeqCst) != 0 {
        if asked == libc::__WCLONE as u32 as u64 {
            frame.rax = -i64::from(libc::ECHILD);
            return true;
        }
        args[at] &= !special;
    }
    if args[at] & libc::WNOHANG as u64 == 0 && has_children(args[at] & special) {
        frame.args = args;
        return false;
    }
    let waits = args[at] & libc::WNOHANG as u64 == 0;
    let mut now = args;
    if waits {
        // A child that another thread has now is not waited for in here.
        now[at] |= libc::WNOHANG as u64;
        if frame.rax == libc::SYS_waitid {
            now[at] |= libc::WNOWAIT as u64;
        }
    }
    let [a, b, c, d, e, _] = now;
    // SAFETY: the program's own call, which does not wait.
    let answer = unsafe { syscall!(frame.rax, a, b, c, d, e) as i64 };
    if waits && answer == 0 {
        frame.args = args;
        return false;
    }
    frame.rax = answer;
    true
}

/// Are there children that a wait with these flags would see?
fn has_children(special: u64) -> bool {
    let states = libc::WEXITED | libc::WSTOPPED | libc::WCONTINUED;
    let flags = (states | libc::WNOHANG | libc::WNOWAIT) as u64 | special;
    // SAFETY: asks only.
    let found = unsafe { syscall!(libc::SYS_waitid, libc::P_ALL, 0, 0, flags, 0) };
    found != -(libc::ECHILD as isize)
}

/// Does seccomp(operation, _, filter) enter a sandbox? A null filter does not: programs ask
/// that way whether filters are known (the answer is EFAULT).
fn seccomp_acts(operation: u64, filter: u64) -> bool {
    const SET_MODE_STRICT: u64 = 0;
    const SET_MODE_FILTER: u64 = 1;
    operation == SET_MODE_STRICT || (operation == SET_MODE_FILTER && filter != 0)
}

/// Before the filter is in force: from then on hooks make no calls of their own.
fn sandbox() {
    refusal::disable(SANDBOX);
    refusal::retire_and_wait();
    refusal::set_sandboxed();
}

/// A thread or a process is about to be made.
fn birth(frame: &CallFrame) {
    let flags = match frame.rax {
        libc::SYS_vfork => (libc::CLONE_VM | libc::CLONE_VFORK) as u64,
        libc::SYS_clone => frame.args[0],
        libc::SYS_clone3 => user::read_near(frame, frame.args[0]).unwrap_or(0),
        _ => 0,
    };
    let has = |flag: i32| flags & flag as u64 != 0;
    if has(libc::CLONE_THREAD) {
        return;
    }
    if has(libc::CLONE_VM) {
        let nested = is_on_lent_block();
        // SAFETY: the block is this thread's own, or of the parent that waits for this child.
        let block = unsafe { &mut *thread_block() };
        block.lent = match has(libc::CLONE_VFORK) {
            true => lent::UNTIL_BACK.max(block.lent),
            false => lent::FOR_GOOD,
        };
        // A child with a block of its own, which nobody has marked, or one that may still run when
        // this thread has gone.
        if has(libc::CLONE_SETTLS) || !has(libc::CLONE_VFORK) {
            AGENT.memory_shared.store(true, Relaxed);
        }
        if !nested {
            block.lent_blocked = 0;
        }
    }
    if request::is_childless_wanted() && is_agents_process() {
        request::before_a_child();
    }
}

/// Is the calling thread the program's only one? Where that cannot be told it is not.
fn is_alone() -> bool {
    use super::files::paths::{CWD, Path, stat_at};
    // Two links are the directory's own.
    let tasks = Path::of(&[b"/proc/self/task"])
        .and_then(|path| stat_at(CWD, &path, 0).ok())
        .map_or(u64::MAX, |stat| u64::from(stat.nlink).saturating_sub(2));
    let helper = refusal::HELPER_ALIVE.load(Relaxed) != 0;
    tasks <= u64::from(helper) + 1
}

/// unshare and setns. Some need a process of one thread, and our helper is a second.
fn namespaces(frame: &mut CallFrame, flags: u64) -> Verdict {
    let tables = (libc::CLONE_FILES | libc::CLONE_FS) as u64;
    if flags == 0 || !is_agents_process() {
        return Verdict::Forward;
    }
    if flags & !tables == 0 {
        refusal::disable(OWN_TABLES);
        return Verdict::Forward;
    }
    refusal::disable(NAMESPACE);
    refusal::retire_and_wait();
    // A thread that has said good-bye is counted until the kernel has buried it.
    let mut ret = -(libc::EINVAL as isize);
    for _ in 0..50 {
        let [a, b, ..] = frame.args;
        // SAFETY: the program's own request; acts on this thread.
        ret = unsafe { syscall!(frame.rax, a, b) };
        if ret != -(libc::EINVAL as isize) {
            break;
        }
        let pause = [0u64, 1_000_000];
        // SAFETY: a time of ours.
        unsafe { syscall!(libc::SYS_nanosleep, &raw const pause, 0) };
    }
    frame.rax = ret as i64;
    Verdict::Done
}

/// exec hands on what is ignored, what is blocked, the calling thread's pending signals and its
/// death signal. The call is made here: no stop of ours may be under way, the program's view of the
/// reserved signal is put in force, and what failed is put back. Only children forward it.
fn execve(frame: &mut CallFrame) -> Verdict {
    let ignored = sigaction::reserved_action().handler == 1;
    let blocked = signal::reserved_blocked();
    let own = is_agents_process();
    let tied = own && starter::hand_over();
    // In a sandbox there is no helper any more.
    let stops = own && !refusal::sandboxed();
    if !ignored && !blocked && !tied && !stops {
        return Verdict::Forward;
    }
    let _no_stop = stops.then(stop::hold_off);
    let mut before = KernelSigaction::default();
    let ignore = KernelSigaction {
        handler: 1,
        ..Default::default()
    };
    let bit = RESERVED_BIT;
    let [a, b, c, d, e, _] = frame.args;
    // SAFETY: our own structures; the program's own call. When it succeeds nothing
    // of this memory is left (or, in a vfork child, this thread is gone).
    unsafe {
        let sig = RESERVED_SIGNAL;
        if ignored {
            syscall!(
                libc::SYS_rt_sigaction,
                sig,
                &raw const ignore,
                &raw mut before,
                8
            );
        }
        if blocked {
            syscall!(
                libc::SYS_rt_sigprocmask,
                libc::SIG_BLOCK,
                &raw const bit,
                0,
                8
            );
        }
        frame.rax = syscall!(frame.rax, a, b, c, d, e) as i64;
        if tied {
            starter::take_back();
        }
        if blocked {
            syscall!(
                libc::SYS_rt_sigprocmask,
                libc::SIG_UNBLOCK,
                &raw const bit,
                0,
                8
            );
        }
        if ignored {
            syscall!(libc::SYS_rt_sigaction, sig, &raw const before, 0, 8);
        }
    }
    Verdict::Done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::{call, in_child};
    use crate::agent::state::{AGENT, wake};
    use std::sync::atomic::Ordering::*;

    fn ours() {
        // SAFETY: a child of the test alone in its process.
        unsafe {
            wake().unwrap();
            AGENT
                .real_pid
                .store(syscall!(libc::SYS_getpid) as i32, SeqCst);
        }
    }

    #[test]
    fn sandboxes_end_checkpoints() {
        in_child(|| {
            assert_eq!(call(libc::SYS_seccomp, &[1, 0, 8]), None);
            assert_eq!(refusal::disabled(), None);
            ours();
            assert_eq!(call(libc::SYS_seccomp, &[1, 0, 0]), None);
            assert_eq!(refusal::disabled(), None);
            assert_eq!(
                call(libc::SYS_prctl, &[libc::PR_SET_SECCOMP as u64, 2]),
                None
            );
            assert_eq!(refusal::disabled(), Some(SANDBOX));
            assert!(refusal::sandboxed());
        });
    }

    #[test]
    fn facilities_are_noted() {
        in_child(|| {
            assert_eq!(refusal::noted(), 0);
            assert_eq!(call(libc::SYS_io_setup, &[1, 0]), None);
            assert_eq!(call(libc::SYS_io_uring_setup, &[1, 0]), None);
            assert!(refusal::was_noted(Kind::Aio) && refusal::was_noted(Kind::IoUring));
        });
    }

    #[test]
    fn namespaces_retire_the_helper() {
        in_child(|| {
            ours();
            static WOKEN: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
            refusal::set_wake(Some(|| WOKEN.store(true, SeqCst)));
            let ret = call(libc::SYS_unshare, &[libc::CLONE_NEWUTS as u64]);
            assert!(matches!(ret, Some(0 | -1)), "{ret:?}");
            assert!(WOKEN.load(SeqCst));
            assert_eq!(refusal::disabled(), Some(NAMESPACE));
        });
    }

    #[test]
    fn a_failed_exec_changes_nothing() {
        in_child(|| {
            let ignore = KernelSigaction {
                handler: 1,
                ..Default::default()
            };
            sigaction::set_reserved_action(&ignore);
            let path = c"/nonexistent";
            let ret = call(libc::SYS_execve, &[path.as_ptr() as u64, 0, 0]);
            assert_eq!(ret, Some(-2));
            let mut now = KernelSigaction::default();
            // SAFETY: asks the kernel.
            unsafe { syscall!(libc::SYS_rt_sigaction, 64, 0, &raw mut now, 8) };
            assert_eq!(now.handler, 0);
        });
    }

    #[test]
    fn exec_hands_on_what_the_program_ignores() {
        in_child(|| {
            let ignore = KernelSigaction {
                handler: 1,
                ..Default::default()
            };
            sigaction::set_reserved_action(&ignore);
            let script = c"grep -q '^SigIgn:.8' /proc/self/status";
            let args = [
                c"sh".as_ptr(),
                c"-c".as_ptr(),
                script.as_ptr(),
                std::ptr::null(),
            ];
            let path = c"/bin/sh".as_ptr() as u64;
            call(libc::SYS_execve, &[path, args.as_ptr() as u64, 0]);
            unreachable!();
        });
    }
}
