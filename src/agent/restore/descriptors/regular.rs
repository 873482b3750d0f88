//! Regular files by path, directories, unlinked files and memfds from the
//! image's contents. Part of [`super::restore`].

use super::{Late, RestoreError, Restorer};
use crate::agent::collect::descriptors::sys::{self, Fd};
use crate::agent::recover::files::FilesBack;
use crate::image::state::{Extent, FileKind};

const SYS_FACCESSAT2: i64 = 439;
const F_ADD_SEALS: i32 = 1033;
const F_SEAL_SEAL: u32 = 1;
const F_SEAL_FUTURE_WRITE: u32 = 0x10;
const PROC_MAGIC: i64 = 0x9fa0;
const SYSFS_MAGIC: i64 = 0x6265_6572;
const CGROUP2_MAGIC: i64 = 0x6367_7270;

/// The flags of `open` that a description is opened again with: never one that
/// creates or truncates.
fn open_flags(flags: u32) -> i32 {
    let kept = libc::O_ACCMODE
        | libc::O_APPEND
        | libc::O_NONBLOCK
        | libc::O_SYNC
        | libc::O_DSYNC
        | libc::O_DIRECT
        | libc::O_LARGEFILE
        | libc::O_NOATIME
        | libc::O_PATH
        | libc::O_NOFOLLOW;
    (flags as i32 & kept) | libc::O_CLOEXEC | libc::O_NOCTTY
}

/// Opens a path with a description's flags; where only the permissions of a file
/// of our own stand in the way (a lock file made with mode 0444, say), they are
/// lifted for the moment of opening.
fn open_again(path: &[u8], flags: i32) -> Result<Fd, i32> {
    match sys::open(path, flags, 0) {
        Err(libc::EPERM) if flags & libc::O_NOATIME != 0 => {
            sys::open(path, flags & !libc::O_NOATIME, 0)
        }
        Err(libc::EACCES) => {
            let st = sys::stat(path)?;
            let name = sys::cstr(path);
            let mode = st.st_mode & 0o7777;
            // SAFETY: a live NUL-terminated path.
            let lifted = ckpt_sys::raw::check(unsafe {
                ckpt_sys::syscall!(libc::SYS_chmod, name.as_ptr(), mode | 0o600)
            });
            lifted.map_err(|_| libc::EACCES)?;
            let fd = sys::open(path, flags, 0);
            // SAFETY: as above.
            unsafe { ckpt_sys::syscall!(libc::SYS_chmod, name.as_ptr(), mode) };
            fd
        }
        other => other,
    }
}

/// What [`open_again`] would open.
pub struct Opened {
    pub stat: libc::stat,
    /// Its number and size mean something.
    pub stable: bool,
}

/// What [`open_again`] would open, without a trace.
pub fn would_open(path: &[u8], flags: u32) -> Result<Opened, i32> {
    let flags = open_flags(flags) | flags as i32 & libc::O_DIRECTORY;
    let stable = |stat| Opened { stat, stable: true };
    let follow = match flags & libc::O_NOFOLLOW {
        0 => 0,
        _ => libc::AT_SYMLINK_NOFOLLOW,
    };
    let there = sys::fstatat(libc::AT_FDCWD, &sys::cstr(path), follow)?;
    // Opening another kind may wait, or do something.
    if !matches!(there.st_mode & libc::S_IFMT, libc::S_IFREG | libc::S_IFDIR) {
        return Ok(stable(there));
    }
    let opened = match sys::open(path, flags, 0) {
        Err(libc::EPERM) => sys::open(path, flags & !libc::O_NOATIME, 0),
        other => other,
    };
    match opened {
        Ok(fd) => {
            let stat = sys::fstat(fd.raw())?;
            let stable = !is_unstable(&fd);
            Ok(Opened { stat, stable })
        }
        Err(libc::EACCES) => {
            // SAFETY: no arguments.
            let own = unsafe { ckpt_sys::syscall!(libc::SYS_geteuid) } as u32;
            if there.st_uid == own {
                Ok(stable(there))
            } else {
                Err(libc::EACCES)
            }
        }
        Err(errno) => Err(errno),
    }
}

/// A file that a redirection names and that is not there is made where the description was an
/// output. What was read as well is not: an empty file in its place would be a silent error.
pub fn makes(flags: u32) -> bool {
    flags as i32 & (libc::O_ACCMODE | libc::O_PATH) == libc::O_WRONLY
}

