//! Limits of the process (setrlimit(2)) that are in the way of a rollback: it needs memory,
//! numbers and files, and the program may have used up its limits, or lowered them since.
//!
//! With the program stopped the helper raises the limits as far as it may ([`lift`]); whoever
//! calls the rollback off has them put back, and after it they are what they were at the
//! checkpoint anyway. What is still too low then is refused ([`check`]). Where the address
//! space is still limited the leader unmaps first what goes anyway ([`make_room`]).

use super::call::Region;
use crate::agent::procfs;
use crate::agent::track::blank::{push, without};
use crate::agent::track::fault;
use crate::agent::{headroom, region};
use crate::image::PAGE;
use crate::image::state::{DescriptorTable, FileKind, Manifest, VmaKind};
use ckpt_sys::blob::BLOB_THREAD_STACK;
use ckpt_sys::syscall;

type Range = (u64, u64);
/// Resource, soft, hard.
type Limit = (u32, u64, u64);

/// What a rollback needs.
const NEEDED: [u32; 7] = [
    libc::RLIMIT_AS,
    libc::RLIMIT_DATA,
    libc::RLIMIT_NOFILE,
    libc::RLIMIT_FSIZE,
    libc::RLIMIT_NPROC,
    libc::RLIMIT_MEMLOCK,
    libc::RLIMIT_SIGPENDING,
];

/// Numbers for what is open only on the way.
const SPARE: u64 = 32;
/// The restorer's area besides what is counted; other mappings for a moment.
const AREA: u64 = 8 << 20;
/// Tables and streams of the store are rarely larger.
const STORE_FILE: u64 = 64 << 20;

pub fn now(resource: u32) -> (u64, u64) {
    let mut pair = [u64::MAX; 2];
    // SAFETY: the kernel fills two words.
    unsafe { syscall!(libc::SYS_prlimit64, 0, resource, 0, &mut pair) };
    (pair[0], pair[1])
}

fn set(resource: u32, (soft, hard): (u64, u64)) -> bool {
    let pair = [soft, hard];
    // SAFETY: a valid pair.
    unsafe { syscall!(libc::SYS_prlimit64, 0, resource, &pair, 0) == 0 }
}

/// As of the checkpoint: what the program had set itself, else what it was started with.
pub fn then(manifest: &Manifest, given: &[Limit], resource: u32) -> (u64, u64) {
    let own = manifest.process.rlimits.iter().chain(given);
    let found = own.copied().find(|limit| limit.0 == resource);
    found.map_or_else(|| now(resource), |limit| (limit.1, limit.2))
}

/// One above the highest number of the checkpoint.
fn numbers(table: &DescriptorTable) -> u64 {
    let highest = table.fds.iter().map(|d| d.fd).max();
    highest.map_or(0, |fd| fd as u64 + 1)
}

/// The limits as they were, until this is dropped.
pub struct Lifted(Vec<(u32, (u64, u64))>);

/// Before the stop: this thread cannot even look without a few numbers of its own.
pub fn lift_numbers() -> Lifted {
    let (soft, hard) = now(libc::RLIMIT_NOFILE);
    let enough = hard.min(2 * SPARE);
    let raised = soft < enough && set(libc::RLIMIT_NOFILE, (enough, hard));
    let lifted = raised.then_some((libc::RLIMIT_NOFILE, (soft, hard)));
    Lifted(lifted.into_iter().collect())
}

/// Raises them. Helper thread, the program stopped. `given`: those of the start.
pub fn lift(manifest: &Manifest, given: &[Limit]) -> Lifted {
    let mut lifted = Vec::new();
    for resource in NEEDED {
        let (soft, hard) = now(resource);
        if soft == u64::MAX {
            continue;
        }
        let table = &manifest.descriptors;
        let highest = match resource {
            // The kernel has a limit of its own for this one.
            libc::RLIMIT_NOFILE => {
                let wanted = numbers(table) + table.fds.len() as u64 + SPARE;
                wanted.max(hard).max(then(manifest, given, resource).1)
            }
            _ => u64::MAX,
        };
        if set(resource, (highest, highest)) || soft < hard && set(resource, (hard, hard)) {
            lifted.push((resource, (soft, hard)));
        }
    }
    // The next helper's memory counts again when they are back.
    let (soft, hard) = then(manifest, given, libc::RLIMIT_AS);
    headroom::suppose(soft.min(hard).min(now(libc::RLIMIT_AS).1));
    Lifted(lifted)
}

impl Drop for Lifted {
    fn drop(&mut self) {
        headroom::suppose(0);
        for &(resource, limit) in &self.0 {
            set(resource, limit);
        }
    }
}

