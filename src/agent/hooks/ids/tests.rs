use super::*;
use crate::agent::hooks::testing::{call, frame, in_child};
use ckpt_sys::callsite::{self, LifeCall};

/// Pretends that this process was 1000 (group 900) in its first life.
fn restored() -> i32 {
    // SAFETY: no arguments.
    let pid = unsafe { syscall!(libc::SYS_getpid) } as i32;
    set_identity(&[(1000, pid), (1001, 77)], 1000, pid).unwrap();
    pid
}

#[test]
fn nothing_happens_without_a_restore() {
    in_child(|| {
        assert_eq!(call(libc::SYS_getpid, &[]), None);
        assert_eq!(virtual_tid(5), 5);
    });
}

#[test]
fn own_ids_are_the_old_ones() {
    in_child(|| {
        let pid = restored();
        assert_eq!(call(libc::SYS_getpid, &[]), Some(1000));
        assert_eq!(call(libc::SYS_gettid, &[]), Some(1000));
        assert_eq!((to_real(1001), to_virtual(77), to_real(5)), (77, 1001, 5));
        assert_eq!((virtual_tid(pid), virtual_tid(77)), (1000, 1001));
        in_child(move || {
            // SAFETY: no arguments.
            let own = unsafe { syscall!(libc::SYS_getpid) } as i64;
            assert_eq!(call(libc::SYS_getpid, &[]), Some(own));
            assert_eq!(call(libc::SYS_gettid, &[]), Some(own));
            assert_eq!(call(libc::SYS_getppid, &[]), Some(1000));
        });
    });
}

#[test]
fn arguments_are_translated() {
    in_child(|| {
        let pid = restored() as u64;
        set_groups(900, 66, 800, 55);
        let arguments = |nr, given: &[u64]| {
            let mut f = frame(nr, given);
            if calls::SENDERS.contains(&nr) {
                return calls::addressed(&f, &mut [0; 16]).1;
            }
            calls::translate(&mut f);
            f.args
        };
        assert_eq!(
            arguments(libc::SYS_tgkill, &[1000, 1001, 9])[..2],
            [pid, 77]
        );
        assert_eq!(
            arguments(libc::SYS_kill, &[-900i64 as u64, 9])[0] as i64,
            -66
        );
        assert_eq!(
            arguments(libc::SYS_kill, &[-1000i64 as u64, 9])[0] as i64,
            -(pid as i64)
        );
        assert_eq!(arguments(libc::SYS_kill, &[-1i64 as u64, 9])[0] as i64, -1);
        assert_eq!(arguments(libc::SYS_kill, &[0, 9])[0], 0);
        assert_eq!(arguments(libc::SYS_sched_getaffinity, &[1001])[0], 77);
        assert_eq!(arguments(libc::SYS_setpriority, &[0, 1001, 5])[1], 77);
        assert_eq!(arguments(libc::SYS_setpriority, &[1, 900, 5])[1], 66);
        assert_eq!(arguments(libc::SYS_wait4, &[900])[0], 900);
        assert_eq!(arguments(libc::SYS_wait4, &[-900i64 as u64])[0] as i64, -66);
        let clock = |id: i32| i64::from((!id << 3) | 6) as u64;
        assert_eq!(
            arguments(libc::SYS_clock_getres, &[clock(1001)])[0],
            clock(77)
        );
    });
}

/// After a restart a process that had been stopped on its way to the kernel sent itself a signal
/// by its pid of the life before, which was a stranger's by then.
#[test]
fn a_call_is_made_in_its_own_life_only() {
    let word = AtomicU32::new(5);
    let mut call = LifeCall {
        nr: libc::SYS_dup,
        args: [u64::MAX, 0, 0, 0, 0, 0],
        word: &word,
        expected: 5,
    };
    let failed = Some(-i64::from(libc::EBADF));
    // SAFETY: a call that fails; no stop comes.
    unsafe {
        assert_eq!(call.make(), failed);
        word.store(6, SeqCst);
        assert_eq!(call.make(), None);
        call.expected = 6;
        assert_eq!(call.make(), failed);
        // A thread stopped just before the `syscall` compares again.
        let mut uc: libc::ucontext_t = std::mem::zeroed();
        for (stopped, goes_on) in [(-2, true), (0, false)] {
            let at = callsite::life_after() as i64;
            uc.uc_mcontext.gregs[libc::REG_RIP as usize] = at + stopped;
            crate::agent::callsites::rewind(&raw mut uc);
            let compares = callsite::life_compare() as i64;
            let expected = if goes_on { compares } else { at };
            assert_eq!(uc.uc_mcontext.gregs[libc::REG_RIP as usize], expected);
        }
    }
}

