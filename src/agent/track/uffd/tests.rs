//! The tracker against a model, and the stories of what it once missed.

use super::*;
use crate::agent::collect::memory;
use crate::agent::track::model::Model;

fn tracker() -> Option<Uffd> {
    match probe() {
        Ok(()) => Some(Uffd::new().unwrap()),
        Err(why) => {
            eprintln!("not here: {why}");
            None
        }
    }
}

/// What the process maps inside a range.
fn pieces(start: u64, end: u64) -> Vec<Piece> {
    let own = memory::Own {
        store: b"/nonexistent/",
        is_cache: |_| false,
    };
    let mut pieces = memory::collect(&own).unwrap().pieces;
    pieces.retain(|p| p.vma.start >= start && p.vma.end <= end);
    pieces
}

fn map(len: u64, extra: i32) -> u64 {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | extra;
    // SAFETY: a fresh mapping.
    unsafe { check(syscall!(libc::SYS_mmap, 0, len, prot, flags, -1i32, 0)).unwrap() as u64 }
}

fn poke(addr: u64) {
    // SAFETY: memory of the test.
    unsafe { (addr as *mut u64).write_volatile(1 + addr) };
}

#[test]
fn a_copy_kept_by_sweeps_equals_the_memory() {
    for seed in 1..=6 {
        let Some(mut uffd) = tracker() else { return };
        let mut model = Model::new(&mut uffd, 0x1234_5678_9abc + seed);
        model.run(60);
        // Nothing is reported that was not touched (whole mappings were, when new).
        assert!(
            model.reported <= model.changed + model.changed / 4,
            "{} reported, {} touched",
            model.reported,
            model.changed
        );
    }
}

#[test]
fn what_a_restore_has_mapped_equals_the_memory() {
    for seed in 1..=10 {
        let Some(mut uffd) = tracker() else { return };
        let mut model = Model::restored(&mut uffd, 0x7531_9642_aaa1 + seed);
        // Nothing, a little or much happens before the first sweep.
        for _ in 0..seed % 8 * 7 {
            model.step();
        }
        if seed % 2 == 0 {
            model.sweep_late_and_check();
        }
        model.sweep_and_check();
        model.sweep_late_and_check();
        model.run(3);
    }
}

/// Until the first sweep nothing is registered, and it reports what was written or read
/// over the image, not what was only read.
#[test]
fn the_first_sweep_after_a_restore_reports_little() {
    let Some(mut uffd) = tracker() else { return };
    let mut model = Model::restored(&mut uffd, 0x1357_9bdf_0246);
    let pieces = model.pieces();
    for page in 0..900 {
        // SAFETY: mapped from the image.
        unsafe { ((pieces[0].vma.start + page * PAGE) as *const u8).read_volatile() };
    }
    let registered = |model: &mut Model<'_>| {
        let mut found = 0;
        let mut map = PageMap::open().unwrap();
        let (start, end) = (pieces[0].vma.start, pieces[0].vma.end);
        map.scan(start, end, UNREGISTERED, |from, to, _| found += to - from)
            .unwrap();
        model.reported = 0;
        found == 0
    };
    assert!(!registered(&mut model));
    model.sweep_and_check();
    let reported = model.reported;
    assert!((12..40).contains(&reported), "{reported}");
    assert!(registered(&mut model));
    model.sweep_and_check();
    assert_eq!(model.reported, 0);
    model.run(1);
}

