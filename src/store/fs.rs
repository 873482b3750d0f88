//! The file operations that the store needs, behind a trait so that tests can
//! kill, fail or shorten each of them.
//!
//! [`RawFs`] is the real one: raw system calls, no libc. It is used in the target's
//! constructor and helper thread, and in the command. New files are 0600, new
//! directories 0700, less the caller's umask.

use crate::errno::{Errno, Io};
use crate::image::ReadAt;
use crate::image::writer::ImageSink;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};
use std::ffi::OsStr;
use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    pub name: Vec<u8>,
    pub dir: bool,
}

pub trait Fs {
    type File: std::fmt::Debug;

    fn mkdir(&self, path: &Path) -> Io<()>;
    /// A new file, for reading and writing.
    fn create_new(&self, path: &Path) -> Io<Self::File>;
    /// An existing file, for reading.
    fn open(&self, path: &Path) -> Io<Self::File>;
    /// A file for reading and writing; `bool`: it was created.
    fn open_or_create(&self, path: &Path) -> Io<(Self::File, bool)>;
    fn len(&self, file: &Self::File) -> Io<u64>;
    fn read_at(&self, file: &Self::File, buffer: &mut [u8], offset: u64) -> Io<usize>;
    fn write_at(&self, file: &Self::File, pieces: &[IoSlice<'_>], offset: u64) -> Io<usize>;
    fn truncate(&self, file: &Self::File, len: u64) -> Io<()>;
    fn sync_data(&self, file: &Self::File) -> Io<()>;
    fn sync_dir(&self, path: &Path) -> Io<()>;
    fn rename(&self, from: &Path, to: &Path) -> Io<()>;
    fn unlink(&self, path: &Path) -> Io<()>;
    fn rmdir(&self, path: &Path) -> Io<()>;
    fn list(&self, path: &Path) -> Io<Vec<Entry>>;

    /// Asks the kernel to begin writing that part to the disk, without waiting for it.
    fn start_writing(&self, _file: &Self::File, _offset: u64, _len: u64) {}

    /// Writes all of `bytes`. A write that is short does not say why (no space, RLIMIT_FSIZE): the
    /// one behind it does.
    fn write_all(&self, file: &Self::File, bytes: &[u8], offset: u64) -> Io<()> {
        let written = self.write_at(file, &[IoSlice::new(bytes)], offset)?;
        let Some(rest) = bytes.get(written..).filter(|_| written < bytes.len()) else {
            return Ok(());
        };
        match self.write_at(file, &[IoSlice::new(rest)], offset + written as u64)? {
            all if all == rest.len() => Ok(()),
            _ => Err(Errno::ENOSPC),
        }
    }

    /// The whole contents of a file of at most `most` bytes (else EFBIG).
    fn read_all(&self, file: &Self::File, most: u64) -> Io<Vec<u8>> {
        let len = self.len(file)?;
        if len > most {
            return Err(Errno::EFBIG);
        }
        let mut bytes = vec![0u8; len as usize];
        FileOf(self, file).read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// Removes a directory and what is in it; nothing there is fine.
    fn remove_tree(&self, path: &Path) -> Io<()> {
        let entries = match self.list(path) {
            Err(Errno::ENOENT) => return Ok(()),
            other => other?,
        };
        for entry in entries {
            let inner = path.join(OsStr::from_bytes(&entry.name));
            let removed = if entry.dir {
                self.remove_tree(&inner)
            } else {
                self.unlink(&inner)
            };
            match removed {
                Err(Errno::ENOENT) => {}
                other => other?,
            }
        }
        self.rmdir(path)
    }
}

/// A file of some [`Fs`], as something to read from or to write an image to.
pub struct FileOf<'a, F: Fs + ?Sized>(pub &'a F, pub &'a F::File);

impl<F: Fs + ?Sized> ReadAt for FileOf<'_, F> {
    fn len(&self) -> Io<u64> {
        self.0.len(self.1)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Io<usize> {
        self.0.read_at(self.1, buffer, offset)
    }
}

impl<F: Fs + ?Sized> ImageSink for FileOf<'_, F> {
    fn write_at(&mut self, pieces: &[IoSlice<'_>], offset: u64) -> Io<usize> {
        self.0.write_at(self.1, pieces, offset)
    }

    fn sync_data(&mut self) -> Io<()> {
        self.0.sync_data(self.1)
    }
}

/// The real file system by raw system calls.
#[derive(Debug, Clone, Copy, Default)]
pub struct RawFs;

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> Io<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.map_err(Errno::from),
        }
    }
}

impl RawFs {
    fn open_with(&self, path: &Path, flags: OFlags) -> Io<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NOCTTY;
        retry(|| rustix::fs::openat(CWD, path, flags, Mode::RUSR | Mode::WUSR))
    }
}

impl Fs for RawFs {
    type File = OwnedFd;

    fn mkdir(&self, path: &Path) -> Io<()> {
        retry(|| rustix::fs::mkdirat(CWD, path, Mode::RWXU))
    }

