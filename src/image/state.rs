//! The plain state structs of a member's manifest: "live object -> plain
//! `XxxState` -> bytes". Collectors (`agent::collect`) fill them inside the
//! target, restorers (`agent::restore`) and the `ckpt` command read them.
//!
//! Only data here: no I/O, no system calls. Kernel names for kernel things.
//! Paths are bytes (`Vec<u8>`), times are nanoseconds, addresses are `u64`.

use serde::{Deserialize, Serialize};

/// Everything a member's image holds beside its pages and checksums.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub identity: Identity,
    pub process: ProcessState,
    pub memory: MemoryState,
    pub threads: Vec<ThreadState>,
    pub signals: SignalState,
    pub timers: TimerState,
    pub descriptors: DescriptorTable,
    /// Addresses inside the image that the restorer calls.
    pub entry: EntryPoints,
    /// In a section of its own (`codec`); empty in images of older programs.
    #[serde(skip)]
    pub clock: ClockState,
    /// Microseconds of each phase of the stop, in order: park, collect,
    /// snapshot (fork or copy), release.
    pub stop_phases_us: [u64; 4],
    /// In a section of its own (`codec`).
    #[serde(skip)]
    pub privileges: Privileges,
    /// Device and inode of the working directory, in a section of its own (`codec`); zeroes in
    /// images of older programs.
    #[serde(skip)]
    pub cwd_object: (u64, u64),
    /// In a section of its own (`codec`).
    #[serde(skip)]
    pub rare: Rare,
}

/// What few programs ask of the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rare {
    /// membarrier(2): the MEMBARRIER_CMD_REGISTER_* that are in force.
    pub membarrier: u32,
    /// In the order of `Manifest::threads`; those behind the end have nothing of it.
    pub threads: Vec<RareThread>,
    /// `DescriptorTable::hung_up`.
    pub hung_up: Vec<u32>,
}

/// What few threads have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RareThread {
    /// ioprio_set(2), 0 where none was set.
    pub ioprio: u32,
    /// SCHED_DEADLINE: runtime, deadline and period, ns.
    pub deadline: [u64; 3],
}

/// What the process and its threads may do, where that is not the kernel's default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Privileges {
    /// Ids, groups and capabilities: a new start must have the same (`collect::credentials`).
    pub credentials: Vec<u8>,
    /// PR_SET_MDWE.
    pub mdwe: u32,
    /// Memory protection keys that are allocated: bit n is key n.
    pub protection_keys: u32,
    /// Switches of threads, in the order of `Manifest::threads`; those behind the end are off.
    pub threads: Vec<Switches>,
}

/// What a thread has set for itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switches {
    /// PR_SET_KEEPCAPS.
    pub keepcaps: bool,
    /// PR_SET_TSC: reading the time stamp counter is a SIGSEGV.
    pub no_tsc: bool,
}

/// The clocks that count from the machine's start, and the vdso by which they are read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// The vdso as the program knows it: where, and its bytes.
    pub vdso_at: u64,
    pub vdso: Vec<u8>,
    /// It is ordinary memory whose functions lead to the kernel's own vdso.
    pub led: bool,
    /// A `clock_gettime` in the image that adds the offsets.
    pub gettime: u64,
    /// What the program's signal handlers return to.
    pub sigreturn: u64,
    /// What the kernel's clocks showed with all threads stopped, and by how much the program's
    /// are ahead of them (`agent::clock::Clock`).
    pub kernel: Vec<u64>,
    pub offsets: Vec<u64>,
    /// /proc/self/timens_offsets.
    pub namespace: Vec<u8>,
    /// A thread was stopped amid a function that reads a clock.
    pub amid: bool,
    /// System calls can be seen, so that times in them can be translated.
    pub net: bool,
}

/// What must be the same where the image is restored.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// `x86_64`.
    pub arch: String,
    /// The executable (`/proc/self/exe`) first, then every mapped ELF file.
    pub objects: Vec<ObjectId>,
    /// CPUID feature words and XCR0 as `agent::collect::cpu` defines them.
    pub cpu_features: Vec<u64>,
    pub uid: u32,
    pub gid: u32,
    pub hostname: String,
    pub boot_id: String,
    pub kernel: String,
    /// Digest of the kernel's own vdso (`agent::collect::identity::vdso_digest`).
    pub vdso: u64,
    /// CLOCK_REALTIME and CLOCK_MONOTONIC at the stop.
    pub realtime_ns: u64,
    pub monotonic_ns: u64,
}