#[test]
fn only_what_was_written_is_reported() {
    let Some(mut uffd) = tracker() else { return };
    let len = 4096 * PAGE;
    let base = map(len + 2 * PAGE, 0) + PAGE;
    for page in 0..4096 {
        poke(base + page * PAGE);
    }
    // Cut off from neighbours.
    for guard in [base - PAGE, base + len] {
        // SAFETY: pages of this mapping.
        unsafe { syscall!(libc::SYS_mprotect, guard, PAGE, 0) };
    }
    let sweep = |uffd: &mut Uffd| {
        let mut seen = Dirty::new();
        uffd.sweep(&pieces(base, base + len), &mut seen).unwrap();
        seen
    };
    assert_eq!(sweep(&mut uffd).present_pages(), 4096);
    assert!(sweep(&mut uffd).is_empty());
    let written: Vec<u64> = (0..40).map(|k| k * 97).collect();
    for &page in &written {
        poke(base + page * PAGE);
    }
    let seen = sweep(&mut uffd);
    assert_eq!((seen.present_pages(), seen.absent_pages()), (40, 0));
    assert!(
        written
            .iter()
            .all(|&p| seen.at(base + p * PAGE) == Some(Change::Present))
    );
    // A whole page table is discarded, and one page; each is told once.
    let table = base.next_multiple_of(512 * PAGE);
    // SAFETY: memory of the test.
    unsafe {
        syscall!(libc::SYS_madvise, table, 512 * PAGE, libc::MADV_DONTNEED);
        let elsewhere = table + 1030 * PAGE;
        syscall!(libc::SYS_madvise, elsewhere, PAGE, libc::MADV_DONTNEED);
    }
    let seen = sweep(&mut uffd);
    assert_eq!(seen.present_pages(), 0);
    assert_eq!(
        seen.absent_pages(),
        513,
        "{base:x} {table:x} {:?}",
        seen.runs()
    );
    assert!(sweep(&mut uffd).is_empty());
    // A new mapping in the place of another table, nothing of which exists.
    // SAFETY: memory of the test.
    unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let (at, len) = (table + 512 * PAGE, 512 * PAGE);
        syscall!(libc::SYS_munmap, at, len);
        check(syscall!(libc::SYS_mmap, at, len, prot, flags, -1i32, 0)).unwrap();
    }
    let seen = sweep(&mut uffd);
    assert!(seen.absent_pages() >= 512);
    assert_eq!(seen.at(table + 512 * PAGE), Some(Change::Absent));
    assert_eq!(seen.at(table + 1023 * PAGE), Some(Change::Absent));
}

/// A page of a private file mapping that was modified, protected and discarded counted as the
/// program's own: stored, it hid what was written to the file after the restart.
#[test]
fn what_is_discarded_is_the_files_again() {
    let Some(mut uffd) = tracker() else { return };
    let name = c"discarded";
    // SAFETY: a file and a mapping of this test.
    let (fd, at) = unsafe {
        let fd = check(syscall!(libc::SYS_memfd_create, name.as_ptr(), 0)).unwrap() as i32;
        check(syscall!(libc::SYS_ftruncate, fd, 8 * PAGE)).unwrap();
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        let at = check(syscall!(libc::SYS_mmap, 0, 8 * PAGE, prot, flags, fd, 0)).unwrap() as u64;
        (fd, at)
    };
    let mut sweep = || {
        let mut seen = Dirty::new();
        uffd.sweep(&pieces(at, at + 8 * PAGE), &mut seen).unwrap();
        (0..8)
            .map(|page| seen.at(at + page * PAGE))
            .collect::<Vec<_>>()
    };
    for page in [2, 3, 5] {
        poke(at + page * PAGE);
    }
    let first = sweep();
    assert_eq!([2, 3, 5].map(|k| first[k]), [Some(Change::Present); 3]);
    // SAFETY: memory of this test.
    unsafe {
        let advice = libc::MADV_DONTNEED;
        check(syscall!(libc::SYS_madvise, at + 2 * PAGE, 2 * PAGE, advice)).unwrap();
    }
    let (gone, no) = (Some(Change::Absent), None);
    assert_eq!(sweep(), [no, no, gone, gone, no, no, no, no]);
    assert_eq!(sweep(), [no; 8]);
    poke(at + 2 * PAGE);
    assert_eq!(sweep()[2], Some(Change::Present));
    // SAFETY: of this test.
    unsafe {
        syscall!(libc::SYS_munmap, at, 8 * PAGE);
        syscall!(libc::SYS_close, fd);
    }
}

#[test]
fn a_reservation_costs_nothing() {
    let Some(mut uffd) = tracker() else { return };
    let len = 1u64 << 40;
    let base = map(len, 0);
    poke(base + (len >> 1));
    let tables = || {
        let text = crate::agent::procfs::read_file(b"/proc/self/status").unwrap();
        let field = crate::agent::procfs::field(&text, "VmPTE")
            .unwrap()
            .to_vec();
        crate::agent::procfs::number(&field).unwrap()
    };
    let all = pieces(base & !((1 << 30) - 1), base + len + (1 << 30));
    let mut seen = Dirty::new();
    let before = tables();
    let started = std::time::Instant::now();
    for _ in 0..10 {
        uffd.arm(&all).unwrap();
        uffd.sweep(&all, &mut seen).unwrap();
    }
    assert_eq!(seen.at(base + (len >> 1)), Some(Change::Present));
    assert_eq!(seen.at(base), Some(Change::Absent));
    assert!(tables() - before < 64, "page tables grew");
    assert!(started.elapsed().as_millis() < 500);
    // SAFETY: mapped above.
    unsafe { syscall!(libc::SYS_munmap, base, len) };
}