/// Would it be made, and can it be?
pub fn would_make(path: &[u8], flags: u32) -> bool {
    if !makes(flags) || !matches!(sys::stat(path), Err(libc::ENOENT)) {
        return false;
    }
    let slash = path.iter().rposition(|&b| b == b'/');
    let parent = sys::cstr(slash.map_or(b".", |at| &path[..at + 1]));
    let (at, mode) = (libc::AT_FDCWD, libc::W_OK | libc::X_OK);
    // SAFETY: a live NUL-terminated path.
    let may =
        unsafe { ckpt_sys::syscall!(SYS_FACCESSAT2, at, parent.as_ptr(), mode, libc::AT_EACCESS) };
    may == 0
}

pub(super) fn named(r: &mut Restorer, file: usize) -> Result<Fd, RestoreError> {
    let state = r.state(file);
    let FileKind::Regular {
        path,
        dev,
        ino,
        mode,
        btime_ns,
        ..
    } = &state.kind
    else {
        return Err(r.fail(file, "regular file", libc::EINVAL));
    };
    let redirected = redirected(r, path);
    let path = redirected.unwrap_or(path);
    let mut opened = open_again(path, open_flags(state.flags));
    if redirected.is_some() && makes(state.flags) && matches!(opened, Err(libc::ENOENT)) {
        let flags = open_flags(state.flags) | libc::O_CREAT | libc::O_EXCL;
        opened = sys::open(path, flags, mode & 0o777);
    }
    let fd = opened.map_err(|e| r.fail_open(file, path, &sys::errno_text(e)))?;
    let st = sys::fstat(fd.raw()).map_err(|e| r.fail(file, "regular file", e))?;
    let unstable = || is_unstable(&fd);
    if st.st_mode & libc::S_IFMT != mode & libc::S_IFMT {
        return Err(r.fail_open(file, path, "another kind of file has taken its place"));
    }
    let born = sys::identity(fd.raw(), b"\0", libc::AT_EMPTY_PATH).map_or(0, |(_, _, b)| b);
    let reborn = born != 0 && *btime_ns != 0 && born != *btime_ns;
    let put_back = r
        .ctx
        .files
        .replaced
        .contains(&((*dev, *ino), (st.st_dev, st.st_ino)));
    let expected = put_back || redirected.is_some();
    if (st.st_ino != *ino || reborn) && !expected && !unstable() {
        return Err(r.fail_open(
            file,
            path,
            "another file has taken its place since the checkpoint (CKPT_FOREIGN=keep takes that)",
        ));
    }
    if state.flags & libc::O_PATH as u32 != 0 {
        return Ok(fd);
    }
    let regular = mode & libc::S_IFMT == libc::S_IFREG;
    if regular && st.st_size < state.pos && !unstable() {
        let (size, pos) = (st.st_size, state.pos);
        r.warn(&format!(
            "{}: {size} bytes long, shorter than the position {pos} of descriptor {}",
            String::from_utf8_lossy(path),
            r.first(file)
        ));
        if redirected.is_some() {
            sys::lseek(fd.raw(), 0, libc::SEEK_END)
                .map_err(|e| r.fail(file, "set its position", e))?;
            return Ok(fd);
        }
    }
    seek(r, file, &fd)?;
    Ok(fd)
}

/// On file systems whose inode numbers and sizes mean nothing.
fn is_unstable(fd: &Fd) -> bool {
    let magic = sys::fs_magic(fd.raw());
    matches!(magic, Ok(PROC_MAGIC | SYSFS_MAGIC | CGROUP2_MAGIC))
}

/// Where `CKPT_REDIRECT` sends a path; the last entry counts.
fn redirected<'a>(r: &Restorer<'a, '_>, path: &[u8]) -> Option<&'a [u8]> {
    let files: &'a FilesBack = r.ctx.files;
    let asked = files.redirect.iter().rev();
    let mut entries = asked.chain(&files.moved);
    entries
        .find(|(old, _)| old == path)
        .map(|(_, new)| &new[..])
}

pub(super) fn is_redirected(r: &Restorer, path: &[u8]) -> bool {
    redirected(r, path).is_some()
}

