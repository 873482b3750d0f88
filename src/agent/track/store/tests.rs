use super::*;
use crate::agent::collect::memory;
use std::sync::atomic::AtomicBool;

/// Threads overwrite pages while they are stored: what is stored is what was there
/// at the start, whatever way each page took.
fn stored_contents(pages: u64, threads: u64, slow: bool) {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let len = (pages + 2) * PAGE;
    // SAFETY: a fresh mapping with guards.
    let base = unsafe {
        let at = check(syscall!(libc::SYS_mmap, 0, len, prot, flags, -1i32, 0)).unwrap() as u64;
        syscall!(libc::SYS_mprotect, at, PAGE, 0);
        syscall!(libc::SYS_mprotect, at + len - PAGE, PAGE, 0);
        at + PAGE
    };
    let word = |page: u64| (base + page * PAGE) as *mut u64;
    for page in 0..pages {
        // SAFETY: memory of the test.
        unsafe { word(page).write_volatile(page + 1) };
    }
    let own = memory::Own {
        store: b"/nonexistent/",
        is_cache: |_| false,
    };
    let mut pieces = memory::collect(&own).unwrap().pieces;
    pieces.retain(|p| p.vma.start >= base && p.vma.end <= base + pages * PAGE);
    let mut dirty = Dirty::new();
    // All but every seventh page.
    for page in (0..pages).filter(|page| page % 7 != 0) {
        let at = base + page * PAGE;
        dirty.insert(at, at + PAGE, Change::Present);
    }
    let (mut storing, rest) = protect(&pieces, &dirty, &[], false).unwrap();
    assert!(rest.is_empty());
    let mut seen = vec![0u64; pages as usize];
    let finished = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let finished = &finished;
            scope.spawn(move || {
                let mut n = thread + 1;
                for _ in 0..pages {
                    n = n.wrapping_mul(6364136223846793005).wrapping_add(99);
                    // SAFETY: memory of the test.
                    unsafe { word((n >> 33) % pages).write_volatile(u64::MAX) };
                }
                finished.store(true, SeqCst);
            });
        }
        while let Some(taken) = storing.take_next() {
            for k in 0..taken.npages {
                let page = (taken.addr - base) / PAGE + k;
                assert_eq!(seen[page as usize], 0, "page {page} is stored twice");
                // SAFETY: a page of the test, or its copy.
                seen[page as usize] =
                    unsafe { ((taken.at + k * PAGE) as *const u64).read_volatile() };
            }
            if slow {
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
            storing.stored(taken);
        }
        storing.finish();
    });
    for page in 0..pages {
        let expected = if page % 7 == 0 { 0 } else { page + 1 };
        assert_eq!(seen[page as usize], expected, "page {page}");
    }
    for page in 0..pages {
        assert_eq!(table::get(base + page * PAGE), 0);
        // SAFETY: memory of the test; it can be written again.
        unsafe { word(page).write_volatile(3) };
    }
    // SAFETY: mapped above.
    unsafe { syscall!(libc::SYS_munmap, base - PAGE, len) };
}

#[test]
fn pages_are_stored_as_they_were() {
    for round in 0..10 {
        stored_contents(500 + round, 3, false);
    }
}

#[test]
fn threads_wait_when_the_reserve_is_full() {
    stored_contents(3 * RESERVE as u64, 4, true);
}

#[test]
fn mappings_that_go_are_stored_first() {
    use crate::agent::track::fault;
    let pages = 64;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh mapping.
    let base = unsafe {
        let at = check(syscall!(
            libc::SYS_mmap,
            0,
            pages * PAGE,
            prot,
            flags,
            -1i32,
            0
        ));
        at.unwrap() as u64
    };
    for page in 0..pages {
        // SAFETY: memory of the test.
        unsafe { ((base + page * PAGE) as *mut u64).write_volatile(page + 1) };
    }
    let piece = Piece {
        vma: VmaState {
            start: base,
            end: base + pages * PAGE,
            prot: prot as u32,
            kind: VmaKind::Anon,
            flags: 0,
        },
        how: memory::How::Scan,
    };
    let mut dirty = Dirty::new();
    dirty.insert(base, base + pages * PAGE, Change::Present);
    let (mut storing, rest) = protect(&[piece], &dirty, &[], false).unwrap();
    assert!(rest.is_empty());
    fault::release(base, pages * PAGE);
    // SAFETY: the test's own memory goes.
    unsafe { syscall!(libc::SYS_munmap, base, pages * PAGE) };
    let mut count = 0;
    while let Some(taken) = storing.take_next() {
        assert_ne!(taken.at, taken.addr);
        // SAFETY: a copy in the reserve.
        let word = unsafe { *(taken.at as *const u64) };
        assert_eq!(word, (taken.addr - base) / PAGE + 1);
        count += 1;
        storing.stored(taken);
    }
    storing.finish();
    assert_eq!(count, pages);
}
