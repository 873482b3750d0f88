//! The agent's own memory: the `#[global_allocator]` of libckpt.so (law 1).
//!
//! Two heaps of one kind:
//! * the **agent heap**, used by the constructor and by hooks in the program's
//!   threads; it is part of the image. A spinlock guards it, taken only under an
//!   [`InHook`] guard, so that no stopped thread ever holds it;
//! * the **helper heap** inside the helper's region, used by the helper thread (and
//!   its forked writers) alone, without a lock; it is not in the image.
//!
//! Size classes with free lists below 32 KiB, page runs above. Page runs that are
//! freed give their memory back to the kernel, so a checkpoint leaves no trace in RSS.

use crate::agent::place;
use crate::agent::reserve::Bounds;
use crate::agent::state::InHook;
use crate::agent::track::fault;
use ckpt_sys::{syscall, tls::thread_block};
use std::alloc::{GlobalAlloc, Layout};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const PAGE: u64 = 4096;
const MIN_SHIFT: u32 = 4;
const MAX_SHIFT: u32 = 15;
const CLASSES: usize = (MAX_SHIFT - MIN_SHIFT + 1) as usize;
const MAX_RUNS: usize = 512;
/// How much the agent heap asks of the kernel at a time.
const SEGMENT: u64 = 1 << 20;

/// A heap over one or more segments of anonymous memory.
pub struct Heap {
    /// Heads of the free lists, by class.
    free: [u64; CLASSES],
    /// Never used memory of the present segment.
    bump: u64,
    end: u64,
    /// Of what range this is the heap; `None`: it asks the kernel for more segments.
    within: Option<(u64, &'static Bounds)>,
    /// Free page runs: (address, bytes).
    runs: [(u64, u64); MAX_RUNS],
    nruns: usize,
}

impl Heap {
    /// An empty heap that grows by itself.
    pub const fn growing() -> Heap {
        Heap {
            free: [0; CLASSES],
            bump: 0,
            end: 0,
            within: None,
            runs: [(0, 0); MAX_RUNS],
            nruns: 0,
        }
    }

    /// Makes this the heap of what is open from `start` on (page-aligned) of the range at `base`,
    /// whose rest it opens as it needs it.
    pub fn reset_to(&mut self, start: u64, end: u64, base: u64, bounds: &'static Bounds) {
        *self = Heap::growing();
        self.within = Some((base, bounds));
        self.bump = start;
        self.end = end;
    }

    /// Opens more of the range; false: there is no more.
    fn open_more(&mut self, bytes: u64, base: u64, bounds: &Bounds) -> bool {
        let missing = bytes - (self.end - self.bump);
        let steps = [missing.next_multiple_of(SEGMENT), missing];
        // SAFETY: the heap's own range.
        let opened = steps
            .into_iter()
            .find(|&step| unsafe { bounds.open(base, step) }.is_some());
        self.end += opened.unwrap_or(0);
        opened.is_some()
    }

    fn class(layout: &Layout) -> Option<usize> {
        let size = layout.size().max(layout.align()).max(1 << MIN_SHIFT);
        let shift = size.next_power_of_two().trailing_zeros();
        (shift <= MAX_SHIFT).then(|| (shift - MIN_SHIFT) as usize)
    }

    fn pages(&mut self, bytes: u64) -> u64 {
        for k in 0..self.nruns {
            let (addr, len) = self.runs[k];
            if len >= bytes {
                if len == bytes {
                    self.nruns -= 1;
                    self.runs[k] = self.runs[self.nruns];
                } else {
                    self.runs[k] = (addr + bytes, len - bytes);
                }
                return addr;
            }
        }
        if let Some((base, bounds)) = self.within
            && self.end - self.bump < bytes
            && !self.open_more(bytes, base, bounds)
        {
            return 0;
        }
        if self.end - self.bump < bytes {
            let len = bytes.max(SEGMENT).next_multiple_of(SEGMENT);
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let Ok(addr) = place::lasting(len, prot, flags) else {
                return 0;
            };
            fault::keep_open(addr, len);
            if self.end > self.bump {
                self.give_run(self.bump, self.end - self.bump);
            }
            self.bump = addr;
            self.end = addr + len;
        }
        let addr = self.bump;
        self.bump += bytes;
        addr
    }

    fn give_run(&mut self, addr: u64, len: u64) {
        let (mut addr, mut len) = (addr, len);
        let mut k = 0;
        while k < self.nruns {
            let (a, l) = self.runs[k];
            if a + l == addr || addr + len == a {
                addr = addr.min(a);
                len += l;
                self.nruns -= 1;
                self.runs[k] = self.runs[self.nruns];
                k = 0;
            } else {
                k += 1;
            }
        }
        if addr + len == self.bump {
            self.bump = addr;
        } else if self.nruns < MAX_RUNS {
            self.runs[self.nruns] = (addr, len);
            self.nruns += 1;
        } // else: lost until the heap itself goes; never seen with 512 runs
    }

