//! The system calls that tables, recorder and undo make: raw, by path or descriptor.
//!
//! Any thread of the target inside a hook, the helper, the constructor, the command.
//! Errors are positive error numbers. Nothing here allocates or takes a lock, but the
//! functions that return a `Vec`.

use super::{Id, Stat};
use crate::agent::place;
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

pub type Sys<T> = Result<T, i32>;

pub const PATH_LEN: usize = 4096;

/// A NUL-terminated path on the stack.
pub struct CPath {
    buf: [MaybeUninit<u8>; PATH_LEN + 8],
    len: usize,
}

impl CPath {
    /// The pieces one after the other, nothing in between.
    pub fn new(pieces: &[&[u8]]) -> Sys<CPath> {
        let mut path = CPath {
            buf: [MaybeUninit::uninit(); PATH_LEN + 8],
            len: 0,
        };
        for piece in pieces {
            path.push(piece)?;
        }
        path.end();
        Ok(path)
    }

    /// `dir/name`.
    pub fn join(dir: &[u8], name: &[u8]) -> Sys<CPath> {
        let slash: &[u8] = if dir.last() == Some(&b'/') { b"" } else { b"/" };
        CPath::new(&[dir, slash, name])
    }

    /// `/proc/self/fd/N`.
    pub fn of_fd(fd: i32) -> CPath {
        let mut path = CPath {
            buf: [MaybeUninit::uninit(); PATH_LEN + 8],
            len: 0,
        };
        // Both fit by far.
        let _ = path.push(b"/proc/thread-self/fd/");
        path.number(fd.max(0) as u64, 10);
        path.end();
        path
    }

    fn push(&mut self, bytes: &[u8]) -> Sys<()> {
        let room = self
            .buf
            .get_mut(self.len..self.len + bytes.len())
            .filter(|_| self.len + bytes.len() < PATH_LEN)
            .ok_or(libc::ENAMETOOLONG)?;
        if bytes.contains(&0) {
            return Err(libc::ENOENT);
        }
        for (place, byte) in room.iter_mut().zip(bytes) {
            place.write(*byte);
        }
        self.len += bytes.len();
        Ok(())
    }

    /// Appends a number, at least `1` digit, in base 10 or 16.
    pub fn number(&mut self, mut value: u64, base: u64) {
        let mut digits = [0u8; 20];
        let mut at = digits.len();
        loop {
            at -= 1;
            let digit = (value % base) as u8;
            if let Some(place) = digits.get_mut(at) {
                *place = if digit < 10 {
                    b'0' + digit
                } else {
                    b'a' + digit - 10
                };
            }
            value /= base;
            if value == 0 || at == 0 {
                break;
            }
        }
        let _ = self.push(digits.get(at..).unwrap_or_default());
        self.end();
    }

    /// Appends bytes.
    pub fn add(&mut self, bytes: &[u8]) -> Sys<()> {
        self.push(bytes)?;
        self.end();
        Ok(())
    }

    fn end(&mut self) {
        if let Some(place) = self.buf.get_mut(self.len) {
            place.write(0);
        }
    }

    pub fn ptr(&self) -> *const u8 {
        self.buf.as_ptr().cast()
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the first `len` bytes were written.
        unsafe { std::slice::from_raw_parts(self.ptr(), self.len) }
    }
}

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

macro_rules! call {
    ($($arg:expr),*) => {
        // SAFETY: pointers are to live values of the sizes that the call wants.
        check(unsafe { syscall!($($arg),*) })
    };
}

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

pub fn pread(fd: i32, addr: *mut u8, len: usize, offset: u64) -> Sys<usize> {
    call!(libc::SYS_pread64, fd, addr, len, offset)
}

/// Does RLIMIT_FSIZE, which is the program's, let a file be so long? A call that goes beyond it
/// would raise SIGXFSZ, and that ends the program.
fn is_allowed(end: u64) -> Sys<()> {
    let mut limit = [u64::MAX; 2];
    let asked = call!(
        libc::SYS_prlimit64,
        0,
        libc::RLIMIT_FSIZE,
        0,
        limit.as_mut_ptr()
    );
    if asked.is_ok() && end > limit[0] {
        return Err(libc::EFBIG);
    }
    Ok(())
}

pub fn pwrite(fd: i32, bytes: &[u8], offset: u64) -> Sys<usize> {
    is_allowed(offset.saturating_add(bytes.len() as u64))?;
    call!(libc::SYS_pwrite64, fd, bytes.as_ptr(), bytes.len(), offset)
}

