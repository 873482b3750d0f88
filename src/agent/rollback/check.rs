//! Protected regions (FIG. 8, steps "protected variables valid?"): where they may lie, and
//! their bytes. Helper thread; nothing of the program is changed here.

use super::call::Region;
use crate::agent::{own_memory, place};
use crate::image::PAGE;
use crate::image::state::{FileKind, Manifest, ThreadState, VmaKind, VmaState};
use ckpt_sys::syscall;

/// The regions with the bytes that they are to have after the rollback.
#[derive(Debug, Default)]
pub struct Protected {
    regions: Vec<Region>,
    bytes: Bytes,
}

impl Protected {
    /// Where, and what.
    pub fn parts(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let mut rest = &self.bytes[..];
        self.regions.iter().map(move |region| {
            let (part, behind) = rest.split_at(region.len as usize);
            rest = behind;
            (region.addr, part)
        })
    }
}

/// More than this is not for the helper's heap.
const LARGE: usize = 1 << 20;

/// Bytes, zero at first.
#[derive(Debug)]
enum Bytes {
    Heap(Vec<u8>),
    /// A mapping. A shared one: nothing that the leader finds in its map and takes for memory
    /// of the checkpoint that stays.
    Mapped {
        at: u64,
        len: usize,
    },
}

impl Default for Bytes {
    fn default() -> Bytes {
        Bytes::Heap(Vec::new())
    }
}

impl Bytes {
    fn new(len: usize) -> Result<Bytes, i32> {
        if len <= LARGE {
            return Ok(Bytes::Heap(vec![0; len]));
        }
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let at = place::lasting(len as u64, prot, flags)?;
        Ok(Bytes::Mapped { at, len })
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Heap(bytes) => bytes,
            // SAFETY: a mapping of our own.
            Bytes::Mapped { at, len } => unsafe {
                std::slice::from_raw_parts(*at as *const u8, *len)
            },
        }
    }
}

impl std::ops::DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Bytes::Heap(bytes) => bytes,
            // SAFETY: as above.
            Bytes::Mapped { at, len } => unsafe {
                std::slice::from_raw_parts_mut(*at as *mut u8, *len)
            },
        }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if let Bytes::Mapped { at, len } = *self {
            // SAFETY: a mapping of our own that nobody refers to any more.
            unsafe { syscall!(libc::SYS_munmap, at, len) };
        }
    }
}

/// The caller's array; regions without length are left out.
pub fn read_regions(addr: u64, count: u64) -> Result<Vec<Region>, i32> {
    let mut bytes = vec![0u8; count as usize * size_of::<Region>()];
    own_memory::read(addr, &mut bytes)?;
    let word = |at: usize| {
        let mut word = [0u8; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_ne_bytes(word)
    };
    let regions = (0..count as usize).map(|k| Region {
        addr: word(k * 16),
        len: word(k * 16 + 8),
    });
    let regions: Vec<Region> = regions.filter(|r| r.len > 0).collect();
    match regions.iter().all(|r| r.addr.checked_add(r.len).is_some()) {
        true => Ok(regions),
        false => Err(libc::EFAULT),
    }
}

/// May each region be kept? All of it existed at the checkpoint and was writable, and where
/// it is on a stack its frame was alive. `stacks` are those of the checkpoint.
pub fn allowed(manifest: &Manifest, stacks: &[Stack], regions: &[Region]) -> Result<(), i32> {
    let vmas = &manifest.memory.vmas;
    for region in regions {
        let end = region.addr + region.len;
        let mut at = region.addr;
        while at < end {
            let vma = covering(vmas, at).ok_or(libc::EFAULT)?;
            if vma.prot & libc::PROT_WRITE as u32 == 0 {
                return Err(libc::EFAULT);
            }
            let last = end.min(vma.end);
            if contents_end(manifest, vma).is_some_and(|contents| last > contents) {
                return Err(libc::EFAULT);
            }
            at = vma.end;
        }
        let dead = |stack: &Stack| region.addr < stack.sp && end > stack.low;
        if stacks.iter().any(dead) {
            return Err(libc::EFAULT);
        }
    }
    Ok(())
}

/// Where an area ends that may be longer than what it maps, as that was at the checkpoint: behind
/// its last page there is nothing to write to. `None`: not known.
fn contents_end(manifest: &Manifest, vma: &VmaState) -> Option<u64> {
    let (size, offset) = match &vma.kind {
        VmaKind::Shared { object, offset } => {
            let object = manifest.memory.shared.get(*object as usize)?;
            (object.size, *offset)
        }
        VmaKind::FileShared { path, offset, .. } => {
            let mut files = manifest.descriptors.files.iter();
            let size = files.find_map(|file| match &file.kind {
                FileKind::Regular { path: at, size, .. } if at == path => Some(*size),
                _ => None,
            })?;
            (size, *offset)
        }
        _ => return None,
    };
    let there = size.next_multiple_of(PAGE).saturating_sub(offset);
    Some(vma.start + there.min(vma.end - vma.start))
}

fn covering(vmas: &[VmaState], addr: u64) -> Option<&VmaState> {
    let at = vmas.partition_point(|vma| vma.end <= addr);
    vmas.get(at).filter(|vma| vma.start <= addr)
}

/// A thread's stack as of the checkpoint: what lies from `low` up to `sp` was not in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stack {
    pub low: u64,
    pub sp: u64,
}

