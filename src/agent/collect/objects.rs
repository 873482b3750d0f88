//! Builds of the executable and the libraries that the image refers to.
//!
//! Forked writer or helper; reads the files, not the mappings (whose headers the
//! program may have unmapped).

use crate::agent::collect::memory::Plan;
use crate::agent::procfs::{OwnFd, read_link};
use crate::image::state::{ObjectId, VmaKind};
use ckpt_sys::syscall;

fn pread(fd: &OwnFd, buf: &mut [u8], at: u64) -> usize {
    // SAFETY: a buffer of the length given.
    let n = unsafe { syscall!(libc::SYS_pread64, fd.raw(), buf.as_mut_ptr(), buf.len(), at) };
    n.max(0) as usize
}

fn word<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0u8; 8];
    if let Some(part) = bytes.get(at..at + N) {
        value[..N].copy_from_slice(part);
    }
    u64::from_le_bytes(value)
}

/// NT_GNU_BUILD_ID of an ELF file, empty when there is none.
fn build_id(fd: &OwnFd) -> Vec<u8> {
    let mut head = [0u8; 4096];
    let n = pread(fd, &mut head, 0);
    if n < 64 || &head[..5] != b"\x7fELF\x02" {
        return Vec::new();
    }
    let (phoff, phnum) = (word::<8>(&head, 32) as usize, word::<2>(&head, 56) as usize);
    for k in 0..phnum {
        let ph = phoff + k * 56;
        if ph + 56 > n {
            break;
        }
        const PT_NOTE: u64 = 4;
        if word::<4>(&head, ph) != PT_NOTE {
            continue;
        }
        let (at, len) = (
            word::<8>(&head, ph + 8),
            word::<8>(&head, ph + 32).min(4096) as usize,
        );
        let mut notes = vec![0u8; len];
        let got = pread(fd, &mut notes, at);
        notes.truncate(got);
        let mut p = 0;
        while p + 12 <= notes.len() {
            let (namesz, descsz) = (
                word::<4>(&notes, p) as usize,
                word::<4>(&notes, p + 4) as usize,
            );
            let desc = p + 12 + namesz.next_multiple_of(4);
            if word::<4>(&notes, p + 8) == 3 && notes.get(p + 12..p + 16) == Some(b"GNU\0") {
                return notes.get(desc..desc + descsz).unwrap_or(&[]).to_vec();
            }
            p = desc + descsz.next_multiple_of(4);
        }
    }
    Vec::new()
}

/// As `ObjectId::mtime_ns`: the file has been changed since, and what it was is not known. (Where
/// the program has done that, a recovery makes it what it was.)
const UNKNOWN: i64 = i64::MIN;

/// The clock by which files are stamped stands still for so long.
const TICK_NS: i64 = 20_000_000;

/// The identity of the file at `path`, `None` when it cannot be opened.
pub fn identify(path: &[u8]) -> Option<ObjectId> {
    look(path).map(|(object, _)| object)
}

/// Also when it was last changed in any way, which nobody can set.
fn look(path: &[u8]) -> Option<(ObjectId, i64)> {
    let fd = OwnFd::open(path).ok()?;
    // SAFETY: all-zero is a valid stat buffer.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the struct (the layouts agree on x86_64).
    if unsafe { syscall!(libc::SYS_fstat, fd.raw(), &mut st) } != 0 {
        return None;
    }
    let object = ObjectId {
        path: path.to_vec(),
        build_id: build_id(&fd),
        size: st.st_size as u64,
        mtime_ns: st.st_mtime * 1_000_000_000 + st.st_mtime_nsec,
    };
    Some((object, st.st_ctime * 1_000_000_000 + st.st_ctime_nsec))
}

/// The identity that the file had at `then`.
fn identify_as_of(path: &[u8], then: i64) -> Option<ObjectId> {
    let (mut object, changed) = look(path)?;
    if changed >= then - TICK_NS {
        object.build_id.clear();
        object.mtime_ns = UNKNOWN;
    }
    Some(object)
}

/// The executable first, then every privately mapped file once, as they were at the stop
/// (CLOCK_REALTIME). The program runs already.
pub fn collect(plan: &Plan, stopped_ns: u64) -> Vec<ObjectId> {
    let then = stopped_ns as i64;
    let mut objects: Vec<ObjectId> = Vec::new();
    objects.extend(
        read_link(b"/proc/thread-self/exe")
            .ok()
            .and_then(|path| identify_as_of(&path, then)),
    );
    for piece in &plan.pieces {
        if let VmaKind::FilePrivate { path, .. } = &piece.vma.kind
            && !objects.iter().any(|o| &o.path == path)
        {
            objects.extend(identify_as_of(path, then).map(|object| ObjectId {
                // The tables keep what such a file holds, and its times are the kernel's to set.
                mtime_ns: match is_written(plan, path) {
                    true => UNKNOWN,
                    false => object.mtime_ns,
                },
                ..object
            }));
        }
    }
    objects
}

/// Has the program the file mapped to be written to, too?
fn is_written(plan: &Plan, file: &[u8]) -> bool {
    plan.pieces.iter().any(|piece| {
        let kind = &piece.vma.kind;
        matches!(kind, VmaKind::FileShared { path, writable: true, .. } if path == file)
    })
}

/// Is `here` the same build as `then`?
pub fn same_build(then: &ObjectId, here: &ObjectId) -> bool {
    if then.mtime_ns == UNKNOWN {
        return true;
    }
    if !then.build_id.is_empty() || !here.build_id.is_empty() {
        return then.build_id == here.build_id;
    }
    then.size == here.size && then.mtime_ns == here.mtime_ns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::collect::identity::realtime_ns;
    use std::os::unix::ffi::OsStrExt;

    /// A file that the program maps and had written since the stop counted as another build: no
    /// restart, though the recovery makes it what it was.
    #[test]
    fn what_was_changed_since_is_not_known() {
        let path = std::env::temp_dir().join(format!("ckpt-objects-{}", std::process::id()));
        std::fs::write(&path, b"one").unwrap();
        let name = path.as_os_str().as_bytes();
        std::thread::sleep(std::time::Duration::from_millis(50));
        let then = realtime_ns() as i64;
        let before = identify_as_of(name, then).unwrap();
        assert_eq!(Some(&before), identify(name).as_ref());
        std::thread::sleep(std::time::Duration::from_millis(50));
        std::fs::write(&path, b"two").unwrap();
        let after = identify_as_of(name, then).unwrap();
        let now = identify(name).unwrap();
        assert!(!same_build(&before, &now) && same_build(&after, &before));
        std::fs::remove_file(&path).unwrap();
    }
}
