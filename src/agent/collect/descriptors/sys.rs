//! The system calls that collecting and restoring descriptors need, as thin
//! wrappers over `ckpt_sys::raw`: no libc function, no errno, no lock. Called by
//! the helper thread (world stopped) and by the constructor of a restored
//! process.

use ckpt_sys::raw::{SysResult, check};
use ckpt_sys::syscall;

/// An owned descriptor closed by a raw system call (std's `OwnedFd` would call
/// libc's `close`).
#[derive(Debug)]
pub struct Fd(i32);

impl Fd {
    /// Takes over `fd`.
    pub fn own(fd: i32) -> Fd {
        Fd(fd)
    }

    pub fn raw(&self) -> i32 {
        self.0
    }

    /// Gives the descriptor up without closing it.
    pub fn release(self) -> i32 {
        let fd = self.0;
        std::mem::forget(self);
        fd
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        close(self.0);
    }
}

/// A NUL-terminated copy of a path or name; an inner NUL ends it.
pub fn cstr(path: &[u8]) -> Vec<u8> {
    let end = path.iter().position(|&b| b == 0).unwrap_or(path.len());
    let mut out = Vec::with_capacity(end + 1);
    out.extend_from_slice(&path[..end]);
    out.push(0);
    out
}

/// The decimal digits of a small number, NUL-terminated, without allocation.
pub fn decimal(n: i32, buf: &mut [u8; 12]) -> &[u8] {
    let mut at = buf.len() - 1;
    buf[at] = 0;
    let mut n = n.unsigned_abs();
    loop {
        at -= 1;
        buf[at] = b'0' + (n % 10) as u8;
        n /= 10;
        if n == 0 {
            return &buf[at..];
        }
    }
}

pub fn close(fd: i32) {
    // SAFETY: closing a number touches no memory.
    unsafe { syscall!(libc::SYS_close, fd) };
}

/// `path` must be NUL-terminated (see [`cstr`]).
pub fn openat(dir: i32, path: &[u8], flags: i32, mode: u32) -> Result<Fd, i32> {
    debug_assert!(path.ends_with(&[0]));
    // SAFETY: `path` is a live NUL-terminated string.
    check(unsafe { syscall!(libc::SYS_openat, dir, path.as_ptr(), flags, mode) })
        .map(|fd| Fd(fd as i32))
}

/// Opens an absolute or working-directory relative path.
pub fn open(path: &[u8], flags: i32, mode: u32) -> Result<Fd, i32> {
    openat(libc::AT_FDCWD, &cstr(path), flags | libc::O_CLOEXEC, mode)
}

pub fn read(fd: i32, buf: &mut [u8]) -> SysResult {
    // SAFETY: the buffer is ours for its whole length.
    check(unsafe { syscall!(libc::SYS_read, fd, buf.as_mut_ptr(), buf.len()) })
}

pub fn pread(fd: i32, buf: &mut [u8], at: u64) -> SysResult {
    // SAFETY: the buffer is ours for its whole length.
    check(unsafe { syscall!(libc::SYS_pread64, fd, buf.as_mut_ptr(), buf.len(), at) })
}

pub fn write(fd: i32, buf: &[u8]) -> SysResult {
    // SAFETY: the buffer is live for its whole length.
    check(unsafe { syscall!(libc::SYS_write, fd, buf.as_ptr(), buf.len()) })
}

pub fn pwrite(fd: i32, buf: &[u8], at: u64) -> SysResult {
    // SAFETY: the buffer is live for its whole length.
    check(unsafe { syscall!(libc::SYS_pwrite64, fd, buf.as_ptr(), buf.len(), at) })
}

pub fn lseek(fd: i32, offset: i64, whence: i32) -> SysResult {
    // SAFETY: no memory is involved.
    check(unsafe { syscall!(libc::SYS_lseek, fd, offset, whence) })
}

pub fn fcntl(fd: i32, cmd: i32, arg: usize) -> SysResult {
    // SAFETY: callers pass commands with integer arguments, or pointers to live
    // objects of the command's type.
    check(unsafe { syscall!(libc::SYS_fcntl, fd, cmd, arg) })
}

