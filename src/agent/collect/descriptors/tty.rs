//! Character devices: the harmless ones, terminals and ptys. Called by
//! [`super::collect`] in the helper thread.

use super::{Collector, Raw, fdinfo, sys};
use crate::agent::collect::Refusal;
use crate::image::state::FileKind;

const TIOCGPTN: u64 = 0x8004_5430;
const TIOCGPTLCK: u64 = 0x8004_5439;
const TIOCGPKT: u64 = 0x8004_5438;
/// Size of the kernel's `struct termios`.
pub const TERMIOS_SIZE: usize = 36;
/// Major numbers of pty slaves.
const PTS_MAJORS: std::ops::RangeInclusive<u32> = 136..=143;

pub(super) fn character_device(c: &mut Collector, at: usize) -> Result<FileKind, Refusal> {
    let raw = &c.raws[at];
    let rdev = raw.stat.st_rdev;
    match (libc::major(rdev), libc::minor(rdev)) {
        // null, zero, full, random, urandom
        (1, 3 | 5 | 7 | 8 | 9) => Ok(FileKind::Device {
            path: raw.link.clone(),
            rdev,
        }),
        (5, 2) => master(c, raw),
        (4 | 5 | 136..=143, _) => terminal(c, raw),
        _ => {
            terminal(c, raw).map_err(|_| raw.refuse_kind("is a device whose state cannot be saved"))
        }
    }
}

/// Index of a pty slave by its device number.
fn slave_index(raw: &Raw) -> Option<u32> {
    let rdev = raw.stat.st_rdev;
    let major = libc::major(rdev);
    PTS_MAJORS
        .contains(&major)
        .then(|| (major - PTS_MAJORS.start()) * 256 + libc::minor(rdev))
}

fn terminal(c: &Collector, raw: &Raw) -> Result<FileKind, Refusal> {
    let dup = c.duplicate(raw)?;
    let mut termios = [0u8; TERMIOS_SIZE];
    let modes = sys::ioctl(dup.raw(), libc::TCGETS, &mut termios);
    let own_pair = slave_index(raw).is_some_and(|index| {
        c.raws
            .iter()
            .filter(|r| libc::major(r.stat.st_rdev) == 5 && libc::minor(r.stat.st_rdev) == 2)
            .any(|r| {
                r.info.value("tty-index").map(|v| fdinfo::number(v, 10)) == Some(u64::from(index))
            })
    });
    let mut foreground = 0i32;
    let controlling = sys::ioctl(dup.raw(), libc::TIOCGPGRP, &mut foreground).is_ok();
    if !own_pair && (controlling || c.started_with(raw)) {
        // In the background the modes are the shell's, not the program's.
        // SAFETY: no memory is involved.
        let group = unsafe { ckpt_sys::syscall!(libc::SYS_getpgid, 0) } as i32;
        let ours = !controlling || foreground == group;
        return Ok(FileKind::Inherited {
            path: raw.link.clone(),
            termios: match modes {
                Ok(_) if ours => termios.to_vec(),
                _ => Vec::new(),
            },
        });
    }
    modes.map_err(|e| raw.refuse("is not a terminal", e))?;
    if own_pair && sys::fionread(dup.raw()).unwrap_or(0) > 0 {
        return Err(raw.refuse_kind("is a terminal of the program's own with unread input"));
    }
    let mut winsize = [0u8; 8];
    let _ = sys::ioctl(dup.raw(), libc::TIOCGWINSZ, &mut winsize);
    Ok(FileKind::Tty {
        path: raw.link.clone(),
        rdev: raw.stat.st_rdev,
        termios: termios.to_vec(),
        winsize: winsize.to_vec(),
    })
}

fn master(c: &Collector, raw: &Raw) -> Result<FileKind, Refusal> {
    let dup = c.duplicate(raw)?;
    let ask = |request| -> Result<i32, Refusal> {
        let mut value = 0i32;
        sys::ioctl(dup.raw(), request, &mut value)
            .map_err(|e| raw.refuse("is a pty master that does not tell its state", e))?;
        Ok(value)
    };
    if sys::fionread(dup.raw()).unwrap_or(0) > 0 {
        return Err(raw.refuse_kind("is a pty master with unread output"));
    }
    let mut termios = [0u8; TERMIOS_SIZE];
    let mut winsize = [0u8; 8];
    sys::ioctl(dup.raw(), libc::TCGETS, &mut termios)
        .map_err(|e| raw.refuse("is a pty master that does not tell its modes", e))?;
    let _ = sys::ioctl(dup.raw(), libc::TIOCGWINSZ, &mut winsize);
    Ok(FileKind::PtyMaster {
        index: ask(TIOCGPTN)? as u32,
        locked: ask(TIOCGPTLCK)? != 0,
        packet: ask(TIOCGPKT)? != 0,
        termios: termios.to_vec(),
        winsize: winsize.to_vec(),
    })
}

/// Has the last descriptor of a master's slave been closed?
pub(super) fn is_hung_up(c: &Collector, master: &Raw) -> bool {
    let dup = c.duplicate(master);
    dup.is_ok_and(|dup| sys::poll_now(dup.raw(), 0) & libc::POLLHUP != 0)
}
