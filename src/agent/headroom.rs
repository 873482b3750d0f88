//! How much address space the program still has under limits of its own (RLIMIT_AS,
//! RLIMIT_DATA: getrlimit(2)). What the library maps counts against them, so what it can
//! do without it maps only where plenty is left.
//!
//! Helper thread; before the region exists, the constructor.

use crate::agent::track::table;
use crate::agent::{procfs, region};
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicU64, Ordering};

const PAGE: u64 = 4096;

/// Part of what is left that a checkpoint may take for itself.
const SHARE: u64 = 4;

fn limit(resource: libc::__rlimit_resource_t) -> u64 {
    let mut pair = [u64::MAX; 2];
    // SAFETY: the kernel fills two words.
    unsafe { syscall!(libc::SYS_prlimit64, 0, resource, 0, &mut pair) };
    pair[0]
}

/// What the address space will be limited to again, while that limit is lifted; 0: it is not.
static SUPPOSED: AtomicU64 = AtomicU64::new(0);

/// A rollback has lifted the limits, or put them back (0).
pub fn suppose(limit: u64) {
    SUPPOSED.store(limit, Ordering::SeqCst);
}

/// RLIMIT_AS, bytes; `u64::MAX`: none.
pub fn address_space() -> u64 {
    match SUPPOSED.load(Ordering::SeqCst) {
        0 => limit(libc::RLIMIT_AS),
        supposed => supposed,
    }
}

/// RLIMIT_MEMLOCK, bytes.
pub fn lockable() -> u64 {
    limit(libc::RLIMIT_MEMLOCK)
}

/// Does RLIMIT_FSIZE hold for this process? It is not meant for our images, but what this
/// process writes is held to it.
pub fn file_size_is_limited() -> bool {
    limit(libc::RLIMIT_FSIZE) != libc::RLIM_INFINITY
}

/// Is the process's address space limited?
pub fn limited() -> bool {
    address_space() != u64::MAX
}

/// Bytes that can still be mapped writable; `u64::MAX` where nothing limits it.
pub fn left() -> u64 {
    let (space, data) = (address_space(), limit(libc::RLIMIT_DATA));
    if space == u64::MAX && data == u64::MAX {
        return u64::MAX;
    }
    let text = procfs::read_file(b"/proc/self/statm").unwrap_or_default();
    // proc(5): size and, sixth, data + stack, in pages.
    let field = |n: usize| {
        let mut words = text.split(|b| *b == b' ');
        let pages = words.nth(n).and_then(procfs::number).unwrap_or(0);
        pages as u64 * PAGE
    };
    let space = space.saturating_sub(field(0));
    space.min(data.saturating_sub(field(5)))
}

/// The program limits its address space to `limit` bytes: reservations become smaller. Any thread
/// under a guard, or the restored helper.
pub fn make_room(limit: u64) {
    region::make_room(limit);
    table::make_room(limit);
}

/// May a checkpoint map so many bytes that it could do without?
pub fn ample(bytes: u64) -> bool {
    bytes <= left() / SHARE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;

    #[test]
    fn what_is_left_is_what_can_be_mapped() {
        in_child(|| {
            assert_eq!(left(), u64::MAX);
            assert!(ample(u64::MAX / SHARE));
            let text = procfs::read_file(b"/proc/self/statm").unwrap();
            let size = text.split(|b| *b == b' ').next().unwrap();
            let size = procfs::number(size).unwrap() as u64 * PAGE;
            let limit = [size + (8 << 20), u64::MAX];
            // SAFETY: a valid pair; this process is a child of the test's own.
            unsafe { syscall!(libc::SYS_prlimit64, 0, libc::RLIMIT_AS, &limit, 0) };
            let now = left();
            assert!((7 << 20..=8 << 20).contains(&now), "{now}");
            assert!(ample(1 << 20) && !ample(4 << 20));
            let map = |len: u64| {
                let (prot, flags) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                // SAFETY: fresh address space that is never touched.
                unsafe { syscall!(libc::SYS_mmap, 0, len, prot, flags, -1i32, 0) }
            };
            assert!(map(now + PAGE) < 0);
            assert!(map(now - PAGE) > 0);
            assert_eq!(left(), PAGE);
        });
    }
}
