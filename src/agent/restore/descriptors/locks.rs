//! File locks, taken again once every descriptor is at its number. Part of
//! [`super::restore`]. A lock that someone else holds by now is an error: the
//! program believes that it holds it.

use super::{Late, RestoreError, Restorer};
use crate::agent::collect::descriptors::sys;
use crate::image::state::{FileLock, LockKind};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;

const F_SETLK: i32 = 6;
const F_GETLK: i32 = 5;
const F_OFD_SETLK: i32 = 37;

pub(super) fn take(r: &mut Restorer) -> Result<(), RestoreError> {
    for lock in &r.table.locks {
        take_one(lock).map_err(|e| {
            let path = sys::path_of(lock.fd).unwrap_or_default();
            let path = String::from_utf8_lossy(&path).into_owned();
            let reason = match (e, holder(lock)) {
                (libc::EAGAIN | libc::EACCES, Some(pid)) => {
                    format!("held by process {pid} now")
                }
                (libc::EAGAIN | libc::EACCES, None) => "held by someone else now".to_string(),
                _ => sys::errno_text(e),
            };
            RestoreError::Lock { path, reason }
        })?;
        if lock.kind == LockKind::Posix {
            r.out.late.push(Late::PosixLock(lock.clone()));
        }
    }
    Ok(())
}

pub(super) fn flock_of(lock: &FileLock) -> libc::flock {
    // SAFETY: plain integers; all-zero is valid.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = if lock.write {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    } as i16;
    range.l_whence = libc::SEEK_SET as i16;
    range.l_start = lock.start as i64;
    range.l_len = lock.len as i64;
    range
}

fn take_one(lock: &FileLock) -> Result<(), i32> {
    let mut range = flock_of(lock);
    let command = match lock.kind {
        LockKind::Flock => {
            let how = if lock.write {
                libc::LOCK_EX
            } else {
                libc::LOCK_SH
            };
            // SAFETY: no memory is involved.
            let ret = unsafe { syscall!(libc::SYS_flock, lock.fd, how | libc::LOCK_NB) };
            return check(ret).map(drop);
        }
        LockKind::Posix => F_SETLK,
        LockKind::Ofd => F_OFD_SETLK,
    };
    sys::fcntl(lock.fd, command, &raw mut range as usize).map(drop)
}

/// Who holds a range that is in the way, as far as the kernel tells.
fn holder(lock: &FileLock) -> Option<i32> {
    let mut range = flock_of(lock);
    sys::fcntl(lock.fd, F_GETLK, &raw mut range as usize).ok()?;
    (range.l_type != libc::F_UNLCK as i16 && range.l_pid > 0).then_some(range.l_pid)
}