/// More than the frames of ours take that lie below the program's in a stopped thread: the
/// kernel's with all vector state, the handler's and the resuming function's first ones.
const FRAMES: u64 = 64 << 10;

/// The stacks of the checkpoint that are known for stacks: the first thread's, and those
/// that hold their thread's control block, as the C library makes them. Of any other, one that
/// a program has made for a coroutine, what is known to be dead is where our own frames are:
/// the thread is resumed from them. `sp_of` says where the program's part of a thread's stack
/// ended.
pub fn stacks(
    manifest: &Manifest,
    mut sp_of: impl FnMut(&ThreadState) -> Result<u64, i32>,
) -> Result<Vec<Stack>, i32> {
    let mut stacks = Vec::new();
    for thread in &manifest.threads {
        let sp = sp_of(thread)?;
        let Some(vma) = covering(&manifest.memory.vmas, sp) else {
            continue;
        };
        // The first thread's control block may lie in one area with anything.
        let first = thread.tid == manifest.process.pid;
        let own = !first && sp < thread.fs_base && thread.fs_base < vma.end;
        let below = thread.resume_stack;
        if vma.kind == VmaKind::Stack || (own && vma.kind != VmaKind::Heap) {
            stacks.push(Stack { low: vma.start, sp });
        } else if vma.start <= below && below < sp && sp - below <= FRAMES {
            stacks.push(Stack { low: below, sp });
        }
    }
    Ok(stacks)
}

