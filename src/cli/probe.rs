//! What this kernel and this user permit: each probe tries the thing itself, on this
//! process or on a child of its own. For `ckpt doctor`.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `Ok`: permitted; `Err`: the error of the attempt.
pub type Probe = std::io::Result<()>;

fn result(value: libc::c_long) -> std::io::Result<libc::c_long> {
    if value < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(value)
}

/// The PAGEMAP_SCAN ioctl of /proc/self/pagemap.
pub fn pagemap_scan() -> Probe {
    const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
    const PAGE_IS_PRESENT: u64 = 1 << 3;
    let file = File::open("/proc/self/pagemap")?;
    let page = std::ptr::from_ref(&file) as u64 & !4095;
    let mut regions = [[0u64; 3]; 4];
    // struct pm_scan_arg: size, flags, start, end, walk_end, vec, vec_len, max_pages,
    // category_inverted, category_mask, category_anyof_mask, return_mask.
    let mut arg = [
        96,
        0,
        page,
        page + 4096,
        0,
        regions.as_mut_ptr() as u64,
        regions.len() as u64,
        0,
        0,
        PAGE_IS_PRESENT,
        0,
        PAGE_IS_PRESENT,
    ];
    // SAFETY: `arg` is a struct pm_scan_arg of 96 bytes, `regions` is what it names.
    result(unsafe { libc::ioctl(file.as_raw_fd(), PAGEMAP_SCAN, arg.as_mut_ptr()) }.into())?;
    Ok(())
}

/// clone3 with a chosen pid: a child with a free number that ends at once.
pub fn set_tid() -> Probe {
    const RANGE: std::ops::Range<i32> = 300..32_000;
    let mut last = std::io::Error::from_raw_os_error(libc::EEXIST);
    let start = RANGE.start + (std::process::id() as i32 * 7) % (RANGE.end - RANGE.start);
    for pid in start..start + 20 {
        // struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack,
        // stack_size, tls, set_tid, set_tid_size, cgroup.
        let set_tid = [pid];
        let mut args = [0u64; 11];
        args[4] = libc::SIGCHLD as u64;
        args[8] = set_tid.as_ptr() as u64;
        args[9] = 1;
        // SAFETY: as fork(2): the child has a copy of everything and ends at once by a
        // system call; `args` and `set_tid` outlive the call.
        let child = unsafe {
            let child = libc::syscall(libc::SYS_clone3, args.as_ptr(), size_of_val(&args));
            if child == 0 {
                libc::_exit(0);
            }
            child
        };
        match result(child) {
            Ok(child) => {
                // SAFETY: waits for the child just made, wants no status.
                unsafe { libc::waitpid(child as i32, std::ptr::null_mut(), 0) };
                return Ok(());
            }
            Err(error) => last = error,
        }
        if last.raw_os_error() != Some(libc::EEXIST) {
            break;
        }
    }
    Err(last)
}

/// prctl(PR_SET_MM, PR_SET_MM_MAP): present if its size can be asked for.
pub fn set_mm_map() -> Probe {
    const PR_SET_MM_MAP_SIZE: libc::c_ulong = 15;
    let mut size = 0u32;
    // SAFETY: the kernel writes one 32-bit word.
    let done = unsafe { libc::prctl(libc::PR_SET_MM, PR_SET_MM_MAP_SIZE, &mut size, 0, 0) };
    result(done.into()).map(drop)
}

/// arch_prctl(ARCH_MAP_VDSO_64): with a vdso in place it answers EEXIST; where it is
/// not compiled in, EINVAL.
pub fn map_vdso() -> Probe {
    const ARCH_MAP_VDSO_64: libc::c_int = 0x2003;
    // SAFETY: changes nothing, as this process has its vdso.
    let done = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_MAP_VDSO_64, 0usize) };
    match result(done) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _ => Ok(()),
    }
}

/// kcmp(2), by which shared open files are told apart.
pub fn kcmp() -> Probe {
    const KCMP_FILE: libc::c_int = 0;
    let file = File::open("/proc/self/stat")?;
    let pid = std::process::id();
    let fd = file.as_raw_fd();
    // SAFETY: integers only.
    result(unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_FILE, fd, fd) }).map(drop)
}

/// pidfd_getfd(2), by which the program's descriptors are examined.
pub fn pidfd_getfd() -> Probe {
    let file = File::open("/proc/self/stat")?;
    // SAFETY: integers only; both calls make descriptors that are ours.
    unsafe {
        let pidfd = result(libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0))?;
        let pidfd = OwnedFd::from_raw_fd(pidfd as i32);
        let number = file.as_raw_fd();
        let copy = libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0);
        drop(OwnedFd::from_raw_fd(result(copy)? as i32));
    }
    Ok(())
}

/// Are vdso and friends sealed (mseal), so that a restore cannot unmap them?
pub fn sealed_system_mappings() -> bool {
    let Ok(smaps) = std::fs::read_to_string("/proc/self/smaps") else {
        return false;
    };
    let mut in_vdso = false;
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if in_vdso && flags.split_whitespace().any(|flag| flag == "sl") {
                return true;
            }
            in_vdso = false;
        } else if line.ends_with("[vdso]") {
            in_vdso = true;
        }
    }
    false
}

/// Can a file in `dir` be mapped for execution?
pub fn is_noexec(dir: &std::path::Path) -> bool {
    use nix::sys::statvfs::{FsFlags, statvfs};
    statvfs(dir).is_ok_and(|stat| stat.flags().contains(FsFlags::ST_NOEXEC))
}

/// Bytes that this user may still write below `dir`.
pub fn free_space(dir: &std::path::Path) -> Option<u64> {
    let stat = nix::sys::statvfs::statvfs(dir).ok()?;
    Some(stat.blocks_available() * stat.fragment_size())
}

/// The kind of file system, where it matters.
pub fn file_system(dir: &std::path::Path) -> Option<&'static str> {
    let kind = nix::sys::statfs::statfs(dir).ok()?.filesystem_type().0;
    Some(match kind as i64 {
        0x0102_1994 => "tmpfs",
        0x6969 => "nfs",
        0xef53 => "ext4",
        0x5846_5342 => "xfs",
        0x9123_683e => "btrfs",
        0x794c_7630 => "overlayfs",
        0x6573_5546 => "fuse",
        _ => return None,
    })
}

/// The C library's version.
pub fn libc_version() -> String {
    // SAFETY: returns a static string.
    let version = unsafe { std::ffi::CStr::from_ptr(libc::gnu_get_libc_version()) };
    version.to_string_lossy().into_owned()
}
