//! Contents that a forked writer would not see as they are at the stop: shared memory,
//! which goes on changing, and private ranges that fork drops (MADV_DONTFORK) or
//! empties (MADV_WIPEONFORK). They are copied while the world is stopped.
//!
//! A shared object has no page tables of its own, so what exists in it is asked of the
//! object: by SEEK_DATA where /proc lets us open it (CAP_CHECKPOINT_RESTORE), else by
//! mincore(2), which does not know swapped pages: those are brought in first. Reading what
//! does not exist would populate a sparse reservation.
//!
//! Helper thread, world stopped.

use crate::agent::collect::memory::{How, MemoryError, PAGE, Piece, is_zero};
use crate::agent::procfs::{OwnFd, number, read_file};
use crate::agent::side::SideBuffer;
use crate::agent::snapshot::contents::{Contents, Id};
use crate::agent::track::pagemap::{OWN, PageMap};
use crate::image::state::{Extent, SharedKind, SharedObject};
use ckpt_sys::raw::check;
use ckpt_sys::syscall;

/// Pages read at once.
const CHUNK: u64 = 64;
/// Pages asked about at once.
const STEP: u64 = 8192;

/// Copies ranges of memory into the side buffer.
pub struct Copier<'s> {
    side: &'s mut SideBuffer,
    mem: Option<OwnFd>,
    pagemap: Option<PageMap>,
    /// May mapped objects be opened? Unknown until it was tried.
    may_open: bool,
    /// Is anything swapped out on this machine?
    swapped: Option<bool>,
    /// A page of zeros is content: there is a file's page below it.
    over_file: bool,
    /// What the base holds of shared objects, and the one at work.
    base: Option<&'s mut Contents>,
    object: Option<Id>,
    /// Before the stop: what becomes of the pages that are to be stored.
    outlet: Option<&'s mut Outlet<'s>>,
}

/// Takes pages: the address of each in its object's space, and their contents.
pub type Outlet<'s> = dyn FnMut(&[u64], &[u8]) -> Result<(), i32> + 's;

/// The longest range whose pages are asked for one by one before the stop as well.
const MOST_AHEAD: u64 = 2 << 30;

/// What is known of the pages of a shared range.
enum Existing {
    /// SEEK_DATA tells.
    Seek(OwnFd),
    /// mincore tells.
    Resident,
    /// Nobody tells.
    All,
}