fn seek(r: &Restorer, file: usize, fd: &Fd) -> Result<(), RestoreError> {
    let pos = r.state(file).pos;
    if pos != 0 {
        sys::lseek(fd.raw(), pos, libc::SEEK_SET)
            .map_err(|e| r.fail(file, "set its position", e))?;
    }
    Ok(())
}

pub(super) fn directory(r: &mut Restorer, file: usize) -> Result<Fd, RestoreError> {
    let state = r.state(file);
    let FileKind::Directory { path, ino } = &state.kind else {
        return Err(r.fail(file, "directory", libc::EINVAL));
    };
    let redirected = redirected(r, path);
    let path = redirected.unwrap_or(path);
    let flags = open_flags(state.flags) | libc::O_DIRECTORY;
    let fd = open_again(path, flags).map_err(|e| r.fail_open(file, path, &sys::errno_text(e)))?;
    let st = sys::fstat(fd.raw()).map_err(|e| r.fail(file, "directory", e))?;
    let in_proc = || sys::fs_magic(fd.raw()) == Ok(PROC_MAGIC);
    let mut replaced = r.ctx.files.replaced.iter();
    let put_back = replaced.any(|(old, new)| old.1 == *ino && *new == (st.st_dev, st.st_ino));
    if st.st_ino != *ino && !put_back && redirected.is_none() && !in_proc() {
        return Err(r.fail_open(
            file,
            path,
            "another directory has taken its place since the checkpoint",
        ));
    }
    seek(r, file, &fd)?;
    Ok(fd)
}

/// Opens one more description of an object that is set aside.
fn reopen(r: &Restorer, file: usize, object: (u64, u64)) -> Result<Fd, RestoreError> {
    let holder = &r.objects[&object];
    let flags = open_flags(r.state(file).flags) & !libc::O_NOFOLLOW;
    let fd = sys::open(&sys::thread_fd_path(holder.raw()), flags, 0)
        .map_err(|e| r.fail(file, "open its contents again", e))?;
    seek(r, file, &fd)?;
    Ok(fd)
}

pub(super) fn unlinked(r: &mut Restorer, file: usize) -> Result<Fd, RestoreError> {
    let FileKind::Unlinked {
        path,
        dev,
        ino,
        size,
        extents,
        ..
    } = &r.state(file).kind
    else {
        return Err(r.fail(file, "unlinked file", libc::EINVAL));
    };
    if !r.objects.contains_key(&(*dev, *ino)) {
        let holder = nameless(path).map_err(|e| r.fail(file, "unlinked file", e))?;
        fill(r, holder.raw(), *size, extents).map_err(|e| r.fail(file, "its contents", e))?;
        let holder = r.park(holder)?;
        r.objects.insert((*dev, *ino), holder);
    }
    reopen(r, file, (*dev, *ino))
}

/// A new file without a name, in the old one's directory where possible.
fn nameless(path: &[u8]) -> Result<Fd, i32> {
    let parent = match path.iter().rposition(|&b| b == b'/') {
        Some(0) | None => &b"/"[..],
        Some(slash) => &path[..slash],
    };
    let flags = libc::O_TMPFILE | libc::O_RDWR;
    for dir in [parent, b"/tmp", b"/var/tmp", b"/dev/shm"] {
        if let Ok(fd) = sys::open(dir, flags, 0o600) {
            return Ok(fd);
        }
        // A file system without O_TMPFILE: a name for a moment.
        // SAFETY: getpid has no arguments.
        let pid = unsafe { ckpt_sys::syscall!(libc::SYS_getpid) };
        let name = [dir, format!("/.ckpt-unlinked-{pid}").as_bytes()].concat();
        let create = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
        if let Ok(fd) = sys::open(&name, create, 0o600) {
            let name = sys::cstr(&name);
            // SAFETY: a live NUL-terminated path.
            unsafe { ckpt_sys::syscall!(libc::SYS_unlink, name.as_ptr()) };
            return Ok(fd);
        }
    }
    Err(libc::EACCES)
}

