//! What an inode has besides its contents: mode, owner, times, extended attributes; and what
//! the caller may do to those of others. Any context, as all of [`super`].

use super::{CPath, CWD, Sys};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;

/// Not for symbolic links.
pub fn chmod(path: &CPath, mode: u32) -> Sys<()> {
    call!(libc::SYS_fchmodat, CWD, path.ptr(), mode & 0o7777).map(drop)
}

/// Of the inode behind a descriptor.
pub fn fchmod(fd: i32, mode: u32) -> Sys<()> {
    call!(libc::SYS_fchmod, fd, mode & 0o7777).map(drop)
}

pub fn chown(path: &CPath, uid: u32, gid: u32) -> Sys<()> {
    call!(
        libc::SYS_fchownat,
        CWD,
        path.ptr(),
        uid,
        gid,
        libc::AT_SYMLINK_NOFOLLOW
    )
    .map(drop)
}

pub fn set_times(path: &CPath, atime_ns: i64, mtime_ns: i64) -> Sys<()> {
    let spec = |ns: i64| [ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000)];
    let times = [spec(atime_ns), spec(mtime_ns)];
    call!(
        libc::SYS_utimensat,
        CWD,
        path.ptr(),
        times.as_ptr(),
        libc::AT_SYMLINK_NOFOLLOW
    )
    .map(drop)
}

/// Of a symbolic link itself; ENODATA: there is none.
pub fn get_xattr(path: &CPath, name: &CPath, buf: &mut [u8]) -> Sys<usize> {
    call!(
        libc::SYS_lgetxattr,
        path.ptr(),
        name.ptr(),
        buf.as_mut_ptr(),
        buf.len()
    )
}

/// Of the inode behind a descriptor, whatever that is open for.
pub fn get_xattr_fd(fd: i32, name: &CPath, buf: &mut [u8]) -> Sys<usize> {
    let (at, len) = (buf.as_mut_ptr(), buf.len());
    match call!(libc::SYS_fgetxattr, fd, name.ptr(), at, len) {
        // O_PATH.
        Err(libc::EBADF) => {
            let path = CPath::of_fd(fd);
            call!(libc::SYS_getxattr, path.ptr(), name.ptr(), at, len)
        }
        got => got,
    }
}

pub fn set_xattr(path: &CPath, name: &CPath, value: &[u8]) -> Sys<()> {
    call!(
        libc::SYS_lsetxattr,
        path.ptr(),
        name.ptr(),
        value.as_ptr(),
        value.len(),
        0
    )
    .map(drop)
}

pub fn remove_xattr(path: &CPath, name: &CPath) -> Sys<()> {
    call!(libc::SYS_lremovexattr, path.ptr(), name.ptr()).map(drop)
}

/// NUL-separated names.
pub fn list_xattrs(path: &CPath, buf: &mut [u8]) -> Sys<usize> {
    call!(
        libc::SYS_llistxattr,
        path.ptr(),
        buf.as_mut_ptr(),
        buf.len()
    )
}

pub fn effective_uid() -> u32 {
    // SAFETY: no arguments.
    unsafe { syscall!(libc::SYS_geteuid) as u32 }
}

/// Is this the thread's group, or one of its others? Of very many: yes.
pub fn is_in_group(gid: u32) -> bool {
    // SAFETY: no arguments.
    if unsafe { syscall!(libc::SYS_getegid) } as u32 == gid {
        return true;
    }
    let mut groups = [0u32; 256];
    match call!(libc::SYS_getgroups, groups.len(), groups.as_mut_ptr()) {
        Ok(count) => groups.iter().take(count).any(|group| *group == gid),
        Err(_) => true,
    }
}

pub const CAP_CHOWN: u32 = 0;
pub const CAP_DAC_OVERRIDE: u32 = 1;
pub const CAP_FOWNER: u32 = 3;
pub const CAP_SYS_RESOURCE: u32 = 24;

/// Does this thread have a capability (one of the first 32)?
pub fn has_capability(number: u32) -> bool {
    const VERSION_3: u32 = 0x2008_0522;
    let (header, mut sets) = ([VERSION_3, 0], [[0u32; 3]; 2]);
    let got = call!(libc::SYS_capget, &raw const header, &raw mut sets);
    got.is_ok() && sets[0][0] & (1 << number) != 0
}