#[test]
fn huge_pages_are_tracked_in_small_ones() {
    let Some(mut uffd) = tracker() else { return };
    const HUGE: u64 = 512 * PAGE;
    let base = map(6 * HUGE, 0).next_multiple_of(HUGE);
    // SAFETY: memory of the test.
    unsafe { syscall!(libc::SYS_madvise, base, 4 * HUGE, libc::MADV_HUGEPAGE) };
    for page in 0..4 * 512 {
        poke(base + page * PAGE);
    }
    let mut all = pieces(base, base + 4 * HUGE);
    all.retain(|p| p.vma.end <= base + 4 * HUGE);
    let mut seen = Dirty::new();
    uffd.sweep(&all, &mut seen).unwrap();
    assert_eq!(seen.present_pages(), 4 * 512);
    seen.clear();
    poke(base + HUGE + 5 * PAGE);
    uffd.sweep(&all, &mut seen).unwrap();
    assert!(seen.at(base + HUGE + 5 * PAGE) == Some(Change::Present));
    assert!(seen.present_pages() <= 512, "{}", seen.present_pages());
}

/// A page that was discarded, written between the two walks of a sweep and discarded
/// again was not reported: the image kept what it had held in between.
#[test]
fn discarded_while_it_is_swept() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let Some(mut uffd) = tracker() else { return };
    const PAGES: u64 = 256;
    let base = map((PAGES + 2) * PAGE, 0) + PAGE;
    for guard in [base - PAGE, base + PAGES * PAGE] {
        // SAFETY: pages of this mapping.
        unsafe { syscall!(libc::SYS_mprotect, guard, PAGE, 0) };
    }
    let all = pieces(base, base + PAGES * PAGE);
    let mut copy = vec![0u64; PAGES as usize];
    let read = |page: u64| {
        // SAFETY: memory of the test; a word that is there or zero.
        unsafe { ((base + page * PAGE) as *const u64).read_volatile() }
    };
    for round in 0..200u64 {
        let stop = AtomicBool::new(false);
        let follow = |uffd: &mut Uffd, copy: &mut [u64]| {
            let mut seen = Dirty::new();
            uffd.sweep(&all, &mut seen).unwrap();
            for (page, kept) in copy.iter_mut().enumerate() {
                match seen.at(base + page as u64 * PAGE) {
                    Some(Change::Present) => *kept = read(page as u64),
                    Some(Change::Absent) => *kept = 0,
                    None => {}
                }
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut n = round + 1;
                while !stop.load(Ordering::Relaxed) {
                    n = n.wrapping_mul(6364136223846793005).wrapping_add(99);
                    let at = base + (n >> 33) % PAGES * PAGE;
                    // SAFETY: memory of the test.
                    unsafe {
                        if n >> 62 == 0 {
                            syscall!(libc::SYS_madvise, at, PAGE, libc::MADV_DONTNEED);
                        } else {
                            (at as *mut u64).write_volatile(n);
                        }
                    }
                }
            });
            for _ in 0..10 {
                follow(&mut uffd, &mut copy);
            }
            stop.store(true, Ordering::Relaxed);
        });
        follow(&mut uffd, &mut copy);
        for (page, kept) in copy.iter().enumerate() {
            assert_eq!(*kept, read(page as u64), "page {page} in round {round}");
        }
    }
}

