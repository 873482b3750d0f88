//! Paths of the program's calls: read from its memory, looked up, and turned into the
//! absolute names that the recorder keeps. Any thread, inside a `Recording`.
//!
//! No descriptor is opened for this: for a moment it would take a number that another
//! thread of the program counts on.

use super::guard::Recording;
use super::{directories, resolve};
use crate::agent::hooks::user;
use crate::persist::{FileRef, Id, NameRef, Stat};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::mem::MaybeUninit;

pub const CWD: i32 = libc::AT_FDCWD;
const PATH_MAX: usize = 4096;
const MAX_LINKS: usize = 40;

/// A path as the program passed it. Ends with a NUL, which `text` leaves out.
pub struct Path(Vec<u8>);

impl Path {
    /// A copy of the string at `at`. `None`: the kernel will refuse it (or there is no memory).
    pub fn read(at: u64) -> Option<Path> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(256).ok()?;
        loop {
            let from = bytes.len();
            let more = if from == 0 { 256 } else { PATH_MAX - from };
            bytes.try_reserve_exact(more).ok()?;
            bytes.resize(from + more, 0);
            let got =
                user::read_string(at.checked_add(from as u64)?, bytes.get_mut(from..)?).ok()?;
            if let Some(end) = bytes
                .get(from..from + got)?
                .iter()
                .position(|&byte| byte == 0)
            {
                bytes.truncate(from + end + 1);
                return Some(Path(bytes));
            }
            if got < more || bytes.len() >= PATH_MAX {
                return None;
            }
        }
    }

    /// A copy of the string at `at`, which the kernel has just read to its end for a call
    /// of the same thread ([`stat_raw`]).
    pub fn read_known(at: u64) -> Option<Path> {
        let from = at as *const u8;
        let mut bytes = Vec::new();
        if from.is_null() {
            // Newer kernels take this for an empty path.
            return Path::of(&[]);
        }
        // SAFETY: the program's own string, in reach a moment ago; a program that unmaps it
        // in another thread during its call has no right to expect anything.
        unsafe {
            let len = (0..PATH_MAX).find(|&k| from.add(k).read_volatile() == 0)?;
            bytes.try_reserve_exact(len + 1).ok()?;
            bytes.extend_from_slice(std::slice::from_raw_parts(from, len));
        }
        bytes.push(0);
        Some(Path(bytes))
    }

    /// From pieces, put together.
    pub fn of(pieces: &[&[u8]]) -> Option<Path> {
        let len: usize = pieces.iter().map(|piece| piece.len()).sum();
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(len + 1).ok()?;
        for piece in pieces {
            bytes.extend_from_slice(piece);
        }
        bytes.push(0);
        Some(Path(bytes))
    }

    pub fn text(&self) -> &[u8] {
        self.0.split_last().map_or(&[], |(_, text)| text)
    }

    pub fn pointer(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    pub fn is_empty(&self) -> bool {
        self.text().is_empty()
    }
}

/// Attributes of what the program's string at `path` (relative to `dir`) names; `flags` are
/// statx's. With any result but EFAULT, ENAMETOOLONG and ENOMEM the string can be read.
pub fn stat_raw(dir: i32, path: u64, flags: i32) -> Result<Stat, i32> {
    Ok(stat_and_mount(dir, path, flags)?.0)
}

/// The mount that an inode was found in; `None`: the kernel does not say.
pub type Mount = Option<u64>;

/// The same, with the mount.
pub fn stat_and_mount(dir: i32, path: u64, flags: i32) -> Result<(Stat, Mount), i32> {
    const BASIC_STATS: u32 = 0x7ff;
    const MOUNT: u32 = 0x1000;
    let mut x = MaybeUninit::<libc::statx>::uninit();
    // SAFETY: the kernel checks the path, and fills in what is read of `x`.
    unsafe {
        check(syscall!(
            libc::SYS_statx,
            dir,
            path,
            flags | libc::AT_NO_AUTOMOUNT,
            BASIC_STATS | MOUNT,
            x.as_mut_ptr()
        ))?;
        let x = x.assume_init_ref();
        let mount = (x.stx_mask & MOUNT != 0).then_some(x.stx_mnt_id);
        Ok((Stat::from_statx(x), mount))
    }
}

/// Attributes of what `path` (relative to `dir`) names.
pub fn stat_at(dir: i32, path: &Path, flags: i32) -> Result<Stat, i32> {
    stat_raw(dir, path.pointer(), flags)
}

/// Attributes of an open file.
pub fn stat_fd(fd: i32) -> Result<Stat, i32> {
    stat_raw(fd, c"".as_ptr() as u64, libc::AT_EMPTY_PATH)
}

/// What the symbolic link at the address `path` (relative to `dir`) says. `None`: there is none.
pub fn link_text(dir: i32, path: u64) -> Option<Vec<u8>> {
    let mut buf = [MaybeUninit::<u8>::uninit(); PATH_MAX];
    // SAFETY: room for PATH_MAX bytes.
    let got = unsafe {
        check(syscall!(
            libc::SYS_readlinkat,
            dir,
            path,
            buf.as_mut_ptr(),
            PATH_MAX
        ))
    };
    filled(&buf, got.ok()?)
}

