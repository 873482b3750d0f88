//! Recovery (FIG. 8): from a checked image to the jump into the restorer.
//!
//! Constructor of the new process, or at a rollback the leader of the old one, alone, with
//! the control block of the helper ([`Inside`]): one thread; std and libc may be used,
//! since all of this process's memory is about to be replaced, but for what needs a locale
//! (`std::io::Error` asks libc for its text): that control block has none. Every error is one
//! line and exit status 125.

pub mod ahead;
pub mod alone;
pub mod area;
pub mod attributes;
pub mod check;
pub mod clocks;
pub mod contents;
pub mod descriptors;
pub mod handlers;
pub mod layout;
pub mod method;
pub mod proxy;
pub mod stay;
pub mod tape;
pub mod unpack;

use crate::agent::checkpoint::increments::Knowledge;
use crate::agent::collect::descriptors::sys;
use crate::agent::recover::files::FilesBack;
use crate::agent::region::{self, Region};
use crate::agent::resume::{HelperArgs, Payload, ThreadRecord};
use crate::agent::rollback::check::Protected;
use crate::agent::stop::rseq_area;
use crate::agent::{clock, hooks, log, procfs, settings};
use crate::config::RestoreMethod;
use crate::errno::Errno;
use crate::image::chain::ChainError;
use crate::image::codec;
use crate::image::state::{FileKind, Manifest, OpenFileState, VmaKind};
use crate::store::RawFs;
use crate::store::find::FoundMember;
use crate::store::working_set::WorkingSet;
use area::Area;
use ckpt_sys::blob::{BLOB_THREAD_STACK, RESTORER, RestorerArgs, RestorerThread};
use ckpt_sys::syscall;
use ckpt_sys::thread::enter_restorer;
pub use contents::Contents;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// What cannot be brought back here.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    Check(#[from] check::CheckError),
    #[error(transparent)]
    Descriptors(#[from] descriptors::RestoreError),
    #[error("change to the working directory {path}: {error}")]
    Cwd { path: String, error: Errno },
    #[error("put the chain of images together: {0}")]
    Chain(#[from] ChainError),
    #[error("unpack the image of generation {generation}: {error}")]
    Unpack { generation: u64, error: Errno },
    #[error("find free address space for the restorer: errno {0}")]
    Area(i32),
    #[error("rebuild shared memory {name}: {error}")]
    Shared { name: String, error: Errno },
    #[error("encode the state for the restored process: {0}")]
    Payload(String),
    #[error("find free address space for the vdso")]
    NoPlace,
    #[error("lead the vdso to this kernel's: {0}")]
    Vdso(#[from] crate::agent::vdso::VdsoError),
    #[error("permit the vector features that the image uses: errno {0}")]
    Features(i32),
}

impl RestoreError {
    /// Is this generation the obstacle, so that an older one may do?
    pub fn is_of_the_generation(&self) -> bool {
        match self {
            RestoreError::Check(error) => error.is_of_the_generation(),
            // Not where there is no room for it, say: that would be so with any other.
            RestoreError::Unpack { error, .. } => *error == unpack::DAMAGED,
            RestoreError::Chain(_) => true,
            _ => false,
        }
    }
}

/// How to restore (from the environment).
pub struct Options {
    pub method: RestoreMethod,
    /// The job's directory.
    pub job: PathBuf,
    pub files: FilesBack,
    /// Rollback in the running process.
    pub inside: Option<Inside>,
    /// What [`Contents::of`] found, where that was asked before.
    pub contents: Option<Contents>,
}

/// What is different in a process that runs already.
#[derive(Default)]
pub struct Inside {
    /// The C library's rseq area of this thread, and its length.
    pub rseq: (u64, u32),
    /// Memory that keeps its content.
    pub protected: Protected,
    /// What has changed since, where that is known.
    pub pages: Option<Knowledge>,
    /// The tracker's descriptor.
    pub watching: Option<OwnedFd>,
}

/// Mapped files that stay where somebody else has moved them.
fn follow_moved(manifest: &mut Manifest, files: &FilesBack) {
    for vma in &mut manifest.memory.vmas {
        if let VmaKind::FileShared { path, .. } = &mut vma.kind
            && let Some((_, now)) = files.moved.iter().find(|(old, _)| old == path)
        {
            path.clone_from(now);
        }
    }
}

/// Restores a member. Returns only with an error, and then this process is
/// as good as before (or a child of it that must exit with 125).
///
/// `lock` is the job's lock, to be kept by the helper; `payload` what the restored
/// process must know and the manifest does not say.
pub fn restore(
    member: FoundMember<RawFs>,
    lock: Option<OwnedFd>,
    options: Options,
    mut payload: Payload,
) -> Result<std::convert::Infallible, RestoreError> {
    let Contents {
        pieces,
        objects,
        files,
        mappable,
    } = match options.contents {
        Some(contents) => contents,
        None => Contents::of(&member, &options.job)?,
    };
    // The descriptors as well: this is the program's table.
    let FoundMember {
        image, file, older, ..
    } = member;
    drop((file, older));
    let mut manifest = image.manifest;
    let mut inside = options.inside;
    // From inside that was done before there was no way back; `check::machine` was asked
    // before the files went back.
    follow_moved(&mut manifest, &options.files);
    contents::place(&mut manifest, &objects);
    let mut mapped = Vec::new();
    if inside.is_none() {
        check::files(&manifest)?;
        mapped = check::hold_mapped(&manifest)?;
    }
    attributes::raise_nofile(&manifest);
    if inside.is_some() {
        // SAFETY: no pointers.
        unsafe {
            // The clocks of the vdso need it; each thread gets its own switch in the end.
            syscall!(libc::SYS_prctl, libc::PR_SET_TSC, libc::PR_TSC_ENABLE);
            // What is mapped on the way is not to be locked; what was locked is mapped anew.
            if hooks::memory::locked_in_future() != 0 {
                syscall!(libc::SYS_munlockall);
            }
        }
    }
    // From inside, the threads' old ids are free unless somebody else has taken one.
    let mut same = true;
    if inside.is_none() {
        alone::be_alone();
        same = proxy::become_pid(manifest.process.pid, attributes::death_signal(&manifest))
            == proxy::Identity::Same;
        payload.starter = proxy::starter();
    }
    attributes::permit_features(&manifest)?;
    attributes::process(&manifest, inside.is_some());
    let path = os(&manifest.process.cwd);
    std::env::set_current_dir(&path).map_err(|error| RestoreError::Cwd {
        path: path.to_string_lossy().into_owned(),
        error: error.into(),
    })?;

    // The images that contents come from, and the lock. The number that each image of the
    // chain has in this list, if any:
    let mut place: Vec<Option<usize>> = vec![None; files.len()];
    let mut keep: Vec<RawFd> = Vec::new();
    for (number, file) in files.into_iter().enumerate() {
        if let Some(file) = file {
            place[number] = Some(keep.len());
            keep.push(file.as_raw_fd());
            // From here on the numbers in `keep` count; the owners must not close them.
            std::mem::forget(file);
        }
    }
    let lock_at = lock.as_ref().map(|lock| {
        keep.push(lock.as_raw_fd());
        keep.len() - 1
    });
    std::mem::forget(lock);
    let watching = inside.as_mut().and_then(|inside| inside.watching.take());
    let watching_at = watching.map(|fd| {
        keep.push(fd.into_raw_fd());
        keep.len() - 1
    });
    let mapped_at = keep.len();
    let (mapped_paths, mapped): (Vec<_>, Vec<_>) = mapped.into_iter().unzip();
    keep.extend(mapped.into_iter().map(IntoRawFd::into_raw_fd));
    let late = restore_descriptors(
        &manifest,
        &place,
        &mut keep,
        &mut payload,
        &options.files,
        inside.is_some(),
    )?;
    // The restorer's tape closes them.
    let mapped_fds = keep.split_off(mapped_at);
    let held: Vec<_> = mapped_paths.into_iter().zip(mapped_fds).collect();
    let image_fd = keep[0];
    let image_fds: Vec<i32> = place
        .iter()
        .map(|at| at.map_or(-1, |at| keep[at]))
        .collect();
    let lock_fd = lock_at.map(|at| keep[at]);
    // SAFETY: no pointers.
    unsafe { libc::umask(manifest.process.umask) };

    let mut shared_fds: Vec<Option<i32>> = Vec::new();
    for (k, object) in manifest.memory.shared.iter().enumerate() {
        let fd = match descriptor_of(&manifest, object.dev, object.ino) {
            Some(fd) => Some(fd),
            None if tape::needs_file(&manifest, k) => {
                let fd = contents::rebuild(object, &image_fds)?;
                keep.push(fd);
                Some(fd)
            }
            None => None,
        };
        shared_fds.push(fd);
    }

    payload.take_from(&manifest);
    let clocks = clocks::decide(&manifest)?;
    if let Some(why) = clocks.lead {
        log::line(format_args!("{why}"));
    }
    let ahead = clocks.offsets[clock::Clock::Monotonic as usize];
    if ahead != 0 {
        log::line(format_args!(
            "the program's clock goes on, {}.{:03} s ahead of this machine's",
            ahead / 1_000_000_000,
            ahead / 1_000_000 % 1000
        ));
    }
    let taken: Vec<(u64, u64)> = manifest
        .memory
        .vmas
        .iter()
        .map(|vma| (vma.start, vma.end))
        .chain([(manifest.memory.vvar_start, manifest.memory.vdso_end)])
        .chain([clocks::taken(&manifest)])
        .collect();
    let watching = watching_at.map(|at| keep[at]);
    let stay = inside.as_mut().and_then(|inside| {
        let mut pages = inside.pages.take().filter(|_| clocks.lead.is_none())?;
        // A copy: the descriptor itself goes on to the next life.
        let copy = watching.map(|fd| sys::dup_above(fd, 0)).transpose().ok()?;
        let moved = pages.tracker.moved(copy.map(procfs::OwnFd::from_raw));
        moved.ok()?;
        let root = &payload.store_root;
        stay::look(pages, &manifest, &pieces, root, inside.rseq.0)
    });
    let areas = inside.is_some().then(|| manifest.memory.vmas.clone());
    let pieces = match &stay {
        Some(stay) => {
            // From here on memory means what is to be made.
            manifest.memory.vmas.clone_from(&stay.areas);
            payload.watching = watching;
            payload.kept = Some(stay.kept.clone());
            &stay.pieces
        }
        None => &pieces,
    };
    let before = WorkingSet::read(&RawFs, &options.job);
    let choice = if pieces.is_empty() {
        method::NOTHING
    } else {
        let open = image_fds.iter().filter(|&&fd| fd >= 0);
        // SAFETY: open until the restorer closes them.
        let borrow = |&fd: &i32| unsafe { BorrowedFd::borrow_raw(fd) };
        let files: Vec<_> = open.map(borrow).collect();
        method::choose(options.method, pieces, &files, before.as_ref())
    };
    let lazy = choice.lazy && mappable;
    if lazy && choice.cold {
        ahead::at_once(pieces, before.as_ref(), &image_fds);
    }
    log::line(format_args!(
        "memory is {} ({}), {} images, {} pieces",
        if lazy { "mapped" } else { "read" },
        if mappable { choice.why } else { "unpacked" },
        image_fds.iter().filter(|&&fd| fd >= 0).count(),
        pieces.len(),
    ));
    let mut options = tape::Options {
        lazy,
        cold: lazy && choice.cold,
        collapse: false,
        noexec: false,
        max_maps: 65530,
        huge_pages: (0, 0),
        image_fds,
        held,
    };
    // Where all memory stays mapped nobody wants to know.
    if !manifest.memory.vmas.is_empty() {
        options.collapse = !manifest.process.thp_disable && huge_pages_allowed();
        options.noexec = is_noexec(image_fd);
        let limit = read_number(b"/proc/sys/vm/max_map_count");
        options.max_maps = limit.unwrap_or(options.max_maps);
        options.huge_pages = huge_pages();
    }
    if !options.cold {
        payload.flags = areas.unwrap_or_default();
    }
    let contents = tape::plan(&manifest, pieces, &options);

    // Sizes first: the area must not move.
    let nthreads = manifest.threads.len();
    let stacks = nthreads as u64 * BLOB_THREAD_STACK;
    let maps: usize = contents.iter().map(|area| area.maps.len()).sum();
    let parts = || inside.iter().flat_map(|inside| inside.protected.parts());
    let kept: usize = parts().map(|(_, bytes)| bytes.len() + 64 + 3 * 10).sum();
    let files = options.image_fds.len();
    let fetched = if options.cold {
        maps + before.as_ref().map_or(0, WorkingSet::runs)
    } else {
        0
    };
    let images = stay.as_ref().map_or(0, |stay| stay.images.len());
    let payload_room =
        4 * codec_len(&payload)? + (maps + files + 2 * (fetched + images)) as u64 * 32;
    let scratch = RESTORER.len() as u64
        + tape::area_needed(&manifest, &contents)
        + stay.as_ref().map_or(0, tape::stay_needs)
        + stacks
        + nthreads as u64 * (size_of::<RestorerThread>() + size_of::<ThreadRecord>() + 128) as u64
        + payload_room
        + kept as u64
        + manifest.clock.vdso.len() as u64
        + (256 << 10);
    let known = stay.as_ref().map(|stay| &stay.mapped[..]);
    let mut area = Area::map(scratch, &taken, known).map_err(RestoreError::Area)?;
    let here = clocks::here();
    let vvar_start = match clocks.lead {
        Some(_) if here.len > 0 => {
            area::free_place(&taken, here.len).ok_or(RestoreError::NoPlace)?
        }
        Some(_) => 0,
        None => manifest.memory.vvar_start,
    };
    let (led, content) = clocks::lead(&manifest, &clocks, &here, vvar_start)?;
    payload.clocks = led;
    let led_content = content.map(|content| area.put(&content));
    let blob = area.put(RESTORER);
    let shared_fd = |k: usize| shared_fds[k];
    let writable = |path: &[u8]| can_write(path);
    let mut tape = tape::Tape::default();
    if let Some(stay) = &stay {
        tape::stay(&mut tape, stay, &options, &mut area);
    }
    tape::memory(
        &mut tape, &manifest, &contents, &options, &mut area, &shared_fd, &writable,
    );
    if let Some(content) = led_content {
        clocks::place(&mut tape, &manifest, content);
    }
    for work in &late {
        tape::late(&mut tape, work, &mut area);
    }
    tape::process(&mut tape, &manifest, &mut area);
    payload.mapped = std::mem::take(&mut tape.mapped);
    payload.cold = options.cold;
    if options.cold {
        (payload.prefetch, payload.touched) = ahead::queue(&payload.mapped, before.as_ref());
    }
    for &(file, example) in &tape.examples {
        payload.add_image_file(options.image_fds[file as usize], example);
    }
    if let Some(stay) = &stay {
        payload.mapped.extend_from_slice(&stay.images);
        payload.mapped.sort_unstable();
        let files = stay::image_files(&stay.images);
        payload.image_files.extend(files);
    }

    let anew = payload.starter != 0 || inside.is_some();
    let records = manifest.threads.iter();
    let switches = |k: usize| {
        let all = &manifest.privileges.threads;
        all.get(k).copied().unwrap_or_default()
    };
    let records: Vec<_> = records
        .enumerate()
        .map(|(k, t)| ThreadRecord::of(t, switches(k), anew))
        .collect();
    let records = area.put_slice(&records);
    let pid = manifest.process.pid;
    let threads: Vec<RestorerThread> = manifest
        .threads
        .iter()
        .enumerate()
        .map(|(k, t)| RestorerThread {
            tid: t.tid,
            new_tid: 0,
            fs_base: t.fs_base,
            gs_base: t.gs_base,
            robust_list: t.robust_list,
            robust_list_len: t.robust_list_len,
            clear_child_tid: t.clear_child_tid,
            rseq: t.rseq,
            rseq_len: t.rseq_len,
            rseq_sig: t.rseq_sig,
            entry: manifest.entry.resume_thread,
            entry_stack: t.resume_stack,
            entry_arg: [
                t.ucontext,
                t.interrupted,
                records + (k * size_of::<ThreadRecord>()) as u64,
            ],
            is_main: (t.tid == pid) as u32,
            pad: 0,
        })
        .collect();
    let leader_exits = !threads.iter().any(|t| t.is_main != 0);
    let threads_at = area.put_slice(&threads);
    let tape_at = area.put_slice(&tape.ops);
    let stacks_at = area.take(stacks as usize + 64);

    for (addr, bytes) in parts() {
        let entry = (addr, bytes.len() as u64, area.put(bytes));
        payload.protected.push(entry);
    }
    let bytes = codec::encode(&payload).map_err(|e| RestoreError::Payload(e.to_string()))?;
    let payload_at = area.put(&bytes);
    // The helper drops every descriptor but the lock; the program's table drops these.
    let close_at = area.put_slice(&keep);
    // SAFETY: the region part of the area is mapped, zero and unused.
    unsafe {
        region::lay_out(area.region, area.region_len).map_err(RestoreError::Area)?;
        if let Some(fd) = lock_fd {
            (*(area.region as *mut Region)).keep_fds[0] = fd;
        }
        if let Some(fd) = payload.watching {
            (*(area.region as *mut Region)).keep_fds[1] = fd;
        }
    }
    // SAFETY: a region that was just laid out.
    let (helper_tls, helper_stack) = unsafe {
        (
            (*(area.region as *const Region)).tls,
            (*(area.region as *const Region)).stack_top,
        )
    };
    let args_at = area.take(size_of::<RestorerArgs>());
    let helper_at = area.put_slice(&[HelperArgs {
        restorer: args_at,
        region: area.region,
        scratch: (area.start, area.scratch_len),
        payload: (payload_at, bytes.len() as u64),
        main_fs: manifest.threads.first().map_or(0, |t| t.fs_base),
    }]);
    let stack_at = area.take(64 << 10) + (64 << 10) - 64;
    let rseq = inside.as_ref().map_or_else(own_rseq, |inside| inside.rseq);
    let args = RestorerArgs {
        area: area.start,
        area_len: area.total_len(),
        task_size: crate::agent::collect::memory::TASK_SIZE,
        rseq: rseq.0,
        rseq_len: rseq.1 as u64,
        rseq_sig: crate::agent::collect::threads::RSEQ_SIG as u64,
        tape: tape_at,
        tape_len: tape.ops.len() as u64,
        threads: threads_at,
        nthreads: nthreads as u64,
        thread_stacks: stacks_at,
        use_set_tid: same as u32,
        message_fd: 2,
        vvar_start,
        helper_stack,
        helper_tls,
        helper_entry: manifest.entry.after_restore,
        helper_arg: helper_at,
        close_fds: close_at,
        nclose_fds: keep.len() as u64,
        ready: AtomicU32::new(0),
        go: AtomicU32::new(0),
        leader_exits: leader_exits as u32,
        leader_word: AtomicU32::new(leader_exits as u32),
        stays: stay.is_some() as u64,
        share_from: tape.shared.0 as u64,
        share_to: tape.shared.1 as u64,
        share_next: AtomicU64::new(0),
        helper_busy: AtomicU32::new(0),
        played: AtomicU32::new(0),
        stage_ns: [0; 4],
    };
    // SAFETY: the room was taken above; everything the blob needs lies in the area;
    // all signals are blocked before this stack is left.
    unsafe {
        (args_at as *mut RestorerArgs).write(args);
        let everything = u64::MAX;
        syscall!(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &everything,
            0,
            8
        );
        enter_restorer(blob, args_at, stack_at & !15)
    }
}

/// The administrator has not forbidden transparent huge pages.
fn huge_pages_allowed() -> bool {
    let path = b"/sys/kernel/mm/transparent_hugepage/enabled";
    procfs::read_file(path).is_ok_and(|text| !text.windows(7).any(|w| w == b"[never]"))
}

/// The open file table; descriptors in `keep` may get other numbers.
fn restore_descriptors(
    manifest: &Manifest,
    place: &[Option<usize>],
    keep: &mut [RawFd],
    payload: &mut Payload,
    files: &FilesBack,
    inside: bool,
) -> Result<Vec<descriptors::Late>, RestoreError> {
    let images: Vec<_> = place.iter().map(|at| at.map(|at| keep[at])).collect();
    let source =
        contents::ImageSource::map(manifest, &images).map_err(|error| RestoreError::Shared {
            name: "image".into(),
            error: error.into(),
        })?;
    let mut warn = |line: &str| log::line(format_args!("{line}"));
    let mut ctx = descriptors::Context {
        keep,
        program_pid: manifest.process.pid,
        warn: &mut warn,
        files,
        inside,
    };
    let restored = descriptors::restore(&manifest.descriptors, &source, &mut ctx)?;
    payload.inherited = restored
        .inherited
        .iter()
        .map(|i| (i.fd, i.dev, i.ino))
        .collect();
    // What the program had put elsewhere for a while at the checkpoint comes back to its number.
    let given = settings::get().map_or(&[][..], |s| &s.inherited);
    for &(fd, dev, ino) in given {
        let is_it = |file: &OpenFileState| matches!(&file.kind, FileKind::Regular { dev: d, ino: i, .. } if (*d, *i) == (dev, ino));
        let known = payload.inherited.iter().any(|known| known.0 == fd);
        if !known && manifest.descriptors.files.iter().any(is_it) {
            payload.inherited.push((fd, dev, ino));
        }
    }
    Ok(restored.late)
}

fn os(bytes: &[u8]) -> std::path::PathBuf {
    use std::os::unix::ffi::OsStrExt;
    std::path::PathBuf::from(std::ffi::OsStr::from_bytes(bytes))
}

/// A descriptor of the program through which a shared object is open.
fn descriptor_of(manifest: &Manifest, dev: u64, ino: u64) -> Option<i32> {
    let table = &manifest.descriptors;
    let file = table.files.iter().position(|file| match &file.kind {
        FileKind::Memfd {
            object_dev,
            object_ino,
            ..
        } => (*object_dev, *object_ino) == (dev, ino),
        FileKind::Unlinked { dev: d, ino: i, .. } => (*d, *i) == (dev, ino),
        _ => false,
    })?;
    table
        .fds
        .iter()
        .find(|d| d.file as usize == file)
        .map(|d| d.fd)
}

fn codec_len(payload: &Payload) -> Result<u64, RestoreError> {
    Ok(codec::encode(payload)
        .map_err(|e| RestoreError::Payload(e.to_string()))?
        .len() as u64)
}

fn read_number(path: &[u8]) -> Option<u64> {
    procfs::read_file(path)
        .ok()
        .and_then(|t| procfs::number(&t))
        .map(|n| n as u64)
}

/// The size of a huge page and how many are free.
fn huge_pages() -> (u64, u64) {
    let text = procfs::read_file(b"/proc/meminfo").unwrap_or_default();
    let number = |key| {
        let value = procfs::field(&text, key).and_then(procfs::number);
        value.unwrap_or(0) as u64
    };
    let reserved = number("HugePages_Rsvd");
    let free = number("HugePages_Free").saturating_sub(reserved);
    (number("Hugepagesize") << 10, free)
}

/// glibc's rseq registration of this very thread.
fn own_rseq() -> (u64, u32) {
    let mut fs = 0u64;
    // SAFETY: the kernel fills one word (ARCH_GET_FS).
    unsafe { syscall!(libc::SYS_arch_prctl, 0x1003, &mut fs) };
    rseq_area(fs)
}

fn is_noexec(fd: i32) -> bool {
    // SAFETY: all-zero is a valid statfs buffer; the kernel fills it.
    unsafe {
        let mut st: libc::statvfs = std::mem::zeroed();
        libc::fstatvfs(fd, &mut st) == 0 && st.f_flag & libc::ST_NOEXEC != 0
    }
}

fn can_write(path: &[u8]) -> bool {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(os(path))
        .is_ok()
}
