//! What runs in the image's own code once the restorer has rebuilt the memory.
//!
//! [`after_restore`] is the new helper thread: it finishes what needs the new thread
//! ids (timers, pending signals, scheduling), resets the agent's state and opens the
//! barrier. [`resume_thread`] runs in each of the program's threads, on its own
//! stack, and returns into the saved frame. The addresses of both are in the
//! manifest, since this code is part of the image.

mod attributes;
mod timers;

use crate::agent::callsites::restart::{self, Clock};
use crate::agent::checkpoint::files;
use crate::agent::checkpoint::increments::prepare_restored;
use crate::agent::checkpoint::mapped::{self, Mapping};
use crate::agent::clock::{self, Clocks};
use crate::agent::collect::signals::{put_back, put_back_own};
use crate::agent::collect::{keys, process, rare};
use crate::agent::hooks;
use crate::agent::procfs::OwnFd;
use crate::agent::region::{self, Region};
use crate::agent::settings::GivenOutput;
use crate::agent::snapshot::copy;
use crate::agent::state::AGENT;
use crate::agent::track::{Kept, fault, mprotect};
use crate::agent::{
    ballast, exit, heap, helper, interface, log, own_memory, prefetch, request, rollback, settings,
    side, start, starter, state, stop, track,
};
use crate::image::codec;
use crate::image::state::{
    DescriptorState, Manifest, PendingSignal, ProcessState, Rare, SchedState, Switches,
    ThreadState, TimerState, VmaState,
};
use crate::persist::table;
use crate::store::report::RequestResult;
use ckpt_sys::blob::{RestorerArgs, RestorerThread};
use ckpt_sys::syscall;
use ckpt_sys::thread::sigreturn_to;
use serde::{Deserialize, Serialize};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

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
    tid: i32,
    name: [u8; 16],
    timer_slack_ns: u64,
    pdeathsig: i32,
    switches: Switches,
    /// The process has a death signal that is not the image's.
    anew: bool,
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

/// Futex: threads that have left the area.
static RESUMED: AtomicU32 = AtomicU32::new(0);

/// What the threads take from the payload themselves (their pending signals), as long
/// as they resume; null when there is nothing.
static PENDING: AtomicPtr<Payload> = AtomicPtr::new(std::ptr::null_mut());

/// In a resuming thread, all signals blocked.
fn put_back_pending(tid: i32) {
    // SAFETY: `after_restore` keeps the payload alive until every thread is counted out.
    let Some(payload) = (unsafe { PENDING.load(Ordering::SeqCst).as_ref() }) else {
        return;
    };
    for signal in payload
        .threads
        .iter()
        .filter(|t| t.tid == tid)
        .flat_map(|t| &t.pending)
    {
        put_back_own(signal);
    }
}

const FUTEX_WAIT_PRIVATE: i32 = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
const FUTEX_WAKE_PRIVATE: i32 = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;

/// The entry of each restored thread, on its own stack below its saved frame.
///
/// # Safety
/// Only the restorer jumps here, with what the manifest says of this thread.
pub unsafe extern "C" fn resume_thread(
    uc: *mut libc::ucontext_t,
    interrupted: u64,
    record: *const ThreadRecord,
) -> ! {
    // SAFETY: the blob passes what the manifest says; the record lies in the area,
    // which stays mapped until every thread has counted itself out below.
    unsafe {
        fault::let_through();
        hooks::altstack::claim();
        syscall!(libc::SYS_prctl, libc::PR_SET_NAME, &(*record).name);
        syscall!(
            libc::SYS_prctl,
            libc::PR_SET_TIMERSLACK,
            (*record).timer_slack_ns
        );
        // A starter's child has had the starter's until now, and who goes back what it set since.
        if (*record).pdeathsig != 0 || (*record).anew {
            starter::set_death_signal((*record).pdeathsig);
        }
        let switches = (*record).switches;
        if switches != Switches::default() || (*record).anew {
            let keep = u64::from(switches.keepcaps);
            syscall!(libc::SYS_prctl, libc::PR_SET_KEEPCAPS, keep, 0, 0, 0);
            let tsc = match switches.no_tsc {
                true => libc::PR_TSC_SIGSEGV,
                false => libc::PR_TSC_ENABLE,
            };
            syscall!(libc::SYS_prctl, libc::PR_SET_TSC, tsc, 0, 0, 0);
        }
        put_back_pending((*record).tid);
        let stopped_ns = stop::STOPPED_AT_NS.load(Ordering::SeqCst);
        hooks::clock::put_off(stop::now_ns().wrapping_sub(stopped_ns) as i64);
        if interrupted != 0 {
            let pending = &*(interrupted as *const restart::Interrupted);
            restart::finish(uc, pending, Clock::StoodStill { stopped_ns });
        }
        if AGENT.ids_translated.load(Ordering::SeqCst) {
            hooks::ids::locks::enter_again(uc);
        }
        stop::go_on(uc);
        RESUMED.fetch_add(1, Ordering::SeqCst);
        syscall!(libc::SYS_futex, &RESUMED, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0);
        sigreturn_to(uc)
    }
}

