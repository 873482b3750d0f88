//! Tests: a tracker against a model. Random writes, discards, new mappings, moves, growth,
//! forks and protections in an arena; after every sweep a copy that is only ever updated
//! by what the sweep reported must equal the memory.

use super::{Change, Dirty, Tracker};
use crate::agent::collect::memory::{self, PAGE, Piece};
use crate::agent::hooks::maps::Maps;
use crate::agent::hooks::ranges;
use crate::agent::hooks::testing::call;
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::collections::{BTreeMap, HashMap};

/// Pages of the arena.
const ARENA: u64 = 3 * 1024;

pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    /// A range of pages in the arena, mostly short.
    fn range(&mut self) -> (u64, u64) {
        let from = self.below(ARENA - 1);
        let len = match self.below(8) {
            0 => 512 + self.below(600),
            1 | 2 => 1 + self.below(64),
            _ => 1 + self.below(6),
        };
        (from, len.min(ARENA - from))
    }
}

/// A call of the program, as the net sees it.
pub fn program(nr: libc::c_long, args: &[u64]) -> i64 {
    call(nr, args).unwrap_or_else(|| {
        let arg = |k: usize| args.get(k).copied().unwrap_or(0);
        // SAFETY: the test's own request.
        unsafe { syscall!(nr, arg(0), arg(1), arg(2), arg(3), arg(4), arg(5)) as i64 }
    })
}

const RW: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
const ANON: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
const FIXED: u64 = libc::MAP_FIXED as u64;

pub struct Model<'t> {
    pub tracker: &'t mut dyn Tracker,
    base: u64,
    /// The copy: contents by page, absent = nothing.
    copy: HashMap<u64, Vec<u8>>,
    /// Pages that may have changed since the last sweep.
    touched: std::collections::HashSet<u64>,
    file: i32,
    /// Where files count as images.
    store: std::path::PathBuf,
    random: Random,
    pub reported: u64,
    pub changed: u64,
}