/// `ioctl` with a pointer to `arg`.
pub fn ioctl<T>(fd: i32, request: u64, arg: &mut T) -> SysResult {
    // SAFETY: the requests used here read or write at most `size_of::<T>()` bytes;
    // each call site passes the request's own type.
    check(unsafe { syscall!(libc::SYS_ioctl, fd, request, arg as *mut T) })
}

/// `ioctl` with an integer argument.
pub fn ioctl_int(fd: i32, request: u64, arg: usize) -> SysResult {
    // SAFETY: callers pass requests whose argument is not a pointer.
    check(unsafe { syscall!(libc::SYS_ioctl, fd, request, arg) })
}

pub fn fionread(fd: i32) -> Result<usize, i32> {
    let mut n = 0i32;
    ioctl(fd, libc::FIONREAD, &mut n)?;
    Ok(n.max(0) as usize)
}

fn zeroed_stat() -> libc::stat {
    // SAFETY: `stat` is plain integers; all-zero is valid.
    unsafe { std::mem::zeroed() }
}

/// `path` must be NUL-terminated.
pub fn fstatat(dir: i32, path: &[u8], flags: i32) -> Result<libc::stat, i32> {
    let mut st = zeroed_stat();
    // SAFETY: live NUL-terminated path, live result.
    check(unsafe { syscall!(libc::SYS_newfstatat, dir, path.as_ptr(), &raw mut st, flags) })?;
    Ok(st)
}

pub fn fstat(fd: i32) -> Result<libc::stat, i32> {
    let mut st = zeroed_stat();
    // SAFETY: live result.
    check(unsafe { syscall!(libc::SYS_fstat, fd, &raw mut st) })?;
    Ok(st)
}

pub fn stat(path: &[u8]) -> Result<libc::stat, i32> {
    fstatat(libc::AT_FDCWD, &cstr(path), 0)
}

/// What `statx` tells more than `stat`.
pub struct Stat {
    pub stat: libc::stat,
    /// As `mnt_id` in fdinfo.
    pub mount: Option<u64>,
    /// 0: the file system does not tell.
    pub btime_ns: i64,
}

/// All of an inode but its times; `path` must be NUL-terminated.
pub fn statx(dir: i32, path: &[u8], flags: i32) -> Result<Stat, i32> {
    let mask = libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID;
    let st = raw_statx(dir, path, flags, mask)?;
    let mut stat = zeroed_stat();
    stat.st_dev = libc::makedev(st.stx_dev_major, st.stx_dev_minor);
    stat.st_rdev = libc::makedev(st.stx_rdev_major, st.stx_rdev_minor);
    stat.st_ino = st.stx_ino;
    stat.st_mode = u32::from(st.stx_mode);
    stat.st_nlink = u64::from(st.stx_nlink);
    stat.st_uid = st.stx_uid;
    stat.st_gid = st.stx_gid;
    stat.st_size = st.stx_size as i64;
    stat.st_blksize = i64::from(st.stx_blksize);
    stat.st_blocks = st.stx_blocks as i64;
    Ok(Stat {
        stat,
        mount: (st.stx_mask & libc::STATX_MNT_ID != 0).then_some(st.stx_mnt_id),
        btime_ns: btime(&st),
    })
}

fn btime(st: &libc::statx) -> i64 {
    if st.stx_mask & libc::STATX_BTIME == 0 {
        return 0;
    }
    st.stx_btime.tv_sec * 1_000_000_000 + i64::from(st.stx_btime.tv_nsec)
}

/// `(device, inode, birth time in ns or 0)`; `path` must be NUL-terminated.
pub fn identity(dir: i32, path: &[u8], flags: i32) -> Result<(u64, u64, i64), i32> {
    let st = raw_statx(dir, path, flags, libc::STATX_INO | libc::STATX_BTIME)?;
    let dev = libc::makedev(st.stx_dev_major, st.stx_dev_minor);
    Ok((dev, st.stx_ino, btime(&st)))
}

