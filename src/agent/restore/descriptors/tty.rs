//! Devices, terminals and ptys, and stand-ins for inherited descriptors that the
//! new start does not provide. Part of [`super::restore`].

use super::{RestoreError, Restorer};
use crate::agent::collect::descriptors::sys::{self, Fd};
use crate::image::state::FileKind;
use ckpt_sys::raw::check;
use ckpt_sys::syscall;

const TIOCSPTLCK: u64 = 0x4004_5431;
const TIOCGPTN: u64 = 0x8004_5430;
const TIOCPKT: u64 = 0x5420;
const TIOCGPTPEER: u64 = 0x5441;
const TERMIOS_SIZE: usize = 36;

pub(super) fn device(
    r: &Restorer,
    file: usize,
    path: &[u8],
    rdev: u64,
) -> Result<Fd, RestoreError> {
    let flags = r.state(file).flags as i32;
    let flags = flags & (libc::O_ACCMODE | libc::O_APPEND | libc::O_NONBLOCK) | libc::O_NOCTTY;
    let fd = sys::open(path, flags, 0).map_err(|e| r.fail_open(file, path, &sys::errno_text(e)))?;
    match sys::fstat(fd.raw()) {
        Ok(st) if st.st_rdev == rdev => Ok(fd),
        _ => Err(r.fail_open(file, path, "it is another device now")),
    }
}

/// Sets terminal modes, if `fd` is a terminal whose modes are ours to set: one
/// that is not our controlling terminal, or is and has us in the foreground.
pub(super) fn set_modes(fd: i32, termios: &[u8]) {
    let Ok(mut modes) = <[u8; TERMIOS_SIZE]>::try_from(termios) else {
        return;
    };
    let mut foreground = 0i32;
    if sys::ioctl(fd, libc::TIOCGPGRP, &mut foreground).is_ok() {
        // SAFETY: no memory is involved.
        let group = unsafe { syscall!(libc::SYS_getpgid, 0) } as i32;
        if group != foreground {
            return;
        }
    }
    // Should the shell take the terminal back just now, TTOU must not stop us.
    let ttou = 1u64 << (libc::SIGTTOU - 1);
    let mut old = 0u64;
    // SAFETY: live signal sets of 8 bytes.
    unsafe {
        syscall!(
            libc::SYS_rt_sigprocmask,
            libc::SIG_BLOCK,
            &raw const ttou,
            &raw mut old,
            8
        );
    }
    let _ = sys::ioctl(fd, libc::TCSETS, &mut modes);
    // SAFETY: as above.
    unsafe {
        syscall!(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const old,
            0,
            8
        );
    }
}

/// Sets the window size; only where the other end is the program's as well.
pub(super) fn set_size(fd: i32, winsize: &[u8]) {
    if let Ok(mut size) = <[u8; 8]>::try_from(winsize) {
        let _ = sys::ioctl(fd, libc::TIOCSWINSZ, &mut size);
    }
}

pub(super) fn terminal(r: &mut Restorer, file: usize) -> Result<Fd, RestoreError> {
    let state = r.state(file);
    let FileKind::Tty {
        path,
        termios,
        winsize,
        ..
    } = &state.kind
    else {
        return Err(r.fail(file, "terminal", libc::EINVAL));
    };
    let flags = state.flags as i32 & (libc::O_ACCMODE | libc::O_NONBLOCK) | libc::O_NOCTTY;
    let master = path.strip_prefix(b"/dev/pts/").and_then(|index| {
        let index = crate::agent::collect::descriptors::fdinfo::number(index, 10) as u32;
        (0..r.table.files.len()).find(
            |&f| matches!(&r.state(f).kind, FileKind::PtyMaster { index: i, .. } if *i == index),
        )
    });
    let Some(master) = master else {
        let fd =
            sys::open(path, flags, 0).map_err(|e| r.fail_open(file, path, &sys::errno_text(e)))?;
        set_modes(fd.raw(), termios);
        return Ok(fd);
    };
    // The slave of a pty of our own: through its master, whatever its number.
    if !r.made[master] {
        let fd = self::master(r, master)?;
        let fd = r.park(fd)?;
        r.place(master, fd)?;
    }
    let number = r.first(master);
    let flags = flags | libc::O_CLOEXEC;
    let fd = sys::ioctl_int(number, TIOCGPTPEER, flags as usize)
        .map_err(|e| r.fail(file, "pty slave", e))?;
    let fd = Fd::own(fd as i32);
    set_modes(fd.raw(), termios);
    set_size(fd.raw(), winsize);
    Ok(fd)
}