/// A copy of the first `len` bytes, which the kernel has written.
fn filled(buf: &[MaybeUninit<u8>; PATH_MAX], len: usize) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    text.try_reserve_exact(len).ok()?;
    // SAFETY: written by the kernel (the caller's promise), and not beyond the buffer.
    text.extend_from_slice(unsafe {
        std::slice::from_raw_parts(buf.as_ptr().cast(), len.min(PATH_MAX))
    });
    Some(text)
}

/// The path by which the kernel knows an open file.
pub fn path_of_fd(fd: i32) -> Option<Vec<u8>> {
    let mut digits = [0u8; 10];
    let mut at = digits.len();
    let mut rest = u32::try_from(fd).ok()?;
    loop {
        at = at.checked_sub(1)?;
        *digits.get_mut(at)? = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    let path = Path::of(&[b"/proc/self/fd/", digits.get(at..)?])?;
    link_text(CWD, path.pointer())
}

/// The working directory, where it has a path.
pub fn cwd() -> Option<Vec<u8>> {
    let mut buf = [MaybeUninit::<u8>::uninit(); PATH_MAX];
    // SAFETY: room for PATH_MAX bytes.
    let got = unsafe { check(syscall!(libc::SYS_getcwd, buf.as_mut_ptr(), PATH_MAX)) };
    let text = filled(&buf, got.ok()?.saturating_sub(1))?;
    (text.first() == Some(&b'/')).then_some(text)
}

/// A name in a directory: the owner of what a `NameRef` borrows.
pub struct Name {
    dir: Id,
    /// Absolute, with the name.
    pub full: Vec<u8>,
    name_at: usize,
}

impl Name {
    pub fn as_ref(&self) -> NameRef<'_> {
        let dir_path = match self.name_at {
            0 | 1 => &b"/"[..],
            at => self.full.get(..at - 1).unwrap_or(b"/"),
        };
        NameRef {
            dir: self.dir,
            dir_path,
            name: self.full.get(self.name_at..).unwrap_or(b""),
        }
    }
}

/// Splits a path: the directory's part (may be empty) and the last component.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = path.iter().rposition(|&byte| byte != b'/')? + 1;
    let path = path.get(..end)?;
    let at = path
        .iter()
        .rposition(|&byte| byte == b'/')
        .map_or(0, |slash| slash + 1);
    let name = path.get(at..)?;
    (name != b"." && name != b"..").then_some((path.get(..at)?, name))
}

/// What is wrong with a name that the program wants to change.
pub enum NoName {
    /// The call is bound to fail (or concerns nothing that could be put back).
    WillFail,
    /// The name cannot be told (no /proc, out of memory).
    Unknown,
}

/// A path's last component, and the directory that it is a name in.
pub struct Parent<'p> {
    pub id: Id,
    pub name: &'p [u8],
    stat: Stat,
    mount: Mount,
    /// The path up to the name.
    way: &'p [u8],
    at: i32,
    here: Path,
}

/// The directory and the last component of `path`. Does not ask whether the name exists.
pub fn parent_of(dir: i32, path: &Path) -> Result<Parent<'_>, NoName> {
    let (way, name) = split(path.text()).ok_or(NoName::WillFail)?;
    let here = Path::of(&[if way.is_empty() { b"." } else { way }]);
    let here = here.ok_or(NoName::Unknown)?;
    let found = stat_and_mount(dir, here.pointer(), 0);
    let (stat, mount) = found.map_err(|_| NoName::WillFail)?;
    if !stat.is_dir() {
        return Err(NoName::WillFail);
    }
    Ok(Parent {
        id: stat.id,
        name,
        stat,
        mount,
        way,
        at: dir,
        here,
    })
}

impl Parent<'_> {
    /// The absolute name. `ask`: whether the program may write to the directory.
    pub fn full_name(&self, recording: &mut Recording, ask: bool) -> Result<Name, NoName> {
        if ask && !writable(self.at, &self.here) {
            return Err(NoName::WillFail);
        }
        let known = directories::path_of(recording, self.id, self.mount, self.way);
        let mut full = match known {
            Some(path) => path,
            None => {
                let path = self.real_path()?;
                directories::note(recording, self.id, self.mount, &path);
                path
            }
        };
        full.try_reserve_exact(self.name.len() + 1)
            .map_err(|_| NoName::Unknown)?;
        if full.last() != Some(&b'/') {
            full.push(b'/');
        }
        let name_at = full.len();
        full.extend_from_slice(self.name);
        Ok(Name {
            dir: self.id,
            full,
            name_at,
        })
    }

    /// The directory's own path, asked for component by component.
    fn real_path(&self) -> Result<Vec<u8>, NoName> {
        let real = resolve::real(self.at, self.way, true).ok_or(NoName::Unknown)?;
        if !real.is(&self.stat) {
            // A removed directory takes no names.
            let gone = self.stat.nlink == 0;
            return Err(if gone {
                NoName::WillFail
            } else {
                NoName::Unknown
            });
        }
        Ok(real.path)
    }
}

