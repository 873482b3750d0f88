//! The helper region: one mapping that holds all memory of the helper thread
//! (header, thread control block, stack, heap). It is never in an image; after a
//! restore a new one lies in the restorer's area.

use crate::agent::ballast;
use crate::agent::headroom;
use crate::agent::heap::{HELPER_HEAP, Heap};
use crate::agent::reserve::{self, Bounds};
use crate::agent::snapshot::copy;
use crate::agent::{side, track};
use crate::persist::table;
use ckpt_sys::raw::check;
use ckpt_sys::{syscall, tls::thread_block};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const PAGE: u64 = 4096;
const STACK: u64 = 1 << 20;
const TCB: u64 = 4096;
/// Reserved, not used: the memory is only touched as far as it is needed.
const PREFERRED_LEN: u64 = 1 << 30;
pub const MINIMUM_LEN: u64 = 16 << 20;
/// Closed memory below it ([`reserve::exempt`]).
pub const GUARD: u64 = PAGE;
/// Of the heap, open from the beginning.
const FIRST_HEAP: u64 = 1 << 20;

/// The start of the region.
#[repr(C)]
pub struct Region {
    pub bounds: Bounds,
    /// Futex: 1 once the helper has taken over.
    pub started: AtomicU32,
    pub tid: AtomicU32,
    pub tls: u64,
    pub stack_top: u64,
    /// Descriptors that the helper keeps when it is born; -1 = none.
    pub keep_fds: [i32; 4],
    pub heap: Heap,
}

/// The present region's address; 0 = none.
pub static REGION: AtomicU64 = AtomicU64::new(0);

/// The restorer's area below the region, as long as it is mapped.
static SCRATCH: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

/// Makes a range one of ours; (0, 0) when it is gone.
pub fn publish_scratch(start: u64, end: u64) {
    SCRATCH[0].store(start, Ordering::Relaxed);
    SCRATCH[1].store(end, Ordering::Relaxed);
}

/// The ranges of memory that do not belong to the image, ascending.
pub fn own_ranges() -> impl Iterator<Item = (u64, u64)> {
    let base = REGION.load(Ordering::Relaxed);
    let len = if base == 0 {
        0
    } else {
        // SAFETY: a published region stays mapped as long as it is published.
        unsafe { (*(base as *const Region)).bounds.total() }
    };
    let mut ranges = [(0, 0); 7 + table::OWN_RANGES];
    ranges[0] = (base.saturating_sub(GUARD), base + len);
    ranges[1] = side::range();
    ranges[2] = copy::range();
    ranges[3] = track::table::own_range();
    ranges[4] = track::store::own_range();
    ranges[5] = ballast::range();
    let [start, end] = [0, 1].map(|k| SCRATCH[k].load(Ordering::Relaxed));
    ranges[6] = (start, end);
    ranges[7..].copy_from_slice(&table::own_ranges());
    ranges.sort_unstable();
    ranges.into_iter().filter(|(start, end)| start < end)
}

/// The descriptor that the helper was born with (the job's lock), if any. Taken once.
pub fn kept_fd() -> Option<i32> {
    let base = REGION.load(Ordering::Relaxed) as *mut Region;
    // SAFETY: the helper's own region, published before it runs.
    let fd = unsafe { std::mem::replace(&mut (*base).keep_fds[0], -1) };
    (fd >= 0).then_some(fd)
}

/// The length to begin with, a power of two: the program would miss what is reserved of a
/// limited address space, so a small part of it has to do.
pub fn preferred_len() -> u64 {
    len_within(headroom::address_space())
}

/// The same under a limit of `space` bytes.
pub fn len_within(space: u64) -> u64 {
    let share = (space / 16).clamp(MINIMUM_LEN, PREFERRED_LEN);
    1 << share.ilog2()
}