/// The entry of the new helper thread.
///
/// # Safety
/// Only the restorer calls this, once, with arguments in the area.
pub unsafe extern "C" fn after_restore(args: *const HelperArgs) -> ! {
    // SAFETY: `args` and all it points to lie in the area; every program thread waits
    // at the barrier, so this thread has the agent's state for itself.
    unsafe {
        let args = *args;
        let region = args.region as *mut Region;
        adopt_dtv(region, args.main_fs);
        region::publish(args.region);
        region::publish_scratch(args.scratch.0, args.scratch.0 + args.scratch.1);
        helper::take_over(region);
        table::forget();
        stop::reset_after_restore();
        request::reset_after_restore();
        side::reset_after_restore();
        copy::reset_after_restore();
        rollback::reset_after_restore();
        prefetch::forget();
        ballast::forget();
        track::forget();
        RESUMED.store(0, Ordering::SeqCst);
        let restorer = &*(args.restorer as *const RestorerArgs);
        wait_at_least(&restorer.ready, expected_threads(restorer));
        let bytes =
            std::slice::from_raw_parts(args.payload.0 as *const u8, args.payload.1 as usize);
        let mut payload = codec::decode::<Payload>(bytes);
        PENDING.store(std::ptr::null_mut(), Ordering::SeqCst);
        match &mut payload {
            Ok(payload) => {
                // First: what this thread changes in the image's memory from here on is
                // a change since the generation like any other.
                let fd = payload.watching.take().map(OwnFd::from_raw);
                let kept = payload.kept.take();
                let flags = std::mem::take(&mut payload.flags);
                // Where memory is not what the image has, the next one must be complete.
                let known = !payload.clocks.replaced;
                if let Some(settings) = settings::restored(payload).filter(|_| known) {
                    mprotect::while_resuming(resuming(restorer), args.scratch, || {
                        let kept = kept.as_ref();
                        prepare_restored(&settings, payload.generation, fd, kept, flags);
                    });
                }
                rebuild(restorer, payload);
                begin_table(payload);
                put_protected(payload);
                prefetch::prepare(payload);
                if payload.threads.iter().any(|t| !t.pending.is_empty()) {
                    PENDING.store(payload, Ordering::SeqCst);
                }
            }
            // Same build, same memory: cannot happen. The program still runs on.
            Err(error) => log::line(format_args!("restored state unreadable: {error}")),
        }
        helper::mark_running();
        restorer.go.store(1, Ordering::SeqCst);
        syscall!(
            libc::SYS_futex,
            &restorer.go,
            FUTEX_WAKE_PRIVATE,
            i32::MAX,
            0,
            0,
            0
        );
        wait_at_least(&RESUMED, restorer.nthreads as u32);
        hooks::altstack::settle();
        PENDING.store(std::ptr::null_mut(), Ordering::SeqCst);
        drop(payload);
        // The initial thread of a process whose leader had exited ends in the area;
        // the kernel clears the word when it is gone.
        while restorer.leader_word.load(Ordering::SeqCst) != 0 {
            let pause = [0u64, 100_000];
            syscall!(libc::SYS_nanosleep, &pause, 0);
        }
        let stages = restorer.stage_ns;
        let us = |a: usize, b: usize| (stages[b] - stages[a]) / 1000;
        log::line(format_args!(
            "restored: unmap {} us, map {} us, threads {} us, all {} us",
            us(0, 1),
            us(1, 2),
            us(2, 3),
            (stop::now_ns() - stages[0]) / 1000
        ));
        syscall!(libc::SYS_munmap, args.scratch.0, args.scratch.1);
        region::publish_scratch(0, 0);
    }
    helper::live(helper::Life::Restored)
}