/// A build of an executable or library.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectId {
    pub path: Vec<u8>,
    /// ELF note NT_GNU_BUILD_ID; empty when the file has none, then size and
    /// mtime decide.
    pub build_id: Vec<u8>,
    pub size: u64,
    pub mtime_ns: i64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessState {
    /// As the program sees it.
    pub pid: i32,
    pub ppid: i32,
    pub pgid: i32,
    pub sid: i32,
    pub cwd: Vec<u8>,
    pub umask: u32,
    pub exe: Vec<u8>,
    /// NUL-separated, as in /proc/self/cmdline.
    pub cmdline: Vec<u8>,
    /// `(resource, soft, hard)` for RLIMIT_* 0..16.
    pub rlimits: Vec<(u32, u64, u64)>,
    pub dumpable: i32,
    pub no_new_privs: bool,
    pub child_subreaper: bool,
    pub thp_disable: bool,
    pub personality: u32,
    pub oom_score_adj: i32,
    /// Not in use: `Privileges::threads`.
    pub keepcaps: bool,
    pub mm: MmFields,
    /// The bytes of /proc/self/auxv.
    pub auxv: Vec<u8>,
    /// `mlockall` flags in force (MCL_*), 0 for none.
    pub mlockall: u32,
    /// Dynamic XSAVE features the program was permitted (ARCH_GET_XCOMP_PERM).
    pub xcomp_perm: u64,
}

/// `struct prctl_mm_map` without the auxv pointer (prctl(2), PR_SET_MM_MAP).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmFields {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryState {
    /// Ascending, disjoint.
    pub vmas: Vec<VmaState>,
    /// Where page data lies in the image, ascending by address, disjoint.
    pub extents: Vec<Extent>,
    /// Shared memory objects whose contents are ours to keep.
    pub shared: Vec<SharedObject>,
    pub vvar_start: u64,
    pub vdso_start: u64,
    pub vdso_end: u64,
    /// The generation whose pages count where this one says nothing; `None` = this
    /// image is complete. With `dropped` in a section of its own (`codec`).
    #[serde(skip)]
    pub base: Option<Base>,
    /// `(address, pages)` for which the base no longer counts and which this image does
    /// not hold. Ascending, disjoint, also from `extents`; empty without a base.
    #[serde(skip)]
    pub dropped: Vec<(u64, u64)>,
    /// `(address, pages)` of guard regions (MADV_GUARD_INSTALL), which hold nothing and must
    /// not be touched. Ascending, disjoint. In a section of its own as well.
    #[serde(skip)]
    pub guarded: Vec<(u64, u64)>,
    /// Objects whose contents are pages of this image and of those it stands on, like
    /// memory's. Ascending by `at`, disjoint. In a section of its own.
    #[serde(skip)]
    pub objects: Vec<ObjectSpace>,
}

/// Addresses from here on are those of contents of objects: no memory is there.
pub const OBJECTS_AT: u64 = 1 << 60;

/// The contents of a shared object, or of an open file without a name: page `n` of it is
/// the page `at + n * 4096` of `MemoryState::extents` and `dropped`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectSpace {
    pub dev: u64,
    pub ino: u64,
    pub at: u64,
    pub npages: u64,
}

impl ObjectSpace {
    pub fn end(&self) -> u64 {
        self.at
            .saturating_add(self.npages.saturating_mul(super::PAGE))
    }
}

/// The image that an increment stands on (docs/INCREMENTS.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    pub generation: u64,
    /// The header checksum of its image at the time (`MemberRecord::header_crc`).
    pub header_crc: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmaState {
    pub start: u64,
    pub end: u64,
    /// PROT_*.
    pub prot: u32,
    pub kind: VmaKind,
    /// VmFlags of /proc/self/smaps that `madvise`, `mlock` and `mmap` set, one
    /// bit each (`vma_flag`).
    pub flags: u32,
}

