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

/// The identity of the file at `path`, `None` when it cannot be opened.
pub fn identify(path: &[u8]) -> Option<ObjectId> {
    let fd = OwnFd::open(path).ok()?;
    // SAFETY: all-zero is a valid stat buffer.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the struct (the layouts agree on x86_64).
    if unsafe { syscall!(libc::SYS_fstat, fd.raw(), &mut st) } != 0 {
        return None;
    }
    Some(ObjectId {
        path: path.to_vec(),
        build_id: build_id(&fd),
        size: st.st_size as u64,
        mtime_ns: st.st_mtime * 1_000_000_000 + st.st_mtime_nsec,
    })
}

/// The executable first, then every privately mapped file once.
pub fn collect(plan: &Plan) -> Vec<ObjectId> {
    let mut objects: Vec<ObjectId> = Vec::new();
    objects.extend(
        read_link(b"/proc/thread-self/exe")
            .ok()
            .and_then(|path| identify(&path)),
    );
    for piece in &plan.pieces {
        if let VmaKind::FilePrivate { path, .. } = &piece.vma.kind
            && !objects.iter().any(|o| &o.path == path)
        {
            objects.extend(identify(path));
        }
    }
    objects
}

/// Is `here` the same build as `then`?
pub fn same_build(then: &ObjectId, here: &ObjectId) -> bool {
    if !then.build_id.is_empty() || !here.build_id.is_empty() {
        return then.build_id == here.build_id;
    }
    then.size == here.size && then.mtime_ns == here.mtime_ns
}