fn raw_statx(dir: i32, path: &[u8], flags: i32, mask: u32) -> Result<libc::statx, i32> {
    // SAFETY: plain integers; all-zero is valid.
    let mut st: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: live NUL-terminated path, live result.
    check(unsafe {
        syscall!(
            libc::SYS_statx,
            dir,
            path.as_ptr(),
            flags,
            mask,
            &raw mut st
        )
    })?;
    Ok(st)
}

/// How many descriptors the process may have.
pub fn open_files_limit() -> u64 {
    let mut limit = [0u64; 2];
    // SAFETY: asks for the limit.
    unsafe {
        syscall!(
            libc::SYS_prlimit64,
            0,
            libc::RLIMIT_NOFILE,
            0,
            &raw mut limit
        )
    };
    limit[0]
}

/// The file system's magic number.
pub fn fs_magic(fd: i32) -> Result<i64, i32> {
    // SAFETY: plain integers; all-zero is valid.
    let mut st: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: live result.
    check(unsafe { syscall!(libc::SYS_fstatfs, fd, &raw mut st) })?;
    Ok(st.f_type)
}

/// Reads a symbolic link; `path` must be NUL-terminated.
pub fn readlinkat(dir: i32, path: &[u8]) -> Result<Vec<u8>, i32> {
    let mut buf = [0u8; 4096];
    // SAFETY: live NUL-terminated path, live buffer.
    let n = check(unsafe {
        syscall!(
            libc::SYS_readlinkat,
            dir,
            path.as_ptr(),
            buf.as_mut_ptr(),
            buf.len()
        )
    })?;
    Ok(buf[..n].to_vec())
}

/// The path that `/proc/self/fd/<fd>` of the *calling thread's* table shows.
pub fn path_of(fd: i32) -> Result<Vec<u8>, i32> {
    readlinkat(libc::AT_FDCWD, &cstr(&thread_fd_path(fd)))
}

/// `/proc/thread-self/fd/<fd>`: right for the helper too, whose table is its own.
pub fn thread_fd_path(fd: i32) -> Vec<u8> {
    let mut path = b"/proc/thread-self/fd/".to_vec();
    let mut buf = [0; 12];
    let digits = decimal(fd, &mut buf);
    path.extend_from_slice(&digits[..digits.len() - 1]);
    path
}

/// Reads a small file whole into `out` (cleared first); `path` NUL-terminated. The open file.
pub fn read_file(dir: i32, path: &[u8], out: &mut Vec<u8>) -> Result<Fd, i32> {
    let fd = openat(dir, path, libc::O_RDONLY | libc::O_CLOEXEC, 0)?;
    out.clear();
    out.resize(out.capacity().max(4096), 0);
    let mut len = 0;
    loop {
        if len == out.len() {
            out.resize(len * 2, 0);
        }
        // procfs gives at most a page at a time: read until nothing comes.
        match read(fd.raw(), &mut out[len..])? {
            0 => break,
            n => len += n,
        }
        // A short answer with much room left is the end of a one-record file.
        if len < 1024 {
            break;
        }
    }
    out.truncate(len);
    Ok(fd)
}

/// Names in a directory, without `.` and `..`, in directory order.
pub fn list_dir(dir: i32) -> Result<Vec<Vec<u8>>, i32> {
    let mut names = Vec::new();
    let mut buf = vec![0u8; 32768];
    loop {
        // SAFETY: the buffer is ours for its whole length.
        let n = check(unsafe { syscall!(libc::SYS_getdents64, dir, buf.as_mut_ptr(), buf.len()) })?;
        if n == 0 {
            return Ok(names);
        }
        let mut at = 0;
        // struct linux_dirent64: ino 8, off 8, reclen 2, type 1, name.
        while at + 19 <= n {
            let len = u16::from_ne_bytes([buf[at + 16], buf[at + 17]]) as usize;
            let name = &buf[at + 19..(at + len).min(n)];
            let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
            let name = &name[..end];
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
            at += len.max(19);
        }
    }
}