pub(super) fn master(r: &mut Restorer, file: usize) -> Result<Fd, RestoreError> {
    let state = r.state(file);
    let FileKind::PtyMaster {
        index,
        locked,
        packet,
        termios,
        winsize,
    } = &state.kind
    else {
        return Err(r.fail(file, "pty master", libc::EINVAL));
    };
    let flags = state.flags as i32 & (libc::O_ACCMODE | libc::O_NONBLOCK) | libc::O_NOCTTY;
    let fail = |e: i32| r.fail_open(file, b"/dev/ptmx", &sys::errno_text(e));
    // The lowest free number is given out: open until it is the one.
    let mut extra: Vec<Fd> = Vec::new();
    let (fd, got) = loop {
        let fd = sys::open(b"/dev/ptmx", flags, 0).map_err(fail)?;
        let mut got = 0u32;
        sys::ioctl(fd.raw(), TIOCGPTN, &mut got).map_err(fail)?;
        if got >= *index {
            break (fd, got);
        }
        extra.push(fd);
    };
    let fd = match extra.pop() {
        // Taken by someone else: the lowest number does as well.
        Some(lower) if got != *index => lower,
        _ => fd,
    };
    drop(extra);
    if got != *index {
        r.warn(&format!(
            "/dev/pts/{index} of descriptor {} is in use; the terminal has another number now",
            r.first(file)
        ));
    }
    set_modes(fd.raw(), termios);
    if r.table.hung_up.contains(&(file as u32)) {
        open_once(fd.raw()).map_err(|e| r.fail(file, "pty master", e))?;
    }
    let mut lock = i32::from(*locked);
    let _ = sys::ioctl(fd.raw(), TIOCSPTLCK, &mut lock);
    let mut mode = i32::from(*packet);
    let _ = sys::ioctl(fd.raw(), TIOCPKT, &mut mode);
    set_size(fd.raw(), winsize);
    Ok(fd)
}

/// For an inherited descriptor that the new start does not have: 0 to 2 read and
/// write nothing, a terminal is opened again, a pipe's or socket's other end is
/// closed.
pub(super) fn stand_in(r: &mut Restorer, file: usize, path: &[u8]) -> Result<Fd, RestoreError> {
    let access = r.state(file).flags as i32 & libc::O_ACCMODE;
    let fail = |e: i32| r.fail_open(file, path, &sys::errno_text(e));
    if r.first(file) <= 2 {
        return sys::open(b"/dev/null", libc::O_RDWR, 0).map_err(fail);
    }
    if path.starts_with(b"pipe:") || path.starts_with(b"socket:") {
        return match (path.starts_with(b"socket:"), access) {
            (true, _) => super::sockets::ended_unix().map_err(fail),
            (false, libc::O_RDONLY) => sys::pipe(0).map(|(reader, _)| reader).map_err(fail),
            (false, _) => sys::pipe(0).map(|(_, writer)| writer).map_err(fail),
        };
    }
    let flags = access | libc::O_NOCTTY | libc::O_NONBLOCK;
    for candidate in [&b"/dev/tty"[..], path] {
        if let Ok(fd) = sys::open(candidate, flags, 0) {
            r.set_flags(file, &fd)?;
            return Ok(fd);
        }
    }
    // No terminal at all any more: one that has been hung up.
    hung_up().map_err(fail)
}

/// A master whose slave has been opened and closed says so to who reads from it: whoever
/// waited there for the end of a program would wait for ever.
fn open_once(master: i32) -> Result<(), i32> {
    let mut unlock = 0i32;
    sys::ioctl(master, TIOCSPTLCK, &mut unlock)?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    let slave = sys::ioctl_int(master, TIOCGPTPEER, flags as usize)?;
    sys::close(slave as i32);
    Ok(())
}

/// A pty slave whose master is gone.
fn hung_up() -> Result<Fd, i32> {
    let master = sys::open(b"/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY, 0)?;
    let mut unlock = 0i32;
    sys::ioctl(master.raw(), TIOCSPTLCK, &mut unlock)?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: no pointer is passed.
    let fd = check(unsafe { syscall!(libc::SYS_ioctl, master.raw(), TIOCGPTPEER, flags) })?;
    Ok(Fd::own(fd as i32))
}
