//! Objects with names other than files: FIFOs, what inotify watches, sockets bound to an
//! address. Can they be made again? Part of [`super::reopen`], helper thread.
//!
//! Probes leave no trace: what can only be bound is bound in the helper's own table for a
//! moment; a socket's file is looked up, not made.

use super::reopen::MadeAnew;
use crate::agent::collect::descriptors::sys::{self, Fd};
use crate::agent::procfs;
use crate::agent::restore::descriptors::{anon, sockets};
use crate::image::state::{FileKind, SocketRole, SocketState};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;

/// A socket that the program has now.
pub struct Socket {
    ino: u64,
    local: Vec<u8>,
}

impl Socket {
    pub fn of(ino: u64, fd: &Fd) -> Socket {
        let mut local = vec![0u8; 128];
        let mut len = local.len() as u32;
        let at = local.as_mut_ptr();
        // SAFETY: an address buffer of `len` bytes.
        let told = check(unsafe { syscall!(libc::SYS_getsockname, fd.raw(), at, &raw mut len) });
        local.truncate(told.map_or(0, |_| len as usize));
        Socket { ino, local }
    }
}

/// A path that the rollback itself may bring back, and why this cannot be made as it is now.
type Obstacle = (Vec<u8>, String);

/// Can a working directory be entered?
pub fn can_be_entered(path: &[u8]) -> Result<(), i32> {
    let inside = [path, b"/."].concat();
    sys::open(&inside, libc::O_PATH | libc::O_DIRECTORY, 0).map(drop)
}

pub fn can_be_made(kind: &FileKind, open: &[Socket], anew: &MadeAnew) -> Result<(), Obstacle> {
    match kind {
        FileKind::Fifo { path, ino, .. } => fifo(path, anew.now(0, *ino).1),
        FileKind::Inotify { watches, .. } => {
            let Some((path, errno)) = anon::obstacle(watches) else {
                return Ok(());
            };
            let reason = sys::errno_text(errno);
            let shown = String::from_utf8_lossy(path);
            Err((
                path.to_vec(),
                format!(
                    "{shown} was watched at the checkpoint and cannot be watched again: {reason}"
                ),
            ))
        }
        FileKind::Socket(s) => socket(s, open),
        _ => Ok(()),
    }
}

/// Open still or not, it must be there: one that stays is known by its path.
fn fifo(path: &[u8], ino: u64) -> Result<(), Obstacle> {
    let reason = match sys::stat(path) {
        Ok(st) if st.st_mode & libc::S_IFMT == libc::S_IFIFO && st.st_ino == ino => return Ok(()),
        Ok(_) => "another file has taken its place".into(),
        Err(errno) => sys::errno_text(errno),
    };
    let shown = String::from_utf8_lossy(path);
    Err((
        path.to_vec(),
        format!("the FIFO {shown} was open at the checkpoint and cannot be opened again: {reason}"),
    ))
}

fn socket(s: &SocketState, open: &[Socket]) -> Result<(), Obstacle> {
    let bound = matches!(s.role, SocketRole::Idle | SocketRole::Listening { .. });
    // What the program has at this address itself is closed first, or stays.
    let own = open
        .iter()
        .any(|now| now.ino == s.ino || now.local == s.local);
    if !bound || !sockets::named(&s.local) || own && !is_file(s) {
        return Ok(());
    }
    if !is_file(s) {
        return sockets::would_bind(s).map_err(|errno| {
            let shown = address(s);
            let reason = sys::errno_text(errno);
            let reason = format!("a socket cannot be bound to {shown} again: {reason}");
            (Vec::new(), reason)
        });
    }
    let still_open = open.iter().any(|now| now.ino == s.ino);
    if still_open && matches!(s.role, SocketRole::Listening { .. }) {
        return Ok(());
    }
    let end = s.local[2..].iter().position(|&b| b == 0);
    let path = &s.local[2..end.map_or(s.local.len(), |end| 2 + end)];
    if path.first() != Some(&b'/') {
        // Of the working directory to come.
        return Ok(());
    }
    let reason = match socket_file(path, open) {
        Ok(()) => return Ok(()),
        Err(reason) => reason,
    };
    let shown = String::from_utf8_lossy(path);
    Err((
        path.to_vec(),
        format!("a socket cannot be bound to {shown} again: {reason}"),
    ))
}

fn is_file(s: &SocketState) -> bool {
    s.domain == libc::AF_UNIX && s.local.get(2).is_some_and(|&first| first != 0)
}

fn address(s: &SocketState) -> String {
    match (s.domain, &s.local[..]) {
        (libc::AF_INET, [_, _, high, low, a, b, c, d, ..]) => {
            format!("{a}.{b}.{c}.{d}:{}", u16::from_be_bytes([*high, *low]))
        }
        (libc::AF_INET6, [_, _, high, low, ..]) => {
            format!("port {}", u16::from_be_bytes([*high, *low]))
        }
        (libc::AF_UNIX, [_, _, 0, name @ ..]) => format!("@{}", String::from_utf8_lossy(name)),
        _ => "its address".into(),
    }
}

/// Nothing is there, and something can be; or a socket that nobody else has.
fn socket_file(path: &[u8], open: &[Socket]) -> Result<(), String> {
    let free = match sys::fstatat(libc::AT_FDCWD, &sys::cstr(path), libc::AT_SYMLINK_NOFOLLOW) {
        Ok(st) if st.st_mode & libc::S_IFMT == libc::S_IFSOCK => !has_owner(path, open),
        Ok(_) => return Err("another file has taken its place".into()),
        Err(libc::ENOENT) => true,
        Err(errno) => return Err(sys::errno_text(errno)),
    };
    if !free {
        return Err(sys::errno_text(libc::EADDRINUSE));
    }
    let dir = match path.iter().rposition(|&b| b == b'/') {
        Some(0) => &b"/"[..],
        Some(slash) => &path[..slash],
        None => b".",
    };
    let dir = sys::cstr(dir);
    let (at, how) = (libc::AT_FDCWD, libc::W_OK | libc::X_OK);
    // SAFETY: a live NUL-terminated path.
    let may = check(unsafe {
        let effective = libc::AT_EACCESS;
        syscall!(libc::SYS_faccessat2, at, dir.as_ptr(), how, effective)
    });
    match may {
        Ok(_) | Err(libc::ENOSYS) => Ok(()),
        Err(errno) => Err(sys::errno_text(errno)),
    }
}

/// Does another process have a socket with this name?
fn has_owner(path: &[u8], open: &[Socket]) -> bool {
    let text = procfs::read_file(b"/proc/thread-self/net/unix").unwrap_or_default();
    // Num RefCount Protocol Flags Type St Inode Path
    text.split(|&b| b == b'\n').any(|line| {
        let mut fields = line.splitn(2, |&b| b == b'/');
        let numbers = fields.next().unwrap_or_default();
        let named = fields
            .next()
            .is_some_and(|rest| path.strip_prefix(b"/") == Some(rest));
        let ino = numbers.split(|&b| b == b' ').rfind(|f| !f.is_empty());
        let ino = ino.and_then(procfs::number).unwrap_or(0) as u64;
        named && !open.iter().any(|own| own.ino == ino)
    })
}