/// `pidfd_open` of a thread (`PIDFD_THREAD`, Linux 6.9) or, where that is not
/// known, of the process `pid`.
pub fn pidfd_of(pid: i32, tid: i32) -> Result<Fd, i32> {
    // SAFETY: no memory is involved.
    let thread = check(unsafe { syscall!(libc::SYS_pidfd_open, tid, libc::O_EXCL) });
    // SAFETY: as above.
    let fd = thread.or_else(|_| check(unsafe { syscall!(libc::SYS_pidfd_open, pid, 0) }))?;
    Ok(Fd(fd as i32))
}

pub fn pidfd_getfd(pidfd: i32, fd: i32) -> Result<Fd, i32> {
    // SAFETY: no memory is involved; the new descriptor is ours.
    check(unsafe { syscall!(libc::SYS_pidfd_getfd, pidfd, fd, 0) }).map(|fd| Fd(fd as i32))
}

/// `kcmp(2)`; `b` is a descriptor, or the address of a slot for `KCMP_EPOLL_TFD`.
pub fn kcmp(tid: i32, kind: i32, a: i32, b: usize) -> SysResult {
    // SAFETY: `b` is a number or the address of a live `EpollSlot`.
    check(unsafe { syscall!(libc::SYS_kcmp, tid, tid, kind, a, b) })
}

/// Events ready now on one descriptor.
pub fn poll_now(fd: i32, events: i16) -> i16 {
    let mut p = libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    // SAFETY: one live pollfd.
    match check(unsafe { syscall!(libc::SYS_poll, &raw mut p, 1, 0) }) {
        Ok(1) => p.revents,
        _ => 0,
    }
}

/// A pipe: (read end, write end), both close-on-exec.
pub fn pipe(flags: i32) -> Result<(Fd, Fd), i32> {
    let mut fds = [0i32; 2];
    // SAFETY: room for two descriptors.
    check(unsafe { syscall!(libc::SYS_pipe2, fds.as_mut_ptr(), flags | libc::O_CLOEXEC) })?;
    Ok((Fd(fds[0]), Fd(fds[1])))
}

/// `tee(2)`, non-blocking.
pub fn tee(from: i32, to: i32, len: usize) -> SysResult {
    // SAFETY: no memory is involved.
    check(unsafe { syscall!(libc::SYS_tee, from, to, len, libc::SPLICE_F_NONBLOCK) })
}

/// Duplicates `fd` to a number not below `min`, close-on-exec.
pub fn dup_above(fd: i32, min: i32) -> Result<i32, i32> {
    fcntl(fd, libc::F_DUPFD_CLOEXEC, min as usize).map(|n| n as i32)
}

/// `dup3(2)`; equal numbers are an error of the caller.
pub fn dup3(from: i32, to: i32, cloexec: bool) -> SysResult {
    let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
    // SAFETY: no memory is involved.
    check(unsafe { syscall!(libc::SYS_dup3, from, to, flags) })
}

/// The kernel's name of an errno, for messages.
pub fn errno_text(errno: i32) -> String {
    let name = match errno {
        libc::EPERM => "operation not permitted",
        libc::ENOENT => "no such file or directory",
        libc::ESRCH => "no such process",
        libc::EIO => "input/output error",
        libc::ENXIO => "no such device or address",
        libc::EBADF => "bad file descriptor",
        libc::EAGAIN => "would block",
        libc::ENOMEM => "out of memory",
        libc::EACCES => "permission denied",
        libc::EBUSY => "busy",
        libc::EEXIST => "file exists",
        libc::ENODEV => "no such device",
        libc::ENOTDIR => "not a directory",
        libc::EISDIR => "is a directory",
        libc::EINVAL => "invalid argument",
        libc::ENFILE => "too many open files in the system",
        libc::EMFILE => "too many open files",
        libc::ENOSPC => "no space left on device",
        libc::EROFS => "read-only file system",
        libc::ELOOP => "too many symbolic links",
        libc::ENOSYS => "not provided by this kernel",
        libc::EADDRINUSE => "address in use",
        libc::EADDRNOTAVAIL => "address not available",
        libc::ECONNREFUSED => "connection refused",
        _ => return format!("errno {errno}"),
    };
    name.to_string()
}
