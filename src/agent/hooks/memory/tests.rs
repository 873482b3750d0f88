//! A file of 0xAA bytes stands for the image.

use super::remap::unmap;
use super::*;
use crate::agent::hooks::testing::{call, in_child};
use crate::agent::track::uffd;

/// `[anonymous][image n pages][anonymous]`, one page each at the edges, registered
/// as a restorer would; returns the image part's address.
fn restored(pages: u64) -> u64 {
    let len = (pages + 2) * PAGE;
    let base = anonymous(0, len + 64 * PAGE, 0, libc::MAP_NORESERVE).unwrap();
    unmap(base, len + 64 * PAGE);
    anonymous(base, len, 3, libc::MAP_FIXED).unwrap();
    // SAFETY: a memfd mapped over a range of the test's own.
    unsafe {
        let fd = libc::memfd_create(c"image".as_ptr(), 0);
        let bytes = vec![0xaau8; ((pages + 8) * PAGE) as usize];
        assert!(libc::write(fd, bytes.as_ptr().cast(), bytes.len()) > 0);
        let at = libc::mmap(
            (base + PAGE) as *mut _,
            (pages * PAGE) as usize,
            3,
            libc::MAP_PRIVATE | libc::MAP_FIXED,
            fd,
            0,
        );
        assert_eq!(at as u64, base + PAGE);
    }
    let m = Maps::open().unwrap().at(base + PAGE).unwrap().unwrap();
    assert!(set_image_files(&[(m.dev, m.ino)]));
    set_image_ranges(&[(base + PAGE, base + PAGE + pages * PAGE, 0)]).unwrap();
    base + PAGE
}

fn byte(addr: u64) -> u8 {
    // SAFETY: mapped by the test.
    unsafe { std::ptr::read_volatile(addr as *const u8) }
}

fn poke(addr: u64, value: u8) {
    // SAFETY: mapped by the test.
    unsafe { std::ptr::write_volatile(addr as *mut u8, value) }
}

fn advise(addr: u64, pages: u64, advice: i32) -> Option<i64> {
    call(libc::SYS_madvise, &[addr, pages * PAGE, advice as u64])
}

fn mapping(addr: u64) -> Mapping {
    Maps::open().unwrap().at(addr).unwrap().unwrap()
}

#[test]
fn discarded_pages_are_zero() {
    in_child(|| {
        let at = restored(8);
        assert_eq!(byte(at + 2 * PAGE), 0xaa);
        poke(at + PAGE, 1);
        assert_eq!(advise(at + PAGE, 2, libc::MADV_DONTNEED), Some(0));
        assert_eq!((byte(at + PAGE), byte(at + 2 * PAGE)), (0, 0));
        assert_eq!((byte(at), byte(at + 3 * PAGE)), (0xaa, 0xaa));
        assert_eq!(advise(at + 3 * PAGE, 1, libc::MADV_FREE), Some(0));
        assert_eq!(byte(at + 3 * PAGE), 0);
        assert_eq!(mapping(at + PAGE).prot, 3);
        assert_eq!(advise(at, 8, libc::MADV_DONTNEED), Some(0));
        assert_eq!(byte(at + 7 * PAGE), 0);
        // Nothing is left to look after.
        assert_eq!(advise(at, 8, libc::MADV_DONTNEED), Some(0));
        assert_eq!(advise(at + 1, 1, libc::MADV_DONTNEED), Some(-22));
    });
}

#[test]
fn other_mappings_over_a_stale_range_are_not_touched() {
    in_child(|| {
        let at = restored(4);
        anonymous(at, 4 * PAGE, 3, libc::MAP_FIXED).unwrap();
        poke(at, 7);
        assert_eq!(advise(at, 4, libc::MADV_DONTFORK), Some(0));
        assert_eq!(byte(at), 7);
        assert!(special_advice_seen());
        assert!(!ranges::may_overlap(at, at + 4 * PAGE));
    });
}

#[test]
fn wipe_on_fork_keeps_the_contents() {
    in_child(|| {
        let at = restored(4);
        poke(at, 9);
        let number = advice_number();
        assert_eq!(advise(at, 2, libc::MADV_WIPEONFORK), Some(0));
        // Once before the call and once behind it.
        assert_eq!(advice_number(), number + 2);
        assert!(mapping(at).is_anonymous());
        assert_eq!(
            (byte(at), byte(at + PAGE), byte(at + 2 * PAGE)),
            (9, 0xaa, 0xaa)
        );
    });
}

