//! What stays mapped at a rollback, what is put back into it, what is mapped anew.

use super::*;
use crate::agent::track::model::Model;
use crate::agent::track::uffd::Uffd;
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::collections::BTreeMap;

const RW: u32 = (libc::PROT_READ | libc::PROT_WRITE) as u32;
const R: u32 = libc::PROT_READ as u32;
const A: u64 = 0x10000;

fn vma(start: u64, end: u64, kind: VmaKind) -> VmaState {
    VmaState {
        start,
        end,
        prot: RW,
        kind,
        flags: 0,
    }
}

fn anon(start: u64, end: u64) -> VmaState {
    vma(start, end, VmaKind::Anon)
}

fn file(start: u64, end: u64, path: &str, offset: u64) -> VmaState {
    let path = path.as_bytes().to_vec();
    vma(start, end, VmaKind::FilePrivate { path, offset })
}

fn scan(vma: VmaState) -> Piece {
    let how = How::Scan;
    Piece { vma, how }
}

fn contents(addr: u64, npages: u64, offset: u64) -> Sourced {
    Sourced {
        addr,
        npages,
        file: 0,
        offset,
    }
}

fn ranges(parts: &[Part]) -> Vec<Range> {
    parts.iter().map(|part| (part.start, part.end)).collect()
}

/// What stays of one area, in the map `now`.
fn stays(then: VmaState, now: &[Piece]) -> Vec<Range> {
    ranges(&parts(&[then], now))
}

#[test]
fn the_same_mapping_stays() {
    let end = A + 16 * PAGE;
    for then in [
        anon(A, end),
        vma(A, end, VmaKind::Heap),
        vma(A, end, VmaKind::Stack),
        file(A, end, "/bin/x", 3 * PAGE),
    ] {
        assert_eq!(stays(then.clone(), &[scan(then.clone())]), [(A, end)]);
        for how in [How::All, How::Readable] {
            let vma = then.clone();
            assert_eq!(stays(then.clone(), &[Piece { vma, how }]), [(A, end)]);
        }
    }
}

#[test]
fn another_mapping_does_not() {
    let end = A + 16 * PAGE;
    let then = || file(A, end, "/bin/x", 3 * PAGE);
    let none: [Range; 0] = [];
    for now in [
        anon(A, end),
        vma(A, end, VmaKind::Heap),
        file(A, end, "/bin/y", 3 * PAGE),
        file(A, end, "/bin/x", 4 * PAGE),
        VmaState { prot: R, ..then() },
        VmaState {
            flags: vma_flag::HUGEPAGE,
            ..then()
        },
    ] {
        assert_eq!(stays(then(), &[scan(now.clone())]), none, "{now:?}");
    }
    // Other contents at the same place: shared memory, or what was copied for the image.
    for how in [How::Nothing, How::Copied] {
        let vma = anon(A, end);
        assert_eq!(stays(vma.clone(), &[Piece { vma, how }]), none, "{how:?}");
    }
    let object = || VmaKind::Shared {
        object: 0,
        offset: 0,
    };
    assert_eq!(
        stays(vma(A, end, object()), &[scan(vma(A, end, object()))]),
        none
    );
    // What the kernel may not let us put back page by page.
    for flags in [vma_flag::LOCKED, vma_flag::HUGETLB] {
        let both = VmaState {
            flags,
            ..anon(A, end)
        };
        assert_eq!(stays(both.clone(), &[scan(both)]), none, "{flags}");
    }
}

#[test]
fn a_part_of_an_area_stays() {
    // A hole in the middle, another protection behind it, and what has grown over both ends.
    let now = [
        scan(anon(A - 4 * PAGE, A + 2 * PAGE)),
        scan(VmaState {
            prot: R,
            ..anon(A + 5 * PAGE, A + 6 * PAGE)
        }),
        scan(anon(A + 6 * PAGE, A + 20 * PAGE)),
    ];
    let then = anon(A, A + 16 * PAGE);
    let kept = [(A, A + 2 * PAGE), (A + 6 * PAGE, A + 16 * PAGE)];
    assert_eq!(stays(then.clone(), &now), kept);
    let pieces = [contents(A + PAGE, 7, 100 * PAGE)];
    let parts = parts(std::slice::from_ref(&then), &now);
    let stay = put_back(&[then], &pieces, parts, &Dirty::new());
    let [missing] = &stay.areas[..] else {
        panic!("{:?}", stay.areas);
    };
    assert_eq!((missing.start, missing.end), (A + 2 * PAGE, A + 6 * PAGE));
    // Its contents, and only its own.
    assert_eq!(stay.pieces, [contents(A + 2 * PAGE, 4, 101 * PAGE)]);
    assert!(stay.reads.is_empty() && stay.drops.is_empty());
}