/// What must stay open of the threads at the barrier.
fn resuming(restorer: &RestorerArgs) -> Vec<mprotect::Resuming> {
    // SAFETY: the blob's thread table lies in the area.
    let threads = unsafe {
        std::slice::from_raw_parts(
            restorer.threads as *const RestorerThread,
            restorer.nthreads as usize,
        )
    };
    let resuming = threads.iter().map(|thread| mprotect::Resuming {
        ucontext: thread.entry_arg[0],
        fs: thread.fs_base,
        words: [thread.robust_list, thread.clear_child_tid, thread.rseq],
    });
    resuming.collect()
}

fn expected_threads(restorer: &RestorerArgs) -> u32 {
    restorer.nthreads as u32
}

fn wait_at_least(word: &AtomicU32, count: u32) {
    loop {
        let now = word.load(Ordering::SeqCst);
        if now >= count {
            return;
        }
        let timeout = [0u64, 10_000_000];
        // SAFETY: a futex word of ours and a valid timespec.
        unsafe {
            syscall!(
                libc::SYS_futex,
                word,
                FUTEX_WAIT_PRIVATE,
                now,
                &timeout,
                0,
                0
            )
        };
    }
}

/// The helper's dynamic TLS table takes the image's generation, so that lookups stay
/// on the fast path.
///
/// # Safety
/// `region` is laid out; `fs` is the thread pointer of a glibc thread of the image.
unsafe fn adopt_dtv(region: *mut Region, fs: u64) {
    // SAFETY: per contract: fs:8 is the thread's dtv, its first word the generation.
    unsafe {
        let dtv = *((*region).tls as *const u64).add(1) as *mut u64;
        if fs != 0 {
            *dtv = **((fs + 8) as *const *const u64);
        }
    }
}

