//! The exported libc names (the symbol net). No logic: each name asks whether the
//! symbol net is on duty (`hooks::symbol::on_duty`, false as soon as the call-site net
//! is laid) and goes to the policy or straight to libc's function.
//!
//! `redhook` does exports and look-ups. Its `real!` resolves at the first use, inside a
//! `Once`: [`touch_all`] does that for every name in the constructor, so that later
//! uses, in signal handlers and forked children, only read. Its fallback after a
//! panic is out of reach: every profile aborts on panic. Variadic mremap is a function
//! of five arguments here: in this ABI the callee cannot tell, and the fifth is only
//! used where the flags say that it was passed.

// The names are libc's.
#![allow(non_camel_case_types)]

use ckpt::agent::hooks::symbol::{self, on_duty, real_id};
use libc::{c_int, c_ulong, c_void, id_t, pid_t, sighandler_t, siginfo_t, sigset_t, size_t};
use libc::{
    cpu_set_t, epoll_event, fd_set, nfds_t, pollfd, sigaction as action, stack_t, timespec,
};
use redhook::{hook, real};

/// The exports that pass on to libc: one list for the definitions and for [`touch_all`].
macro_rules! exports {
    ($($name:ident ( $($arg:ident : $t:ty),* ) -> $r:ty = $hook:ident $policy:block)*) => {
        $(hook! {
            unsafe fn $name($($arg: $t),*) -> $r => $hook {
                // SAFETY: the program's own arguments, as for the libc function of this
                // name, whose address dlsym gave for this very name.
                unsafe {
                    if on_duty() { $policy } else { real!($name)($($arg),*) }
                }
            }
        })*

        /// Resolves every real function; constructor.
        pub fn touch_all() {
            $(let _ = real!($name);)*
        }
    };
}

/// sigset_t with nothing in it, to be filled by `symbol::waiting_mask`.
macro_rules! filtered {
    ($set:expr, $copy:ident) => {{
        $copy = std::mem::zeroed();
        symbol::waiting_mask($set, &mut $copy)
    }};
}

