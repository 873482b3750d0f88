//! Who sent a signal: after a restore with other ids the kernel writes the process's
//! real id into `si_pid` of what the process sends itself, and the program knows another.
//! glibc itself compares them (its handlers for cancellation and set-id ignore signals
//! of other processes), so a cancelled thread would never end.
//!
//! * **Handlers** with SA_SIGINFO are entered through [`enter_handler`], which puts the
//!   program's id where the real one stands and goes on to the handler. The table is filled by
//!   [`adopt`] after the restore and by `sigaction` from then on; the program is shown its own.
//! * **Sigwaitinfo, signalfd**: what the process sends to itself (`kill`, and `tgkill` to the
//!   calling thread) is queued with the right id from the start ([`to_self`]).
//!
//! Any thread, any context.

use super::sigaction::kernel;
use super::user;
use crate::agent::state::{AGENT, Agent, RESERVED_SIGNAL};
use crate::image::state::KernelSigaction;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicU64, Ordering::*};

/// The program's handlers (index = number), for [`enter_handler`]; replaced, never cleared.
static HANDLERS: [AtomicU64; 65] = [const { AtomicU64::new(0) }; 65];

/// The handler that the kernel knows. Entered as a signal handler, leaves everything as the
/// kernel made it, but for `si_pid`.
///
/// # Safety
/// Only the kernel calls it, as the handler of a signal with an entry in the table.
#[unsafe(naked)]
unsafe extern "C" fn enter_handler() {
    std::arch::naked_asm!(
        "mov eax, dword ptr [rsi + 8]", // si_code
        "test eax, eax",                // SI_USER
        "jz 2f",
        "cmp eax, -1", // SI_QUEUE
        "je 2f",
        "cmp eax, -3", // SI_MESGQ
        "je 2f",
        "cmp eax, -6", // SI_TKILL
        "jne 3f",
        "2:",
        "lea rcx, [rip + {agent}]",
        "mov eax, dword ptr [rsi + 16]", // si_pid
        "cmp eax, dword ptr [rcx + {real}]",
        "jne 3f",
        "mov eax, dword ptr [rcx + {shown}]",
        "mov dword ptr [rsi + 16], eax",
        "3:",
        "lea rax, [rip + {handlers}]",
        "jmp qword ptr [rax + rdi * 8]",
        agent = sym AGENT,
        real = const std::mem::offset_of!(Agent, real_pid),
        shown = const std::mem::offset_of!(Agent, pid),
        handlers = sym HANDLERS,
    )
}

fn entry() -> u64 {
    enter_handler as *const () as u64
}

/// Before `action` is given to the kernel: the way through [`enter_handler`], if ids are
/// translated and the handler can see the sender.
pub fn wrap(sig: i32, action: &mut KernelSigaction) {
    let sees = action.handler > 1 && action.flags & libc::SA_SIGINFO as u64 != 0;
    if sees && action.handler != entry() && AGENT.ids_translated.load(Relaxed) {
        HANDLERS[sig as usize].store(action.handler, Release);
        action.handler = entry();
    }
}

/// The handler behind [`enter_handler`] at this moment, for [`unwrap`].
pub fn current(sig: i32) -> u64 {
    HANDLERS[sig as usize].load(Acquire)
}

/// What the program is to see of the kernel's `action`; `behind` as [`current`] told before the
/// action was replaced.
pub fn unwrap(action: &mut KernelSigaction, behind: u64) {
    if action.handler == entry() {
        action.handler = behind;
    }
}

/// After a restore with other ids, before the program's threads run: the handlers that
/// are in force, glibc's own included.
pub fn adopt() {
    for sig in 1..RESERVED_SIGNAL {
        let mut action = KernelSigaction::default();
        if kernel(sig, std::ptr::null(), &mut action) != 0 {
            continue;
        }
        let before = action.handler;
        wrap(sig, &mut action);
        if action.handler != before {
            kernel(sig, &action, std::ptr::null_mut());
        }
    }
}

/// rt_sigaction for glibc's two signals: nothing but the sender is of interest.
pub fn glibcs_action(sig: i32, act: u64, old: u64) -> Result<i64, i32> {
    let behind = current(sig);
    let mut before = KernelSigaction::default();
    let ret = if act == 0 {
        kernel(sig, std::ptr::null(), &mut before)
    } else {
        let mut new = user::read::<KernelSigaction>(act)?;
        wrap(sig, &mut new);
        kernel(sig, &new, &mut before)
    };
    if ret == 0 && old != 0 {
        unwrap(&mut before, behind);
        user::write(old, &before)?;
    }
    Ok(ret as i64)
}