/// Everything that needs the new threads to exist.
fn rebuild(restorer: &RestorerArgs, payload: &Payload) {
    // SAFETY: the blob's thread table lies in the area.
    let threads = unsafe {
        std::slice::from_raw_parts(
            restorer.threads as *const RestorerThread,
            restorer.nthreads as usize,
        )
    };
    // SAFETY: no arguments.
    let real_pid = unsafe { syscall!(libc::SYS_getpid) } as i32;
    AGENT.real_pid.store(real_pid, Ordering::SeqCst);
    starter::die_with(payload.starter);
    let pid = payload.process.pid;
    AGENT.pid.store(pid, Ordering::SeqCst);
    let pairs: Vec<(i32, i32)> = threads.iter().map(|t| (t.tid, t.new_tid)).collect();
    let translated = real_pid != pid || pairs.iter().any(|(old, new)| old != new);
    AGENT.ids_translated.store(translated, Ordering::SeqCst);
    clock::adopt(&payload.clocks);
    // SAFETY: every other thread waits at the barrier.
    unsafe {
        heap::in_agent_heap(|| {
            hooks::after_restore(&hooks::Restored {
                pairs: &pairs,
                old_pid: pid,
                new_pid: real_pid,
                mapped: &payload.mapped,
                image_files: &payload.image_files,
                pgid: payload.process.pgid,
                sid: payload.process.sid,
            });
            settings::adopt(payload);
            interface::restored(payload.generation);
            if let Some(settings) = settings::get() {
                exit::configure(settings.config.keep_on_exit);
            }
            // Before any thread runs: the image may name another job (its template), which an
            // early exit would remove.
            exit::set_job_dir(&payload.job_dir);
        });
        let _ = state::wake();
    }
    let own = (pid, real_pid);
    let real = |tid: i32| {
        let mut all = pairs.iter().chain([&own]);
        all.find(|(old, _)| *old == tid)
            .map_or(tid, |(_, new)| *new)
    };
    for (index, thread) in payload.threads.iter().enumerate() {
        let tid = real(thread.tid);
        // The leader of a process that goes back may have been changed since.
        let changed = payload.return_value.is_some();
        let rare = payload.rare.threads.get(index).copied();
        attributes::set_sched(tid, &thread.sched, rare.unwrap_or_default(), changed);
    }
    rare::register(payload.rare.membarrier);
    let someone = pairs.first().map_or(real_pid, |(_, new)| *new);
    attributes::set_owners(&payload.owners, someone);
    if let Some(value) = payload.return_value {
        AGENT.return_value.store(value.max(1), Ordering::SeqCst);
    }
    rollback::ask::adopt(&payload.asked, &payload.answers);
    request::ask_again(&payload.open);
    for signal in payload.pending.iter().chain(&payload.kept_signals) {
        put_back(signal);
    }
    // Before its limit may forbid it.
    lock_future(payload.process.mlockall);
    keys::restore(payload.protection_keys, payload.return_value.is_some());
    // What the program had set itself, the rest as the process was started.
    let own = &payload.process.rlimits;
    let given = settings::get().map_or(&[][..], |s| &s.limits);
    let given = given.iter().filter(|g| !own.iter().any(|o| o.0 == g.0));
    for &(resource, soft, hard) in own.iter().chain(given) {
        attributes::set_rlimit(resource, soft, hard);
    }
    // SAFETY: no pointers.
    unsafe {
        syscall!(
            libc::SYS_prctl,
            libc::PR_SET_DUMPABLE,
            payload.process.dumpable.min(1),
            0,
            0,
            0
        )
    };
    // Last of all: what is executable is so by now. That it can be set was asked before.
    if payload.mdwe != 0
        && let Err(errno) = process::set_mdwe(payload.mdwe)
    {
        start::give_up(format_args!(
            "PR_SET_MDWE cannot be set again: errno {errno}"
        ));
    }
    timers::set(&payload.timers, &payload.kept_timers, &real);
}

/// mlockall(MCL_FUTURE): what is mapped from here on. What was locked is locked already.
fn lock_future(flags: u32) {
    if flags == 0 {
        return;
    }
    // SAFETY: no pointers.
    let ret = unsafe { syscall!(libc::SYS_mlockall, u64::from(flags)) };
    if ret != 0 {
        log::line(format_args!(
            "new memory of the program is not locked any more (mlockall): errno {}",
            -ret
        ));
    }
}

/// The tracker is at work already: what is written here has changed since the checkpoint.
fn put_protected(payload: &Payload) {
    for some in payload.protected.chunks(own_memory::PARTS) {
        some.iter().for_each(|part| fault::touch(part.0, part.1));
        // The ranges were writable at the checkpoint (`rollback::check`), so they are now, but for
        // what lies behind the end of a shared file whose size was not known.
        // SAFETY: the bytes lie in the area; the places are the program's, to be written.
        if let Err(errno) = unsafe { own_memory::scatter(some) } {
            start::give_up(format_args!(
                "cannot go on from the checkpoint: what was to be kept cannot be written: errno {errno}"
            ));
        }
    }
}

/// The table that leads back to the generation again. Without it the program could not
/// go on: what it did to files would not be known.
fn begin_table(payload: &Payload) {
    let Some(settings) = settings::get() else {
        return;
    };
    let job = std::path::Path::new(std::ffi::OsStr::from_bytes(&payload.job_dir));
    if let Err(reason) = files::resume(job, payload.generation, &settings.config, &payload.shared) {
        start::give_up(format_args!("cannot go on from the checkpoint: {reason}"));
    }
}
