//! The plain state structs of a member's manifest: "live object -> plain
//! `XxxState` -> bytes". Collectors (`agent::collect`) fill them inside the
//! target, restorers (`agent::restore`) and the `ckpt` command read them.
//!
//! Here: the manifest, and what a process and its threads are. `memory` and `descriptors`
//! have the two large parts; all are called by the name of this module.
//!
//! Only data: no I/O, no system calls. Kernel names for kernel things.
//! Paths are bytes (`Vec<u8>`), times are nanoseconds, addresses are `u64`.

mod descriptors;
mod memory;

pub use descriptors::{
    DescriptorState, DescriptorTable, EpollEntry, FileKind, FileLock, InotifyWatch, LockKind,
    OpenAs, OpenFileState, QueuedData, SocketRole, SocketState,
};
pub use memory::{
    Base, Extent, MemoryState, OBJECTS_AT, ObjectSpace, SharedKind, SharedObject, VmaKind,
    VmaState, vma_flag,
};

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