/// VmFlags that are restored.
pub mod vma_flag {
    pub const HUGEPAGE: u32 = 1; // hg
    pub const NOHUGEPAGE: u32 = 1 << 1; // nh
    pub const LOCKED: u32 = 1 << 2; // lo
    pub const DONTFORK: u32 = 1 << 3; // dc
    pub const DONTDUMP: u32 = 1 << 4; // dd
    pub const NORESERVE: u32 = 1 << 5; // nr
    pub const WIPEONFORK: u32 = 1 << 6; // wf
    pub const MERGEABLE: u32 = 1 << 7; // mg
    pub const RANDOM: u32 = 1 << 8; // rr
    pub const SEQUENTIAL: u32 = 1 << 9; // sr
    pub const LOCKONFAULT: u32 = 1 << 10; // lf
    pub const GROWSDOWN: u32 = 1 << 11; // gd
    pub const HUGETLB: u32 = 1 << 12; // ht
    pub const MAYSHARE_WRITE: u32 = 1 << 13; // a shared mapping of a file opened for writing
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmaKind {
    /// Private anonymous; absent pages are zero.
    Anon,
    /// Grows down: the main thread's stack, and what was mapped with MAP_GROWSDOWN.
    Stack,
    /// The brk heap.
    Heap,
    /// A private mapping of a named file; pages not in the image come from it.
    FilePrivate { path: Vec<u8>, offset: u64 },
    /// A shared mapping of a named file: contents belong to the persistent state.
    FileShared {
        path: Vec<u8>,
        offset: u64,
        writable: bool,
    },
    /// A mapping of `MemoryState::shared[object]` at `offset`.
    Shared { object: u32, offset: u64 },
    /// A private mapping of `MemoryState::shared[object]`, a file without a name that is open
    /// ([`DescriptorTable::of_contents`]); pages not in the image come from it.
    PrivateOf { object: u32, offset: u64 },
}

impl VmaKind {
    /// A private mapping of a file: where it has no page of its own there is the file's.
    pub fn is_private_file(&self) -> bool {
        matches!(
            self,
            VmaKind::FilePrivate { .. } | VmaKind::PrivateOf { .. }
        )
    }
}

/// `npages` pages of 4096 bytes at `addr` lie at `offset` in the image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    pub addr: u64,
    pub npages: u64,
    pub offset: u64,
}

