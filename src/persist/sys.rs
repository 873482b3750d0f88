//! The system calls that tables, recorder and undo make: raw, by path or descriptor.
//!
//! Any thread of the target inside a hook, the helper, the constructor, the command.
//! Errors are positive error numbers. Nothing here allocates or takes a lock, but the
//! functions that return a `Vec`.
//!
//! Here: descriptors, names and what is at them. `path` has paths on the stack, `contents` what
//! is in a file, `attributes` what an inode has besides, and who may change it.

macro_rules! call {
    ($($arg:expr),*) => {
        // SAFETY: pointers are to live values of the sizes that the call wants.
        check(unsafe { syscall!($($arg),*) })
    };
}

mod attributes;
mod contents;
mod path;

pub use attributes::{
    CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_SYS_RESOURCE, chmod, chown, effective_uid, fchmod,
    get_xattr, get_xattr_fd, has_capability, is_in_group, list_xattrs, remove_xattr, set_times,
    set_xattr,
};
pub use contents::{
    copy_file_range, copy_sparse, end_of_data, fallocate, fdatasync, flags, ftruncate, map, pread,
    pread_all, pwrite, pwrite_all, seek, sync_range, unmap,
};
pub use path::{CPath, PATH_LEN, add_id};

use super::Stat;
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

pub type Sys<T> = Result<T, i32>;

/// A descriptor that is closed when dropped.
#[derive(Debug)]
pub struct Fd(pub i32);

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: ours.
        unsafe { syscall!(libc::SYS_close, self.0) };
    }
}

/// Where transient descriptors in the program's table go: above what it uses, below
/// what would make the kernel's table large.
const HIGH_FD: i32 = 1000;

/// Tests: called before each step that changes something (see [`point`]).
static POINT: AtomicUsize = AtomicUsize::new(0);

/// A step of recording or undoing: tests may die here.
#[inline]
pub fn point() {
    let at = POINT.load(Ordering::Relaxed);
    if at != 0 {
        // SAFETY: only `set_point` stores here.
        let f: fn() = unsafe { std::mem::transmute(at) };
        f();
    }
}

/// Tests: `f` runs at each [`point`].
pub fn set_point(f: fn()) {
    POINT.store(f as usize, Ordering::Relaxed);
}

/// The wall clock, nanoseconds since 1970.
pub fn realtime_ns() -> i64 {
    let mut time = [0i64; 2];
    // SAFETY: the kernel fills both words.
    unsafe { syscall!(libc::SYS_clock_gettime, libc::CLOCK_REALTIME, &raw mut time) };
    time[0] * 1_000_000_000 + time[1]
}

/// The clock that stamps inodes, which is some milliseconds behind.
pub fn file_time_ns() -> i64 {
    let mut time = [0i64; 2];
    let clock = libc::CLOCK_REALTIME_COARSE;
    // SAFETY: the kernel fills both words.
    unsafe { syscall!(libc::SYS_clock_gettime, clock, &raw mut time) };
    time[0] * 1_000_000_000 + time[1]
}

const CWD: i32 = libc::AT_FDCWD;

/// When the inode at the path itself was made; `None`: the file system does not know.
pub fn made_ns(path: &CPath) -> Option<i64> {
    let mut x = MaybeUninit::<libc::statx>::uninit();
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
    call!(
        libc::SYS_statx,
        CWD,
        path.ptr(),
        flags,
        libc::STATX_BTIME,
        x.as_mut_ptr()
    )
    .ok()?;
    // SAFETY: filled by the kernel.
    let x = unsafe { x.assume_init_ref() };
    let time = &x.stx_btime;
    (x.stx_mask & libc::STATX_BTIME != 0)
        .then(|| time.tv_sec * 1_000_000_000 + i64::from(time.tv_nsec))
}

/// When the inode at the path itself was last changed, attributes included (ctime).
pub fn changed_ns(path: &CPath) -> Sys<i64> {
    let mut x = MaybeUninit::<libc::statx>::uninit();
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
    let mask = libc::STATX_CTIME;
    call!(
        libc::SYS_statx,
        CWD,
        path.ptr(),
        flags,
        mask,
        x.as_mut_ptr()
    )?;
    // SAFETY: filled by the kernel.
    let time = unsafe { x.assume_init_ref() }.stx_ctime;
    Ok(time.tv_sec * 1_000_000_000 + i64::from(time.tv_nsec))
}

fn statx(dirfd: i32, path: *const u8, flags: i32) -> Sys<Stat> {
    let mut x = MaybeUninit::<libc::statx>::uninit();
    let flags = flags | libc::AT_NO_AUTOMOUNT;
    call!(
        libc::SYS_statx,
        dirfd,
        path,
        flags,
        libc::STATX_BASIC_STATS,
        x.as_mut_ptr()
    )?;
    // SAFETY: filled by the kernel.
    Ok(Stat::from_statx(unsafe { x.assume_init_ref() }))
}

