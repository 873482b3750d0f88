use super::super::model::{Model, program};
use super::*;
use crate::agent::collect::memory;
use crate::agent::hooks::testing::{child_status, in_child};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};

fn pieces(start: u64, end: u64) -> Vec<Piece> {
    let own = memory::Own {
        store: b"/nonexistent/",
        is_cache: |_| false,
    };
    let mut pieces = memory::collect(&own).unwrap().pieces;
    pieces.retain(|p| p.vma.start >= start && p.vma.end <= end);
    pieces
}

/// Memory with a guard at either end, every page written.
fn memory(pages: u64) -> u64 {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let len = (pages + 2) * PAGE;
    // SAFETY: a fresh mapping.
    unsafe {
        let at = check(syscall!(libc::SYS_mmap, 0, len, prot, flags, -1i32, 0)).unwrap() as u64;
        syscall!(libc::SYS_mprotect, at, PAGE, 0);
        syscall!(libc::SYS_mprotect, at + len - PAGE, PAGE, 0);
        for page in 1..=pages {
            ((at + page * PAGE) as *mut u64).write_volatile(page);
        }
        at + PAGE
    }
}

fn poke(addr: u64, value: u64) {
    // SAFETY: memory of the test.
    unsafe { (addr as *mut u64).write_volatile(value) };
}

fn sweep(tracker: &mut Mprotect, base: u64, pages: u64) -> Dirty {
    let mut seen = Dirty::new();
    let end = base + pages * PAGE;
    tracker.sweep(&pieces(base, end), &mut seen).unwrap();
    seen
}

#[test]
fn a_copy_kept_by_sweeps_equals_the_memory() {
    for seed in 1..=4 {
        let mut tracker = Mprotect::new().unwrap();
        let mut model = Model::new(&mut tracker, 0x2345_6789_abcd + seed);
        model.run(40);
        assert!(
            model.reported <= 2 * model.changed + 2000,
            "{} reported, {} touched",
            model.reported,
            model.changed
        );
    }
}

#[test]
fn only_what_was_written_is_reported_and_the_map_looks_untouched() {
    let pages = 4096;
    let base = memory(pages);
    let before = pieces(base, base + pages * PAGE);
    let mut tracker = Mprotect::new().unwrap();
    assert_eq!(sweep(&mut tracker, base, pages).present_pages(), pages);
    assert!(sweep(&mut tracker, base, pages).is_empty());
    for k in 0..40 {
        poke(base + k * 97 * PAGE, 5);
    }
    let now = pieces(base, base + pages * PAGE);
    assert_eq!(now.len(), before.len());
    assert_eq!(now[0].vma, before[0].vma);
    let seen = sweep(&mut tracker, base, pages);
    assert_eq!((seen.present_pages(), seen.absent_pages()), (40, 0));
    // Writes by the kernel.
    let mut ends = [0i32; 2];
    // SAFETY: a pipe of the test.
    unsafe { assert_eq!(libc::pipe(ends.as_mut_ptr()), 0) };
    let text = *b"0123456789";
    // SAFETY: as above.
    unsafe { libc::write(ends[1], text.as_ptr().cast(), 10) };
    let target = base + 7 * PAGE - 5;
    let got = program(libc::SYS_read, &[ends[0] as u64, target, 10]);
    assert_eq!(got, 10);
    assert_eq!(sweep(&mut tracker, base, pages).present_pages(), 2);
}

#[test]
fn more_scattered_writes_than_mappings() {
    let pages = 160_000;
    let base = memory(pages);
    let mut tracker = Mprotect::new().unwrap();
    sweep(&mut tracker, base, pages);
    // Every second page: 80,000 runs, more than vm.max_map_count.
    for page in (0..pages).step_by(2) {
        poke(base + page * PAGE, page + 1);
    }
    let text = procfs::read_file(b"/proc/self/maps").unwrap();
    let lines = text.iter().filter(|&&b| b == b'\n').count();
    assert!(lines < 50_000, "{lines} mappings");
    let seen = sweep(&mut tracker, base, pages);
    assert!(
        (0..pages)
            .step_by(2)
            .all(|p| seen.at(base + p * PAGE).is_some())
    );
}