pub fn name_at(recording: &mut Recording, dir: i32, path: &Path) -> Result<Name, NoName> {
    parent_of(dir, path)?.full_name(recording, true)
}

/// May the program write there? Doubts are yes.
pub fn writable(dir: i32, path: &Path) -> bool {
    const SYS_FACCESSAT2: i64 = 439;
    // SAFETY: the path ends with a NUL.
    let ret = unsafe {
        syscall!(
            SYS_FACCESSAT2,
            dir,
            path.pointer(),
            libc::W_OK,
            libc::AT_EACCESS
        )
    };
    ret != -(libc::EACCES as isize) && ret != -(libc::EROFS as isize)
}

/// Follows symbolic links in the last component. What the end names is in the second part.
fn follow(dir: i32, path: &Path) -> Option<(i32, Path, Result<Stat, i32>)> {
    let mut at = (dir, Path::of(&[path.text()])?);
    for _ in 0..MAX_LINKS {
        let stat = stat_at(at.0, &at.1, libc::AT_SYMLINK_NOFOLLOW);
        match stat {
            Ok(stat) if stat.mode & libc::S_IFMT == libc::S_IFLNK => {
                let target = link_text(at.0, at.1.pointer())?;
                at = if target.first() == Some(&b'/') {
                    (CWD, Path::of(&[&target])?)
                } else {
                    let (parent, _) = split(at.1.text())?;
                    (at.0, Path::of(&[parent, &target])?)
                };
            }
            stat => return Some((at.0, at.1, stat)),
        }
    }
    None
}

/// Where a symbolic link that ends in nothing leads: the name that O_CREAT would make. `None`: not
/// such a link.
pub fn behind_links(dir: i32, path: &Path) -> Option<(i32, Path)> {
    match follow(dir, path)? {
        (dir, path, Err(libc::ENOENT)) => Some((dir, path)),
        _ => None,
    }
}

/// An inode and its real path.
pub struct Found {
    pub stat: Stat,
    pub full: Vec<u8>,
    /// The program's descriptor that the path stands for (/proc/self/fd), where it is not one
    /// of the inode's names.
    pub fd: Option<i32>,
    /// `full` is not only what the program wrote.
    pub sure: bool,
}

impl Found {
    pub fn file(&self) -> FileRef<'_> {
        FileRef {
            stat: &self.stat,
            path: if self.fd.is_some() { b"" } else { &self.full },
            fd: None,
            any_fd: self.fd,
        }
    }

    /// The inode as it is now.
    pub fn now(&self) -> Option<Stat> {
        let stat = match self.fd {
            Some(fd) => stat_fd(fd),
            None => stat_at(CWD, &Path::of(&[&self.full])?, libc::AT_SYMLINK_NOFOLLOW),
        };
        stat.ok().filter(|stat| stat.id == self.stat.id)
    }
}

/// What `path` names, with a symbolic link as last component followed or not. `None`: nothing
/// that could be modified.
pub fn find(dir: i32, path: &Path, follow_last: bool) -> Option<Found> {
    let flags = if follow_last {
        0
    } else {
        libc::AT_SYMLINK_NOFOLLOW
    };
    let stat = stat_at(dir, path, flags).ok()?;
    let found = |full, fd, sure| {
        Some(Found {
            stat,
            full,
            fd,
            sure,
        })
    };
    let Some(real) = resolve::real(dir, path.text(), follow_last) else {
        return found(path.text().to_vec(), None, false);
    };
    if real.is(&stat) {
        return found(real.path, None, true);
    }
    // The links of /proc lead to inodes, whatever they say.
    let fd = real.descriptor(&stat);
    match (fd, real.link) {
        (Some(fd), _) => found(path_of_fd(fd)?, Some(fd), true),
        (None, Some((_, target))) => found(target, None, true),
        (None, None) => found(real.path, None, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_split_like_the_kernel_does() {
        assert_eq!(split(b"a"), Some((&b""[..], &b"a"[..])));
        assert_eq!(split(b"/a"), Some((&b"/"[..], &b"a"[..])));
        assert_eq!(split(b"x/y//z///"), Some((&b"x/y//"[..], &b"z"[..])));
        assert_eq!(split(b"x/.."), None);
        assert_eq!(split(b"/"), None);
    }

    #[test]
    fn bad_pointers_are_no_paths() {
        assert!(Path::read(8).is_none());
        let long = [b'x'; 5000];
        assert!(Path::read(long.as_ptr() as u64).is_none());
        assert_eq!(Path::read(c"/a/b".as_ptr() as u64).unwrap().text(), b"/a/b");
    }

    #[test]
    fn the_end_of_dangling_links_is_found() {
        let dir = std::env::temp_dir().join(format!("ckpt-links-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let link = dir.join("link");
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink("not/there", &link).unwrap();
        let path = Path::of(&[link.as_os_str().as_encoded_bytes()]).unwrap();
        let (_, end) = behind_links(CWD, &path).unwrap();
        assert!(end.text().ends_with(b"/not/there"));
        let there = Path::of(&[dir.as_os_str().as_encoded_bytes()]).unwrap();
        assert!(behind_links(CWD, &there).is_none());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