    fn create_new(&self, path: &Path) -> Io<OwnedFd> {
        self.open_with(path, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)
    }

    fn open(&self, path: &Path) -> Io<OwnedFd> {
        self.open_with(path, OFlags::RDONLY)
    }

    fn open_or_create(&self, path: &Path) -> Io<(OwnedFd, bool)> {
        match self.create_new(path) {
            Ok(file) => Ok((file, true)),
            Err(Errno::EEXIST) => Ok((self.open_with(path, OFlags::RDWR)?, false)),
            Err(errno) => Err(errno),
        }
    }

    fn len(&self, file: &OwnedFd) -> Io<u64> {
        Ok(rustix::fs::fstat(file)?.st_size as u64)
    }

    fn read_at(&self, file: &OwnedFd, buffer: &mut [u8], offset: u64) -> Io<usize> {
        retry(|| rustix::io::pread(file, &mut *buffer, offset))
    }

    fn write_at(&self, file: &OwnedFd, pieces: &[IoSlice<'_>], offset: u64) -> Io<usize> {
        file.as_fd().write_at(pieces, offset)
    }

    fn truncate(&self, file: &OwnedFd, len: u64) -> Io<()> {
        retry(|| rustix::fs::ftruncate(file, len))
    }

    fn sync_data(&self, file: &OwnedFd) -> Io<()> {
        file.as_fd().sync_data()
    }

    fn start_writing(&self, file: &OwnedFd, offset: u64, len: u64) {
        // Not durability: a file system that cannot do it loses nothing.
        // SAFETY: no pointers.
        unsafe {
            ckpt_sys::syscall!(
                libc::SYS_sync_file_range,
                file.as_raw_fd(),
                offset,
                len,
                libc::SYNC_FILE_RANGE_WRITE
            );
        }
    }

    fn sync_dir(&self, path: &Path) -> Io<()> {
        let dir = self.open_with(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        match rustix::fs::fsync(&dir) {
            // Some network and FUSE file systems cannot sync directories at all.
            Err(rustix::io::Errno::INVAL) => Ok(()),
            other => Ok(other?),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> Io<()> {
        retry(|| rustix::fs::renameat(CWD, from, CWD, to))
    }

    fn unlink(&self, path: &Path) -> Io<()> {
        retry(|| rustix::fs::unlinkat(CWD, path, AtFlags::empty()))
    }

    fn rmdir(&self, path: &Path) -> Io<()> {
        retry(|| rustix::fs::unlinkat(CWD, path, AtFlags::REMOVEDIR))
    }

    fn list(&self, path: &Path) -> Io<Vec<Entry>> {
        let dir = self.open_with(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut entries = Vec::new();
        for entry in Dir::new(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let is_dir = match entry.file_type() {
                FileType::Unknown => {
                    let path = path.join(OsStr::from_bytes(name));
                    let stat = rustix::fs::statat(CWD, &path, AtFlags::SYMLINK_NOFOLLOW)?;
                    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
                }
                kind => kind == FileType::Directory,
            };
            entries.push(Entry {
                name: name.to_vec(),
                dir: is_dir,
            });
        }
        entries.sort();
        Ok(entries)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::path::PathBuf;

    /// A directory of its own, removed at the end.
    pub(crate) struct TempDir(pub PathBuf);

    impl TempDir {
        pub(crate) fn new(name: &str) -> TempDir {
            use std::sync::atomic::{AtomicU32, Ordering};
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            let unique = format!("ckpt-test-{}-{n}-{name}", std::process::id());
            let path = std::env::temp_dir().join(unique);
            RawFs.remove_tree(&path).unwrap();
            RawFs.mkdir(&path).unwrap();
            TempDir(path)
        }
    }

    impl Drop for TempDir {
        fn drop(&mut self) {
            let _ = RawFs.remove_tree(&self.0);
        }
    }

    #[test]
    fn the_real_one() {
        let dir = TempDir::new("fs");
        let file = RawFs.create_new(&dir.0.join("a")).unwrap();
        RawFs.write_all(&file, b"hello", 3).unwrap();
        assert_eq!(RawFs.read_all(&file, 100).unwrap(), b"\0\0\0hello");
        assert_eq!(RawFs.read_all(&file, 7), Err(Errno::EFBIG));
        assert_eq!(
            RawFs.create_new(&dir.0.join("a")).err(),
            Some(Errno::EEXIST)
        );
        assert!(!RawFs.open_or_create(&dir.0.join("a")).unwrap().1);
        RawFs.mkdir(&dir.0.join("d")).unwrap();
        assert!(RawFs.open_or_create(&dir.0.join("d/b")).unwrap().1);
        let names = RawFs.list(&dir.0).unwrap();
        let names: Vec<_> = names.iter().map(|e| (&e.name[..], e.dir)).collect();
        assert_eq!(names, [(&b"a"[..], false), (b"d", true)]);
        RawFs.sync_dir(&dir.0).unwrap();
        RawFs.remove_tree(&dir.0.join("d")).unwrap();
        RawFs.remove_tree(&dir.0.join("d")).unwrap();
    }
}