#[test]
fn the_rest_of_a_file_is_mapped_from_its_place_in_the_file() {
    let then = file(A, A + 8 * PAGE, "/bin/x", 3 * PAGE);
    // The same bytes at the same place, begun later.
    let now = [scan(file(A + 2 * PAGE, A + 5 * PAGE, "/bin/x", 5 * PAGE))];
    assert_eq!(stays(then.clone(), &now), [(A + 2 * PAGE, A + 5 * PAGE)]);
    let parts = parts(std::slice::from_ref(&then), &now);
    let stay = put_back(&[then], &[], parts, &Dirty::new());
    let offset = |vma: &VmaState| match vma.kind {
        VmaKind::FilePrivate { offset, .. } => (vma.start, vma.end, offset),
        _ => panic!("{vma:?}"),
    };
    let areas: Vec<_> = stay.areas.iter().map(offset).collect();
    assert_eq!(
        areas,
        [
            (A, A + 2 * PAGE, 3 * PAGE),
            (A + 5 * PAGE, A + 8 * PAGE, 8 * PAGE)
        ]
    );
}

#[test]
fn a_stack_stays_as_a_whole_or_not_at_all() {
    let stack = |start, end| vma(start, end, VmaKind::Stack);
    let then = || stack(A, A + 4 * PAGE);
    // Grown since.
    let grown = scan(stack(A - 8 * PAGE, A + 4 * PAGE));
    assert_eq!(stays(then(), &[grown]), [(A, A + 4 * PAGE)]);
    for now in [stack(A + PAGE, A + 4 * PAGE), stack(A, A + 3 * PAGE)] {
        assert!(stays(then(), &[scan(now)]).is_empty());
    }
}

#[test]
fn changed_pages_are_put_back_or_emptied() {
    let then = anon(A, A + 32 * PAGE);
    let now = [scan(then.clone())];
    let mut changed = Dirty::new();
    // Half of it has contents; and one that the tracker only says is gone.
    changed.insert(A + 2 * PAGE, A + 6 * PAGE, Change::Present);
    changed.insert(A + 9 * PAGE, A + 10 * PAGE, Change::Absent);
    changed.insert(A + 20 * PAGE, A + 21 * PAGE, Change::Present);
    let pieces = [
        contents(A, 4, 100 * PAGE),
        contents(A + 8 * PAGE, 4, 200 * PAGE),
    ];
    let parts = parts(std::slice::from_ref(&then), &now);
    let stay = put_back(&[then], &pieces, parts, &changed);
    assert_eq!(
        stay.reads,
        [
            contents(A + 2 * PAGE, 2, 102 * PAGE),
            contents(A + 9 * PAGE, 1, 201 * PAGE)
        ]
    );
    assert_eq!(
        stay.drops,
        [(A + 4 * PAGE, A + 6 * PAGE), (A + 20 * PAGE, A + 21 * PAGE)]
    );
    assert!(stay.areas.is_empty() && stay.pieces.is_empty());
}

#[test]
fn a_mapping_of_an_image_that_must_be_empty_somewhere_is_mapped_anew() {
    let then = anon(A, A + 8 * PAGE);
    let now = [Piece {
        vma: then.clone(),
        how: How::All,
    }];
    let pieces = [contents(A, 4, 100 * PAGE)];
    let mut changed = Dirty::new();
    changed.insert(A + PAGE, A + 2 * PAGE, Change::Present);
    let before = parts(std::slice::from_ref(&then), &now);
    let stay = put_back(
        std::slice::from_ref(&then),
        &pieces,
        before.clone(),
        &changed,
    );
    assert_eq!(stay.reads, [contents(A + PAGE, 1, 101 * PAGE)]);
    assert_eq!(images(&stay.parts, &now), [(A, A + 8 * PAGE, 0)]);
    // To discard a page of it would bring the image's own page back.
    changed.insert(A + 6 * PAGE, A + 7 * PAGE, Change::Present);
    let stay = put_back(std::slice::from_ref(&then), &pieces, before, &changed);
    assert!(stay.parts.is_empty() && stay.reads.is_empty() && stay.drops.is_empty());
    assert_eq!(stay.areas, [then]);
    assert_eq!(stay.pieces, pieces);
    assert!(images(&stay.parts, &now).is_empty());
}

