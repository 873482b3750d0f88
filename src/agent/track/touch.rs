//! System calls that write into the program's memory: what they will write is opened
//! before the call, since the kernel fails on a protected page and a call that failed
//! cannot be repeated (a datagram is lost, a child was reaped).
//!
//! Called by `hooks::dispatch` before a call, and by the stop handler for a call that the
//! released thread is about to make or to repeat. Any thread, any context.

// Call numbers keep the kernel's names.
#![allow(non_upper_case_globals)]

use super::fault::{self, touch};
use crate::agent::callsites;
use crate::agent::hooks::frame::CallFrame;
use crate::agent::hooks::{memory, user};
use ckpt_sys::callsite::{self, RestartRecord};
use ckpt_sys::tls::thread_block;
use libc::*;

const SYS_IO_PGETEVENTS: c_long = 333;

/// Calls that only read the program's memory (or do not look at it at all): nothing to do.
const READERS: &[c_long] = &[
    SYS_write,
    SYS_pwrite64,
    SYS_writev,
    SYS_pwritev,
    SYS_pwritev2,
    SYS_sendto,
    SYS_sendmsg,
    SYS_open,
    SYS_openat,
    SYS_creat,
    SYS_close,
    SYS_lseek,
    SYS_mmap,
    SYS_munmap,
    SYS_mprotect,
    SYS_madvise,
    SYS_mremap,
    SYS_brk,
    SYS_execve,
    SYS_execveat,
    SYS_exit_group,
    SYS_rename,
    SYS_renameat,
    SYS_renameat2,
    SYS_unlink,
    SYS_unlinkat,
    SYS_mkdir,
    SYS_rmdir,
    SYS_setxattr,
    SYS_lsetxattr,
    SYS_fsetxattr,
    SYS_setsockopt,
    SYS_connect,
    SYS_bind,
];

/// The calls that must come to a hook while pages are protected.
pub const NUMBERS: &[c_long] = &[
    SYS_read,
    SYS_pread64,
    SYS_readv,
    SYS_preadv,
    SYS_preadv2,
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_recvmmsg,
    SYS_sendmmsg,
    SYS_accept,
    SYS_accept4,
    SYS_getsockname,
    SYS_getpeername,
    SYS_getsockopt,
    SYS_socketpair,
    SYS_pipe,
    SYS_pipe2,
    SYS_stat,
    SYS_lstat,
    SYS_fstat,
    SYS_newfstatat,
    SYS_statx,
    SYS_statfs,
    SYS_fstatfs,
    SYS_getcwd,
    SYS_readlink,
    SYS_readlinkat,
    SYS_getdents64,
    SYS_getdents,
    SYS_getxattr,
    SYS_lgetxattr,
    SYS_fgetxattr,
    SYS_listxattr,
    SYS_llistxattr,
    SYS_flistxattr,
    SYS_ioctl,
    SYS_fcntl,
    SYS_poll,
    SYS_ppoll,
    SYS_select,
    SYS_pselect6,
    SYS_epoll_wait,
    SYS_epoll_pwait,
    SYS_epoll_pwait2,
    SYS_wait4,
    SYS_waitid,
    SYS_getrusage,
    SYS_times,
    SYS_time,
    SYS_gettimeofday,
    SYS_clock_gettime,
    SYS_clock_getres,
    SYS_nanosleep,
    SYS_clock_nanosleep,
    SYS_getitimer,
    SYS_setitimer,
    SYS_timer_create,
    SYS_timer_gettime,
    SYS_timer_settime,
    SYS_timerfd_gettime,
    SYS_timerfd_settime,
    SYS_uname,
    SYS_sysinfo,
    SYS_getrandom,
    SYS_getrlimit,
    SYS_prlimit64,
    SYS_getresuid,
    SYS_getresgid,
    SYS_getgroups,
    SYS_getcpu,
    SYS_capget,
    SYS_prctl,
    SYS_arch_prctl,
    SYS_sched_getaffinity,
    SYS_sched_getparam,
    SYS_sched_getattr,
    SYS_sched_rr_get_interval,
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigpending,
    SYS_rt_sigtimedwait,
    SYS_sigaltstack,
    SYS_futex,
    SYS_futex_waitv,
    SYS_exit,
    SYS_get_robust_list,
    SYS_set_tid_address,
    SYS_mincore,
    SYS_sendfile,
    SYS_splice,
    SYS_copy_file_range,
    SYS_msgrcv,
    SYS_msgctl,
    SYS_shmctl,
    SYS_semctl,
    SYS_mq_timedreceive,
    SYS_mq_getsetattr,
    SYS_io_getevents,
    SYS_IO_PGETEVENTS,
    SYS_process_vm_readv,
    SYS_process_vm_writev,
    SYS_name_to_handle_at,
    SYS_sysfs,
    SYS_ustat,
    SYS_quotactl,
    SYS_syslog,
    SYS_clone,
    SYS_clone3,
    SYS_munmap,
    SYS_mmap,
    SYS_mremap,
    SYS_mprotect,
    SYS_pkey_mprotect,
    SYS_brk,
    SYS_shmat,
    SYS_madvise,
    SYS_mlock,
    SYS_mlock2,
    SYS_munlock,
];

