//! The system-call filter that a program in a container lives under: what Docker and Podman
//! forbid by default to a process without capabilities, in force before the program starts.

use std::process::Command;

/// Forbidden: EPERM.
const FORBIDDEN: &[libc::c_long] = &[
    libc::SYS_userfaultfd,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_process_madvise,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_fanotify_init,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_chroot,
    libc::SYS_add_key,
    libc::SYS_keyctl,
    libc::SYS_personality,
    libc::SYS_move_pages,
    libc::SYS_get_mempolicy,
    libc::SYS_clock_settime,
];

/// Not there at all, so that the C library takes clone(2), whose flags a filter can see: ENOSYS.
const MISSING: libc::c_long = libc::SYS_clone3;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const IS: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

fn statement(code: u16, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

fn answer(filter: &mut Vec<libc::sock_filter>, call: libc::c_long, errno: i32) {
    // Any other call: over the next statement.
    filter.push(libc::sock_filter {
        jf: 1,
        ..statement(IS, call as u32)
    });
    filter.push(statement(RETURN, libc::SECCOMP_RET_ERRNO | errno as u32));
}

/// Puts the program under the filter.
pub fn contain(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    // The number comes first in `struct seccomp_data`.
    let mut filter = vec![statement(LOAD, 0)];
    for &call in FORBIDDEN {
        answer(&mut filter, call, libc::EPERM);
    }
    answer(&mut filter, MISSING, libc::ENOSYS);
    filter.push(statement(RETURN, libc::SECCOMP_RET_ALLOW));
    // SAFETY: only system calls between fork and exec; the program of the filter is alive.
    unsafe {
        command.pre_exec(move || {
            let program = libc::sock_fprog {
                len: filter.len() as u16,
                filter: filter.as_mut_ptr(),
            };
            let mode = libc::SECCOMP_MODE_FILTER;
            if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0
                || libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) < 0
            {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}