impl<'t> Model<'t> {
    pub fn new(tracker: &'t mut dyn Tracker, seed: u64) -> Model<'t> {
        let len = ARENA * PAGE;
        let prot = libc::PROT_NONE as u64;
        let noreserve = libc::MAP_NORESERVE as u64;
        // A guard at either end: no neighbour grows into the arena.
        let got = program(
            libc::SYS_mmap,
            &[0, len + 2 * PAGE, prot, ANON | noreserve, u64::MAX, 0],
        );
        let base = got as u64 + PAGE;
        let path = std::env::temp_dir().join(format!("ckpt-model-{}", std::process::id()));
        let text: Vec<u8> = (0..256 * PAGE).map(|k| (k / PAGE) as u8 | 1).collect();
        std::fs::write(&path, text).unwrap();
        let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: a NUL-terminated path.
        let file = unsafe { libc::open(name.as_ptr(), libc::O_RDWR) };
        assert!(file >= 0);
        Model {
            tracker,
            base,
            copy: HashMap::new(),
            touched: Default::default(),
            file,
            store: "/nonexistent".into(),
            random: Random(seed),
            reported: 0,
            changed: 0,
        }
    }

    /// As after a restore: most of the arena is mapped from an image, some pages were read
    /// over it. The tracker has begun.
    pub fn restored(tracker: &'t mut dyn Tracker, seed: u64) -> Model<'t> {
        let mut model = Model::new(tracker, seed);
        let name = format!("ckpt-model-store-{}-{seed}", std::process::id());
        model.store = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&model.store).unwrap();
        let image = model.store.join("image");
        let words = (0..2 * ARENA * PAGE / 8).map(|k| (k / 512 + 1) * 0x1_0001);
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        std::fs::write(&image, bytes).unwrap();
        let name = std::ffi::CString::new(image.to_str().unwrap()).unwrap();
        // SAFETY: a NUL-terminated path.
        let fd = unsafe { libc::open(name.as_ptr(), libc::O_RDONLY) };
        assert!(fd >= 0);
        for (from, to, offset) in [(0, 1000, 0), (1000, 1300, 2500), (1700, 3000, 1600)] {
            let flags = libc::MAP_PRIVATE as u64 | FIXED;
            let (addr, bytes) = (model.addr(from), (to - from) * PAGE);
            let args = [addr, bytes, RW, flags, fd as u64, offset * PAGE];
            assert_eq!(program(libc::SYS_mmap, &args) as u64, addr);
        }
        let mut maps = Maps::open().unwrap();
        let mapping = maps.at(model.addr(0)).unwrap().unwrap();
        ranges::set_image_files(&[(mapping.dev, mapping.ino)]);
        ranges::set_image_ranges(&[(model.addr(0), model.addr(ARENA), 0)]).unwrap();
        // Little in the first and the last, much in the second.
        for page in (0..1000).step_by(90).chain((1000..1300).step_by(3)) {
            model.write(page, 1);
        }
        model.write(2000, 7);
        for page in 0..ARENA {
            let content = model.content(page).filter(|c| c.iter().any(|&b| b != 0));
            model.copy.extend(content.map(|content| (page, content)));
        }
        model.touched.clear();
        let pieces = model.pieces();
        model.tracker.begin(&pieces).unwrap();
        // SAFETY: a descriptor of ours; the mappings keep the file.
        unsafe { libc::close(fd) };
        model
    }

    /// The program goes on between the look at its map and the sweep, as before a stop.
    pub fn sweep_late_and_check(&mut self) {
        let pieces = self.pieces();
        for _ in 0..3 {
            self.step();
        }
        let mut seen = Dirty::new();
        self.tracker.sweep(&pieces, &mut seen).unwrap();
        self.take_over(&seen);
        self.step();
        self.sweep_and_check();
    }

    fn addr(&self, page: u64) -> u64 {
        self.base + page * PAGE
    }

    pub fn pieces(&self) -> Vec<Piece> {
        let store = format!("{}/", self.store.display());
        let own = memory::Own {
            store: store.as_bytes(),
            is_cache: |_| false,
        };
        let plan = memory::collect(&own).unwrap();
        let end = self.addr(ARENA);
        let mut pieces = plan.pieces;
        pieces.retain(|p| p.vma.start >= self.base && p.vma.end <= end);
        pieces
    }

    fn touch(&mut self, from: u64, len: u64) {
        self.touched.extend(from..from + len);
    }

    fn prot_at(&self, page: u64) -> u32 {
        let addr = self.addr(page);
        let pieces = self.pieces();
        let piece = pieces
            .iter()
            .find(|p| p.vma.start <= addr && addr < p.vma.end);
        piece.map_or(0, |p| p.vma.prot)
    }

    pub fn step(&mut self) {
        let (from, len) = self.random.range();
        let (addr, bytes) = (self.addr(from), len * PAGE);
        match self.random.below(20) {
            0 => {
                self.touch(from, len);
                program(
                    libc::SYS_madvise,
                    &[addr, bytes, libc::MADV_DONTNEED as u64],
                );
            }
            1 | 2 => {
                self.touch(from, len);
                program(
                    libc::SYS_mmap,
                    &[addr, bytes, RW, ANON | FIXED, u64::MAX, 0],
                );
            }
            3 => {
                // A private mapping of a file, modified later on.
                let len = len.min(200);
                self.touch(from, len);
                let flags = libc::MAP_PRIVATE as u64 | FIXED;
                let args = [addr, len * PAGE, RW, flags, self.file as u64, 4 * PAGE];
                program(libc::SYS_mmap, &args);
            }
            4 => {
                let (to, _) = self.random.range();
                let len = len.min(ARENA - to);
                if to < from + len && from < to + len {
                    return;
                }
                let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
                let args = [addr, len * PAGE, len * PAGE, flags, self.addr(to)];
                if program(libc::SYS_mremap, &args) > 0 {
                    let none = libc::PROT_NONE as u64;
                    program(
                        libc::SYS_mmap,
                        &[addr, len * PAGE, none, ANON | FIXED, u64::MAX, 0],
                    );
                    self.touch(from, len);
                    self.touch(to, len);
                }
            }
            5 => {
                // Grows in place, into a hole made for it.
                let hole = (from + len).min(ARENA - 1);
                let room = 8.min(ARENA - hole);
                program(libc::SYS_munmap, &[self.addr(hole), room * PAGE]);
                self.touch(hole, room);
                let grown = bytes + room * PAGE;
                program(libc::SYS_mremap, &[addr, bytes, grown, 0, 0]);
                // What is still a hole is filled, so that nobody else gets it.
                for page in hole..hole + room {
                    let args = [self.addr(page), PAGE, RW, ANON | 0x10_0000, u64::MAX, 0];
                    program(libc::SYS_mmap, &args);
                }
            }
            6 => {
                let prot = [0, 1, RW, RW, RW][self.random.below(5) as usize];
                self.touch(from, len);
                program(libc::SYS_mprotect, &[addr, bytes, prot]);
            }
            7 => self.fork_and_write(from, len),
            8 => {
                // Read only: makes zero pages and file pages.
                for page in from..from + len {
                    if self.prot_at(page) & 1 != 0 {
                        // SAFETY: readable.
                        unsafe { (self.addr(page) as *const u8).read_volatile() };
                    }
                }
            }
            9 => {
                // A write by the kernel.
                if self.prot_at(from) & 2 != 0 {
                    self.touch(from, 1);
                    let args = [self.file as u64, addr + 100, 64, self.random.below(1 << 19)];
                    assert!(program(libc::SYS_pread64, &args) >= 0);
                }
            }
            _ => self.write(from, len.min(12)),
        }
    }

    fn write(&mut self, from: u64, len: u64) {
        for page in from..from + len {
            if self.prot_at(page) & 2 != 0 {
                self.touch(page, 1);
                let word = self.random.below(u64::MAX);
                let at = self.random.below(PAGE / 8) * 8;
                // SAFETY: writable.
                unsafe { ((self.addr(page) + at) as *mut u64).write_volatile(word) };
            }
        }
    }

    /// A child modifies its copy; the parent's pages go on being watched.
    fn fork_and_write(&mut self, from: u64, len: u64) {
        let writable: Vec<_> = (from..from + len.min(8))
            .filter(|&page| self.prot_at(page) & 2 != 0)
            .collect();
        // SAFETY: the child writes into its own copies and ends.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                for page in &writable {
                    (self.addr(*page) as *mut u64).write_volatile(77);
                }
                libc::_exit(0);
            }
            let mut status = 0;
            libc::waitpid(child, &mut status, 0);
            assert_eq!(status, 0);
            if let Some(&page) = writable.first() {
                (self.addr(page) as *mut u64).write_volatile(78);
                self.touch(page, 1);
            }
        }
    }

    /// The page as the program sees it, whatever its protection.
    fn content(&self, page: u64) -> Option<Vec<u8>> {
        let mut buf = vec![0u8; PAGE as usize];
        // SAFETY: an own buffer; the file reports bad addresses.
        let n = unsafe {
            let fd = check(syscall!(
                libc::SYS_openat,
                libc::AT_FDCWD,
                c"/proc/thread-self/mem".as_ptr(),
                libc::O_RDONLY | libc::O_CLOEXEC,
                0
            ))
            .unwrap();
            let n = syscall!(
                libc::SYS_pread64,
                fd,
                buf.as_mut_ptr(),
                PAGE,
                self.addr(page)
            );
            syscall!(libc::SYS_close, fd);
            n
        };
        (n == PAGE as isize).then_some(buf)
    }

    fn take_over(&mut self, seen: &Dirty) {
        for page in 0..ARENA {
            match seen.at(self.addr(page)) {
                Some(Change::Present) => {
                    self.copy
                        .insert(page, self.content(page).unwrap_or_default());
                }
                Some(Change::Absent) => {
                    self.copy.remove(&page);
                }
                None => {}
            }
        }
    }

    pub fn sweep_and_check(&mut self) {
        let pieces = self.pieces();
        let mut seen = Dirty::new();
        self.tracker.sweep(&pieces, &mut seen).unwrap();
        self.changed += self.touched.len() as u64;
        self.reported += seen.present_pages();
        self.touched.clear();
        self.take_over(&seen);
        self.check(&pieces);
    }

    /// The copy equals the memory.
    fn check(&mut self, pieces: &[Piece]) {
        let is_file = |addr: u64| {
            let piece = pieces
                .iter()
                .find(|p| p.vma.start <= addr && addr < p.vma.end);
            piece.is_some_and(|p| p.vma.kind.is_private_file())
        };
        for page in 0..ARENA {
            let addr = self.addr(page);
            let exists = pieces
                .iter()
                .any(|p| p.vma.start <= addr && addr < p.vma.end);
            if !exists {
                self.copy.remove(&page);
                continue;
            }
            let now = self.content(page).unwrap_or_default();
            match self.copy.get(&page) {
                Some(kept) => assert!(*kept == now, "page {page} differs"),
                None if is_file(addr) => {
                    // Nothing kept: it must be the file's own page, all bytes alike and odd.
                    assert!(
                        now.iter().all(|&b| b == now[0] && b & 1 == 1),
                        "page {page}"
                    );
                }
                None => assert!(now.iter().all(|&b| b == 0), "page {page} is not kept"),
            }
        }
    }

    /// Begins and ends here.
    pub fn arena(&self) -> (u64, u64) {
        (self.base, self.addr(ARENA))
    }

    /// The copy as of the last sweep: addresses of pages and what they hold.
    pub fn kept(&self) -> BTreeMap<u64, Vec<u8>> {
        let pages = self.copy.iter();
        pages
            .map(|(&page, bytes)| (self.addr(page), bytes.clone()))
            .collect()
    }

    /// Memory was brought back to what [`Model::kept`] said.
    pub fn went_back(&mut self, kept: &BTreeMap<u64, Vec<u8>>) {
        let page = |addr: &u64| (addr - self.base) / PAGE;
        self.copy = kept.iter().map(|(a, b)| (page(a), b.clone())).collect();
        self.touched.clear();
        let pieces = self.pieces();
        self.check(&pieces);
    }

    pub fn run(&mut self, sweeps: u32) {
        for _ in 0..sweeps {
            for _ in 0..1 + self.random.below(30) {
                self.step();
            }
            if self.random.below(4) == 0 {
                let pieces = self.pieces();
                self.tracker.arm(&pieces).unwrap();
                self.step();
            }
            self.sweep_and_check();
        }
        let name = std::env::temp_dir().join(format!("ckpt-model-{}", std::process::id()));
        let _ = std::fs::remove_file(name);
        if self.store.starts_with(std::env::temp_dir()) {
            let _ = std::fs::remove_dir_all(&self.store);
        }
    }
}