/// Each page of the checkpoint comes to what it was, on exactly one way.
#[test]
fn every_page_is_what_it_was() {
    let mut state = 88172645463325252u64;
    let mut below = |n: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % n
    };
    const PAGES: u64 = 120;
    /// What a page holds: 0 is nothing.
    type Memory = [u64; PAGES as usize];
    let page = |k: u64| A + k * PAGE;
    for round in 0..400 {
        let (mut then, mut now, mut pieces) = (Vec::new(), Vec::new(), Vec::new());
        let (mut want, mut have): (Memory, Memory) = ([0; PAGES as usize], [0; PAGES as usize]);
        let mut at = 0;
        while at < PAGES - 12 {
            let (start, end) = (at + below(3), at + 4 + below(6));
            then.push(anon(page(start), page(end)));
            let filled = start + below(end - start);
            if filled > start {
                let offset = (1000 + start) * PAGE;
                pieces.push(contents(page(start), filled - start, offset));
                for k in start..filled {
                    want[k as usize] = 1000 + k;
                }
            }
            at = end;
        }
        let mut at = 0;
        while at < PAGES - 12 {
            let (start, end) = (at + below(2), at + 3 + below(9));
            let mut vma = anon(page(start), page(end));
            if below(4) == 0 {
                vma.prot = R;
            }
            let how = [How::Scan, How::Scan, How::All][below(3) as usize];
            now.push(Piece { vma, how });
            at = end;
        }
        // Memory is as it was but for what the tracker tells.
        have.copy_from_slice(&want);
        let mut changed = Dirty::new();
        for _ in 0..below(12) {
            let (start, n) = (below(PAGES - 4), 1 + below(3));
            changed.insert(page(start), page(start + n), Change::Present);
            for k in start..start + n {
                have[k as usize] = 7;
            }
        }
        let parts = parts(&then, &now);
        let stay = put_back(&then, &pieces, parts, &changed);
        let index = |addr: u64| ((addr - A) / PAGE) as usize;
        let mut ways = [0; PAGES as usize];
        for part in &stay.parts {
            for way in &mut ways[index(part.start)..index(part.end)] {
                *way += 1;
            }
        }
        for area in &stay.areas {
            for k in index(area.start)..index(area.end) {
                ways[k] += 1;
                have[k] = 0;
            }
        }
        for &(start, end) in &stay.drops {
            let of_image = |piece: &&Piece| piece.vma.start <= start && start < piece.vma.end;
            let piece = now.iter().find(of_image).expect("it stays");
            assert_eq!(piece.how, How::Scan, "round {round}");
            have[index(start)..index(end)].fill(0);
        }
        for piece in stay.reads.iter().chain(&stay.pieces) {
            for k in 0..piece.npages {
                have[index(piece.addr) + k as usize] = piece.offset / PAGE + k;
            }
        }
        for vma in &then {
            for k in index(vma.start)..index(vma.end) {
                assert_eq!(ways[k], 1, "round {round}, page {k}");
                assert_eq!(have[k], want[k], "round {round}, page {k}");
            }
        }
        let covered: usize = ways.iter().sum();
        let pages = |vma: &VmaState| ((vma.end - vma.start) / PAGE) as usize;
        assert_eq!(covered, then.iter().map(pages).sum::<usize>());
    }
}

