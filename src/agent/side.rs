//! The side buffer: contents copied during the stop (unlinked files, memfds, shared
//! memory), page-aligned, written at the head of the image's data. Offsets count
//! from the buffer's start until the snapshot makes them file offsets.
//!
//! It has a mapping of its own, which grows as far as there is memory (the helper's
//! heap ends with its region) and is no part of the image ([`range`]). Where the program
//! has used up its address space (RLIMIT_AS) the helper's heap has to do.

use crate::agent::collect::descriptors::ContentSink;
use crate::agent::place;
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::alloc::Layout;
use std::sync::atomic::{AtomicU64, Ordering::*};

const PAGE: usize = 4096;
const FIRST: usize = 256 << 10;

/// Memory of the helper's, given back after the checkpoint.
#[derive(Debug, Default)]
pub struct SideBuffer {
    at: usize,
    len: usize,
    capacity: usize,
    /// In the helper's heap.
    in_heap: bool,
}

static START: AtomicU64 = AtomicU64::new(0);
static END: AtomicU64 = AtomicU64::new(0);

/// Where the present buffer is mapped; empty when there is none.
pub fn range() -> (u64, u64) {
    (START.load(Relaxed), END.load(Relaxed))
}

/// After a restore: the buffer of the life before is not in the image.
pub fn reset_after_restore() {
    publish(0, 0);
}

fn publish(start: usize, len: usize) {
    START.store(start as u64, Relaxed);
    END.store((start + len) as u64, Relaxed);
}

impl SideBuffer {
    pub fn bytes(&self) -> &[u8] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: mapped, and written up to `len` (fresh memory is zero).
        unsafe { std::slice::from_raw_parts(self.at as *const u8, self.len) }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends `n` bytes for the caller to fill in.
    pub fn grow(&mut self, n: usize) -> Result<&mut [u8], i32> {
        let wanted = self.len.checked_add(n).ok_or(libc::ENOMEM)?;
        if wanted > self.capacity {
            self.reserve(wanted.next_power_of_two().max(FIRST))?;
        }
        let at = self.at + self.len;
        self.len = wanted;
        // SAFETY: inside the mapping, which is ours alone.
        Ok(unsafe { std::slice::from_raw_parts_mut(at as *mut u8, n) })
    }

    /// Takes back what lies behind the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    fn reserve(&mut self, capacity: usize) -> Result<(), i32> {
        if self.in_heap {
            return self.move_to_heap(capacity);
        }
        match self.map(capacity) {
            Err(libc::ENOMEM) => self.move_to_heap(capacity),
            mapped => mapped,
        }
    }

    fn layout(capacity: usize) -> Result<Layout, i32> {
        Layout::from_size_align(capacity, PAGE).map_err(|_| libc::ENOMEM)
    }

    fn move_to_heap(&mut self, capacity: usize) -> Result<(), i32> {
        // SAFETY: a layout of at least a page; the old contents are whole.
        unsafe {
            let at = std::alloc::alloc_zeroed(Self::layout(capacity)?);
            if at.is_null() {
                return Err(libc::ENOMEM);
            }
            std::ptr::copy_nonoverlapping(self.bytes().as_ptr(), at, self.len);
            self.free();
            (self.at, self.capacity, self.in_heap) = (at as usize, capacity, true);
        }
        Ok(())
    }

    /// Gives the memory back; the contents are lost.
    fn free(&mut self) {
        if self.capacity == 0 {
            return;
        }
        if self.in_heap {
            if let Ok(layout) = Self::layout(self.capacity) {
                // SAFETY: allocated with this layout, no longer used.
                unsafe { std::alloc::dealloc(self.at as *mut u8, layout) };
            }
        } else {
            publish(0, 0);
            // SAFETY: our own mapping, no longer used.
            unsafe { syscall!(libc::SYS_munmap, self.at, self.capacity) };
        }
        (self.at, self.capacity, self.in_heap) = (0, 0, false);
    }

    fn map(&mut self, capacity: usize) -> Result<(), i32> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let at = if self.capacity == 0 {
            place::passing(capacity as u64, prot, flags)? as usize
        } else {
            let (at, old) = (self.at, self.capacity);
            let may_move = libc::MREMAP_MAYMOVE;
            // SAFETY: our own mapping; nothing points into it while it moves.
            check(unsafe { syscall!(libc::SYS_mremap, at, old, capacity, may_move) })?
        };
        (self.at, self.capacity) = (at, capacity);
        publish(at, capacity);
        Ok(())
    }
}

impl Drop for SideBuffer {
    fn drop(&mut self) {
        self.free();
    }
}

impl ContentSink for SideBuffer {
    fn append(&mut self, pages: &[u8]) -> Result<u64, i32> {
        let offset = self.len as u64;
        let room = self.grow(pages.len().next_multiple_of(PAGE))?;
        let (content, rest) = room.split_at_mut(pages.len());
        content.copy_from_slice(pages);
        rest.fill(0);
        Ok(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_and_is_told_apart() {
        let mut side = SideBuffer::default();
        assert_eq!(side.append(&[7; 100]), Ok(0));
        let page = vec![8u8; PAGE];
        for k in 1..1000 {
            assert_eq!(side.append(&page), Ok(k * PAGE as u64));
        }
        assert_eq!(&side.bytes()[..101], &[&[7u8; 100][..], &[0]].concat()[..]);
        assert_eq!(side.bytes()[999 * PAGE], 8);
        let (start, end) = range();
        assert!(start <= side.bytes().as_ptr() as u64 && end - start >= 1000 * PAGE as u64);
        side.truncate(PAGE);
        assert_eq!(side.grow(1).unwrap().len(), 1);
        // No address space left: the contents move.
        side.move_to_heap(4 * PAGE).unwrap();
        assert_eq!(range(), (0, 0));
        assert_eq!(&side.bytes()[..101], &[&[7u8; 100][..], &[0]].concat()[..]);
        assert_eq!(side.append(&vec![9; 5 * PAGE]), Ok(PAGE as u64 + 1));
        assert_eq!((side.bytes()[99], side.bytes()[5 * PAGE]), (7, 9));
        drop(side);
        assert_eq!(range(), (0, 0));
    }
}