/// Anonymous shared memory, a memfd, SysV memory or a deleted file in a shared mapping.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedObject {
    pub dev: u64,
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// As /proc/self/maps shows it, without " (deleted)".
    pub name: Vec<u8>,
    pub kind: SharedKind,
    /// Contents: `addr` is the offset in the object. Empty where `MemoryState::objects`
    /// has it.
    pub extents: Vec<Extent>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SharedKind {
    /// MAP_SHARED|MAP_ANONYMOUS.
    #[default]
    Anonymous,
    Memfd,
    DeletedFile,
    SysV,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ThreadState {
    /// As the program sees it; equal to the pid for the main thread.
    pub tid: i32,
    /// The `ucontext_t` inside the image that rt_sigreturn takes.
    pub ucontext: u64,
    /// The restart record of an interrupted call, on the thread's own stack
    /// (`agent::callsites::restart`); 0 for an inserted caller.
    pub interrupted: u64,
    /// Where a resume function may put its stack: below everything of the thread
    /// that is still alive.
    pub resume_stack: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub robust_list: u64,
    pub robust_list_len: u64,
    pub clear_child_tid: u64,
    pub rseq: u64,
    pub rseq_len: u32,
    pub rseq_sig: u32,
    pub name: Vec<u8>,
    pub sched: SchedState,
    /// Signals pending for this thread alone, in queue order.
    pub pending: Vec<PendingSignal>,
    /// Captured by `ckpt_capture` (the caller of `ckpt_checkpoint`), not by a signal.
    pub inserted: bool,
    pub pdeathsig: i32,
    pub timer_slack_ns: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SchedState {
    pub policy: u32,
    pub priority: i32,
    pub nice: i32,
    pub reset_on_fork: bool,
    /// CPU mask, 64 CPUs a word; empty when equal to the process's default.
    pub affinity: Vec<u64>,
}

/// A queued signal: its number and the 128 bytes of its `siginfo_t`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingSignal {
    pub signo: i32,
    pub info: Vec<u8>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalState {
    /// Index = signal number - 1, for 1..=64; as the program sees them.
    pub actions: Vec<KernelSigaction>,
    /// Pending for the process, in queue order.
    pub pending: Vec<PendingSignal>,
}

/// `struct kernel_sigaction` of rt_sigaction(2) on x86_64.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelSigaction {
    pub handler: u64,
    pub flags: u64,
    pub restorer: u64,
    pub mask: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerState {
    /// ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF: (remaining, interval) in ns; the
    /// kernel's microsecond resolution.
    pub itimers: [(u64, u64); 3],
    pub posix: Vec<PosixTimer>,
}

/// A timer of timer_create(2), from /proc/self/timers and timer_gettime.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    pub id: i32,
    pub clock: i32,
    /// SIGEV_*.
    pub notify: i32,
    pub signo: i32,
    pub sigval: u64,
    /// The thread for SIGEV_THREAD_ID, as the program sees it.
    pub tid: i32,
    pub remaining_ns: u64,
    pub interval_ns: u64,
    pub overrun: i32,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryPoints {
    /// `extern "C" fn(*const HelperArgs) -> !`: the new helper thread.
    pub after_restore: u64,
    /// `extern "C" fn(*mut ucontext_t) -> !`: run by each thread on its own stack.
    pub resume_thread: u64,
    /// The agent's state block (`agent::state::Agent`).
    pub agent: u64,
}

/// The open file table (FIG. 6, step 630): descriptors, and the open file
/// descriptions they share.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Ascending by `fd`.
    pub fds: Vec<DescriptorState>,
    /// Open file descriptions; several descriptors may name one (dup).
    pub files: Vec<OpenFileState>,
    /// Record and flock locks held.
    pub locks: Vec<FileLock>,
    /// Pty masters (indices of `files`) whose slave was open and is closed: end of file, and
    /// not silence. In a section of its own: [`Rare`].
    #[serde(skip)]
    pub hung_up: Vec<u32>,
}

/// How a file whose contents are in the image is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenAs {
    pub fd: i32,
    /// For reading only, and a mapping of it may want more.
    pub wants_write: bool,
    /// It can be mapped privately again: it can be read, and a new start puts no other file there.
    pub private: bool,
}

impl DescriptorTable {
    /// The best descriptor of a file (device, inode) whose contents are in the image.
    pub fn of_contents(&self, id: (u64, u64)) -> Option<OpenAs> {
        let all = self.fds.iter().filter_map(|descriptor| {
            let file = self.files.get(descriptor.file as usize)?;
            const F_SEAL_WRITE: u32 = 8;
            let (of, huge, sealed) = match &file.kind {
                FileKind::Unlinked { dev, ino, .. } => ((*dev, *ino), false, false),
                FileKind::Memfd {
                    object_dev,
                    object_ino,
                    hugetlb,
                    seals,
                    ..
                } => (
                    (*object_dev, *object_ino),
                    *hugetlb != 0,
                    seals & F_SEAL_WRITE != 0,
                ),
                _ => return None,
            };
            // One that is sealed cannot be mapped shared by a descriptor for writing, on some
            // kernels not even to be read.
            let readable = match file.flags as i32 & (libc::O_ACCMODE | libc::O_PATH) {
                libc::O_RDWR => 2 - u32::from(sealed),
                libc::O_RDONLY => 1 + u32::from(sealed),
                _ => 0,
            };
            let private = readable > 0 && !huge && !descriptor.inherited;
            let fd = descriptor.fd;
            let open = OpenAs {
                fd,
                wants_write: readable < 2 && !sealed,
                private,
            };
            (of == id).then_some(((private, readable), open))
        });
        // The first of the best.
        let best = all.reduce(|best, next| if next.0 > best.0 { next } else { best });
        best.map(|(_, open)| open)
    }