/// What the restorer does with memory, here in the test's own arena.
fn put_memory_back(
    model: &Model<'_>,
    then: &[VmaState],
    stay: &Stay,
    contents: &BTreeMap<u64, Vec<u8>>,
) {
    let raw = |nr: libc::c_long, args: [u64; 6]| {
        let [a, b, c, d, e, f] = args;
        // SAFETY: calls on the arena.
        check(unsafe { syscall!(nr, a, b, c, d, e, f) }).unwrap()
    };
    let protect = |start: u64, end: u64, prot: u32| {
        let args = [start, end - start, prot.into(), 0, 0, 0];
        raw(libc::SYS_mprotect, args);
    };
    let write = |start: u64, end: u64| {
        for (&at, bytes) in contents.range(start..end) {
            // SAFETY: made writable by the caller.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
        }
    };
    let all: Vec<Range> = then.iter().map(|vma| (vma.start, vma.end)).collect();
    without(&[model.arena()], &all, |start, end| {
        raw(libc::SYS_munmap, [start, end - start, 0, 0, 0, 0]);
    });
    for area in &stay.areas {
        let (fd, offset) = match &area.kind {
            VmaKind::FilePrivate { path, offset } => {
                let path = std::ffi::CString::new(path.clone()).unwrap();
                let path = path.as_ptr() as u64;
                (raw(libc::SYS_open, [path, 0, 0, 0, 0, 0]) as u64, *offset)
            }
            _ => (u64::MAX, 0),
        };
        let anonymous = if fd == u64::MAX {
            libc::MAP_ANONYMOUS
        } else {
            0
        };
        let flags = (libc::MAP_PRIVATE | libc::MAP_FIXED | anonymous) as u64;
        let len = area.end - area.start;
        raw(
            libc::SYS_mmap,
            [area.start, len, RW.into(), flags, fd, offset],
        );
        if fd != u64::MAX {
            raw(libc::SYS_close, [fd, 0, 0, 0, 0, 0]);
        }
        write(area.start, area.end);
        protect(area.start, area.end, area.prot);
    }
    for part in &stay.parts {
        let reads = stay.reads.iter();
        let mut reads = reads.filter(|r| part.start <= r.addr && r.addr < part.end);
        if let Some(first) = reads.next() {
            protect(part.start, part.end, RW);
            write(first.addr, first.end());
            reads.for_each(|read| write(read.addr, read.end()));
            protect(part.start, part.end, part.prot);
        }
    }
    for &(start, end) in &stay.drops {
        let advice = libc::MADV_DONTNEED as u64;
        raw(libc::SYS_madvise, [start, end - start, advice, 0, 0, 0]);
    }
}

/// Random memory goes back to the last sweep, again and again; what the tracker says from
/// there on is true, and no more than that.
#[test]
fn what_stays_goes_back_and_is_watched_on() {
    for seed in 1..=4 {
        let Ok(mut uffd) = Uffd::new() else { return };
        let mut model = Model::new(&mut uffd, 0x2468_ace0_1357 + seed);
        let (mut stayed, mut reported) = (0, 0);
        let (mut opened, mut closed) = (0, 0);
        for round in 0..30 {
            for _ in 0..round % 7 {
                model.step();
            }
            model.sweep_and_check();
            let contents = model.kept();
            let then: Vec<VmaState> = model.pieces().into_iter().map(|p| p.vma).collect();
            for times in 0..1 + round % 3 {
                for _ in 0..3 + 5 * times {
                    model.step();
                }
                let now = model.pieces();
                let mut changed = Dirty::new();
                model.tracker.look(&now, &mut changed).unwrap();
                let mut image: Vec<Sourced> = Vec::new();
                for &at in contents.keys() {
                    match image.last_mut() {
                        Some(last) if last.end() == at => last.npages += 1,
                        _ => image.push(super::tests::contents(at, 1, at)),
                    }
                }
                let mut stay = put_back(&then, &image, parts(&then, &now), &changed);
                let before = model.tracker.left_open().cloned().unwrap();
                stay.kept = kept(&stay, &image, &before);
                let open = &stay.kept.open.ranges;
                let left: u64 = open.iter().map(|(start, end)| (end - start) / PAGE).sum();
                match left {
                    0 => closed += 1,
                    _ => opened += 1,
                }
                stayed += stay.parts.len();
                put_memory_back(&model, &then, &stay, &contents);
                model.went_back(&contents);
                let pieces = model.pieces();
                model.tracker.begin_again(&pieces, &stay.kept).unwrap();
                // Nothing has been written since, but what is open counts as written.
                let before = model.reported;
                if times == 1 {
                    model.sweep_and_check();
                    reported += (model.reported - before).saturating_sub(left);
                }
            }
        }
        model.run(10);
        assert!(stayed > 100, "{stayed}");
        assert_eq!(reported, 0);
        assert!(opened > 0 && closed > 0, "{opened} {closed}");
    }
}
