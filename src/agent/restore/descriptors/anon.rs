//! eventfd, timerfd, signalfd, inotify, pidfd. Part of [`super::restore`].

use super::{RestoreError, Restorer};
use crate::agent::collect::descriptors::sys::{self, Fd};
use crate::image::state::{FileKind, InotifyWatch};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;

const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;
const INOTIFY_IOC_SETNEXTWD: u64 = 0x4004_4900;
const SECOND: u64 = 1_000_000_000;

fn nonblock(r: &Restorer, file: usize) -> i32 {
    r.state(file).flags as i32 & libc::O_NONBLOCK
}

pub(super) fn eventfd(
    r: &Restorer,
    file: usize,
    count: u64,
    semaphore: bool,
) -> Result<Fd, RestoreError> {
    let mut flags = libc::EFD_CLOEXEC | nonblock(r, file);
    if semaphore {
        flags |= libc::EFD_SEMAPHORE;
    }
    // SAFETY: no memory is involved.
    let fd = check(unsafe { syscall!(libc::SYS_eventfd2, 0, flags) })
        .map_err(|e| r.fail(file, "eventfd", e))?;
    let fd = Fd::own(fd as i32);
    if count == u64::MAX {
        return Err(r.fail(file, "eventfd: its count", libc::EINVAL));
    }
    if count > 0 {
        sys::write(fd.raw(), &count.to_ne_bytes())
            .map_err(|e| r.fail(file, "eventfd: its count", e))?;
    }
    Ok(fd)
}

pub(super) fn signalfd(r: &Restorer, file: usize, mask: u64) -> Result<Fd, RestoreError> {
    let flags = libc::SFD_CLOEXEC | nonblock(r, file);
    // SAFETY: a live signal set of 8 bytes.
    check(unsafe { syscall!(libc::SYS_signalfd4, -1i32, &raw const mask, 8, flags) })
        .map(|fd| Fd::own(fd as i32))
        .map_err(|e| r.fail(file, "signalfd", e))
}

pub(super) fn timerfd(r: &Restorer, file: usize) -> Result<Fd, RestoreError> {
    let FileKind::TimerFd {
        clock,
        ticks,
        remaining_ns,
        interval_ns,
        cancel_on_set,
        ..
    } = r.state(file).kind
    else {
        return Err(r.fail(file, "timerfd", libc::EINVAL));
    };
    let flags = libc::TFD_CLOEXEC | nonblock(r, file);
    // SAFETY: no memory is involved.
    let fd = check(unsafe { syscall!(libc::SYS_timerfd_create, clock, flags) })
        .map_err(|e| r.fail(file, "timerfd", e))?;
    let fd = Fd::own(fd as i32);
    let set = |flags: i32, first: u64| {
        let spec = [
            interval_ns / SECOND,
            interval_ns % SECOND,
            first / SECOND,
            first % SECOND,
        ];
        // SAFETY: `spec` has the layout of `struct itimerspec`.
        check(unsafe { syscall!(libc::SYS_timerfd_settime, fd.raw(), flags, spec.as_ptr(), 0) })
            .map_err(|e| r.fail(file, "timerfd: its time", e))
    };
    if remaining_ns == 0 && ticks == 0 {
        return Ok(fd);
    }
    let mut now = [0u64; 2];
    // SAFETY: `now` has the layout of `struct timespec`.
    unsafe { syscall!(libc::SYS_clock_gettime, clock, now.as_mut_ptr()) };
    let now = now[0] * SECOND + now[1];
    if remaining_ns > 0 {
        // The time left counts, also of a timer that was set to a point in time.
        if cancel_on_set {
            let flags = libc::TFD_TIMER_ABSTIME | libc::TFD_TIMER_CANCEL_ON_SET;
            set(flags, now + remaining_ns)?;
        } else {
            set(0, remaining_ns)?;
        }
    }
    let mut unread = ticks;
    if ticks == 0 || sys::ioctl(fd.raw(), TFD_IOC_SET_TICKS, &mut unread).is_ok() {
        return Ok(fd);
    }
    // A kernel without that request: a start so long ago that the expirations
    // are due now, and the next one at its time.
    if interval_ns > 0 {
        let past = ticks.saturating_mul(interval_ns);
        let first = (now + remaining_ns).saturating_sub(past).max(1);
        set(libc::TFD_TIMER_ABSTIME, first)?;
    } else if remaining_ns == 0 {
        set(0, 1)?;
    }
    Ok(fd)
}