exports! {
    sigaction(sig: c_int, act: *const action, old: *mut action) -> c_int = on_sigaction {
        symbol::sigaction(real!(sigaction), sig, act, old)
    }
    signal(sig: c_int, handler: sighandler_t) -> sighandler_t = on_signal {
        if sig == 64 { symbol::signal_reserved(handler) } else { real!(signal)(sig, handler) }
    }
    sigprocmask(how: c_int, set: *const sigset_t, old: *mut sigset_t) -> c_int = on_sigprocmask {
        symbol::fail(symbol::mask(how, set, old))
    }
    pthread_sigmask(how: c_int, set: *const sigset_t, old: *mut sigset_t) -> c_int = on_pthread_sigmask {
        symbol::mask(how, set, old)
    }
    sigpending(set: *mut sigset_t) -> c_int = on_sigpending { symbol::sigpending(set) }
    sigaltstack(new: *const stack_t, old: *mut stack_t) -> c_int = on_sigaltstack {
        symbol::call(libc::SYS_sigaltstack, &[new as u64, old as u64]) as c_int
    }
    sigsuspend(set: *const sigset_t) -> c_int = on_sigsuspend {
        let mut copy: sigset_t;
        real!(sigsuspend)(filtered!(set, copy))
    }
    sigtimedwait(set: *const sigset_t, info: *mut siginfo_t, time: *const timespec) -> c_int = on_sigtimedwait {
        let mut copy: sigset_t;
        real!(sigtimedwait)(filtered!(set, copy), info, time)
    }
    sigwaitinfo(set: *const sigset_t, info: *mut siginfo_t) -> c_int = on_sigwaitinfo {
        let mut copy: sigset_t;
        real!(sigwaitinfo)(filtered!(set, copy), info)
    }
    sigwait(set: *const sigset_t, sig: *mut c_int) -> c_int = on_sigwait {
        let mut copy: sigset_t;
        real!(sigwait)(filtered!(set, copy), sig)
    }
    signalfd(fd: c_int, set: *const sigset_t, flags: c_int) -> c_int = on_signalfd {
        let mut copy: sigset_t;
        real!(signalfd)(fd, filtered!(set, copy), flags)
    }
    ppoll(fds: *mut pollfd, n: nfds_t, time: *const timespec, set: *const sigset_t) -> c_int = on_ppoll {
        let mut copy: sigset_t;
        real!(ppoll)(fds, n, time, filtered!(set, copy))
    }
    pselect(n: c_int, r: *mut fd_set, w: *mut fd_set, e: *mut fd_set, time: *const timespec, set: *const sigset_t) -> c_int = on_pselect {
        let mut copy: sigset_t;
        real!(pselect)(n, r, w, e, time, filtered!(set, copy))
    }
    epoll_pwait(fd: c_int, events: *mut epoll_event, n: c_int, time: c_int, set: *const sigset_t) -> c_int = on_epoll_pwait {
        let mut copy: sigset_t;
        real!(epoll_pwait)(fd, events, n, time, filtered!(set, copy))
    }
    madvise(addr: *mut c_void, len: size_t, advice: c_int) -> c_int = on_madvise {
        symbol::call(libc::SYS_madvise, &[addr as u64, len as u64, advice as u64]) as c_int
    }
    mremap(old: *mut c_void, old_len: size_t, new_len: size_t, flags: c_int, new: *mut c_void) -> *mut c_void = on_mremap {
        let args = [old as u64, old_len as u64, new_len as u64, flags as u64, new as u64];
        symbol::call(libc::SYS_mremap, &args) as *mut c_void
    }
    mlock(addr: *const c_void, len: size_t) -> c_int = on_mlock {
        symbol::call(libc::SYS_mlock, &[addr as u64, len as u64]) as c_int
    }
    mlockall(flags: c_int) -> c_int = on_mlockall {
        symbol::call(libc::SYS_mlockall, &[flags as u64]) as c_int
    }
    getpid() -> pid_t = on_getpid { symbol::call(libc::SYS_getpid, &[]) as pid_t }
    gettid() -> pid_t = on_gettid { symbol::call(libc::SYS_gettid, &[]) as pid_t }
    getpgrp() -> pid_t = on_getpgrp { symbol::call(libc::SYS_getpgrp, &[]) as pid_t }
    getpgid(pid: pid_t) -> pid_t = on_getpgid { symbol::call(libc::SYS_getpgid, &[pid as u64]) as pid_t }
    getsid(pid: pid_t) -> pid_t = on_getsid { symbol::call(libc::SYS_getsid, &[pid as u64]) as pid_t }
    setsid() -> pid_t = on_setsid { symbol::call(libc::SYS_setsid, &[]) as pid_t }
    setpgid(pid: pid_t, group: pid_t) -> c_int = on_setpgid {
        symbol::call(libc::SYS_setpgid, &[pid as u64, group as u64]) as c_int
    }
    kill(pid: pid_t, sig: c_int) -> c_int = on_kill {
        symbol::call(libc::SYS_kill, &[pid as u64, sig as u64]) as c_int
    }
    tgkill(pid: pid_t, tid: pid_t, sig: c_int) -> c_int = on_tgkill {
        symbol::call(libc::SYS_tgkill, &[pid as u64, tid as u64, sig as u64]) as c_int
    }
    sched_setaffinity(pid: pid_t, len: size_t, set: *const cpu_set_t) -> c_int = on_sched_setaffinity {
        real!(sched_setaffinity)(real_id(pid), len, set)
    }
    sched_getaffinity(pid: pid_t, len: size_t, set: *mut cpu_set_t) -> c_int = on_sched_getaffinity {
        real!(sched_getaffinity)(real_id(pid), len, set)
    }
    getpriority(which: c_ulong, who: id_t) -> c_int = on_getpriority {
        let who = if which == 0 { real_id(who as pid_t) as id_t } else { who };
        real!(getpriority)(which, who)
    }
    setpriority(which: c_ulong, who: id_t, value: c_int) -> c_int = on_setpriority {
        let who = if which == 0 { real_id(who as pid_t) as id_t } else { who };
        real!(setpriority)(which, who, value)
    }
}

/// Ends the process; the clean-up sees it with either net.
///
/// # Safety
/// As `_exit(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn _exit(status: c_int) -> ! {
    symbol::end(status)
}

/// As [`_exit`].
///
/// # Safety
/// As `_Exit(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn _Exit(status: c_int) -> ! {
    symbol::end(status)
}