    /// The extents of every open file whose contents are in the image.
    pub fn content_extents(&mut self) -> impl Iterator<Item = &mut Vec<Extent>> {
        let contents = |file| OpenFileState::contents_mut(file).map(|(_, _, extents)| extents);
        self.files.iter_mut().filter_map(contents)
    }
}

impl OpenFileState {
    /// Of a file whose contents are in the image: device and inode, size, and where they lie.
    pub fn contents_mut(&mut self) -> Option<((u64, u64), u64, &mut Vec<Extent>)> {
        match &mut self.kind {
            FileKind::Unlinked {
                dev,
                ino,
                size,
                extents,
                ..
            }
            | FileKind::Memfd {
                object_dev: dev,
                object_ino: ino,
                size,
                extents,
                ..
            } => Some(((*dev, *ino), *size, extents)),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorState {
    pub fd: i32,
    pub cloexec: bool,
    /// Index into [`DescriptorTable::files`].
    pub file: u32,
    /// The program was started with this descriptor and never put another file
    /// at its number: a new start's redirection of it is respected.
    pub inherited: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFileState {
    /// O_* as in fdinfo, without O_CLOEXEC.
    pub flags: u32,
    pub pos: i64,
    /// F_SETOWN: (type F_OWNER_*, pid) and F_SETSIG; zero for none.
    pub owner: (i32, i32),
    pub owner_sig: i32,
    pub kind: FileKind,
}

/// A message or byte run in flight, with descriptors passed in it refused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuedData {
    /// Stream: one element. Datagram and seqpacket: one element a message.
    pub messages: Vec<Vec<u8>>,
    /// Sender address of each datagram (raw sockaddr bytes), empty when unnamed.
    pub from: Vec<Vec<u8>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    Regular {
        path: Vec<u8>,
        dev: u64,
        ino: u64,
        /// When the file was made, 0 if its file system does not tell: inode
        /// numbers are used again.
        btime_ns: i64,
        size: u64,
        mode: u32,
    },
    /// Unlinked or O_TMPFILE: contents kept in the image at `extents`
    /// (`addr` is the offset in the file), sparse.
    Unlinked {
        path: Vec<u8>,
        dev: u64,
        ino: u64,
        size: u64,
        mode: u32,
        tmpfile: bool,
        extents: Vec<Extent>,
    },
    Directory {
        path: Vec<u8>,
        ino: u64,
    },
    /// Character devices that can simply be opened again (/dev/null, zero, full,
    /// random, urandom), block devices never.
    Device {
        path: Vec<u8>,
        rdev: u64,
    },
    /// A terminal other than a pty pair of our own; `termios` is the 36-byte
    /// kernel `struct termios`, `winsize` the 8-byte `struct winsize`.
    Tty {
        path: Vec<u8>,
        rdev: u64,
        termios: Vec<u8>,
        winsize: Vec<u8>,
    },
    /// A pty master opened by the process; its slave, when open too, is a `Tty`
    /// with `/dev/pts/<index>`.
    PtyMaster {
        index: u32,
        locked: bool,
        packet: bool,
        termios: Vec<u8>,
        winsize: Vec<u8>,
    },
    /// One end of a pipe; `pipe` is shared by both ends (its inode number).
    Pipe {
        pipe: u64,
        write_end: bool,
        capacity: u32,
        packet: bool,
        data: QueuedData,
    },
    Fifo {
        path: Vec<u8>,
        ino: u64,
        capacity: u32,
        data: QueuedData,
    },
    Memfd {
        object_dev: u64,
        object_ino: u64,
        name: Vec<u8>,
        seals: u32,
        size: u64,
        /// 0, or log2 of the huge page size.
        hugetlb: u32,
        mode: u32,
        extents: Vec<Extent>,
    },
    EventFd {
        count: u64,
        semaphore: bool,
    },
    TimerFd {
        clock: i32,
        /// Expirations not read yet.
        ticks: u64,
        remaining_ns: u64,
        interval_ns: u64,
        absolute: bool,
        cancel_on_set: bool,
    },
    SignalFd {
        mask: u64,
    },
    Epoll {
        entries: Vec<EpollEntry>,
    },
    Inotify {
        watches: Vec<InotifyWatch>,
        queued: bool,
    },
    /// A pidfd of the process itself.
    PidFdSelf {
        nonblock: bool,
    },
    /// A pidfd of a process that is gone.
    PidFdDead {
        nonblock: bool,
    },
    Socket(SocketState),
    /// 0-2 and inherited descriptors of a kind that belongs to whoever starts
    /// the program (terminal, pipe, socket to the outside): the new process's is
    /// taken. `path` for messages.
    Inherited {
        path: Vec<u8>,
        termios: Vec<u8>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollEntry {
    /// The number under which it was added; it may be closed or reused since.
    pub fd: i32,
    /// The open file description watched: index into [`DescriptorTable::files`].
    pub file: u32,
    pub events: u32,
    pub data: u64,
    /// `epoll_wait` had returned it and would not do so again before something new
    /// happens: the edge of an edge-triggered entry was consumed. False where that
    /// could not be found out.
    pub spent: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InotifyWatch {
    pub wd: i32,
    pub path: Vec<u8>,
    pub mask: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketState {
    pub ino: u64,
    pub domain: i32,
    pub ty: i32,
    pub protocol: i32,
    pub role: SocketRole,
    /// Raw `sockaddr` bytes, empty when unbound.
    pub local: Vec<u8>,
    pub remote: Vec<u8>,
    /// `(level, name, value bytes)` to be set again, in order.
    pub options: Vec<(i32, i32, Vec<u8>)>,
    /// Bytes received and not yet read.
    pub receive: QueuedData,
    /// SHUT_RD = 1, SHUT_WR = 2.
    pub shutdown: u8,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SocketRole {
    /// Created, perhaps bound, not connected.
    #[default]
    Idle,
    Listening {
        backlog: i32,
    },
    /// Both ends are in this process; the peer socket's inode.
    Pair {
        peer_ino: u64,
    },
    /// Connected to a listening socket of this process and not accepted yet.
    Queued {
        listener_ino: u64,
    },
    /// The other end is elsewhere: comes back as a reset connection.
    Outside,
    /// The other end had closed in order: comes back at its end of file.
    Ended,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileLock {
    pub kind: LockKind,
    pub write: bool,
    /// A descriptor through which it is taken again.
    pub fd: i32,
    /// Byte range for POSIX and OFD locks; `len` 0 means to the end.
    pub start: u64,
    pub len: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockKind {
    Flock,
    Posix,
    Ofd,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shared memory came back by the first descriptor of its file, though that was open for
    /// reading only: it could not be mapped, and there was no restart.
    #[test]
    fn the_best_descriptor_is_taken() {
        let file = |flags: i32, ino| OpenFileState {
            flags: flags as u32,
            pos: 0,
            owner: (0, 0),
            owner_sig: 0,
            kind: FileKind::Unlinked {
                path: Vec::new(),
                dev: 1,
                ino,
                size: 0,
                mode: 0,
                tmpfile: false,
                extents: Vec::new(),
            },
        };
        let fd = |fd, file, inherited| DescriptorState {
            fd,
            cloexec: false,
            file,
            inherited,
        };
        let table = DescriptorTable {
            files: vec![
                file(libc::O_RDONLY, 7),
                file(libc::O_RDWR | libc::O_APPEND, 7),
                file(libc::O_WRONLY, 8),
                file(libc::O_RDWR, 9),
            ],
            fds: vec![
                fd(3, 0, false),
                fd(4, 1, false),
                fd(5, 1, false),
                fd(6, 2, false),
                fd(7, 3, true),
            ],
            locks: Vec::new(),
            hung_up: Vec::new(),
        };
        let best = |ino| table.of_contents((1, ino));
        let open = |fd, wants_write, private| {
            Some(OpenAs {
                fd,
                wants_write,
                private,
            })
        };
        assert_eq!(best(7), open(4, false, true));
        assert_eq!(best(8), open(6, true, false));
        assert_eq!(best(9), open(7, false, false));
        assert_eq!(best(10), None);
    }
}
