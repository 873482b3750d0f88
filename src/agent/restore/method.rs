//! Mapped or read? `CKPT_RESTORE=auto` decides from what is known before the jump: how much
//! memory it is, where the images lie, how much of them is in the page cache, and what the
//! program did with its memory after the last restore (`store::working_set`).
//!
//! Constructor of the new process.

use crate::config::RestoreMethod;
use crate::image::PAGE;
use crate::image::chain::Sourced;
use crate::store::working_set::WorkingSet;
use ckpt_sys::syscall;
use std::os::fd::{AsRawFd, BorrowedFd};

/// No more than this is read faster than the first touches of a mapping would take.
const SMALL_PAGES: u64 = 256;

/// How memory comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    pub lazy: bool,
    /// Much of the images must come from the disk.
    pub cold: bool,
    pub why: &'static str,
}

/// No contents are to be brought back.
pub const NOTHING: Choice = Choice {
    lazy: false,
    cold: false,
    why: "nothing to do",
};

/// Chooses; `files` are the images of the chain that are needed.
pub fn choose(
    asked: RestoreMethod,
    pieces: &[Sourced],
    files: &[BorrowedFd<'_>],
    before: Option<&WorkingSet>,
) -> Choice {
    let pages: u64 = pieces.iter().map(|piece| piece.npages).sum();
    let eager = |why| Choice {
        lazy: false,
        cold: false,
        why,
    };
    if asked == RestoreMethod::Eager {
        return eager("asked for");
    }
    let (cached, whole) = files.iter().fold((0, 0), |sum, file| {
        let (cached, seen) = cached_pages(*file);
        // Large files count as what they are, not as what was looked at.
        let pages = rustix::fs::fstat(file).map_or(0, |stat| stat.st_size as u64 / PAGE);
        let weight = (pages / seen.max(1)).max(1);
        (sum.0 + cached * weight, sum.1 + seen * weight)
    });
    let cold = cached < whole / 10 * 9;
    let lazy = |why| Choice {
        lazy: true,
        cold,
        why,
    };
    if asked == RestoreMethod::Lazy {
        return lazy("asked for");
    }
    if pages <= SMALL_PAGES {
        return eager("small");
    }
    if files.iter().any(|file| is_remote(*file)) {
        // A page that cannot be read later is a SIGBUS in the program.
        return eager("the store is not on a local file system");
    }
    if before.is_some_and(|set| set.written > pages / 4 * 3) {
        return eager("the program wrote most of its memory at once after the last restart");
    }
    lazy(if cold { "not in memory" } else { "in memory" })
}

/// A file of more pages than this is looked at here and there only: to look at each page of
/// a gigabyte takes milliseconds.
const LARGE: u64 = 4096;
/// Places, and pages in each.
const LOOKS: u64 = 64;
const LOOK: u64 = 8;

/// Where to look: first page, number of pages.
fn looks(pages: u64) -> impl Iterator<Item = (u64, u64)> {
    let large = pages > LARGE;
    (0..if large { LOOKS } else { 1 }).map(move |k| match large {
        true => (k * (pages - LOOK) / (LOOKS - 1), LOOK),
        false => (0, pages),
    })
}

/// Pages of a file in the page cache, of so many that were looked at.
fn cached_pages(file: BorrowedFd<'_>) -> (u64, u64) {
    let Ok(stat) = rustix::fs::fstat(file) else {
        return (0, 0);
    };
    let pages = (stat.st_size as u64).div_ceil(PAGE);
    let seen: u64 = looks(pages).map(|look| look.1).sum();
    if pages == 0 {
        return (0, 0);
    }
    const SYS_CACHESTAT: u64 = 451;
    let mut cached = 0;
    for (first, number) in looks(pages) {
        let range = [first * PAGE, number * PAGE];
        let mut found = [0u64; 5];
        // SAFETY: struct cachestat_range and struct cachestat.
        let ret = unsafe { syscall!(SYS_CACHESTAT, file.as_raw_fd(), &range, &mut found, 0) };
        if ret != 0 {
            return (resident(file, pages).unwrap_or(seen), seen);
        }
        cached += found[0].min(number);
    }
    (cached, seen)
}

/// The same by mincore(2), for kernels before 6.5.
fn resident(file: BorrowedFd<'_>, pages: u64) -> Option<u64> {
    // SAFETY: published images are never changed or truncated.
    let map = unsafe { memmap2::Mmap::map(file.as_raw_fd()) }.ok()?;
    let mut cached = 0;
    for (first, number) in looks(pages) {
        let mut present = vec![0u8; number as usize];
        let start = map.as_ptr().wrapping_add((first * PAGE) as usize);
        let len = number * PAGE;
        // SAFETY: inside the mapping of that many pages, a byte for each.
        let ret = unsafe { syscall!(libc::SYS_mincore, start, len, present.as_mut_ptr()) };
        if ret != 0 {
            return None;
        }
        cached += present.iter().filter(|&&page| page & 1 != 0).count() as u64;
    }
    Some(cached)
}

/// File systems whose pages come over a network or from another process.
fn is_remote(file: BorrowedFd<'_>) -> bool {
    const REMOTE: [u32; 9] = [
        0x6969,      // NFS
        0xff53_4d42, // CIFS
        0xfe53_4d42, // SMB2
        0x6573_5546, // FUSE
        0x0102_1997, // 9p
        0x00c3_6400, // Ceph
        0x5346_414f, // AFS
        0x0bd0_0bd0, // Lustre
        0x4750_4653, // GPFS
    ];
    rustix::fs::fstatfs(file).is_ok_and(|fs| REMOTE.contains(&(fs.f_type as u32)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn piece(npages: u64) -> [Sourced; 1] {
        [Sourced {
            addr: 0,
            npages,
            file: 0,
            offset: PAGE,
        }]
    }

    #[test]
    fn the_rule() {
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let files = [file.as_fd()];
        let choose = |asked, pages, before: Option<&WorkingSet>| {
            let choice = choose(asked, &piece(pages), &files, before);
            (choice.lazy, choice.why)
        };
        use RestoreMethod::*;
        assert!(choose(Lazy, 5, None).0 && !choose(Eager, 5000, None).0);
        assert_eq!(choose(Auto, 5, None), (false, "small"));
        assert!(choose(Auto, 5000, None).0);
        let busy = WorkingSet {
            written: 4500,
            ..WorkingSet::default()
        };
        assert!(!choose(Auto, 5000, Some(&busy)).0);
        assert!(choose(Auto, 50_000, Some(&busy)).0);
    }

    #[test]
    fn both_ways_find_the_same_pages() {
        let path = std::env::temp_dir().join(format!("ckpt-cached-{}", std::process::id()));
        std::fs::write(&path, vec![1u8; 40 * PAGE as usize]).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        assert_eq!(cached_pages(file.as_fd()), (40, 40));
        assert_eq!(resident(file.as_fd(), 40), Some(40));
        let large = 8 * LARGE;
        let written = std::fs::OpenOptions::new().write(true).open(&path);
        written.unwrap().set_len(large * PAGE).unwrap();
        let (cached, seen) = cached_pages(file.as_fd());
        assert_eq!(seen, LOOKS * LOOK);
        assert!(cached < seen / 10, "{cached}");
        assert_eq!(resident(file.as_fd(), large), Some(cached));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn looks_reach_from_the_first_page_to_the_last() {
        for pages in [0, 1, 40, LARGE, LARGE + 1, 1 << 20, (1 << 20) + 7] {
            let all: Vec<_> = looks(pages).collect();
            assert_eq!(all[0].0, 0);
            let last = all[all.len() - 1];
            assert_eq!(last.0 + last.1, pages);
            assert!(all.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
        }
    }
}
