//! What tells an inode from a later one that is given its number: the file handle, which
//! has a generation number beside the inode's.
//!
//! One system call for each inode that a record is about, and one for each file system. In
//! the program's threads under the recorder's lock, and in an undo; nothing here allocates.

use super::sys::{self, CPath, Fd, Sys};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::mem::MaybeUninit;

/// The kernel's MAX_HANDLE_SZ.
const HANDLE: usize = 128;

/// File systems whose handles are of the inode itself, so that they outlive its leaving
/// the cache. (FUSE and FAT number what is in use; overlayfs has none by default.)
const STABLE: [u32; 6] = [
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // XFS
    0x9123_683e, // btrfs
    0x0102_1994, // tmpfs
    0xf2f5_2010, // f2fs
    0xca45_1a4e, // bcachefs
];

/// `struct file_handle` with room for any.
#[repr(C)]
struct Handle {
    len: u32,
    kind: i32,
    bytes: [u8; HANDLE],
}

/// Which devices have handles that say something.
#[derive(Debug, Clone, Copy)]
pub struct Births {
    known: [(u64, bool); Births::DEVICES],
    count: usize,
}

impl Default for Births {
    fn default() -> Births {
        Births::new()
    }
}

impl Births {
    const DEVICES: usize = 8;

    pub const fn new() -> Births {
        Births {
            known: [(0, false); Births::DEVICES],
            count: 0,
        }
    }

    /// Of the inode at the path itself, on this device. 0: it cannot be told.
    pub fn of_path(&mut self, path: &CPath, dev: u64) -> u64 {
        let is_stable = || {
            // By a descriptor: a symbolic link is on its own file system.
            let fd = sys::open_high(path, libc::O_PATH, 0)?;
            is_stable(&fd)
        };
        if !self.has(dev, is_stable) {
            return 0;
        }
        birth(libc::AT_FDCWD, path.ptr(), 0)
    }

    /// Of an open file.
    pub fn of_fd(&mut self, fd: i32, dev: u64) -> u64 {
        let is_stable = || is_stable(&std::mem::ManuallyDrop::new(Fd(fd)));
        if !self.has(dev, is_stable) {
            return 0;
        }
        birth(fd, c"".as_ptr().cast(), libc::AT_EMPTY_PATH)
    }

    /// Is the device known to be one of this machine's own file systems?
    pub fn is_here(&self, dev: u64) -> bool {
        let mut known = self.known.iter().take(self.count);
        known.any(|known| *known == (dev, true))
    }

    fn has(&mut self, dev: u64, ask: impl FnOnce() -> Sys<bool>) -> bool {
        let known = self.known.iter().take(self.count);
        if let Some((_, stable)) = known.rev().find(|(known, _)| *known == dev) {
            return *stable;
        }
        let Ok(stable) = ask() else {
            return false;
        };
        let at = self.count % Births::DEVICES;
        if let Some(place) = self.known.get_mut(at) {
            *place = (dev, stable);
        }
        self.count = (self.count + 1).min(Births::DEVICES);
        stable
    }
}

fn is_stable(fd: &Fd) -> Sys<bool> {
    let mut about = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the kernel fills it.
    let about = unsafe {
        check(syscall!(libc::SYS_fstatfs, fd.0, about.as_mut_ptr()))?;
        about.assume_init()
    };
    Ok(STABLE.contains(&(about.f_type as u32)))
}

/// The handle in one number, which is not 0.
fn birth(dir: i32, path: *const u8, flags: i32) -> u64 {
    let mut handle = Handle {
        len: HANDLE as u32,
        kind: 0,
        bytes: [0; HANDLE],
    };
    let mut mount = 0i32;
    // SAFETY: the path ends with a NUL, the handle has as much room as it says.
    let done = check(unsafe {
        syscall!(
            libc::SYS_name_to_handle_at,
            dir,
            path,
            &raw mut handle,
            &raw mut mount,
            flags
        )
    });
    // A container may forbid the call: then numbers must do.
    if done.is_err() {
        return 0;
    }
    let bytes = handle.bytes.get(..handle.len as usize).unwrap_or_default();
    // FNV-1a, 64 bits.
    let mix = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    let start = 0xcbf2_9ce4_8422_2325 ^ handle.kind as u32 as u64;
    bytes.iter().fold(start, mix).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn each_inode_has_one_of_its_own() {
        let path = std::env::temp_dir().join(format!("ckpt-birth-{}", std::process::id()));
        let c_path = CPath::new(&[path.as_os_str().as_bytes()]).unwrap();
        let mut births = Births::new();
        let mut seen = Vec::new();
        for _ in 0..4 {
            let file = std::fs::File::create(&path).unwrap();
            let fd = file.as_raw_fd();
            let dev = sys::fstat(fd).unwrap().id.dev;
            let birth = births.of_path(&c_path, dev);
            if birth == 0 {
                println!("NOT RUN: no handles here");
                return;
            }
            assert_eq!(births.of_fd(fd, dev), birth);
            assert_eq!(births.of_path(&c_path, dev), birth);
            assert!(!seen.contains(&birth), "{seen:?} {birth}");
            seen.push(birth);
            std::fs::remove_file(&path).unwrap();
        }
        // A file system that numbers nothing itself.
        let proc_path = CPath::new(&[b"/proc/self/stat"]).unwrap();
        assert_eq!(births.of_path(&proc_path, 0), 0);
        assert_eq!(births.of_path(&c_path, 0), 0);
    }
}