/// The bytes of all regions as they are now.
pub fn copy(regions: &[Region]) -> Result<Protected, i32> {
    let mut total = 0u64;
    for region in regions {
        total = total.checked_add(region.len).ok_or(libc::ENOMEM)?;
    }
    let mut bytes = Bytes::new(usize::try_from(total).map_err(|_| libc::ENOMEM)?)?;
    let mut rest = &mut bytes[..];
    for some in regions.chunks(own_memory::PARTS) {
        let wanted: u64 = some.iter().map(|part| part.len).sum();
        let (here, behind) = rest.split_at_mut(wanted as usize);
        rest = behind;
        let parts: Vec<[u64; 2]> = some.iter().map(|part| [part.addr, part.len]).collect();
        own_memory::gather(&parts, here)?;
    }
    let regions = regions.to_vec();
    Ok(Protected { regions, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::state::{OpenFileState, SharedObject};

    fn vma(start: u64, end: u64, prot: i32, kind: VmaKind) -> VmaState {
        VmaState {
            start,
            end,
            prot: prot as u32,
            kind,
            flags: 0,
        }
    }

    fn manifest() -> Manifest {
        let mut manifest = Manifest::default();
        let both = libc::PROT_READ | libc::PROT_WRITE;
        manifest.memory.vmas = vec![
            vma(0x1000, 0x3000, both, VmaKind::Anon),
            vma(0x3000, 0x4000, both, VmaKind::Heap),
            vma(0x4000, 0x5000, libc::PROT_READ, VmaKind::Anon),
            vma(0x8000, 0xa000, both, VmaKind::Anon),
            vma(0xc000, 0xf000, both, VmaKind::Stack),
        ];
        manifest.process.pid = 7;
        let thread = |tid, fs_base, ucontext| ThreadState {
            tid,
            fs_base,
            ucontext,
            resume_stack: ucontext - 0x100,
            ..Default::default()
        };
        manifest.threads = vec![
            thread(7, 0x1800, 0xd000),
            thread(8, 0x9f00, 0x9000),
            // On a stack of its own making, somewhere in its heap.
            thread(9, 0x1900, 0x2800),
        ];
        manifest
    }

    #[test]
    fn regions_are_judged_by_the_memory_of_the_checkpoint() {
        let manifest = manifest();
        let stacks = stacks(&manifest, |thread| Ok(thread.ucontext + 0x100)).unwrap();
        assert_eq!(stacks.len(), 3);
        let one = |addr: u64, len: u64| allowed(&manifest, &stacks, &[Region { addr, len }]);
        assert_eq!(one(0x1000, 0x1700), Ok(()));
        assert_eq!(one(0x2900, 0x700), Ok(()), "a coroutine's living frames");
        assert_eq!(one(0x28f8, 8), Err(libc::EFAULT), "frames of ours below");
        assert_eq!(one(0x2600, 0x180), Err(libc::EFAULT));
        assert_eq!(one(0x26f8, 8), Ok(()), "not known to be dead");
        assert_eq!(one(0x2ff0, 0x20), Ok(()), "over the border of two areas");
        assert_eq!(one(0x3ff0, 0x20), Err(libc::EFAULT), "not writable");
        assert_eq!(one(0x5000, 1), Err(libc::EFAULT), "did not exist");
        assert_eq!(one(0x9ff0, 0x20), Err(libc::EFAULT), "runs out of it");
        assert_eq!(one(0xd100, 8), Ok(()), "a frame that was alive");
        assert_eq!(one(0xd0f8, 8), Err(libc::EFAULT), "below the stack pointer");
        assert_eq!(one(0x9f00, 8), Ok(()), "thread-local memory");
        assert_eq!(one(0x9000, 8), Err(libc::EFAULT));
        let both = [(0x1000, 8), (0x9000, 8)].map(|(addr, len)| Region { addr, len });
        assert_eq!(allowed(&manifest, &stacks, &both), Err(libc::EFAULT));
        let mut coroutine = manifest.clone();
        coroutine.threads[0].ucontext = 0x8800;
        coroutine.threads[0].fs_base = 0x9800;
        coroutine.threads.truncate(1);
        let known = super::stacks(&coroutine, |thread| Ok(thread.ucontext)).unwrap();
        assert_eq!(
            known,
            [],
            "data that has become one area with the control block"
        );
    }

    /// A region in a shared file that had grown since was written where the file ended again.
    #[test]
    fn nothing_lies_behind_the_end_of_a_shared_file() {
        let mut manifest = manifest();
        let both = libc::PROT_READ | libc::PROT_WRITE;
        let file = |offset| VmaKind::FileShared {
            path: b"/f".into(),
            offset,
            writable: true,
        };
        let object = VmaKind::Shared {
            object: 0,
            offset: 0,
        };
        manifest.memory.vmas.extend([
            vma(0x10000, 0x14000, both, file(0x1000)),
            vma(0x20000, 0x24000, both, object),
        ]);
        manifest.memory.shared.push(SharedObject {
            size: 0x1000,
            ..Default::default()
        });
        let one = |manifest: &Manifest, addr| allowed(manifest, &[], &[Region { addr, len: 8 }]);
        assert_eq!(one(&manifest, 0x13000), Ok(()), "not known");
        manifest.descriptors.files.push(OpenFileState {
            flags: 0,
            pos: 0,
            owner: (0, 0),
            owner_sig: 0,
            kind: FileKind::Regular {
                path: b"/f".into(),
                dev: 1,
                ino: 1,
                btime_ns: 0,
                size: 0x1003,
                mode: 0,
            },
        });
        assert_eq!(one(&manifest, 0x10ff8), Ok(()), "in its last page");
        assert_eq!(one(&manifest, 0x10ffc), Err(libc::EFAULT));
        assert_eq!(one(&manifest, 0x11000), Err(libc::EFAULT));
        assert_eq!(one(&manifest, 0x20ff8), Ok(()));
        assert_eq!(one(&manifest, 0x21000), Err(libc::EFAULT));
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        let here = [1u64, 8, 2, 0];
        let at = here.as_ptr() as u64;
        let regions = read_regions(at, 2).unwrap();
        assert_eq!(regions, [Region { addr: 1, len: 8 }]);
        assert_eq!(read_regions(8, 1), Err(libc::EFAULT));
        let whole = Region { addr: at, len: 32 };
        let some: Vec<Region> = vec![whole; 3000];
        let copies = copy(&some).unwrap();
        assert_eq!(copies.parts().count(), 3000);
        let (addr, bytes) = copies.parts().last().unwrap();
        assert_eq!((addr, &bytes[8..16]), (at, &8u64.to_ne_bytes()[..]));
        let bad = copy(&[whole, Region { addr: 64, len: 1 }]);
        assert_eq!(bad.unwrap_err(), libc::EFAULT);
        let large = vec![7u8; LARGE];
        let large = Region {
            addr: large.as_ptr() as u64,
            len: large.len() as u64,
        };
        let copies = copy(&[whole, large, whole]).unwrap();
        assert!(matches!(copies.bytes, Bytes::Mapped { .. }));
        let parts: Vec<(u64, &[u8])> = copies.parts().collect();
        assert_eq!(parts.len(), 3);
        assert_eq!(parts[0], parts[2]);
        assert!(parts[1].1.len() == LARGE && parts[1].1.iter().all(|&b| b == 7));
    }
}
