//! What the image's code is told of the new process: it lies in the area, made by the
//! constructor of a recovery (`restore`) or by the leader of a rollback.

use crate::agent::checkpoint::mapped::{self, Mapping};
use crate::agent::clock::Clocks;
use crate::agent::settings::GivenOutput;
use crate::agent::track::Kept;
use crate::image::state::{
    DescriptorState, Manifest, PendingSignal, ProcessState, Rare, SchedState, Switches,
    ThreadState, TimerState, VmaState,
};
use crate::store::report::RequestResult;
use ckpt_sys::syscall;
use serde::{Deserialize, Serialize};

/// What the blob hands to the new helper; lies in the area.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct HelperArgs {
    pub restorer: u64,
    pub region: u64,
    /// The part of the area to be unmapped in the end, with the guard page behind it.
    pub scratch: (u64, u64),
    /// The encoded [`Payload`].
    pub payload: (u64, u64),
    /// Thread pointer of some thread of the image.
    pub main_fs: u64,
}

/// What a thread sets for itself; lies in the area.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ThreadRecord {
    pub(super) tid: i32,
    pub(super) name: [u8; 16],
    pub(super) timer_slack_ns: u64,
    pub(super) pdeathsig: i32,
    pub(super) switches: Switches,
    /// The process has a death signal that is not the image's.
    pub(super) anew: bool,
}

impl ThreadRecord {
    /// `anew`: the process is a starter's child, or goes back inside.
    pub fn of(thread: &ThreadState, switches: Switches, anew: bool) -> ThreadRecord {
        let mut name = [0u8; 16];
        let n = thread.name.len().min(15);
        name[..n].copy_from_slice(&thread.name[..n]);
        ThreadRecord {
            tid: thread.tid,
            name,
            timer_slack_ns: thread.timer_slack_ns,
            pdeathsig: thread.pdeathsig,
            switches,
            anew,
        }
    }
}

/// A thread's state that its helper sets from outside.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ThreadRest {
    pub tid: i32,
    pub sched: SchedState,
    pub pending: Vec<PendingSignal>,
}

/// An image file that memory is mapped from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFile {
    /// As stat(2) has them.
    pub dev: u64,
    pub ino: u64,
    /// An address where it is mapped.
    pub example: u64,
}

/// What the restored process must know besides its memory.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Payload {
    pub threads: Vec<ThreadRest>,
    pub pending: Vec<PendingSignal>,
    pub timers: TimerState,
    pub process: ProcessState,
    pub mdwe: u32,
    pub protection_keys: u32,
    /// Whom the kernel signals that a descriptor is ready (F_SETOWN_EX), where that is not the
    /// process: (fd, F_OWNER_*, id).
    pub owners: Vec<(i32, i32, i32)>,
    pub rare: Rare,
    /// Ranges that are mappings of image files (start, end, `vma_flag`s), and which
    /// files those are.
    pub mapped: Vec<(u64, u64, u32)>,
    pub image_files: Vec<ImageFile>,
    /// Ranges of `mapped` to be brought into memory ahead of the program, in order.
    pub prefetch: Vec<(u64, u64)>,
    /// So many of them were touched after the restart before, the rest is all there is.
    pub touched: u64,
    /// The mappings are advised MADV_RANDOM until then.
    pub cold: bool,
    /// The environment of the new start, as far as the library reads it.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the generation came from: the job's directory and its number.
    pub job_dir: Vec<u8>,
    pub job_key: Vec<u8>,
    pub store_root: Vec<u8>,
    pub generation: u64,
    /// Parts of files that memory maps shared and writable.
    pub shared: Vec<Mapping>,
    /// Descriptors that the new process was started with: (fd, dev, ino).
    pub inherited: Vec<(i32, u64, u64)>,
    /// Files that the new process was given to write; nothing is said where `limits` is empty.
    pub outputs: Vec<GivenOutput>,
    /// Resource limits of the new start; empty: the process is not a new one.
    pub limits: Vec<(u32, u64, u64)>,
    /// What the new start may do; empty: as for the limits.
    pub credentials: Vec<u8>,
    /// CPUs of the new start; empty: as for the limits.
    pub affinity: Vec<u64>,
    /// The process that stands in for this one, or 0.
    pub starter: i32,
    /// CLOCK_MONOTONIC at the constructor's start, for the log.
    pub started_ns: u64,
    /// Rollback: what `ckpt_checkpoint` returns; a recovery has it in the environment.
    pub return_value: Option<i32>,
    /// Rollback: memory that keeps its content (address, length, where the content is).
    pub protected: Vec<(u64, u64, u64)>,
    /// Rollback: signals that others have sent since the checkpoint.
    pub kept_signals: Vec<PendingSignal>,
    /// Rollback: timers that exist already, stopped.
    pub kept_timers: Vec<i32>,
    /// Rollback: requests of the command to be answered.
    pub asked: Vec<u32>,
    /// Rollback: those that are still to be carried out (`request::open_asked`), and the answers
    /// that were given a moment ago: a command may not have read them yet.
    pub open: Vec<u64>,
    pub answers: Vec<RequestResult>,
    /// Rollback that has left memory mapped: the descriptor by which it is watched.
    pub watching: Option<i32>,
    /// And what is known of that memory.
    pub kept: Option<Kept>,
    /// Rollback: the areas with their flags, which need not be read again.
    pub flags: Vec<VmaState>,
    /// How the clocks go on.
    pub clocks: Clocks,
}

impl Payload {
    /// Copies what the helper needs from the manifest.
    pub fn take_from(&mut self, manifest: &Manifest) {
        self.threads = manifest
            .threads
            .iter()
            .map(|t| ThreadRest {
                tid: t.tid,
                sched: t.sched.clone(),
                pending: t.pending.clone(),
            })
            .collect();
        self.pending = manifest.signals.pending.clone();
        self.timers = manifest.timers.clone();
        self.process = manifest.process.clone();
        self.process.auxv.clear();
        self.mdwe = manifest.privileges.mdwe;
        self.protection_keys = manifest.privileges.protection_keys;
        self.owners = owners(manifest);
        self.rare = manifest.rare.clone();
        self.shared = mapped::of(manifest.memory.vmas.iter());
    }

    /// Remembers a file that lazy ranges map.
    pub fn add_image_file(&mut self, fd: i32, example: u64) {
        // SAFETY: all-zero is a valid stat buffer; the kernel fills it.
        unsafe {
            let mut st: libc::stat = std::mem::zeroed();
            if syscall!(libc::SYS_fstat, fd, &mut st) == 0 {
                self.image_files.push(ImageFile {
                    dev: st.st_dev,
                    ino: st.st_ino,
                    example,
                });
            }
        }
    }
}

/// [`Payload::owners`]: the constructor can set no other than the process itself.
fn owners(manifest: &Manifest) -> Vec<(i32, i32, i32)> {
    const F_OWNER_PGRP: i32 = 2;
    let table = &manifest.descriptors;
    let mut owners = Vec::new();
    for (index, file) in table.files.iter().enumerate() {
        let (kind, id) = file.owner;
        let of_file = |d: &&DescriptorState| d.file as usize == index;
        let process = kind != F_OWNER_PGRP && id == manifest.process.pid;
        if id != 0
            && !process
            && let Some(d) = table.fds.iter().find(of_file)
        {
            owners.push((d.fd, kind, id));
        }
    }
    owners
}