/// Fixed-size results are smaller than this.
const STRUCT: u64 = 4096;

fn vectors(at: u64, count: u64) {
    for k in 0..count.min(1024) {
        let Ok([base, len]) = user::read::<[u64; 2]>(at + 16 * k) else {
            return;
        };
        touch(base, len);
    }
}

/// `struct msghdr`: name, namelen, iov, iovlen, control, controllen, flags.
fn message(at: u64) {
    touch(at, 64);
    if let Ok([name, name_len, iov, iov_len, control, control_len, ..]) = user::read::<[u64; 8]>(at)
    {
        touch(name, name_len & 0xffff_ffff);
        vectors(iov, iov_len);
        touch(control, control_len);
    }
}

/// What the call may write is opened.
pub fn call(nr: i64, args: &[u64; 6]) {
    if !fault::active() || READERS.contains(&nr) {
        return;
    }
    let [a, b, c, d, e, _] = *args;
    match nr {
        SYS_read | SYS_pread64 | SYS_getdents64 | SYS_getdents | SYS_readlink => touch(b, c),
        SYS_getcwd | SYS_getrandom => touch(a, b),
        SYS_readlinkat | SYS_getxattr | SYS_lgetxattr | SYS_fgetxattr => touch(c, d),
        SYS_listxattr | SYS_llistxattr | SYS_flistxattr => touch(b, c),
        SYS_readv | SYS_preadv | SYS_preadv2 => vectors(b, c),
        SYS_process_vm_readv => vectors(b, c),
        SYS_process_vm_writev => vectors(d, e),
        SYS_recvfrom => {
            touch(b, c);
            touch(e, STRUCT);
            touch(args[5], 8);
        }
        SYS_recvmsg => message(b),
        SYS_recvmmsg | SYS_sendmmsg => {
            for k in 0..(c & 0xffff_ffff).min(1024) {
                let at = b + 64 * k;
                touch(at, 64);
                if nr == SYS_recvmmsg {
                    message(at);
                }
            }
            touch(e, 16);
        }
        SYS_poll | SYS_ppoll => {
            touch(a, 8 * (b & 0xffff_ffff).min(1 << 20));
            touch(c, 16);
        }
        SYS_epoll_wait | SYS_epoll_pwait | SYS_epoll_pwait2 => touch(b, 12 * (c & 0xffff_ffff)),
        SYS_getgroups => touch(b, 4 * (a & 0xffff_ffff)),
        SYS_mincore => touch(c, b / 4096 + 1),
        SYS_sched_getaffinity => touch(c, b & 0xffff_ffff),
        SYS_getsockopt => {
            let len = user::read::<u32>(e).unwrap_or(0);
            touch(d, u64::from(len));
            touch(e, 4);
        }
        SYS_io_getevents | SYS_IO_PGETEVENTS => touch(d, 32 * c.min(1 << 20)),
        SYS_msgrcv => touch(b, c.saturating_add(8)),
        SYS_mq_timedreceive => {
            touch(b, c);
            touch(d, 4);
        }
        SYS_futex => {
            const PI_AND_OP: &[i32] = &[
                FUTEX_WAKE_OP,
                FUTEX_LOCK_PI,
                FUTEX_UNLOCK_PI,
                FUTEX_TRYLOCK_PI,
                FUTEX_WAIT_REQUEUE_PI,
                FUTEX_CMP_REQUEUE_PI,
                13, // FUTEX_LOCK_PI2
            ];
            // A futex that may be shared is looked up by its page, and a page of the
            // process's own that cannot be written is none for the kernel.
            let shared = b as i32 & FUTEX_PRIVATE_FLAG == 0;
            if shared || PI_AND_OP.contains(&(b as i32 & FUTEX_CMD_MASK)) {
                touch(a, 4);
                touch(e, 4);
            }
        }
        SYS_futex_waitv => {
            for k in 0..(b & 0xff) {
                if let Ok([_, word, _]) = user::read::<[u64; 3]>(a + 24 * k) {
                    touch(word, 4);
                }
            }
        }
        SYS_exit => robust_list(),
        SYS_clone => {
            new_thread(b.saturating_sub(CLONE_STACK), CLONE_STACK);
            for word in [c, d] {
                touch(word, 4);
            }
            control_block(e);
        }
        SYS_clone3 => clone3(a),
        SYS_rt_sigprocmask => touch(c, 8),
        SYS_rt_sigaction => touch(c, 32),
        // Whatever may be a pointer to a result.
        _ => args.iter().for_each(|&arg| touch(arg, STRUCT)),
    }
}

