//! The restorer's area: a range that is free in the old and in the new memory image.
//!
//! Layout: blob, arguments, tape and strings, thread stacks, restorer's stack, a
//! guard page, the new helper's region. Constructor of the new process only.

use crate::agent::collect::memory::{PAGE, TASK_SIZE};
use crate::agent::region::{self, GUARD};
use crate::agent::reserve;
use ckpt_sys::raw::check;
use ckpt_sys::syscall;

/// Distance kept from everything, so that stacks and heaps may still grow.
const MARGIN: u64 = 64 << 20;

/// A bump allocator over the mapped area.
#[derive(Debug)]
pub struct Area {
    pub start: u64,
    /// The part that the restored helper unmaps.
    pub scratch_len: u64,
    pub region: u64,
    pub region_len: u64,
    next: u64,
}

impl Area {
    /// Maps an area with `scratch` bytes besides the helper's region. `taken` are the
    /// ranges of the image, in any order.
    /// `known`: the present map, where it was read a moment ago.
    pub fn map(
        scratch: u64,
        taken: &[(u64, u64)],
        known: Option<&[(u64, u64)]>,
    ) -> Result<Area, i32> {
        let scratch_len = scratch.next_multiple_of(PAGE);
        let mut busy: Vec<(u64, u64)> = taken.to_vec();
        match known {
            Some(known) => busy.extend(known),
            None => busy.extend(current_map()),
        }
        busy.sort_unstable();
        let mut region_len = region::preferred_len();
        loop {
            let total = scratch_len + GUARD + region_len;
            match hole(&busy, total)
                .ok_or(libc::ENOMEM)
                .and_then(|start| reserve(start, total))
            {
                Ok(start) => {
                    let region = start + scratch_len + GUARD;
                    let prot = libc::PROT_READ | libc::PROT_WRITE;
                    // SAFETY: inside the fresh mapping.
                    unsafe {
                        check(syscall!(
                            libc::SYS_mprotect,
                            start,
                            scratch_len,
                            prot | libc::PROT_EXEC
                        ))?;
                        reserve::exempt(region, region_len);
                    }
                    return Ok(Area {
                        start,
                        scratch_len,
                        region,
                        region_len,
                        next: start,
                    });
                }
                // Something has been mapped since.
                Err(libc::EEXIST) if known.is_some() => {
                    return Area::map(scratch, taken, None);
                }
                Err(_) if region_len > region::MINIMUM_LEN => region_len /= 2,
                Err(errno) => return Err(errno),
            }
        }
    }

    /// The whole area, which the blob leaves mapped.
    pub fn total_len(&self) -> u64 {
        self.scratch_len + GUARD + self.region_len
    }

    /// Room for `bytes`, 64-byte aligned.
    pub fn take(&mut self, bytes: usize) -> u64 {
        let at = self.next;
        self.next = (at + bytes as u64).next_multiple_of(64);
        assert!(
            self.next <= self.start + self.scratch_len,
            "the area was sized too small"
        );
        at
    }

    /// Copies `bytes` into the area.
    pub fn put(&mut self, bytes: &[u8]) -> u64 {
        let at = self.take(bytes.len());
        // SAFETY: the room was just taken.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
        at
    }

    /// Copies a slice of plain structs into the area.
    pub fn put_slice<T: Copy>(&mut self, items: &[T]) -> u64 {
        let at = self.take(size_of_val(items));
        // SAFETY: the room was just taken and is aligned to 64 bytes.
        unsafe { std::ptr::copy_nonoverlapping(items.as_ptr(), at as *mut T, items.len()) };
        at
    }

    /// A NUL-terminated copy of a path.
    pub fn put_path(&mut self, path: &[u8]) -> u64 {
        let at = self.take(path.len() + 1);
        // SAFETY: the room was just taken; the area is zeroed memory.
        unsafe { std::ptr::copy_nonoverlapping(path.as_ptr(), at as *mut u8, path.len()) };
        at
    }
}

/// What this process has mapped.
pub fn current_map() -> Vec<(u64, u64)> {
    let text = crate::agent::procfs::read_file(b"/proc/self/maps").unwrap_or_default();
    text.split(|&b| b == b'\n')
        .filter_map(|line| {
            let dash = line.iter().position(|&b| b == b'-')?;
            let start = crate::agent::procfs::hex(&line[..dash])?;
            let end = crate::agent::procfs::hex(&line[dash + 1..])?;
            Some((start, end))
        })
        .collect()
}

/// A place that nothing has, neither in this process (the area included) nor in the image.
pub fn free_place(taken: &[(u64, u64)], len: u64) -> Option<u64> {
    let mut busy = taken.to_vec();
    busy.extend(current_map());
    hole(&busy, len)
}

/// The highest place below the lowest mapping area, or any other, with room and margin.
fn hole(busy: &[(u64, u64)], len: u64) -> Option<u64> {
    let mut candidate = 0x1000_0000_0000;
    let step = 0x10_0000_0000;
    while candidate + len + MARGIN < TASK_SIZE {
        let clash = busy
            .iter()
            .find(|&&(start, end)| start < candidate + len + MARGIN && end + MARGIN > candidate);
        match clash {
            None => return Some(candidate),
            Some(&(_, end)) => {
                candidate = (end + 2 * MARGIN)
                    .next_multiple_of(step)
                    .max(candidate + step)
            }
        }
    }
    None
}

fn reserve(start: u64, len: u64) -> Result<u64, i32> {
    let flags =
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: MAP_FIXED_NOREPLACE never replaces a mapping.
    let got = unsafe {
        check(syscall!(
            libc::SYS_mmap,
            start,
            len,
            libc::PROT_NONE,
            flags,
            -1i32,
            0
        ))
    }?;
    if got as u64 != start {
        // SAFETY: a kernel that does not know the flag put it elsewhere.
        unsafe { syscall!(libc::SYS_munmap, got, len) };
        return Err(libc::EEXIST);
    }
    reserve::unlock(start, len);
    Ok(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hole_keeps_its_margin() {
        let busy = [(0x1000_0000_0000, 0x1000_0001_0000)];
        let at = hole(&busy, 1 << 30).unwrap();
        assert!(at >= busy[0].1 + MARGIN);
        let area = Area::map(10_000, &busy, None).unwrap();
        assert_eq!(area.scratch_len % PAGE, 0);
        // A map that does not show it yet: it is read again.
        let (start, end) = (area.start, area.start + area.total_len());
        let other = Area::map(10_000, &busy, Some(&[])).unwrap();
        assert!(other.start >= end || other.start + other.total_len() <= start);
        assert_eq!(other.region_len, area.region_len);
        // SAFETY: mapped above, used by nobody.
        unsafe { syscall!(libc::SYS_munmap, other.start, other.total_len()) };
        // SAFETY: mapped above, used by nobody.
        unsafe { syscall!(libc::SYS_munmap, area.start, area.total_len()) };
    }
}
