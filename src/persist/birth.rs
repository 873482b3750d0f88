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
/// the cache. (FUSE and FAT number what is in use.)
const STABLE: [u32; 6] = [
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // XFS
    0x9123_683e, // btrfs
    0x0102_1994, // tmpfs
    0xf2f5_2010, // f2fs
    0xca45_1a4e, // bcachefs
];

/// overlayfs: handles are of the inode below, and only to compare with (Linux 6.6).
const OVERLAY: u32 = 0x794c_7630;
const AT_HANDLE_FID: i32 = 0x200;

/// How much the handles of a file system say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Handles {
    Unstable,
    Stable,
    Overlay,
}

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
    known: [(u64, Handles); Births::DEVICES],
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
            known: [(0, Handles::Unstable); Births::DEVICES],
            count: 0,
        }
    }

    /// Of the inode at the path itself, on this device. 0: it cannot be told.
    pub fn of_path(&mut self, path: &CPath, dev: u64) -> u64 {
        let ask = || {
            // By a descriptor: a symbolic link is on its own file system.
            let fd = sys::open_high(path, libc::O_PATH, 0)?;
            handles_of(&fd)
        };
        birth(libc::AT_FDCWD, path.ptr(), 0, self.handles(dev, ask))
    }

    /// Of an open file.
    pub fn of_fd(&mut self, fd: i32, dev: u64) -> u64 {
        let ask = || handles_of(&std::mem::ManuallyDrop::new(Fd(fd)));
        let handles = self.handles(dev, ask);
        birth(fd, c"".as_ptr().cast(), libc::AT_EMPTY_PATH, handles)
    }

    /// Is the device known to be one of this machine's own file systems?
    pub fn is_here(&self, dev: u64) -> bool {
        let mut known = self.known.iter().take(self.count);
        known.any(|known| *known == (dev, Handles::Stable))
    }

    fn handles(&mut self, dev: u64, ask: impl FnOnce() -> Sys<Handles>) -> Handles {
        let known = self.known.iter().take(self.count);
        if let Some((_, handles)) = known.rev().find(|(known, _)| *known == dev) {
            return *handles;
        }
        let Ok(handles) = ask() else {
            return Handles::Unstable;
        };
        let at = self.count % Births::DEVICES;
        if let Some(place) = self.known.get_mut(at) {
            *place = (dev, handles);
        }
        self.count = (self.count + 1).min(Births::DEVICES);
        handles
    }
}

fn handles_of(fd: &Fd) -> Sys<Handles> {
    let mut about = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the kernel fills it.
    let about = unsafe {
        check(syscall!(libc::SYS_fstatfs, fd.0, about.as_mut_ptr()))?;
        about.assume_init()
    };
    Ok(match about.f_type as u32 {
        OVERLAY => Handles::Overlay,
        kind if STABLE.contains(&kind) => Handles::Stable,
        _ => Handles::Unstable,
    })
}

/// The handle in one number, which is not 0.
fn birth(dir: i32, path: *const u8, flags: i32, handles: Handles) -> u64 {
    let flags = match handles {
        Handles::Unstable => return 0,
        Handles::Stable => flags,
        Handles::Overlay => flags | AT_HANDLE_FID,
    };
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
    if handles == Handles::Overlay && !is_of_upper(handle.kind, bytes) {
        return 0;
    }
    // FNV-1a, 64 bits.
    let mix = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    let start = 0xcbf2_9ce4_8422_2325 ^ handle.kind as u32 as u64;
    bytes.iter().fold(start, mix).max(1)
}

/// Is this handle of overlayfs that of a file in the upper directory, on a file system whose
/// handles are stable? What is below stays where it is, so that its number is enough, and its handle
/// may become another one when the file is copied up. (`struct ovl_fh`: three bytes of
/// padding, version 0, magic, length, flags, the other file system's type of handle, its UUID,
/// its handle.)
fn is_of_upper(kind: i32, bytes: &[u8]) -> bool {
    const OVL_FILEID_V1: i32 = 0xf8;
    const MAGIC: u8 = 0xfb;
    const PATH_UPPER: u8 = 1 << 2;
    let [_, _, _, 0, MAGIC, _, flags, inner, handle @ ..] = bytes else {
        return false;
    };
    let word = |at: usize| {
        let bytes = handle.get(16 + at..)?.first_chunk::<4>()?;
        Some(u32::from_le_bytes(*bytes))
    };
    let stable = match inner {
        // ext4, tmpfs, XFS of old, btrfs
        1 | 2 | 0x4d..=0x4f => true,
        // XFS has the lower half of the number first, and its upper half is small. FUSE has the upper
        // half first: that is 0 for small numbers, and behind it is much of an address.
        0x81 | 0x82 => {
            word(0).is_some_and(|low| low != 0) && word(4).is_some_and(|high| high < 1 << 16)
        }
        _ => false,
    };
    kind == OVL_FILEID_V1 && flags & PATH_UPPER != 0 && stable
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::ffi::OsStrExt;

    /// As the kernel gave them (6.18): a file of the lower directory, which keeps its handle when it
    /// is copied up, and one of the upper directory, on ext4; then others by their layout.
    #[test]
    fn overlays_files() {
        let head = [0, 0, 0, 0, 0xfb, 0x1d];
        let handle = |flags: u8, inner: u8, low: u32, high: u32| {
            let mut bytes = head.to_vec();
            bytes.extend([flags, inner]);
            bytes.extend([0; 16]);
            bytes.extend(low.to_le_bytes());
            bytes.extend(high.to_le_bytes());
            bytes
        };
        let upper = handle(4, 1, 0x009a_2119, 0xfb72_5550);
        assert!(is_of_upper(0xf8, &upper));
        assert!(!is_of_upper(0xf9, &upper));
        assert!(!is_of_upper(0xf8, &handle(0, 1, 0x009a_27f1, 0x3d74_60fb)));
        assert!(!is_of_upper(0xf8, &upper[..7]));
        assert!(!is_of_upper(0xf8, &upper[1..]));
        let xfs = handle(4, 0x81, 133, 1);
        assert!(is_of_upper(0xf8, &xfs));
        assert!(!is_of_upper(0xf8, &xfs[..27]));
        // FUSE: a small number, and an address.
        assert!(!is_of_upper(0xf8, &handle(4, 0x81, 0, 5)));
        assert!(!is_of_upper(0xf8, &handle(4, 0x81, 0x7f12, 0x3456_7890)));
    }

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