#[test]
fn threads_fault_at_once() {
    let pages = 256;
    let base = memory(pages);
    let mut tracker = Mprotect::new().unwrap();
    for round in 0..40u64 {
        sweep(&mut tracker, base, pages);
        let go = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let go = &go;
                scope.spawn(move || {
                    while !go.load(Acquire) {
                        std::hint::spin_loop();
                    }
                    for page in 0..pages {
                        poke(base + page * PAGE + 8 * thread, round);
                    }
                });
            }
            go.store(true, Release);
        });
        let seen = sweep(&mut tracker, base, pages);
        assert_eq!(seen.present_pages(), pages);
    }
}

#[test]
fn all_signals_blocked() {
    in_child(|| {
        let base = memory(8);
        let mut tracker = Mprotect::new().unwrap();
        sweep(&mut tracker, base, 8);
        let all = !0u64;
        let mut old = 0u64;
        let (at, old_at) = (&raw const all as u64, &raw mut old as u64);
        assert_eq!(program(libc::SYS_rt_sigprocmask, &[0, at, old_at, 8]), 0);
        assert_eq!(old & fault::FAULT_BIT, 0);
        poke(base, 1);
        assert_eq!(program(libc::SYS_rt_sigprocmask, &[0, 0, old_at, 8]), 0);
        assert_ne!(old & fault::FAULT_BIT, 0);
        assert_eq!(sweep(&mut tracker, base, 8).present_pages(), 1);
    });
}

static CAUGHT: AtomicU64 = AtomicU64::new(0);
static GUARDED: AtomicU64 = AtomicU64::new(0);

extern "C" fn theirs(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel's information; a page of the test.
    unsafe {
        let addr = (*info).si_addr() as u64;
        assert_eq!(addr, GUARDED.load(SeqCst));
        syscall!(libc::SYS_mprotect, addr & !4095, PAGE, 3);
    }
    CAUGHT.fetch_add(1, SeqCst);
}

#[test]
fn the_programs_own_faults_stay_its_own() {
    in_child(|| {
        let base = memory(8);
        let mut tracker = Mprotect::new().unwrap();
        sweep(&mut tracker, base, 8);
        let mut action = crate::image::state::KernelSigaction {
            handler: theirs as *const () as u64,
            flags: libc::SA_SIGINFO as u64 | 0x0400_0000,
            restorer: ckpt_sys::thread::restorer as *const () as u64,
            mask: 0,
        };
        let at = &raw const action as u64;
        let segv = libc::SIGSEGV as u64;
        assert_eq!(program(libc::SYS_rt_sigaction, &[segv, at, 0, 8]), 0);
        // A page that the program itself has protected, amid pages of ours.
        let page = base + 3 * PAGE;
        assert_eq!(program(libc::SYS_mprotect, &[page, PAGE, 1]), 0);
        GUARDED.store(page + 16, SeqCst);
        poke(base, 1);
        assert_eq!(CAUGHT.load(SeqCst), 0);
        poke(page + 16, 2);
        assert_eq!(CAUGHT.load(SeqCst), 1);
        let old_at = &raw mut action as u64;
        assert_eq!(program(libc::SYS_rt_sigaction, &[segv, 0, old_at, 8]), 0);
        assert_eq!(action.handler, theirs as *const () as u64);
        let seen = sweep(&mut tracker, base, 8);
        assert!(seen.at(base).is_some() && seen.at(page).is_some());
    });
}

#[test]
fn a_crash_is_a_crash() {
    let status = child_status(|| {
        let base = memory(8);
        let mut tracker = Mprotect::new().unwrap();
        sweep(&mut tracker, base, 8);
        poke(base, 1);
        let default = crate::image::state::KernelSigaction::default();
        let at = &raw const default as u64;
        program(libc::SYS_rt_sigaction, &[libc::SIGSEGV as u64, at, 0, 8]);
        poke(8, 1);
    });
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV);
}