/// Reserves a region of its own with a hole at either end, and says where and how long it is. A
/// size that RLIMIT_AS does not allow is halved until it fits.
pub fn map() -> Result<(u64, u64), i32> {
    let mut len = preferred_len();
    loop {
        match reserve::map(len + 3 * PAGE) {
            Ok(addr) => {
                let base = addr + PAGE + GUARD;
                // SAFETY: the range was just mapped. The outer pages go back to the kernel: a
                // hole separates the region from its neighbours for good.
                unsafe {
                    reserve::exempt(base, len);
                    syscall!(libc::SYS_munmap, addr, PAGE);
                    syscall!(libc::SYS_munmap, base + len, PAGE);
                }
                return Ok((base, len));
            }
            Err(_) if len > MINIMUM_LEN => len /= 2,
            Err(errno) => return Err(errno),
        }
    }
}

/// The program limits its address space to `limit` bytes: what is reserved and not used goes.
/// Any thread, in a hook.
pub fn make_room(limit: u64) {
    let base = REGION.load(Ordering::Relaxed);
    if base != 0 {
        // SAFETY: the published region; a forked child has its copy of it.
        unsafe {
            (*(base as *const Region))
                .bounds
                .cut(base, len_within(limit))
        };
    }
}

/// The end of the present region that nothing has used yet, but for some room.
pub fn unused() -> (u64, u64) {
    match REGION.load(Ordering::Relaxed) as *const Region {
        base if base.is_null() => (0, 0),
        // SAFETY: a published region; its owner is the caller.
        base => unsafe { (*base).bounds.closed(base as u64, MINIMUM_LEN) },
    }
}

/// Gives that back.
///
/// # Safety
/// Only the thread whose region it is.
pub unsafe fn trim() {
    let (start, end) = unused();
    if start < end {
        let base = REGION.load(Ordering::Relaxed);
        // SAFETY: the published region.
        unsafe { (*(base as *const Region)).bounds.cut(base, start - base) };
    }
}

/// Lays out the region at `base` (zeroed memory): control block, stack, heap.
///
/// The fake thread control block gives the helper a valid `%fs`: self pointers,
/// the stack guard and pointer guard of the calling thread, and zeroed static TLS
/// below it, large enough for our own block and libc's errno.
///
/// # Safety
/// `base..base+len` is reserved (closed), and unused.
pub unsafe fn lay_out(base: u64, len: u64) -> Result<(), i32> {
    // SAFETY: all accesses stay inside the region per contract; fs:0 is the thread
    // pointer of the calling thread.
    unsafe {
        let fs: u64;
        std::arch::asm!("mov {}, fs:[0]", out(reg) fs, options(nostack, readonly));
        let below = (fs - thread_block() as u64)
            .next_multiple_of(PAGE)
            .max(64 << 10)
            + PAGE;
        let region = base as *mut Region;
        let header = (size_of::<Region>() as u64).next_multiple_of(PAGE);
        let tls = base + header + below;
        let stack_top = tls + TCB + PAGE + STACK;
        let open = stack_top - base + FIRST_HEAP;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        check(syscall!(libc::SYS_mprotect, base, open, prot))?;
        (*region).bounds.set(open, len);
        (*region).tls = tls;
        (*region).stack_top = stack_top;
        (*region).keep_fds = [-1; 4];
        let bounds = &(*region).bounds;
        (*region)
            .heap
            .reset_to(stack_top, base + open, base, bounds);
        let tcb = tls as *mut u64;
        *tcb = tls;
        // dtv: our own copy of the caller's generation word, so that a lookup of
        // dynamic TLS takes glibc's fast path; every module's block is the zeroed area.
        let dtv = (tls + TCB / 2) as *mut u64;
        *dtv = *(*((fs + 8) as *const *const u64));
        for module in 1..60 {
            *dtv.add(2 * module) = base + header;
        }
        *tcb.add(1) = dtv as u64;
        *tcb.add(2) = tls;
        *tcb.add(5) = *((fs + 0x28) as *const u64);
        *tcb.add(6) = *((fs + 0x30) as *const u64);
    }
    Ok(())
}

/// Makes the region at `base` the one of the helper that is about to start.
pub fn publish(base: u64) {
    let heap = base + std::mem::offset_of!(Region, heap) as u64;
    HELPER_HEAP.store(heap, Ordering::SeqCst);
    REGION.store(base, Ordering::SeqCst);
}
