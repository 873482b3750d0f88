//! What is known of the program's files from the collection before, so that an untouched
//! one costs two system calls: its position and flags, and whether its path still leads to it.
//!
//! Kept by the helper between checkpoints. Nothing is believed: a descriptor is the file
//! of last time when the kernel says now that it has the same inode number on the same mount as
//! what the path leads to, on a file system where that names an inode (one with a device
//! of its own; what has none, such as overlays and subvolumes, is looked at anew each time).
//! The `fdinfo` files stay open: they name a number in the program's table, and hold no file.

use super::fdinfo::{FdInfo, number};
use super::sys::{self, Fd};
use std::collections::BTreeMap;

/// So many stay open at most, and never more than half of what the process may have.
const MOST: u64 = 4096;

/// See the module.
#[derive(Debug, Default)]
pub struct Known {
    /// The thread by which the program's table is read.
    tid: i32,
    files: BTreeMap<i32, File>,
    room: Option<usize>,
}

#[derive(Debug)]
struct File {
    info: Fd,
    path: Vec<u8>,
    dev: u64,
    ino: u64,
}

/// A descriptor that is still the same file.
pub(super) struct Same {
    pub info: FdInfo,
    pub path: Vec<u8>,
    pub stat: libc::stat,
    pub btime_ns: i64,
}

impl Known {
    /// To be called first: descriptors that are gone are forgotten, and all of them when
    /// the table is read by another thread.
    pub(super) fn begin(&mut self, tid: i32, present: impl Fn(i32) -> bool) {
        if self.tid != tid {
            self.files.clear();
            self.tid = tid;
        }
        self.files.retain(|&fd, _| present(fd));
    }

    /// Is `fd` what it was? `None`: look at it.
    pub(super) fn again(&self, fd: i32, text: &mut Vec<u8>) -> Option<Same> {
        let file = self.files.get(&fd)?;
        text.resize(text.capacity().max(4096), 0);
        let got = sys::pread(file.info.raw(), text, 0).ok()?;
        // Longer ones (many locks) are read whole by the other way.
        if got == 0 || got >= 1024 {
            return None;
        }
        text.truncate(got);
        let info = FdInfo::parse(text);
        let line = |name| info.value(name).map(|v| number(v, 10));
        let there = sys::statx(libc::AT_FDCWD, &sys::cstr(&file.path), 0).ok()?;
        let same = info.flags & libc::O_PATH as u32 == 0
            && (there.stat.st_dev, there.stat.st_ino) == (file.dev, file.ino)
            && line("ino") == Some(file.ino)
            && there.mount.is_some()
            && line("mnt_id") == there.mount;
        same.then(|| Same {
            info,
            path: file.path.clone(),
            stat: there.stat,
            btime_ns: there.btime_ns,
        })
    }

    /// Remembers a descriptor; `info` is its open `fdinfo` file.
    pub(super) fn note(&mut self, fd: i32, info: Fd, path: &[u8], stat: &libc::stat) {
        let room = *self.room.get_or_insert_with(|| {
            let limit = sys::open_files_limit().min(MOST * 2) / 2;
            usize::try_from(limit).unwrap_or(0)
        });
        let plain = stat.st_mode & libc::S_IFMT == libc::S_IFREG
            && libc::major(stat.st_dev) != 0
            && path.first() == Some(&b'/')
            && !path.ends_with(b" (deleted)");
        if !plain || self.files.len() >= room {
            self.files.remove(&fd);
            return;
        }
        let (path, dev, ino) = (path.to_vec(), stat.st_dev, stat.st_ino);
        let file = File {
            info,
            path,
            dev,
            ino,
        };
        self.files.insert(fd, file);
    }
}