#[test]
fn writes_from_many_threads_while_it_is_swept() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let Some(mut uffd) = tracker() else { return };
    let len = 2048 * PAGE;
    let base = map(len + 2 * PAGE, 0) + PAGE;
    for guard in [base - PAGE, base + len] {
        // SAFETY: pages of this mapping.
        unsafe { syscall!(libc::SYS_mprotect, guard, PAGE, 0) };
    }
    let stop = AtomicBool::new(false);
    let all = pieces(base, base + len);
    let mut copy = vec![0u64; 2048];
    let read = |page: u64| {
        // SAFETY: memory of the test.
        unsafe { ((base + page * PAGE) as *const u64).read_volatile() }
    };
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            let stop = &stop;
            scope.spawn(move || {
                let mut n = thread + 1;
                while !stop.load(Ordering::Relaxed) {
                    n = n.wrapping_mul(6364136223846793005).wrapping_add(99);
                    let page = (n >> 33) % 2048;
                    // SAFETY: memory of the test.
                    unsafe { ((base + page * PAGE) as *mut u64).write_volatile(n) };
                }
            });
        }
        for _ in 0..300 {
            let mut seen = Dirty::new();
            uffd.sweep(&all, &mut seen).unwrap();
            for (page, kept) in copy.iter_mut().enumerate() {
                if seen.at(base + page as u64 * PAGE).is_some() {
                    *kept = read(page as u64);
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let mut seen = Dirty::new();
    uffd.sweep(&all, &mut seen).unwrap();
    for (page, kept) in copy.iter().enumerate() {
        let told = seen.at(base + page as u64 * PAGE).is_some();
        assert!(told || *kept == read(page as u64), "page {page}");
    }
}

/// A generation lacked a page that had been written long before: an empty mapping had been moved
/// beside the page's and joined with it, which took the registration from both. The page was still
/// marked as protected when it was registered again, and what was written there from
/// then on was not seen.
#[test]
fn what_is_joined_by_a_move_is_seen() {
    let Some(mut uffd) = tracker() else { return };
    let base = map(60 * PAGE, 0);
    let (page, empty) = (base + 20 * PAGE, base + 40 * PAGE);
    // SAFETY: memory of the test.
    unsafe {
        check(syscall!(libc::SYS_mprotect, base, 60 * PAGE, 0)).unwrap();
        for at in [page, empty] {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            let len = 10 * PAGE;
            check(syscall!(libc::SYS_mmap, at, len, prot, flags, -1i32, 0)).unwrap();
        }
    }
    let write = || (0..10).for_each(|k| poke(page + k * PAGE));
    let mut sweep = || {
        let mut seen = Dirty::new();
        let pieces = pieces(base, base + 60 * PAGE);
        uffd.sweep(&pieces, &mut seen).unwrap();
        seen.present_pages()
    };
    write();
    assert_eq!(sweep(), 10);
    assert_eq!(sweep(), 0);
    // SAFETY: memory of the test.
    unsafe {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let (len, to) = (10 * PAGE, page + 10 * PAGE);
        check(syscall!(libc::SYS_mremap, empty, len, len, flags, to)).unwrap();
    }
    write();
    assert_eq!(sweep(), 10);
    write();
    assert_eq!(sweep(), 10);
}

/// A page was written between a sweep and another look, which stored it, and was then discarded: it
/// was blank at both sweeps, nothing was said of it, and after a restart what had been stored was
/// there. So it was with complete images that were begun while the program ran.
#[test]
fn what_was_seen_between_two_sweeps_and_is_gone_is_reported() {
    let Some(mut uffd) = tracker() else { return };
    let at = map(16 * PAGE, 0);
    let pieces = pieces(at, at + 16 * PAGE);
    uffd.sweep(&pieces, &mut Dirty::new()).unwrap();
    let mut seen = Dirty::new();
    for page in [3, 4, 9] {
        poke(at + page * PAGE);
        seen.insert(at + page * PAGE, at + (page + 1) * PAGE, Change::Present);
    }
    uffd.exist(&existing(&pieces, &seen));
    // SAFETY: memory of the test.
    unsafe { syscall!(libc::SYS_madvise, at + 3 * PAGE, PAGE, libc::MADV_DONTNEED) };
    let mut seen = Dirty::new();
    uffd.sweep(&pieces, &mut seen).unwrap();
    let change = |page: u64| {
        let (start, end) = (at + page * PAGE, at + (page + 1) * PAGE);
        seen.within(start, end).next().map(|run| run.change)
    };
    assert_eq!(change(3), Some(Change::Absent));
    assert_eq!(
        (change(4), change(9)),
        (Some(Change::Present), Some(Change::Present))
    );
    assert_eq!(change(5), None);
}