/// How far below the stack pointer given to clone(2) a new thread may run before it is
/// seen by a stop.
const CLONE_STACK: u64 = 8 << 20;

/// A new thread begins without an alternate stack: it must not fault on its own.
fn new_thread(stack: u64, len: u64) {
    touch(stack, len);
}

/// Thread-local storage and control block around a thread pointer.
fn control_block(fs: u64) {
    if fs > 1 << 20 {
        touch(fs - BELOW_TLS, BELOW_TLS + ABOVE_TLS);
    }
}

/// What is left open around a thread pointer: static thread-local storage below it, the
/// thread's control block (rseq area, robust list, the word cleared at its end) above.
pub const BELOW_TLS: u64 = 64 << 10;
pub const ABOVE_TLS: u64 = 8 << 10;

/// `struct clone_args`: flags, pidfd, child_tid, parent_tid, exit_signal, stack, size, tls.
fn clone3(at: u64) {
    if let Ok([_, pidfd, child, parent, _, stack, size, tls]) = user::read::<[u64; 8]>(at) {
        for word in [pidfd, child, parent] {
            touch(word, 4);
        }
        new_thread(stack, size);
        control_block(tls);
    }
}

/// The thread ends: the kernel marks the robust mutexes that it holds.
fn robust_list() {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: the kernel fills two words of ours.
    unsafe { ckpt_sys::syscall!(SYS_get_robust_list, 0, &raw mut head, &raw mut len) };
    // struct robust_list_head: first entry, offset of the futex word, entry in question.
    let Ok([mut entry, offset, pending]) = user::read::<[u64; 3]>(head) else {
        return;
    };
    let word = |entry: u64| touch((entry & !1).wrapping_add(offset), 4);
    word(pending);
    for _ in 0..2048 {
        if entry & !1 == head || entry == 0 {
            break;
        }
        word(entry);
        match user::read::<u64>(entry & !1) {
            Ok(next) => entry = next,
            Err(_) => break,
        }
    }
}

/// Is it a place in the restart stub where the stack pointer is that of the stub's record?
fn is_at_record(rip: u64) -> bool {
    let stub = callsite::restart()..callsite::restart_after();
    let gather = callsite::restart_gather()..callsite::restart_end();
    stub.contains(&(rip as usize)) || gather.contains(&(rip as usize))
}

/// The stack pointer of the program's code that a frame goes back to, by way of the restart stub or
/// straight.
///
/// # Safety
/// `uc` is a frame of the calling thread's, prepared by `restart::finish`.
pub unsafe fn stack_pointer(uc: *const ucontext_t) -> u64 {
    // SAFETY: the caller's promise; the stub's rsp is at its record.
    unsafe {
        let regs = &(*uc).uc_mcontext.gregs;
        let sp = regs[REG_RSP as usize] as u64;
        match is_at_record(regs[REG_RIP as usize] as u64) {
            true => (*(sp as *const RestartRecord)).rsp,
            false => sp,
        }
    }
}

/// More stack than a hook uses.
const HOOK_STACK: u64 = 64 << 10;

/// In the stop handler, when the thread is released (all signals blocked): the frame may
/// be about to make a call, or to repeat one.
///
/// # Safety
/// `uc` is the frame of the handler; it returns there next.
pub unsafe fn before_release(uc: *mut ucontext_t) {
    if !fault::active() {
        return;
    }
    // SAFETY: the handler's own frame; rip is where the thread goes on, so two bytes of
    // code lie there unless it is about to fault anyway (then nothing is read); the
    // restart stub's rsp is at its record.
    unsafe {
        let regs = &(*uc).uc_mcontext.gregs;
        let arguments = [REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8, REG_R9];
        let args = arguments.map(|reg| regs[reg as usize] as u64);
        let rip = regs[REG_RIP as usize] as u64;
        if is_at_record(rip) {
            let record = &*(regs[REG_RSP as usize] as *const RestartRecord);
            call(record.nr, &record.args);
            call(record.executes, &args);
            return;
        }
        let mut code = [0u8; 2];
        if user::read_bytes(rip, &mut code) == Ok(2) && code == [0x0f, 0x05] {
            call(regs[REG_RAX as usize], &args);
            memory::release_for(regs[REG_RAX as usize], &args);
        }
        // Stopped on its way from the look at the call to the call itself.
        let frame = (*thread_block()).call_frame;
        let sp = regs[REG_RSP as usize] as u64;
        if (1..HOOK_STACK).contains(&frame.wrapping_sub(sp)) {
            let frame = &*(frame as *const CallFrame);
            call(frame.rax, &frame.args);
        }
        if let Some(nr) = callsites::site_after(rip as usize + 2) {
            call(if nr < 0 { regs[REG_RAX as usize] } else { nr }, &args);
        }
    }
}
