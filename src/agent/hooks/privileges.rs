//! Calls that change what the program may do: ids, capabilities, securebits, landlock, the root
//! directory, dispatch of system calls to the program itself. Most of it cannot be brought back,
//! or not without risk, and nothing of it may be wider after a restore than it was: what is
//! found here is looked at by every checkpoint (`collect::credentials`, `refusal`).
//!
//! Any thread. Everything is forwarded, or made here and judged by its result.

use super::frame::{CallFrame, Verdict};
use crate::agent::hooks::files::guard::Recording;
use crate::agent::refusal::{self, Kind};
use crate::agent::state::{InHook, is_agents_process};
use ckpt_sys::syscall;

/// The numbers this file acts on, beside prctl.
pub const NUMBERS: &[libc::c_long] = &[
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    LANDLOCK_RESTRICT_SELF,
];

const LANDLOCK_RESTRICT_SELF: libc::c_long = 446;

/// prctl(2), of Linux 5.11.
const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;

const LANDLOCK: &str = "the program has restricted itself (landlock)";
const DISPATCH: &str = "the program handles its system calls itself (PR_SET_SYSCALL_USER_DISPATCH)";

pub fn dispatch(frame: &mut CallFrame) -> Verdict {
    match frame.rax {
        libc::SYS_prctl => return prctl(frame),
        libc::SYS_chroot | libc::SYS_pivot_root => return other_root(frame),
        LANDLOCK_RESTRICT_SELF if is_agents_process() => {
            let _hook = InHook::enter();
            if make(frame) == 0 {
                refusal::disable(LANDLOCK);
            }
            return Verdict::Done;
        }
        LANDLOCK_RESTRICT_SELF => {}
        // As the kernel has it these act on the calling thread alone.
        _ => refusal::note(Kind::Credentials),
    }
    Verdict::Forward
}

fn prctl(frame: &mut CallFrame) -> Verdict {
    const OFF: u64 = 0;
    match frame.args[0] as i32 {
        libc::PR_CAPBSET_DROP | libc::PR_CAP_AMBIENT => refusal::note(Kind::Credentials),
        libc::PR_SET_KEEPCAPS | libc::PR_SET_TSC => refusal::note(Kind::ThreadSwitches),
        libc::PR_SET_SECUREBITS if is_agents_process() => {
            let _hook = InHook::enter();
            // SAFETY: no pointers.
            let bits = || unsafe { syscall!(libc::SYS_prctl, libc::PR_GET_SECUREBITS) };
            let before = bits();
            if make(frame) == 0 && bits() != before {
                refusal::note(Kind::SecureBits);
            }
            return Verdict::Done;
        }
        // Once it is in force our own calls come to the program, as under a filter.
        PR_SET_SYSCALL_USER_DISPATCH if frame.args[1] != OFF && is_agents_process() => {
            refusal::disable(DISPATCH);
            refusal::retire_and_wait();
            refusal::set_sandboxed();
        }
        _ => {}
    }
    Verdict::Forward
}

/// chroot and pivot_root: paths mean something else from here on. `collect::credentials` sees
/// it; what is done to files cannot be told to the table any more.
fn other_root(frame: &mut CallFrame) -> Verdict {
    let Some(mut recording) = Recording::begin() else {
        return Verdict::Forward;
    };
    if make(frame) == 0 {
        let reason = b"the program changed its root directory (chroot)";
        recording.session.incomplete(reason);
    }
    Verdict::Done
}

/// The program's own call.
fn make(frame: &mut CallFrame) -> i64 {
    let [a, b, c, d, e, f] = frame.args;
    // SAFETY: what the program asked for.
    frame.rax = unsafe { syscall!(frame.rax, a, b, c, d, e, f) as i64 };
    frame.rax
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::callsites::numbers;
    use crate::agent::hooks::process;
    use crate::agent::hooks::testing::{call, in_child};
    use crate::agent::state::{AGENT, wake};
    use std::sync::atomic::Ordering::SeqCst;

    /// pkey_alloc's site in libc was not patched, so nobody saw the program use keys.
    #[test]
    fn every_call_that_must_be_seen_is_patched() {
        let all = NUMBERS.iter().chain(process::NUMBERS);
        let missing: Vec<_> = all.filter(|nr| !numbers::wanted(**nr)).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }

    #[test]
    fn what_is_asked_for_in_vain_changes_nothing() {
        in_child(|| {
            // SAFETY: a child of the test alone in its process.
            unsafe { wake().unwrap() };
            AGENT.real_pid.store(std::process::id() as i32, SeqCst);
            let landlock = call(LANDLOCK_RESTRICT_SELF, &[u64::MAX, 77]);
            assert!(landlock.is_some_and(|ret| ret < 0), "{landlock:?}");
            assert_eq!(refusal::disabled(), None);
            let same = call(libc::SYS_prctl, &[libc::PR_SET_SECUREBITS as u64, 1 << 30]);
            assert_ne!(same, Some(0));
            assert!(!refusal::was_noted(Kind::SecureBits));
            assert_eq!(call(libc::SYS_setfsuid, &[u64::from(u32::MAX)]), None);
            assert!(refusal::was_noted(Kind::Credentials));
        });
    }
}