/// A program that punched a hole into shared memory was told EINVAL, after a restart only: a range
/// was taken for memory from the image because it had once been some.
#[test]
fn removing_is_refused_for_what_is_ours_only() {
    in_child(|| {
        let at = restored(8);
        // SAFETY: a shared mapping over a range of the test's own.
        unsafe {
            let (prot, flags) = (3, libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
            let len = (4 * PAGE) as usize;
            assert_eq!(libc::mmap(at as *mut _, len, prot, flags, -1, 0) as u64, at);
        }
        (0..4).for_each(|page| poke(at + page * PAGE, 7));
        assert_eq!(advise(at, 1, libc::MADV_REMOVE), Some(0));
        assert_eq!((byte(at), byte(at + PAGE)), (0, 7));
        assert_eq!(advise(at + 4 * PAGE, 1, libc::MADV_REMOVE), Some(-22));
        assert_eq!(byte(at + 4 * PAGE), 0xaa);
        // As the kernel does it: what lies before the one that cannot be is removed.
        assert_eq!(advise(at + 2 * PAGE, 4, libc::MADV_REMOVE), Some(-22));
        assert_eq!(
            (byte(at + PAGE), byte(at + 2 * PAGE), byte(at + 3 * PAGE)),
            (7, 0, 0)
        );
    });
}

#[test]
fn growth_in_place_is_zero() {
    in_child(|| {
        let at = restored(4);
        let (old, new) = (5 * PAGE, 9 * PAGE);
        let ret = call(libc::SYS_mremap, &[at, old, new, 0, 0]);
        assert_eq!(ret, Some(at as i64));
        assert_eq!(
            (byte(at), byte(at + 4 * PAGE), byte(at + 8 * PAGE)),
            (0xaa, 0, 0)
        );
        // And again, now over several mappings, with a neighbour in the way.
        anonymous(at + new, PAGE, 3, libc::MAP_FIXED).unwrap();
        let ret = call(libc::SYS_mremap, &[at, new, new + PAGE, 0, 0]);
        assert_eq!(ret, Some(-12));
        poke(at, 3);
        let flags = libc::MREMAP_MAYMOVE as u64;
        let to = call(libc::SYS_mremap, &[at, new, new + PAGE, flags, 0]).unwrap() as u64;
        assert_ne!(to, at);
        assert_eq!(
            (byte(to), byte(to + PAGE), byte(to + 9 * PAGE)),
            (3, 0xaa, 0)
        );
        assert_eq!(advise(to, 10, libc::MADV_DONTNEED), Some(0));
        assert_eq!((byte(to), byte(to + PAGE)), (0, 0));
    });
}

#[test]
fn growth_of_the_last_page_does_not_show_the_image() {
    in_child(|| {
        let at = restored(4);
        unmap(at + 4 * PAGE, PAGE);
        let ret = call(libc::SYS_mremap, &[at, 4 * PAGE, 6 * PAGE, 0, 0]);
        assert_eq!(ret, Some(at as i64));
        assert_eq!((byte(at + 3 * PAGE), byte(at + 5 * PAGE)), (0xaa, 0));
    });
}

#[test]
fn fixed_moves_and_keeps_nothing_behind() {
    in_child(|| {
        let at = restored(4);
        let to = anonymous(0, 8 * PAGE, 3, 0).unwrap();
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        let from = at - PAGE;
        let ret = call(libc::SYS_mremap, &[from, 6 * PAGE, 8 * PAGE, flags, to]);
        assert_eq!(ret, Some(to as i64));
        assert_eq!(
            (byte(to), byte(to + PAGE), byte(to + 5 * PAGE)),
            (0, 0xaa, 0)
        );
        assert!(mapping(from).start >= from + 6 * PAGE);
        let keep = (libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP) as u64;
        let ret = call(libc::SYS_mremap, &[to, 8 * PAGE, 8 * PAGE, keep, 0]);
        let new = ret.unwrap() as u64;
        assert_eq!((byte(new + PAGE), byte(to + PAGE)), (0xaa, 0));
    });
}

#[test]
fn sleeping_children_are_served_too() {
    in_child(|| {
        let at = restored(2);
        in_child(move || {
            assert_eq!(advise(at, 2, libc::MADV_DONTNEED), Some(0));
            assert_eq!(byte(at), 0);
        });
        assert_eq!(byte(at), 0xaa);
    });
}

/// A tracker had registered a part of the range that the program moved. Linux 6.17 and later
/// moved what came before that part and then refused, and what had been moved stayed away.
#[test]
fn a_range_that_is_registered_in_part_is_moved_whole() {
    in_child(|| {
        // Where there is no userfaultfd nothing is registered either.
        let Ok(uffd) = uffd::Uffd::new() else { return };
        for (first, pages) in [(11, 5), (0, 5), (4, 4)] {
            let at = anonymous(0, 16 * PAGE, 3, 0).unwrap();
            let to = anonymous(0, 16 * PAGE, 0, libc::MAP_NORESERVE).unwrap();
            for page in 0..16 {
                poke(at + page * PAGE, page as u8 + 1);
            }
            let part = (at + first * PAGE, at + (first + pages) * PAGE);
            uffd.register_range(part).unwrap();
            let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
            let args = [at, 16 * PAGE, 16 * PAGE, flags, to];
            assert_eq!(call(libc::SYS_mremap, &args), Some(to as i64));
            for page in 0..16 {
                assert_eq!(byte(to + page * PAGE), page as u8 + 1);
            }
            assert!(mapping(at).start > at);
        }
    });
}

/// Two parts of a file in another order are no mapping to the program either. Linux 6.17 and later
/// moves both, unless they are registered: a program was told EFAULT, and the first had moved.
#[test]
fn several_mappings_are_moved_at_once() {
    in_child(|| {
        let Ok(uffd) = uffd::Uffd::new() else { return };
        let at = anonymous(0, 4 * PAGE, 0, libc::MAP_NORESERVE).unwrap();
        let to = anonymous(0, 4 * PAGE, 0, libc::MAP_NORESERVE).unwrap();
        // SAFETY: files and mappings of the test's own.
        unsafe {
            let fd = libc::memfd_create(c"parts".as_ptr(), 0);
            for page in 0..4u8 {
                let bytes = vec![page + 1; PAGE as usize];
                assert!(libc::write(fd, bytes.as_ptr().cast(), bytes.len()) > 0);
            }
            for (place, offset) in [(at, 2 * PAGE), (at + 2 * PAGE, 0)] {
                let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
                let len = (2 * PAGE) as usize;
                let got = libc::mmap(place as *mut _, len, 3, flags, fd, offset as i64);
                assert_eq!(got as u64, place);
            }
        }
        poke(at, 9);
        uffd.register_range((at, at + 4 * PAGE)).unwrap();
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        let args = [at, 4 * PAGE, 4 * PAGE, flags, to];
        assert_eq!(call(libc::SYS_mremap, &args), Some(to as i64));
        let bytes: Vec<u8> = (0..4).map(|page| byte(to + page * PAGE)).collect();
        assert_eq!(bytes, [9, 4, 1, 2]);
        assert!(mapping(at).start > at);
    });
}

/// What a tracker had split when the checkpoint was taken is split after the restore, in whose life
/// nothing may be tracked yet: EFAULT for a mapping of 22 pages that was made one of 5 elsewhere.
#[test]
fn what_is_in_parts_since_a_restore_is_moved_whole() {
    use crate::agent::state::AGENT;
    in_child(|| {
        AGENT.has_store.store(true, Relaxed);
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        for len in [5, 22, 30] {
            let whole = anonymous(0, 22 * PAGE, 0, libc::MAP_NORESERVE).unwrap();
            let to = anonymous(0, 30 * PAGE, 0, libc::MAP_NORESERVE).unwrap();
            // Touched before they are neighbours they stay two.
            for (first, pages) in [(0, 4), (5, 17), (4, 1)] {
                let at = whole + first * PAGE;
                assert_eq!(anonymous(at, pages * PAGE, 3, libc::MAP_FIXED), Ok(at));
                for page in 0..pages {
                    poke(at + page * PAGE, 7);
                }
            }
            assert!(mapping(whole).end < whole + 22 * PAGE);
            let args = [whole, 22 * PAGE, len * PAGE, flags, to];
            assert_eq!(call(libc::SYS_mremap, &args), Some(to as i64), "{len}");
            for page in 0..len {
                let want = if page < 22 { 7 } else { 0 };
                assert_eq!(byte(to + page * PAGE), want, "{len} {page}");
            }
        }
    });
}