/// Is there an obstacle in what the limits are now? Helper thread, behind [`lift`]; an errno
/// and the reason. `images`: how many descriptors of ours come along.
pub fn check(
    manifest: &Manifest,
    given: &[Limit],
    regions: &[Region],
    images: usize,
) -> Result<(), (i32, String)> {
    files(&manifest.descriptors, images)?;
    let hard = now(libc::RLIMIT_FSIZE).1;
    let largest = manifest.descriptors.files.iter().map(|f| match f.kind {
        FileKind::Regular { size, .. } | FileKind::Unlinked { size, .. } => size,
        _ => 0,
    });
    let wanted = largest.max().unwrap_or(0).max(STORE_FILE);
    if hard < then(manifest, given, libc::RLIMIT_FSIZE).1 && hard < wanted {
        let reason = format!("files may not be larger than {hard} bytes now (RLIMIT_FSIZE)");
        return Err((libc::EIO, reason));
    }
    let (space, data) = (now(libc::RLIMIT_AS).0, now(libc::RLIMIT_DATA).0);
    if space == u64::MAX && data == u64::MAX {
        return Ok(());
    }
    let (needs, needs_data) = memory(manifest, regions);
    for (limit, needs, name) in [
        (space, needs, "RLIMIT_AS"),
        (data, needs_data, "RLIMIT_DATA"),
    ] {
        if needs > limit {
            let (needs, limit) = (needs >> 20, limit >> 20);
            let reason = format!(
                "the way back needs {needs} MiB of memory, the process may have {limit} ({name})"
            );
            return Err((libc::EIO, reason));
        }
    }
    Ok(())
}

/// All numbers of the checkpoint, and others for what is set aside meanwhile.
fn files(table: &DescriptorTable, images: usize) -> Result<(), (i32, String)> {
    let limit = now(libc::RLIMIT_NOFILE).0;
    let stays = |kind: &FileKind| {
        !matches!(
            kind,
            FileKind::Unlinked { .. }
                | FileKind::Memfd { .. }
                | FileKind::EventFd { .. }
                | FileKind::TimerFd { .. }
                | FileKind::SignalFd { .. }
                | FileKind::Epoll { .. }
                | FileKind::Inotify { .. }
        )
    };
    let of = |file: u32| table.files.get(file as usize);
    let aside = table
        .fds
        .iter()
        .filter(|d| of(d.file).is_some_and(|f| stays(&f.kind)));
    let together = (table.fds.len() + aside.count() + images) as u64 + SPARE / 4;
    let wanted = numbers(table).max(together);
    if limit < wanted {
        let reason = format!(
            "{wanted} open files are needed on the way back, the process may have {limit} (RLIMIT_NOFILE)"
        );
        return Err((libc::EIO, reason));
    }
    Ok(())
}

/// Address space that is needed at most at any time from [`make_room`] on, and what of it is
/// private and writable.
fn memory(manifest: &Manifest, regions: &[Region]) -> (u64, u64) {
    let len = |range: &Range| range.1 - range.0;
    let of = &manifest.memory;
    let kept: u64 = regions.iter().map(|r| r.len).sum();
    let threads = manifest.threads.len() as u64 * (BLOB_THREAD_STACK + PAGE);
    // Paths, places of contents and the tape: some words for each area and each run.
    let tape = (of.vmas.len() as u64 + of.extents.len() as u64) * 1024;
    let area = AREA + region::MINIMUM_LEN + threads + tape + 2 * kept;
    let unused = len(&region::unused());
    let own: u64 = region::own_ranges().map(|range| len(&range)).sum::<u64>() - unused;
    let heap: u64 = fault::kept_open().map(|range| len(&range)).sum();
    let image: u64 = of.vmas.iter().map(|vma| vma.end - vma.start).sum();
    let writable = of.vmas.iter().filter(|vma| {
        let shared = matches!(
            vma.kind,
            VmaKind::Shared { .. } | VmaKind::FileShared { .. }
        );
        vma.prot & libc::PROT_WRITE as u32 != 0 && !shared && vma.kind != VmaKind::Stack
    });
    let writable: u64 = writable.map(|vma| vma.end - vma.start).sum();
    let vdso = of.vdso_end - of.vvar_start.min(of.vdso_end);
    let mut rest = Vec::new();
    without(&mapped(|_| true), &image_ranges(manifest), |start, end| {
        push(&mut rest, (start, end));
    });
    let goes = going(manifest, 0);
    let goes = goes.iter().map(len).sum::<u64>() + unused;
    let rest: u64 = rest.iter().map(len).sum::<u64>() - goes;
    // `rest` has what is our own already; of the data it is counted as a whole.
    (image + vdso + rest + area, writable + own + heap + area)
}

fn image_ranges(manifest: &Manifest) -> Vec<Range> {
    let mut ranges = Vec::new();
    for vma in &manifest.memory.vmas {
        push(&mut ranges, (vma.start, vma.end));
    }
    ranges
}