/// All of it, or an error; a write of nothing is ENOSPC.
pub fn pwrite_all(fd: i32, mut bytes: &[u8], mut offset: u64) -> Sys<()> {
    while !bytes.is_empty() {
        match pwrite(fd, bytes, offset) {
            Ok(0) => return Err(libc::ENOSPC),
            Ok(n) => {
                bytes = bytes.get(n..).unwrap_or_default();
                offset += n as u64;
            }
            Err(libc::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Fills the buffer as far as the file goes.
pub fn pread_all(fd: i32, addr: *mut u8, len: usize, offset: u64) -> Sys<usize> {
    let mut done = 0;
    while done < len {
        match pread(
            fd,
            addr.wrapping_add(done),
            len - done,
            offset + done as u64,
        ) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(libc::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

pub fn ftruncate(fd: i32, len: u64) -> Sys<()> {
    if is_allowed(len).is_err() && fstat(fd)?.size < len {
        return Err(libc::EFBIG);
    }
    call!(libc::SYS_ftruncate, fd, len).map(drop)
}

pub fn fallocate(fd: i32, mode: i32, offset: u64, len: u64) -> Sys<()> {
    if mode & libc::FALLOC_FL_KEEP_SIZE == 0 {
        is_allowed(offset.saturating_add(len))?;
    }
    call!(libc::SYS_fallocate, fd, mode, offset, len).map(drop)
}

pub fn seek(fd: i32, offset: u64, whence: i32) -> Sys<u64> {
    call!(libc::SYS_lseek, fd, offset, whence).map(|n| n as u64)
}

/// Where the zeros begin that follow all that was ever written to a file of `size` bytes
/// (through a mapping as well); `size` where that is not known for certain.
pub fn end_of_data(fd: i32, size: u64) -> u64 {
    // ext4, XFS, tmpfs: they ask the page cache. Of others it is known that they have
    // forgotten to.
    const CERTAIN: [u64; 3] = [0xef53, 0x5846_5342, 0x0102_1994];
    let mut fs = MaybeUninit::<libc::statfs>::zeroed();
    if call!(libc::SYS_fstatfs, fd, fs.as_mut_ptr()).is_err() {
        return size;
    }
    // SAFETY: filled by the kernel.
    if !CERTAIN.contains(&(unsafe { fs.assume_init_ref() }.f_type as u64)) {
        return size;
    }
    let (mut at, mut end) = (0, 0);
    // A file with many holes is read whole.
    for _ in 0..16 {
        match seek(fd, at, libc::SEEK_DATA) {
            Err(libc::ENXIO) => return end,
            Ok(data) if data >= size => return end,
            Ok(data) => at = data,
            Err(_) => return size,
        }
        match seek(fd, at, libc::SEEK_HOLE) {
            Ok(hole) if hole > at && hole < size => (at, end) = (hole, hole),
            _ => return size,
        }
    }
    size
}

pub fn copy_file_range(from: i32, at: u64, to: i32, at_to: u64, len: u64) -> Sys<u64> {
    let (mut a, mut b) = (at, at_to);
    call!(
        libc::SYS_copy_file_range,
        from,
        &raw mut a,
        to,
        &raw mut b,
        len,
        0
    )
    .map(|n| n as u64)
}

pub fn fdatasync(fd: i32) -> Sys<()> {
    call!(libc::SYS_fdatasync, fd).map(drop)
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

/// Not for symbolic links.
pub fn chmod(path: &CPath, mode: u32) -> Sys<()> {
    call!(libc::SYS_fchmodat, CWD, path.ptr(), mode & 0o7777).map(drop)
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

/// Of the inode behind a descriptor.
pub fn fchmod(fd: i32, mode: u32) -> Sys<()> {
    call!(libc::SYS_fchmod, fd, mode & 0o7777).map(drop)
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

/// Maps `len` bytes of a file, shared, for reading and writing.
pub fn map(fd: i32, offset: u64, len: u64) -> Sys<*mut u8> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // In the target, apart from the program's memory.
    let map = |wish: u64| {
        call!(
            libc::SYS_mmap,
            wish,
            len,
            prot,
            libc::MAP_SHARED,
            fd,
            offset
        )
        .map(|at| at as u64)
    };
    place::wished(len, map).map(|at| at as *mut u8)
}

pub fn unmap(addr: *mut u8, len: u64) {
    let _ = call!(libc::SYS_munmap, addr, len);
}

/// Writes a mapped range and what is needed to find it to the disk.
pub fn sync_range(addr: *mut u8, len: u64) -> Sys<()> {
    call!(libc::SYS_msync, addr, len, libc::MS_SYNC).map(drop)
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

/// Copies `start..end` of a file, holes staying holes, to `at` in another. Both
/// descriptors must be ours alone (their positions move).
pub fn copy_sparse(from: i32, start: u64, end: u64, to: i32, at: u64) -> Sys<()> {
    let mut pos = start;
    while pos < end {
        let data = match seek(from, pos, libc::SEEK_DATA) {
            Ok(data) => data.min(end),
            Err(libc::ENXIO) => return Ok(()),
            Err(_) => pos,
        };
        if data >= end {
            return Ok(());
        }
        let hole = match seek(from, data, libc::SEEK_HOLE) {
            Ok(hole) if hole > data => hole.min(end),
            _ => end,
        };
        point();
        copy_data(from, data, hole, to, at + (data - start))?;
        pos = hole;
    }
    Ok(())
}

/// Copies bytes by the kernel's cheapest way, else through a buffer. Ends early, and
/// well, where the source ends.
fn copy_data(from: i32, start: u64, end: u64, to: i32, at: u64) -> Sys<()> {
    is_allowed(at.saturating_add(end - start))?;
    let mut pos = start;
    while pos < end {
        match copy_file_range(from, pos, to, at + (pos - start), end - pos) {
            Ok(0) => break,
            Ok(n) => pos += n,
            Err(libc::EINTR) => {}
            Err(libc::ENOSPC) => return Err(libc::ENOSPC),
            Err(_) => break,
        }
    }
    let mut buf = [MaybeUninit::<u8>::uninit(); 16 << 10];
    while pos < end {
        let want = (end - pos).min(buf.len() as u64) as usize;
        let got = pread_all(from, buf.as_mut_ptr().cast(), want, pos)?;
        if got == 0 {
            break;
        }
        // SAFETY: the kernel wrote `got` bytes.
        let bytes = unsafe { std::slice::from_raw_parts(buf.as_ptr().cast::<u8>(), got) };
        pwrite_all(to, bytes, at + (pos - start))?;
        pos += got as u64;
    }
    Ok(())
}

/// `device-inode` in hexadecimal, as files of ours are named after inodes.
pub fn add_id(path: &mut CPath, id: &Id) -> Sys<()> {
    path.number(id.dev, 16);
    path.add(b"-")?;
    path.number(id.ino, 16);
    Ok(())
}