/// The inode at the path itself (a symbolic link is not followed).
pub fn lstat(path: &CPath) -> Sys<Stat> {
    statx(CWD, path.ptr(), libc::AT_SYMLINK_NOFOLLOW)
}

pub fn stat(path: &CPath) -> Sys<Stat> {
    statx(CWD, path.ptr(), 0)
}

pub fn fstat(fd: i32) -> Sys<Stat> {
    statx(fd, c"".as_ptr().cast(), libc::AT_EMPTY_PATH)
}

/// Opens close-on-exec, without following a last symbolic link.
pub fn open(path: &CPath, flags: i32, mode: u32) -> Sys<Fd> {
    let flags = flags | libc::O_CLOEXEC | libc::O_NOCTTY | libc::O_NOFOLLOW;
    call!(libc::SYS_openat, CWD, path.ptr(), flags, mode).map(|fd| Fd(fd as i32))
}

/// As [`open`], in the program's descriptor table for a moment: moved up at once, so
/// that a `dup2` of another thread does not meet it.
pub fn open_high(path: &CPath, flags: i32, mode: u32) -> Sys<Fd> {
    open(path, flags, mode).map(lift)
}

/// Opens the inode behind a descriptor anew.
pub fn reopen_high(fd: i32, flags: i32) -> Sys<Fd> {
    let path = CPath::of_fd(fd);
    let flags = flags | libc::O_CLOEXEC | libc::O_NOCTTY;
    call!(libc::SYS_openat, CWD, path.ptr(), flags, 0).map(|fd| lift(Fd(fd as i32)))
}

fn lift(fd: Fd) -> Fd {
    match call!(libc::SYS_fcntl, fd.0, libc::F_DUPFD_CLOEXEC, HIGH_FD) {
        Ok(high) => Fd(high as i32),
        Err(_) => fd,
    }
}

/// A hard link to the inode at `from` itself.
pub fn link(from: &CPath, to: &CPath) -> Sys<()> {
    call!(libc::SYS_linkat, CWD, from.ptr(), CWD, to.ptr(), 0).map(drop)
}

/// A hard link to the inode behind a descriptor.
pub fn link_fd(fd: i32, to: &CPath) -> Sys<()> {
    let from = CPath::of_fd(fd);
    call!(
        libc::SYS_linkat,
        CWD,
        from.ptr(),
        CWD,
        to.ptr(),
        libc::AT_SYMLINK_FOLLOW
    )
    .map(drop)
}

pub fn unlink(path: &CPath) -> Sys<()> {
    call!(libc::SYS_unlinkat, CWD, path.ptr(), 0).map(drop)
}

pub fn rmdir(path: &CPath) -> Sys<()> {
    call!(libc::SYS_unlinkat, CWD, path.ptr(), libc::AT_REMOVEDIR).map(drop)
}

pub fn rename(from: &CPath, to: &CPath, flags: u32) -> Sys<()> {
    call!(libc::SYS_renameat2, CWD, from.ptr(), CWD, to.ptr(), flags).map(drop)
}

pub fn mkdir(path: &CPath, mode: u32) -> Sys<()> {
    call!(libc::SYS_mkdirat, CWD, path.ptr(), mode).map(drop)
}

pub fn symlink(target: &CPath, path: &CPath) -> Sys<()> {
    call!(libc::SYS_symlinkat, target.ptr(), CWD, path.ptr()).map(drop)
}

pub fn mknod(path: &CPath, mode: u32, rdev: u64) -> Sys<()> {
    call!(libc::SYS_mknodat, CWD, path.ptr(), mode, rdev).map(drop)
}
pub fn readlink(path: &CPath, buf: &mut [u8]) -> Sys<usize> {
    call!(
        libc::SYS_readlinkat,
        CWD,
        path.ptr(),
        buf.as_mut_ptr(),
        buf.len()
    )
}

/// What the kernel calls the inode behind a descriptor; ` (deleted)` and all.
pub fn fd_path(fd: i32, buf: &mut [u8]) -> Sys<usize> {
    readlink(&CPath::of_fd(fd), buf)
}

/// The names in a directory but `.` and `..`.
pub fn list(path: &CPath) -> Sys<Vec<Vec<u8>>> {
    let fd = open(path, libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
    let mut names = Vec::new();
    let mut buf = vec![0u8; 32 << 10];
    loop {
        let got = call!(libc::SYS_getdents64, fd.0, buf.as_mut_ptr(), buf.len())?;
        if got == 0 {
            return Ok(names);
        }
        let mut rest = buf.get(..got).unwrap_or_default();
        while let Some(header) = rest.get(..19) {
            let len = usize::from(u16::from_le_bytes([header[16], header[17]]));
            let name = rest.get(19..len).unwrap_or_default();
            let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
            let name = name.get(..end).unwrap_or_default();
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
            rest = rest.get(len.max(19)..).unwrap_or_default();
        }
    }
}