pub(super) fn pidfd_self(r: &Restorer, file: usize, nonblock: bool) -> Result<Fd, RestoreError> {
    let flags = if nonblock { libc::O_NONBLOCK } else { 0 };
    // SAFETY: no memory is involved.
    let fd = check(unsafe {
        let pid = syscall!(libc::SYS_getpid);
        syscall!(libc::SYS_pidfd_open, pid, flags)
    });
    fd.map(|fd| Fd::own(fd as i32))
        .map_err(|e| r.fail(file, "pidfd", e))
}

/// A pidfd of a process that is gone: of a child that ends at once.
pub(super) fn pidfd_dead(r: &Restorer, file: usize, nonblock: bool) -> Result<Fd, RestoreError> {
    let flags = if nonblock { libc::O_NONBLOCK } else { 0 };
    // SAFETY: the child of a plain fork by system call (exit signal 0, so that it
    // is no child to `wait`) does nothing but end; __WALL reaps it.
    let made = unsafe {
        check(syscall!(libc::SYS_clone, 0, 0, 0, 0, 0)).and_then(|child| {
            if child == 0 {
                loop {
                    syscall!(libc::SYS_exit_group, 0);
                }
            }
            let fd = check(syscall!(libc::SYS_pidfd_open, child, flags));
            syscall!(libc::SYS_wait4, child, 0, libc::__WALL, 0);
            fd
        })
    };
    made.map(|fd| Fd::own(fd as i32))
        .map_err(|e| r.fail(file, "pidfd of a process that is gone", e))
}

/// The instance now, its watches by [`add_watches`].
pub(super) fn inotify(
    r: &Restorer,
    file: usize,
    _watches: &[InotifyWatch],
) -> Result<Fd, RestoreError> {
    let flags = libc::IN_CLOEXEC | nonblock(r, file);
    // SAFETY: no memory is involved.
    check(unsafe { syscall!(libc::SYS_inotify_init1, flags) })
        .map(|fd| Fd::own(fd as i32))
        .map_err(|e| r.fail(file, "inotify", e))
}

/// Adds the watches with their numbers, after everything else has been opened,
/// and takes out the events that this caused.
pub(super) fn add_watches(r: &mut Restorer) -> Result<(), RestoreError> {
    let mut instances = Vec::new();
    for file in 0..r.table.files.len() {
        let FileKind::Inotify { watches, .. } = &r.state(file).kind else {
            continue;
        };
        let Some(&fd) = r.numbers[file].first() else {
            continue;
        };
        instances.push(fd);
        for watch in watches {
            add_watch(fd, watch)
                .map_err(|e| r.fail_open(file, &watch.path, &sys::errno_text(e)))?;
        }
    }
    for fd in instances {
        drain(fd);
    }
    Ok(())
}

fn drain(fd: i32) {
    let mut buf = [0u8; 8192];
    while sys::fionread(fd).unwrap_or(0) > 0 {
        if sys::read(fd, &mut buf).is_err() {
            break;
        }
    }
}

/// The first watch that could not be added now.
pub fn obstacle(watches: &[InotifyWatch]) -> Option<(&[u8], i32)> {
    // SAFETY: no memory is involved.
    let fd = check(unsafe { syscall!(libc::SYS_inotify_init1, libc::IN_CLOEXEC) });
    // Without one of our own it is not known.
    let fd = Fd::own(fd.ok()? as i32);
    let mut watches = watches.iter();
    watches.find_map(|watch| {
        let path = sys::cstr(&watch.path);
        let mask = libc::IN_DELETE_SELF;
        // SAFETY: a live NUL-terminated path.
        let added =
            check(unsafe { syscall!(libc::SYS_inotify_add_watch, fd.raw(), path.as_ptr(), mask) });
        added.err().map(|errno| (&watch.path[..], errno))
    })
}

fn add_watch(fd: i32, watch: &InotifyWatch) -> Result<(), i32> {
    let path = sys::cstr(&watch.path);
    let mask = watch.mask & (libc::IN_ALL_EVENTS | libc::IN_EXCL_UNLINK | libc::IN_ONESHOT);
    let add = |mask: u32| {
        // SAFETY: a live NUL-terminated path.
        check(unsafe { syscall!(libc::SYS_inotify_add_watch, fd, path.as_ptr(), mask) })
            .map(|wd| wd as i32)
    };
    let remove = |wd: i32| {
        // SAFETY: no memory is involved.
        unsafe { syscall!(libc::SYS_inotify_rm_watch, fd, wd) };
    };
    // Numbers are given out in ascending order: by request, or by using them up.
    let _ = sys::ioctl_int(fd, INOTIFY_IOC_SETNEXTWD, watch.wd as usize);
    for _ in 0..1_000_000 {
        let wd = add(mask)?;
        if wd == watch.wd {
            return Ok(());
        }
        remove(wd);
        drain(fd);
        if wd > watch.wd {
            return Err(libc::EBUSY);
        }
    }
    Err(libc::EBUSY)
}