/// What is mapped now, by the fields of its line: permissions, inode, name.
fn mapped(wanted: impl Fn([&[u8]; 3]) -> bool) -> Vec<Range> {
    let text = procfs::read_file(b"/proc/self/maps").unwrap_or_default();
    let mut ranges = Vec::new();
    for line in text.split(|&b| b == b'\n') {
        let mut fields = line.split(|&b| b == b' ').filter(|f| !f.is_empty());
        let mut next = || fields.next().unwrap_or_default();
        let (range, perms, _, _, inode, name) = (next(), next(), next(), next(), next(), next());
        let mut ends = range.split(|&b| b == b'-').map(procfs::hex);
        if let (Some(Some(start)), Some(Some(end))) = (ends.next(), ends.next())
            && name != b"[vsyscall]"
            && wanted([perms, inode, name])
        {
            push(&mut ranges, (start, end));
        }
    }
    ranges
}

/// The program's memory without a file that the checkpoint does not have. Not our own: this
/// library still works with it.
fn going(manifest: &Manifest, rseq: u64) -> Vec<Range> {
    let anonymous = mapped(|[perms, inode, name]| {
        let known = name.is_empty() || name == b"[heap]" || name.starts_with(b"[anon:");
        perms.ends_with(b"p") && inode == b"0" && known
    });
    let mut keep: Vec<Range> = manifest
        .memory
        .vmas
        .iter()
        .map(|v| (v.start, v.end))
        .collect();
    keep.extend(region::own_ranges());
    keep.extend(fault::kept_open());
    if rseq != 0 {
        let page = rseq & !(PAGE - 1);
        keep.push((page, page + 2 * PAGE));
    }
    keep.sort_unstable();
    let mut whole = Vec::new();
    keep.into_iter().for_each(|range| push(&mut whole, range));
    let mut going = Vec::new();
    without(&anonymous, &whole, |start, end| going.push((start, end)));
    going
}

/// The leader, alone, on the helper's stack and with its heap: unmaps what goes anyway, where the limits could
/// not be raised so far that the restorer has room beside it.
pub fn make_room(manifest: &Manifest, rseq: u64) {
    if [libc::RLIMIT_AS, libc::RLIMIT_DATA].map(|r| now(r).0) == [u64::MAX; 2] {
        return;
    }
    // SAFETY: the region is this thread's now.
    unsafe { region::trim() };
    for (start, end) in going(manifest, rseq) {
        // SAFETY: memory of a state that is discarded; the threads that used it have ended.
        unsafe { syscall!(libc::SYS_munmap, start, end - start) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;
    use crate::image::state::VmaState;

    #[test]
    fn lifted_and_put_back() {
        in_child(|| {
            let manifest = Manifest::default();
            let before = now(libc::RLIMIT_FSIZE).1;
            assert!(set(libc::RLIMIT_FSIZE, (4096, before)));
            let lifted = lift(&manifest, &[(libc::RLIMIT_AS, 1 << 40, 1 << 40)]);
            assert_eq!(now(libc::RLIMIT_FSIZE).0, now(libc::RLIMIT_FSIZE).1);
            assert_eq!(headroom::address_space(), 1 << 40);
            drop(lifted);
            assert_eq!(now(libc::RLIMIT_FSIZE), (4096, before));
            assert_eq!(headroom::address_space(), now(libc::RLIMIT_AS).0);
        });
    }

    #[test]
    fn a_few_numbers_in_any_case() {
        in_child(|| {
            let hard = now(libc::RLIMIT_NOFILE).1;
            assert!(set(libc::RLIMIT_NOFILE, (5, hard)));
            let lifted = lift_numbers();
            assert_eq!(now(libc::RLIMIT_NOFILE), (2 * SPARE, hard));
            drop(lifted);
            assert_eq!(now(libc::RLIMIT_NOFILE), (5, hard));
        });
    }

    #[test]
    fn what_the_checkpoint_has_does_not_go() {
        in_child(|| {
            let map = |len: u64| {
                let (prot, flags) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                // SAFETY: fresh memory.
                unsafe { syscall!(libc::SYS_mmap, 0, len, prot, flags, -1i32, 0) as u64 }
            };
            let at = map(4 * PAGE);
            let mut manifest = Manifest::default();
            manifest.memory.vmas = vec![VmaState {
                start: at + PAGE,
                end: at + 2 * PAGE,
                prot: libc::PROT_READ as u32,
                kind: VmaKind::Anon,
                flags: 0,
            }];
            let going = going(&manifest, 0);
            let goes = |addr: u64| going.iter().any(|r| r.0 <= addr && addr < r.1);
            assert!(goes(at) && goes(at + 2 * PAGE) && goes(at + 3 * PAGE));
            assert!(!goes(at + PAGE));
        });
    }
}