impl<'s> Copier<'s> {
    pub fn new(side: &'s mut SideBuffer) -> Copier<'s> {
        Copier {
            side,
            mem: None,
            pagemap: None,
            may_open: true,
            swapped: None,
            over_file: false,
            base: None,
            object: None,
            outlet: None,
        }
    }

    /// What the base holds of shared objects is left out.
    pub fn compare(&mut self, base: &'s mut Contents) {
        self.base = Some(base);
    }

    /// Nothing is copied: the program runs, and what is not known goes to `outlet`.
    pub fn ahead(&mut self, outlet: &'s mut Outlet<'s>) {
        self.outlet = Some(outlet);
    }

    /// `start..end` maps `object` from `offset` on. Pages that another mapping of
    /// the object has yielded are left out.
    pub fn shared(
        &mut self,
        (start, end): (u64, u64),
        offset: u64,
        object: &mut SharedObject,
    ) -> Result<(), MemoryError> {
        let mut known = object.extents.clone();
        known.sort_unstable_by_key(|e| e.addr);
        let mut extents = std::mem::take(&mut object.extents);
        self.object = Some((object.dev, object.ino));
        let result = match self.existing(start, end, object) {
            Existing::Seek(fd) => self.by_seeking(&fd, (start, end), offset, &known, &mut extents),
            // To ask page by page takes 70 ns each, whatever there is: once has to do.
            _ if self.outlet.is_some() && end - start > MOST_AHEAD => Ok(()),
            Existing::Resident => self.resident((start, end), offset, &known, &mut extents),
            Existing::All => self.run(start, end, offset, &known, &mut extents),
        };
        object.extents = extents;
        self.object = None;
        result.map_err(|errno| MemoryError::Shared { addr: start, errno })
    }

    /// A private range.
    pub fn private(&mut self, piece: &Piece, extents: &mut Vec<Extent>) -> Result<(), MemoryError> {
        let (start, end) = (piece.vma.start, piece.vma.end);
        // The page tables tell what exists, else everything does.
        let scan = piece.how == How::Scan;
        self.over_file = piece.vma.kind.is_private_file();
        let done = self.private_range(start, end, scan, extents);
        self.over_file = false;
        done
    }

    fn private_range(
        &mut self,
        start: u64,
        end: u64,
        scan: bool,
        extents: &mut Vec<Extent>,
    ) -> Result<(), MemoryError> {
        let fail = |errno| MemoryError::Shared { addr: start, errno };
        if !scan {
            return self.run(start, end, start, &[], extents).map_err(fail);
        }
        let mut runs = Vec::new();
        let pagemap = match &mut self.pagemap {
            Some(pagemap) => pagemap,
            None => self
                .pagemap
                .insert(PageMap::open().map_err(|_| fail(libc::EIO))?),
        };
        pagemap
            .scan(start, end, OWN, |from, to, _| runs.push((from, to)))
            .map_err(|_| fail(libc::EIO))?;
        for (from, to) in runs {
            self.run(from, to, from, &[], extents).map_err(fail)?;
        }
        Ok(())
    }

    fn existing(&mut self, start: u64, end: u64, object: &SharedObject) -> Existing {
        const HUGETLBFS: i64 = 0x9584_58f6;
        if object.name == b"/anon_hugepage" {
            return Existing::Resident;
        }
        if self.may_open {
            let path = format!("/proc/self/map_files/{start:x}-{end:x}");
            match OwnFd::open(path.as_bytes()) {
                Ok(fd) => {
                    // SAFETY: all-zero is a valid statfs buffer; the kernel fills it.
                    let kind = unsafe {
                        let mut st: libc::statfs = std::mem::zeroed();
                        syscall!(libc::SYS_fstatfs, fd.raw(), &mut st);
                        st.f_type
                    };
                    return if kind == HUGETLBFS {
                        Existing::Resident
                    } else {
                        Existing::Seek(fd)
                    };
                }
                // A leader that has exited has no such directory.
                Err(libc::EPERM | libc::EACCES | libc::ENOENT | libc::ESRCH) => {
                    self.may_open = false
                }
                Err(_) => {}
            }
        }
        let in_memory =
            object.kind != SharedKind::DeletedFile || object.name.starts_with(b"/dev/shm/");
        if in_memory {
            Existing::Resident
        } else {
            Existing::All
        }
    }

    fn by_seeking(
        &mut self,
        fd: &OwnFd,
        (start, end): (u64, u64),
        offset: u64,
        known: &[Extent],
        extents: &mut Vec<Extent>,
    ) -> Result<(), i32> {
        let last = offset + (end - start);
        let mut at = offset;
        while at < last {
            // SAFETY: our own descriptor.
            let data = check(unsafe { syscall!(libc::SYS_lseek, fd.raw(), at, libc::SEEK_DATA) });
            let data = match data {
                Ok(data) => (data as u64).min(last),
                Err(libc::ENXIO) => break,
                Err(errno) => return Err(errno),
            };
            // SAFETY: as above.
            let hole =
                check(unsafe { syscall!(libc::SYS_lseek, fd.raw(), data, libc::SEEK_HOLE) })?;
            let hole = (hole as u64).next_multiple_of(PAGE).min(last);
            let from = data / PAGE * PAGE;
            if from < hole {
                self.run(
                    start + (from - offset),
                    start + (hole - offset),
                    from,
                    known,
                    extents,
                )?;
            }
            at = hole.max(data + 1);
        }
        Ok(())
    }

    fn resident(
        &mut self,
        (start, end): (u64, u64),
        offset: u64,
        known: &[Extent],
        extents: &mut Vec<Extent>,
    ) -> Result<(), i32> {
        if *self.swapped.get_or_insert_with(anything_swapped) {
            bring_in(start, end)?;
        }
        let mut vec = vec![0u8; STEP as usize];
        let mut at = start;
        while at < end {
            let to = end.min(at + STEP * PAGE);
            let key = |addr: u64| offset + (addr - start);
            // SAFETY: one byte a page into a buffer of that size.
            let told = unsafe { syscall!(libc::SYS_mincore, at, to - at, vec.as_mut_ptr()) } == 0;
            if !told {
                self.run(at, to, key(at), known, extents)?;
            }
            let mut k = 0;
            let count = if told { ((to - at) / PAGE) as usize } else { 0 };
            while k < count {
                let len = vec[k..count].iter().take_while(|&&b| b & 1 != 0).count();
                if len > 0 {
                    let from = at + k as u64 * PAGE;
                    self.run(from, from + len as u64 * PAGE, key(from), known, extents)?;
                }
                k += len.max(1);
            }
            at = to;
        }
        Ok(())
    }

    /// Copies the pages of `from..to` that can be read, are not zero (nothing) and not known;
    /// `key` is what their extents call the first of them.
    fn run(
        &mut self,
        from: u64,
        to: u64,
        key: u64,
        known: &[Extent],
        extents: &mut Vec<Extent>,
    ) -> Result<(), i32> {
        if self.mem.is_none() {
            self.mem = Some(OwnFd::open(b"/proc/thread-self/mem")?);
        }
        let mem = self.mem.as_ref().map_or(-1, OwnFd::raw);
        let ahead = self.outlet.is_some();
        let mut places = Vec::new();
        let mut at = from;
        while at < to {
            let want = (to - at).min(CHUNK * PAGE);
            let before = self.side.len();
            let room = self.side.grow(want as usize)?;
            let got = read_pages(mem, at, &mut room[..want as usize]);
            let mut kept = 0;
            for k in 0..got {
                let page_key = key + (at - from) + k * PAGE;
                let start = (k * PAGE) as usize;
                let page = &room[start..start + PAGE as usize];
                if covered(known, page_key) || (!self.over_file && is_zero(page)) {
                    continue;
                }
                if let (Some(base), Some(id), true) = (&mut self.base, self.object, ahead) {
                    if let Some(at) = base.before(id, page_key / PAGE, page) {
                        room.copy_within(start..start + PAGE as usize, kept);
                        kept += PAGE as usize;
                        places.push(at);
                    }
                    continue;
                }
                if let (Some(base), Some(id)) = (&mut self.base, self.object)
                    && base.same(id, page_key / PAGE, page)
                {
                    continue;
                }
                room.copy_within(start..start + PAGE as usize, kept);
                push_page(extents, page_key, (before + kept) as u64);
                kept += PAGE as usize;
            }
            if let Some(outlet) = &mut self.outlet {
                outlet(&places, &room[..kept])?;
                places.clear();
                kept = 0;
            }
            self.side.truncate(before + kept);
            // A page that cannot be read (beyond the end of a file) does not exist.
            at += if got == 0 { PAGE } else { got * PAGE };
        }
        Ok(())
    }
}

/// Reads whole pages of this process; how many there are in a row. The file that `mem` is reads
/// what cannot be read as well, but takes twice as long.
fn read_pages(mem: i32, at: u64, room: &mut [u8]) -> u64 {
    let (local, remote) = (
        [room.as_mut_ptr() as u64, room.len() as u64],
        [at, room.len() as u64],
    );
    // SAFETY: a buffer of that length; a bad address is an error.
    let n = unsafe {
        let pid = syscall!(libc::SYS_getpid);
        syscall!(libc::SYS_process_vm_readv, pid, &local, 1, &remote, 1, 0)
    };
    if n >= PAGE as isize {
        return n as u64 / PAGE;
    }
    // SAFETY: as above; the file reports bad addresses.
    let n = unsafe { syscall!(libc::SYS_pread64, mem, room.as_mut_ptr(), room.len(), at) };
    n.max(0) as u64 / PAGE
}

/// Is that page in one of the extents (ascending)?
fn covered(known: &[Extent], key: u64) -> bool {
    let next = known.partition_point(|e| e.addr <= key);
    next > 0 && key < known[next - 1].addr + known[next - 1].npages * PAGE
}

/// Appends a page at `key` (address or object offset) to extents that point into the buffer.
fn push_page(extents: &mut Vec<Extent>, key: u64, offset: u64) {
    if let Some(last) = extents.last_mut()
        && last.addr + last.npages * PAGE == key
        && last.offset + last.npages * PAGE == offset
    {
        last.npages += 1;
        return;
    }
    extents.push(Extent {
        addr: key,
        npages: 1,
        offset,
    });
}

/// Does any swap area hold pages (/proc/swaps, fourth column)?
fn anything_swapped() -> bool {
    let text = read_file(b"/proc/swaps").unwrap_or_default();
    text.split(|&b| b == b'\n').skip(1).any(|line| {
        let mut words = line
            .split(|b| b.is_ascii_whitespace())
            .filter(|w| !w.is_empty());
        words.nth(3).and_then(number).is_some_and(|used| used > 0)
    })
}

/// Kilobytes of the mapping at `start` that are swapped out.
fn swapped_of(start: u64) -> i64 {
    let text = read_file(b"/proc/thread-self/smaps").unwrap_or_default();
    let head = format!("{start:x}-");
    let mut lines = text
        .split(|&b| b == b'\n')
        .skip_while(|line| !line.starts_with(head.as_bytes()));
    let swap = lines.find_map(|line| line.strip_prefix(b"Swap:"));
    swap.and_then(|rest| number(rest.trim_ascii_start()))
        .unwrap_or(0)
}

/// Reads the swapped pages of a shared mapping back in, until mincore knows them all.
fn bring_in(start: u64, end: u64) -> Result<(), i32> {
    const TRIES: u32 = 400;
    let mut vec = vec![0u8; STEP as usize];
    let mem = OwnFd::open(b"/proc/thread-self/mem")?;
    for _ in 0..TRIES {
        if swapped_of(start) == 0 {
            return Ok(());
        }
        let mut at = start;
        // SAFETY: advice that changes nothing; then a byte is read of each page that has
        // arrived, which takes it out of the swap cache.
        unsafe {
            syscall!(libc::SYS_madvise, start, end - start, libc::MADV_WILLNEED);
            while at < end {
                let to = end.min(at + STEP * PAGE);
                if syscall!(libc::SYS_mincore, at, to - at, vec.as_mut_ptr()) == 0 {
                    let pages = ((to - at) / PAGE) as usize;
                    for k in (0..pages).filter(|&k| vec[k] & 1 != 0) {
                        let mut byte = 0u8;
                        let page = at + k as u64 * PAGE;
                        syscall!(libc::SYS_pread64, mem.raw(), &raw mut byte, 1, page);
                    }
                }
                at = to;
            }
            let pause = [0u64, 5_000_000];
            syscall!(libc::SYS_nanosleep, &raw const pause, 0);
        }
    }
    Err(libc::EAGAIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::state::{VmaKind, VmaState};

    /// A sparse shared object of 1 GiB with a few pages, mapped twice.
    fn copied(may_open: bool) {
        const LEN: u64 = 1 << 30;
        // SAFETY: fresh mappings of this test.
        unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let first =
                check(syscall!(libc::SYS_mmap, 0, LEN, prot, flags, -1i32, 0)).unwrap() as u64;
            // mremap of nothing makes a second mapping of a shared object.
            let second = check(syscall!(
                libc::SYS_mremap,
                first,
                0,
                LEN,
                libc::MREMAP_MAYMOVE
            ))
            .unwrap() as u64;
            for k in 0..10u64 {
                *((first + k * 100 * PAGE) as *mut u64) = k + 1;
            }
            *((first + PAGE) as *mut u64) = 0; // exists, but is zero
            let mut side = SideBuffer::default();
            let mut object = SharedObject::default();
            let mut copier = Copier::new(&mut side);
            copier.may_open = may_open;
            copier.shared((first, first + LEN), 0, &mut object).unwrap();
            copier
                .shared((second, second + LEN), 0, &mut object)
                .unwrap();
            let pages: Vec<_> = object
                .extents
                .iter()
                .map(|e| (e.addr / PAGE, e.npages))
                .collect();
            assert_eq!(pages, (0..10).map(|k| (k * 100, 1)).collect::<Vec<_>>());
            for (k, e) in object.extents.iter().enumerate() {
                assert_eq!(side.bytes()[e.offset as usize], k as u8 + 1);
            }
            // Looking has not populated the reservation.
            let mut vec = vec![0u8; (LEN / PAGE) as usize];
            syscall!(libc::SYS_mincore, first, LEN, vec.as_mut_ptr());
            assert_eq!(vec.iter().filter(|&&b| b & 1 != 0).count(), 11);
            syscall!(libc::SYS_munmap, first, LEN);
            syscall!(libc::SYS_munmap, second, LEN);
        }
    }

    #[test]
    fn shared_pages_are_found_by_seeking() {
        copied(true);
    }

    #[test]
    fn shared_pages_are_found_without_privilege() {
        copied(false);
    }

    #[test]
    fn a_page_is_looked_up_among_extents() {
        let at = |page: u64, npages| Extent {
            addr: page * PAGE,
            npages,
            offset: 0,
        };
        let known = [at(2, 2), at(9, 1)];
        let hits: Vec<_> = (0..12).filter(|&p| covered(&known, p * PAGE)).collect();
        assert_eq!(hits, [2, 3, 9]);
    }

    #[test]
    fn private_pages_are_found_in_the_page_tables() {
        // SAFETY: a fresh mapping of this test.
        unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let at = check(syscall!(
                libc::SYS_mmap,
                0,
                64 * PAGE,
                prot,
                flags,
                -1i32,
                0
            ))
            .unwrap() as u64;
            *((at + 5 * PAGE) as *mut u64) = 5;
            *((at + 6 * PAGE) as *mut u64) = 6;
            let (mut side, mut extents) = (SideBuffer::default(), Vec::new());
            *((at + 9 * PAGE) as *mut u64) = 0; // exists, but is zero
            let mut copier = Copier::new(&mut side);
            let mut piece = Piece {
                vma: VmaState {
                    start: at,
                    end: at + 64 * PAGE,
                    prot: 3,
                    kind: VmaKind::Anon,
                    flags: 0,
                },
                how: How::Scan,
            };
            let runs = |extents: &[Extent]| -> Vec<_> {
                let page = |e: &Extent| ((e.addr - at) / PAGE, e.npages);
                extents.iter().map(page).collect()
            };
            copier.private(&piece, &mut extents).unwrap();
            assert_eq!(runs(&extents), [(5, 2)]);
            // A page that the program has zeroed in a private mapping of a file that forks do not
            // pass on (MADV_DONTFORK) came back as the file's.
            piece.vma.kind = VmaKind::PrivateOf {
                object: 0,
                offset: 0,
            };
            extents.clear();
            copier.private(&piece, &mut extents).unwrap();
            assert_eq!(runs(&extents), [(5, 2), (9, 1)]);
            syscall!(libc::SYS_munmap, at, 64 * PAGE);
        }
    }
}