#[test]
fn groups_follow_the_process_when_it_leaves_them() {
    in_child(|| {
        restored();
        // SAFETY: no arguments.
        let real = unsafe { syscall!(libc::SYS_getpgrp) } as i32;
        set_groups(900, real, 800, 0);
        assert_eq!(call(libc::SYS_getpgrp, &[]), Some(900));
        assert_eq!(call(libc::SYS_getpgid, &[1000]), Some(900));
        assert_eq!(call(libc::SYS_setsid, &[]), Some(1000));
        assert_eq!(call(libc::SYS_getpgrp, &[]), Some(1000));
        assert_eq!(call(libc::SYS_getsid, &[0]), Some(1000));
    });
}

#[test]
fn owners_and_credentials() {
    in_child(|| {
        let pid = restored();
        let mut ends = [0i32; 2];
        // SAFETY: a socket pair of our own.
        unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, ends.as_mut_ptr()) };
        let fd = ends[0] as u64;
        let mut cred = [0i32; 3];
        let mut len = 12u32;
        let (at, len_at) = (&raw mut cred as u64, &raw mut len as u64);
        let option = [
            fd,
            libc::SOL_SOCKET as u64,
            libc::SO_PEERCRED as u64,
            at,
            len_at,
        ];
        assert_eq!(call(libc::SYS_getsockopt, &option), Some(0));
        assert_eq!(cred[0], 1000);
        let own: [i32; 2] = [1, 1000];
        let mut back = [0i32; 2];
        let set = [fd, 15, &raw const own as u64];
        assert_eq!(call(libc::SYS_fcntl, &set), Some(0));
        // SAFETY: asks the kernel.
        unsafe { syscall!(libc::SYS_fcntl, fd, 16, &raw mut back) };
        assert_eq!(back, [1, pid]);
        assert_eq!(
            call(libc::SYS_fcntl, &[fd, 16, &raw mut back as u64]),
            Some(0)
        );
        assert_eq!(back, own);
        assert_eq!(call(libc::SYS_fcntl, &[fd, 9]), Some(1000));
    });
}

#[test]
fn proc_paths_and_links() {
    in_child(|| {
        restored();
        let path = c"/proc/1000/comm";
        let fd = call(
            libc::SYS_openat,
            &[libc::AT_FDCWD as u64, path.as_ptr() as u64, 0, 0],
        );
        assert!(fd.unwrap() >= 0);
        assert_eq!(
            call(libc::SYS_openat, &[0, c"/tmp".as_ptr() as u64, 0, 0]),
            None
        );
        let mut buf = [0u8; 64];
        let link = c"/proc/self".as_ptr() as u64;
        let n = call(libc::SYS_readlink, &[link, &raw mut buf as u64, 64]);
        assert_eq!((n, &buf[..4]), (Some(4), &b"1000"[..]));
    });
}

#[test]
fn a_thread_born_with_an_old_id_gets_another() {
    in_child(|| {
        restored();
        std::thread::spawn(|| {
            // SAFETY: no arguments.
            let (pid, tid) = unsafe {
                (
                    syscall!(libc::SYS_getpid) as i32,
                    syscall!(libc::SYS_gettid) as i32,
                )
            };
            set_identity(&[(1000, pid), (tid, 77)], 1000, pid).unwrap();
            assert_eq!(call(libc::SYS_set_robust_list, &[0, 24]), None);
            let id = call(libc::SYS_gettid, &[]).unwrap() as i32;
            assert!(id > FIRST_LATE);
            assert_eq!((to_real(id), to_virtual(tid), to_real(tid)), (tid, id, 77));
            // pthread_self()->tid, as the kernel and glibc know it.
            let mut at = 0u64;
            // SAFETY: asks the kernel.
            unsafe { syscall!(libc::SYS_prctl, 40, &raw mut at) };
            // SAFETY: this thread's own descriptor.
            assert_eq!(unsafe { *(at as *const i32) }, id);
            // Back again: joining goes by the kernel's clearing of that word.
        })
        .join()
        .unwrap();
    });
}

#[test]
fn other_new_threads_keep_the_kernels_id() {
    in_child(|| {
        restored();
        std::thread::spawn(|| {
            assert_eq!(call(libc::SYS_set_robust_list, &[0, 24]), None);
            // SAFETY: no arguments.
            let tid = unsafe { syscall!(libc::SYS_gettid) } as i64;
            assert_eq!(call(libc::SYS_gettid, &[]), Some(tid));
        })
        .join()
        .unwrap();
    });
}