    fn alloc(&mut self, layout: &Layout) -> *mut u8 {
        if layout.align() as u64 > PAGE {
            return std::ptr::null_mut();
        }
        let Some(class) = Heap::class(layout) else {
            return self.pages((layout.size() as u64).next_multiple_of(PAGE)) as *mut u8;
        };
        if self.free[class] == 0 {
            let size = 1u64 << (class as u32 + MIN_SHIFT);
            // No more than a page ahead: each page that is touched costs a fault, at every start.
            let chunk = size.max(PAGE);
            let start = self.pages(chunk);
            if start == 0 {
                return std::ptr::null_mut();
            }
            let mut at = start + chunk;
            while at > start {
                at -= size;
                // SAFETY: `at` lies in the chunk that was just taken.
                unsafe { *(at as *mut u64) = self.free[class] };
                self.free[class] = at;
            }
        }
        let p = self.free[class];
        // SAFETY: `p` is a free cell of this class; its first word is the next one.
        self.free[class] = unsafe { *(p as *const u64) };
        p as *mut u8
    }

    fn dealloc(&mut self, p: *mut u8, layout: &Layout) {
        match Heap::class(layout) {
            Some(class) => {
                // SAFETY: the cell is dead and at least 16 bytes long.
                unsafe { *(p as *mut u64) = self.free[class] };
                self.free[class] = p as u64;
            }
            None => {
                let len = (layout.size() as u64).next_multiple_of(PAGE);
                // SAFETY: whole pages that belong to the dead allocation.
                unsafe { syscall!(libc::SYS_madvise, p, len, libc::MADV_DONTNEED) };
                self.give_run(p as u64, len);
            }
        }
    }
}

/// The helper's heap, inside its region; 0 while there is no helper.
pub static HELPER_HEAP: AtomicU64 = AtomicU64::new(0);

struct AgentHeap(UnsafeCell<Heap>);

// SAFETY: only reached while AGENT_LOCK is held.
unsafe impl Sync for AgentHeap {}

static AGENT_HEAP: AgentHeap = AgentHeap(UnsafeCell::new(Heap::growing()));
static AGENT_LOCK: AtomicBool = AtomicBool::new(false);

fn with_heap<R>(f: impl FnOnce(&mut Heap) -> R) -> R {
    // SAFETY: the block is this thread's own.
    if unsafe { (*thread_block()).is_helper } != 0 {
        let heap = HELPER_HEAP.load(Ordering::Relaxed) as *mut Heap;
        // SAFETY: set before the helper (or the writer forked from it) runs; only
        // that one thread uses it.
        return f(unsafe { &mut *heap });
    }
    let _hook = InHook::enter();
    while AGENT_LOCK
        .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
        .is_err()
    {
        std::hint::spin_loop();
    }
    // SAFETY: the lock is held.
    let result = f(unsafe { &mut *AGENT_HEAP.0.get() });
    AGENT_LOCK.store(false, Ordering::Release);
    result
}

/// Runs `f` in the helper thread with allocations going to the agent heap, for
/// what must outlive the helper (and belong to the image).
///
/// # Safety
/// Helper thread only, while every other thread is held or outside the heap.
pub unsafe fn in_agent_heap<R>(f: impl FnOnce() -> R) -> R {
    let block = thread_block();
    // SAFETY: the block is this thread's own.
    unsafe {
        let was = (*block).is_helper;
        (*block).is_helper = 0;
        let result = f();
        (*block).is_helper = was;
        result
    }
}

/// The allocator that `ckpt-preload` registers.
pub struct AgentAllocator;

// SAFETY: `Heap` hands out disjoint, suitably aligned memory (cells are aligned to
// their power-of-two size, runs to pages) and never unwinds.
unsafe impl GlobalAlloc for AgentAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        with_heap(|heap| heap.alloc(&layout))
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        with_heap(|heap| heap.dealloc(p, &layout))
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: forwarded contract.
        unsafe {
            let p = self.alloc(layout);
            if !p.is_null() {
                std::ptr::write_bytes(p, 0, layout.size());
            }
            p
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_and_runs_are_reused_and_disjoint() {
        let mut heap = Heap::growing();
        let small = Layout::from_size_align(24, 8).unwrap();
        let a = heap.alloc(&small);
        let b = heap.alloc(&small);
        assert_ne!(a, b);
        heap.dealloc(a, &small);
        assert_eq!(heap.alloc(&small), a);
        let big = Layout::from_size_align(100_000, 8).unwrap();
        let x = heap.alloc(&big);
        let y = heap.alloc(&big);
        assert!(x as u64 + 100_000 <= y as u64 || y as u64 + 100_000 <= x as u64);
        heap.dealloc(x, &big);
        heap.dealloc(y, &big);
        let z = heap.alloc(&Layout::from_size_align(200_000, 8).unwrap());
        assert!(z == x.min(y), "freed neighbours are joined");
    }

    #[test]
    fn alignment_is_kept_for_every_class() {
        let mut heap = Heap::growing();
        for shift in 0..=12 {
            let layout = Layout::from_size_align(3 << shift, 1 << shift).unwrap();
            let p = heap.alloc(&layout) as u64;
            assert_eq!(p % (1 << shift), 0);
        }
    }
}
