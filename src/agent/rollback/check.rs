//! Protected regions (FIG. 8, steps "protected variables valid?"): where they may lie, and
//! their bytes. Helper thread; nothing of the program is changed here.

use super::call::Region;
use crate::image::state::{Manifest, VmaKind, VmaState};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;

/// The kernel takes so many parts at once (UIO_MAXIOV).
const PARTS: usize = 1024;

/// A region with the bytes that it is to have after the rollback.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Protected {
    pub addr: u64,
    pub bytes: Vec<u8>,
}

/// Reads memory of the program, which may not be there: `EFAULT` then.
pub fn read_memory(addr: u64, into: &mut [u8]) -> Result<(), i32> {
    // SAFETY: no arguments.
    let pid = unsafe { syscall!(libc::SYS_getpid) };
    let mut done = 0;
    while done < into.len() {
        let local = [into[done..].as_mut_ptr() as u64, (into.len() - done) as u64];
        let remote = [addr + done as u64, (into.len() - done) as u64];
        // SAFETY: the kernel writes into `into` and checks the other side itself.
        let n = check(unsafe {
            syscall!(
                libc::SYS_process_vm_readv,
                pid,
                local.as_ptr(),
                1,
                remote.as_ptr(),
                1,
                0
            )
        })?;
        if n == 0 {
            return Err(libc::EFAULT);
        }
        done += n;
    }
    Ok(())
}

/// The caller's array; regions without length are left out.
pub fn read_regions(addr: u64, count: u64) -> Result<Vec<Region>, i32> {
    let mut bytes = vec![0u8; count as usize * size_of::<Region>()];
    read_memory(addr, &mut bytes)?;
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
            at = vma.end;
        }
        let dead = |stack: &Stack| region.addr < stack.sp && end > stack.low;
        if stacks.iter().any(dead) {
            return Err(libc::EFAULT);
        }
    }
    Ok(())
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

/// The stacks of the checkpoint that are known for stacks: the first thread's, and those
/// that hold their thread's control block, as the C library makes them. `sp_of` reads a
/// stack pointer from the saved frame at an address.
pub fn stacks(
    manifest: &Manifest,
    mut sp_of: impl FnMut(u64) -> Result<u64, i32>,
) -> Result<Vec<Stack>, i32> {
    let mut stacks = Vec::new();
    for thread in &manifest.threads {
        let sp = sp_of(thread.ucontext)?;
        let Some(vma) = covering(&manifest.memory.vmas, sp) else {
            continue;
        };
        let own = sp < thread.fs_base && thread.fs_base < vma.end;
        if vma.kind == VmaKind::Stack || (own && vma.kind != VmaKind::Heap) {
            stacks.push(Stack { low: vma.start, sp });
        }
    }
    Ok(stacks)
}

/// The bytes of all regions as they are now.
pub fn copy(regions: &[Region]) -> Result<Vec<Protected>, i32> {
    let mut copies = Vec::with_capacity(regions.len());
    for region in regions {
        let mut bytes = Vec::new();
        let room = bytes.try_reserve_exact(region.len as usize);
        room.map_err(|_| libc::ENOMEM)?;
        bytes.resize(region.len as usize, 0);
        copies.push(Protected {
            addr: region.addr,
            bytes,
        });
    }
    // Many small ones by few calls.
    // SAFETY: no arguments.
    let pid = unsafe { syscall!(libc::SYS_getpid) };
    for some in copies.chunks_mut(PARTS) {
        let parts = some.iter_mut();
        let local: Vec<[u64; 2]> = parts
            .map(|p| [p.bytes.as_mut_ptr() as u64, p.bytes.len() as u64])
            .collect();
        let remote: Vec<[u64; 2]> = some
            .iter()
            .map(|p| [p.addr, p.bytes.len() as u64])
            .collect();
        let wanted: u64 = remote.iter().map(|part| part[1]).sum();
        // SAFETY: the kernel writes into the copies and checks the other side itself.
        let got = check(unsafe {
            syscall!(
                libc::SYS_process_vm_readv,
                pid,
                local.as_ptr(),
                local.len(),
                remote.as_ptr(),
                remote.len(),
                0
            )
        })?;
        if got as u64 == wanted {
            continue;
        }
        // A call moves 2 GiB at most.
        for part in some {
            read_memory(part.addr, &mut part.bytes)?;
        }
    }
    Ok(copies)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::state::ThreadState;

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
        manifest.threads = vec![
            ThreadState {
                fs_base: 0x1800,
                ucontext: 0xd000,
                ..Default::default()
            },
            ThreadState {
                fs_base: 0x9f00,
                ucontext: 0x9000,
                ..Default::default()
            },
            // On a stack of its own making, somewhere in its heap.
            ThreadState {
                fs_base: 0x1900,
                ucontext: 0x2800,
                ..Default::default()
            },
        ];
        manifest
    }

    #[test]
    fn regions_are_judged_by_the_memory_of_the_checkpoint() {
        let manifest = manifest();
        let stacks = stacks(&manifest, |uc| Ok(uc + 0x100)).unwrap();
        assert_eq!(stacks.len(), 2);
        let one = |addr: u64, len: u64| allowed(&manifest, &stacks, &[Region { addr, len }]);
        assert_eq!(one(0x1000, 0x2000), Ok(()));
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
        assert_eq!(copies.len(), 3000);
        assert_eq!(copies[2999].bytes[8..16], 8u64.to_ne_bytes());
        assert_eq!(
            copy(&[whole, Region { addr: 64, len: 1 }]),
            Err(libc::EFAULT)
        );
    }
}