pub(super) fn memfd(r: &mut Restorer, file: usize) -> Result<Fd, RestoreError> {
    let FileKind::Memfd {
        object_dev,
        object_ino,
        name,
        seals,
        size,
        hugetlb,
        extents,
        ..
    } = &r.state(file).kind
    else {
        return Err(r.fail(file, "memfd", libc::EINVAL));
    };
    let object = (*object_dev, *object_ino);
    if !r.objects.contains_key(&object) {
        let mut flags = libc::MFD_CLOEXEC;
        if *seals != F_SEAL_SEAL {
            flags |= libc::MFD_ALLOW_SEALING;
        }
        if *hugetlb != 0 {
            flags |= libc::MFD_HUGETLB | hugetlb << 26;
        }
        let name = sys::cstr(name);
        // SAFETY: a live NUL-terminated name.
        let holder = ckpt_sys::raw::check(unsafe {
            ckpt_sys::syscall!(libc::SYS_memfd_create, name.as_ptr(), flags)
        })
        .map_err(|e| r.fail(file, "memfd", e))?;
        let holder = Fd::own(holder as i32);
        fill(r, holder.raw(), *size, extents).map_err(|e| r.fail(file, "its contents", e))?;
        let holder = r.park(holder)?;
        r.objects.insert(object, holder);
    }
    reopen(r, file, object)
}

/// Writes the stored pages into a fresh object of the given size.
fn fill(r: &Restorer, fd: i32, size: u64, extents: &[Extent]) -> Result<(), i32> {
    // SAFETY: no memory is involved.
    ckpt_sys::raw::check(unsafe { ckpt_sys::syscall!(libc::SYS_ftruncate, fd, size) })?;
    let mut buf = vec![0u8; 64 * 4096];
    for extent in extents {
        let (mut done, bytes) = (0, extent.npages * 4096);
        while done < bytes {
            let len = (bytes - done).min(buf.len() as u64) as usize;
            r.source.read(extent, done, &mut buf[..len])?;
            let at = extent.addr + done;
            // The last page may go beyond the end of the file.
            let inside = size.saturating_sub(at).min(len as u64) as usize;
            write_at(fd, &buf[..inside], at, size)?;
            done += len as u64;
        }
    }
    Ok(())
}

fn write_at(fd: i32, data: &[u8], at: u64, size: u64) -> Result<(), i32> {
    let mut done = 0;
    while done < data.len() {
        match sys::pwrite(fd, &data[done..], at + done as u64) {
            Ok(0) => return Err(libc::EIO),
            Ok(n) => done += n,
            // hugetlbfs has no write: through a mapping of the whole object.
            Err(libc::EINVAL) if done == 0 => return write_mapped(fd, data, at, size),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn write_mapped(fd: i32, data: &[u8], at: u64, size: u64) -> Result<(), i32> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a fresh shared mapping of the object at an address of the kernel's
    // choice; `at + data.len() <= size` by the caller; unmapped before the end.
    unsafe {
        let base = ckpt_sys::raw::check(ckpt_sys::syscall!(
            libc::SYS_mmap,
            0,
            size,
            prot,
            libc::MAP_SHARED,
            fd,
            0
        ))?;
        let to = (base as *mut u8).add(at as usize);
        std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len());
        ckpt_sys::raw::check(ckpt_sys::syscall!(libc::SYS_munmap, base, size)).map(drop)
    }
}

/// Modes and seals, after every description of the objects has been opened.
pub(super) fn finish(r: &mut Restorer) -> Result<(), RestoreError> {
    for file in 0..r.table.files.len() {
        let (object, mode, seals) = match &r.state(file).kind {
            FileKind::Unlinked { dev, ino, mode, .. } => ((*dev, *ino), *mode, 0),
            FileKind::Memfd {
                object_dev,
                object_ino,
                mode,
                seals,
                ..
            } => ((*object_dev, *object_ino), *mode, *seals),
            _ => continue,
        };
        let Some(holder) = r.objects.remove(&object) else {
            continue;
        };
        // SAFETY: no memory is involved.
        let set = ckpt_sys::raw::check(unsafe {
            ckpt_sys::syscall!(libc::SYS_fchmod, holder.raw(), mode)
        });
        set.map_err(|e| r.fail(file, "set its mode", e))?;
        if seals & F_SEAL_FUTURE_WRITE != 0 {
            // Writable shared mappings made before the seal stay; they must be
            // made again before it.
            let fd = r.first(file);
            r.out.late.push(Late::Seals { fd, seals });
        } else if seals != 0 && seals != F_SEAL_SEAL {
            sys::fcntl(holder.raw(), F_ADD_SEALS, seals as usize)
                .map_err(|e| r.fail(file, "set its seals", e))?;
        }
    }
    Ok(())
}