/// Puts the program's id where `info` (128 bytes of `siginfo_t`) names the process by the real one.
pub fn correct(info: &mut [u64; 16]) {
    let from_us = info[2] as i32 == AGENT.real_pid.load(Relaxed);
    if AGENT.ids_translated.load(Relaxed) && from_us && matches!(info[1] as i32, 0 | -1 | -3 | -6) {
        info[2] = info[2] >> 32 << 32 | u64::from(AGENT.pid.load(Relaxed) as u32);
    }
}

/// As [`enter_handler`], which the thread is just about to begin: after a restore the real id is
/// another one, and what stood there was shown.
///
/// # Safety
/// In the handler whose frame `uc` is.
pub unsafe fn correct_at_entry(uc: *const libc::ucontext_t) {
    // SAFETY: the caller's promise; a handler with SA_SIGINFO begins with its siginfo in rsi.
    unsafe {
        let regs = &(*uc).uc_mcontext.gregs;
        if regs[libc::REG_RIP as usize] as u64 == entry() {
            correct(&mut *(regs[libc::REG_RSI as usize] as *mut [u64; 16]));
        }
    }
}

/// kill(2) of the own process (`to_thread` false) or tgkill(2) of the calling thread, as a call with
/// the id that the program knows as the sender's, which is written to `info`. The kernel permits the
/// claim to nobody but the very task that is named, and any of its threads names a process.
pub fn to_self(sig: i32, to_thread: bool, info: &mut [u64; 16]) -> (i64, [u64; 6]) {
    const SI_USER: i32 = 0;
    const SI_TKILL: i32 = -6;
    let code = if to_thread { SI_TKILL } else { SI_USER };
    // SAFETY: no arguments.
    let (uid, pid, tid) = unsafe {
        (
            syscall!(libc::SYS_getuid) as u32,
            syscall!(libc::SYS_getpid) as u64,
            syscall!(libc::SYS_gettid) as u64,
        )
    };
    info[0] = u64::from(sig as u32);
    info[1] = u64::from(code as u32);
    info[2] = u64::from(AGENT.pid.load(Relaxed) as u32) | u64::from(uid) << 32;
    let (sig, at) = (sig as u64, info.as_ptr() as u64);
    match to_thread {
        true => (libc::SYS_rt_tgsigqueueinfo, [pid, tid, sig, at, 0, 0]),
        false => (libc::SYS_rt_sigqueueinfo, [tid, sig, at, 0, 0, 0]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::{call, in_child};
    use std::sync::atomic::AtomicI32;

    static SENDER: AtomicI32 = AtomicI32::new(0);

    extern "C" fn note(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: a signal of kill(2).
        SENDER.store(unsafe { (*info).si_pid() }, SeqCst);
    }

    /// glibc's handler of SIGCANCEL compares si_pid with getpid(): after a restore as an ordinary
    /// user cancelled threads lived for ever.
    #[test]
    fn the_sender_is_the_one_the_program_knows() {
        in_child(|| {
            // SAFETY: the test's own handler and process.
            unsafe {
                let mut act: libc::sigaction = std::mem::zeroed();
                act.sa_sigaction = note as *const () as usize;
                act.sa_flags = libc::SA_SIGINFO;
                libc::sigaction(libc::SIGUSR1, &act, std::ptr::null_mut());
                AGENT.real_pid.store(libc::getpid(), SeqCst);
                AGENT.pid.store(4711, SeqCst);
                AGENT.ids_translated.store(true, SeqCst);
                adopt();
                libc::kill(libc::getpid(), libc::SIGUSR1);
                assert_eq!(SENDER.swap(0, SeqCst), 4711);
                let sig = libc::SIGUSR1 as u64;
                let mut seen = KernelSigaction::default();
                let at = &raw mut seen as u64;
                assert_eq!(call(libc::SYS_rt_sigaction, &[sig, 0, at, 8]), Some(0));
                assert_eq!(seen.handler, note as *const () as u64);
                let default = KernelSigaction::default();
                let act = &raw const default as u64;
                assert_eq!(call(libc::SYS_rt_sigaction, &[sig, act, at, 8]), Some(0));
                assert_eq!(seen.handler, note as *const () as u64);
                assert_eq!(call(libc::SYS_rt_sigaction, &[sig, at, 0, 8]), Some(0));
                for to_thread in [false, true] {
                    let mut info = [0; 16];
                    let (nr, [a, b, c, d, ..]) = to_self(libc::SIGUSR1, to_thread, &mut info);
                    assert_eq!(syscall!(nr, a, b, c, d), 0);
                    assert_eq!(SENDER.swap(0, SeqCst), 4711);
                }
            }
        });
    }
}
