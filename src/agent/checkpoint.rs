//! The order of a checkpoint (FIG. 6): helper thread.
//!
//! trigger -> files of the new generation -> pre-copy -> stop -> collect -> sweep ->
//! snapshot (copy, fork or write) -> release -> write -> publish -> prune. A checkpoint
//! that fails leaves the previous generation the latest and the program running, and what
//! had changed is kept for the next one.

pub mod files;
pub mod increments;
pub mod mapped;
mod take;

use crate::agent::collect::descriptors::Known;
use crate::agent::collect::identity;
use crate::agent::collect::memory::PAGE;
use crate::agent::helper::Life;
use crate::agent::hooks::files::outside;
use crate::agent::merge::Merger;
use crate::agent::outputs::keep::Streams;
use crate::agent::prefetch::{self, Prefetch};
use crate::agent::rollback::order::{self, Refused, Wanted, Which};
use crate::agent::settings::{self, Settings};
use crate::agent::state::AGENT;
use crate::agent::stop::now_ns;
use crate::agent::{ballast, children, ending, exit, interface, log, refusal, request, rollback};
use crate::config::Interval;
use crate::interval::{Cost, Pace};
use crate::persist::table;
use crate::store::generation::{GenerationKind, GenerationRecord, MemberRecord};
use crate::store::lock::{JobLock, Owner};
use crate::store::start::{Claimed, claim};
use crate::store::{Job, JobKey, Pending, RawFs, history, report};
use ckpt_sys::syscall;
use files::Beginning;
use increments::Increments;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;
use take::{HELD, Taken, take};

/// Why there is no checkpoint this time.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Will pass: a live child, a held critical section.
    #[error("{0}")]
    Postponed(String),
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    Store(String),
}

fn refused(error: impl std::fmt::Display) -> CheckpointError {
    CheckpointError::Refused(error.to_string())
}

fn store_error(error: impl std::fmt::Display) -> CheckpointError {
    CheckpointError::Store(error.to_string())
}

/// Who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trigger {
    Clock,
    Call,
    Command,
    /// The program is about to go back, and the state that it leaves is kept.
    Undo,
}

impl Trigger {
    fn name(self) -> &'static str {
        match self {
            Trigger::Clock => "clock",
            Trigger::Call => "call",
            Trigger::Command => "command",
            Trigger::Undo => "undo",
        }
    }
}

/// The helper's working state.
pub struct Worker {
    settings: &'static Settings,
    claimed: Option<Claimed>,
    streams: Streams,
    /// Mapped files that were looked through for system calls of their own.
    looked: outside::Looked,
    /// The program's files, as the checkpoint before has found them.
    known: Known,
    owner: Option<Owner>,
    /// CLOCK_MONOTONIC of the next clock checkpoint; `None` = no clock.
    due_ns: Option<u64>,
    /// What checkpoints cost here (`CKPT_INTERVAL=auto`).
    pace: Pace,
    /// A postponed request is tried again at this time.
    retry_ns: Option<u64>,
    /// How often in a row it was postponed.
    postponed: u32,
    /// When to look whether the program has ended by itself.
    look_ns: u64,
    last_generation: Option<u64>,
    report: report::Report,
    /// The `ckpt_checkpoint` that the latest image holds as taken; only compared.
    included: *const request::InsertedCall,
    increments: Increments,
    merger: Merger,
    prefetch: Option<Prefetch>,
    /// Nonces of the command's requests that the next outcome answers.
    asked: Vec<u32>,
    /// The generation that the program is about to go back to.
    going_to: Option<u64>,
}

/// When a postponed checkpoint is tried again: a look is one system call, and a program
/// that starts one short child after the other leaves only small gaps between them.
fn retry_delay(tried: u32) -> u64 {
    (2_000_000 * (1 + u64::from(tried) / 32)).min(50_000_000)
}

fn interval_ns(settings: &Settings, pace: &Pace) -> Option<u64> {
    match settings.config.interval? {
        Interval::Off => None,
        Interval::Every(duration) => Some(duration.as_nanos() as u64),
        Interval::Auto => Some(pace.interval().as_nanos() as u64),
    }
}

/// Processor time of this thread.
fn cpu_time() -> Duration {
    let mut time = [0u64; 2];
    // SAFETY: the kernel fills both words.
    unsafe {
        syscall!(
            libc::SYS_clock_gettime,
            libc::CLOCK_THREAD_CPUTIME_ID,
            &mut time
        )
    };
    Duration::new(time[0], time[1] as u32)
}

impl Worker {
    pub fn new(life: Life) -> Worker {
        // Set before any helper is started.
        let settings = settings::get().expect("settings are published before the helper starts");
        let owner = Owner::current().ok();
        let config = &settings.config;
        let pace = Pace::new(config.mtbf, f64::from(config.overhead) / 100_000.0);
        let mut worker = Worker {
            settings,
            claimed: None,
            streams: Streams::default(),
            looked: outside::Looked::default(),
            known: Known::default(),
            owner,
            due_ns: interval_ns(settings, &pace).map(|ns| now_ns() + ns),
            pace,
            retry_ns: None,
            postponed: 0,
            look_ns: now_ns(),
            last_generation: None,
            report: report::Report::default(),
            included: std::ptr::null(),
            increments: increments::take_restored()
                .unwrap_or_else(|| Increments::new(settings.config.tracker)),
            merger: Merger::new(),
            prefetch: prefetch::take(),
            asked: Vec::new(),
            going_to: None,
        };
        ballast::take();
        if life == Life::Restored {
            worker.adopt_job();
        }
        worker
    }

    /// After a restore: the lock's descriptor came along, the job is the old one.
    fn adopt_job(&mut self) {
        let Some((dir, generation)) = &self.settings.restored else {
            return;
        };
        let dir = PathBuf::from(std::ffi::OsStr::from_bytes(dir));
        let Some(fd) = crate::agent::region::kept_fd() else {
            return;
        };
        // SAFETY: the descriptor was handed over to this thread alone.
        let lock = JobLock::adopt(unsafe { OwnedFd::from_raw_fd(fd) }, dir.clone());
        if let Some(owner) = &self.owner {
            let _ = lock.set_owner(owner);
        }
        match Job::open(RawFs, dir) {
            Ok(job) => {
                let _ = job.remove_leftovers();
                files::prune(&job);
                let generations = job.generations();
                let record = generations.iter().find(|g| g.generation == *generation);
                self.streams = files::adopt_streams(&job.dir, record);
                exit::set_job_dir(job.dir.as_os_str().as_bytes());
                AGENT.has_store.store(true, Ordering::SeqCst);
                self.last_generation = Some(*generation);
                self.claimed = Some(Claimed { lock, job });
            }
            Err(error) => log::line(format_args!("{error}")),
        }
    }

    /// One round: waits, does what is wanted. False when the helper shall end.
    pub fn step(&mut self) -> bool {
        let now = now_ns();
        let merge = self.merger.due();
        let prefetch = self.prefetch.as_ref().map(Prefetch::due);
        let next = [self.due_ns, self.retry_ns, merge, prefetch];
        let next = next.into_iter().flatten();
        let next = next.fold(self.look_ns, u64::min);
        let wanted = request::wait(Some(next.saturating_sub(now)));
        if refusal::RETIRE.load(Ordering::SeqCst) {
            self.last_words();
            return false;
        }
        let now = now_ns();
        table::alive(identity::realtime_ns() as i64);
        if let Some(soon) = ending::hint() {
            self.look_ns = self.look_ns.min(now + soon);
        }
        if now >= self.look_ns {
            self.look_ns = now + ending::look();
        }
        self.rollbacks();
        let clock = self.due_ns.is_some_and(|due| now >= due);
        let retry = self.retry_ns.is_some_and(|due| now >= due);
        let call = request::inserted_call().is_some();
        self.asked.extend(request::take_asked(request::CHECKPOINT));
        if call || wanted & request::CHECKPOINT != 0 || clock || retry {
            let trigger = if call {
                Trigger::Call
            } else if wanted & request::CHECKPOINT != 0 || (retry && !clock) {
                Trigger::Command
            } else {
                Trigger::Clock
            };
            self.checkpoint(trigger);
        }
        if wanted & request::REPORT != 0 {
            for nonce in request::take_asked(request::REPORT) {
                self.report.answer(nonce, None, None);
            }
            self.write_report();
        }
        self.merge();
        self.prefetch();
        true
    }

    /// Goes back if that is wanted; what is refused is answered.
    fn rollbacks(&mut self) {
        if let Some(nonce) = rollback::ask::granted() {
            self.report.answer(nonce, self.last_generation, None);
            self.write_report();
        }
        if let Some(call) = rollback::call::pending() {
            let refused = self.roll_back(&Wanted {
                which: Which::Id(call.id),
                value: call.value,
                regions: (call.regions, call.nregions),
                asked: Vec::new(),
            });
            rollback::call::answer(-refused.errno);
        }
        for nonce in request::take_asked(request::ROLLBACK) {
            let root = PathBuf::from(std::ffi::OsStr::from_bytes(&self.settings.store_root));
            let reason = match rollback::ask::read(&root, nonce) {
                Ok(wanted) => self.roll_back(&wanted).reason,
                Err(reason) => reason,
            };
            self.report.answer(nonce, None, Some(reason));
            self.write_report();
        }
    }

    /// Returns when it is refused.
    fn roll_back(&mut self, wanted: &Wanted) -> Refused {
        let keep = self.settings.config.undo || wanted.which == Which::Left;
        let kept = match keep {
            true => self
                .keep_state(wanted)
                .map(|(wanted, left)| (wanted, Some(left))),
            false => Ok((wanted.clone(), None)),
        };
        let refused = match kept {
            Ok((wanted, left)) => {
                let increments = &mut self.increments;
                order::go_back(
                    self.settings,
                    self.claimed.as_mut(),
                    increments,
                    &wanted,
                    left,
                )
            }
            Err(refused) => refused,
        };
        log::line(format_args!("rollback refused: {}", refused.reason));
        refused
    }

    /// Before going back: a generation of the state that will be left.
    fn keep_state(&mut self, wanted: &Wanted) -> Result<(Wanted, u64), Refused> {
        let to = order::check(self.settings, self.claimed.as_ref(), wanted)?;
        self.going_to = Some(to);
        ballast::drop();
        let taken = self.try_checkpoint(Trigger::Undo);
        ballast::take();
        self.going_to = None;
        self.included = std::ptr::null();
        let left = taken.map_err(|error| Refused {
            errno: match error {
                CheckpointError::Store(_) => libc::EIO,
                _ => libc::EAGAIN,
            },
            reason: format!("the state that is left cannot be kept (CKPT_UNDO): {error}"),
        })?;
        self.last_generation = Some(left);
        self.report.last_generation = Some(left);
        self.report.last_checkpoint_ns = identity::realtime_ns();
        self.report.checkpoints += 1;
        let wanted = Wanted {
            which: Which::Generation(to),
            ..wanted.clone()
        };
        Ok((wanted, left))
    }

    /// After a lazy restore: a moment's work ahead of the program.
    fn prefetch(&mut self) {
        if let Some(prefetch) = self.prefetch.as_mut().filter(|p| now_ns() >= p.due())
            && exit::enter_store()
        {
            if !prefetch.slice(self.claimed.as_ref().map(|claimed| &claimed.job)) {
                self.prefetch = None;
            }
            exit::leave_store();
        }
    }

    /// A slice of the merge under way.
    fn merge(&mut self) {
        let longest = self.settings.config.chain;
        let due = self.merger.due().is_some_and(|due| now_ns() >= due);
        if let Some(claimed) = self.claimed.as_mut().filter(|_| due)
            && exit::enter_store()
        {
            if self.merger.slice(&mut claimed.job, longest) {
                let (keep, now) = (self.settings.config.keep, identity::realtime_ns());
                if let Err(error) = claimed.job.prune(keep, self.last_generation, now) {
                    log::line(format_args!("{error}"));
                }
            }
            exit::leave_store();
        }
    }

    fn checkpoint(&mut self, trigger: Trigger) {
        let answering = !self.asked.is_empty();
        ballast::drop();
        let result = self.try_checkpoint(trigger);
        ballast::take();
        let now = now_ns();
        if let Some(ns) = interval_ns(self.settings, &self.pace)
            && self.due_ns.is_some_and(|due| now >= due)
        {
            self.due_ns = Some(now + ns);
        }
        self.retry_ns = None;
        match result {
            Ok(generation) => {
                self.postponed = 0;
                self.last_generation = Some(generation);
                interface::committed(generation);
                self.report.last_generation = Some(generation);
                self.report.last_checkpoint_ns = identity::realtime_ns();
                self.report.checkpoints += 1;
                request::answer_call(self.included, 1);
                for nonce in std::mem::take(&mut self.asked) {
                    self.report.answer(nonce, Some(generation), None);
                }
            }
            Err(CheckpointError::Postponed(reason)) => {
                // The caller of ckpt_checkpoint is told; the clock and the command wait.
                request::answer(-libc::EAGAIN);
                if trigger != Trigger::Call {
                    self.retry_ns = Some(now + retry_delay(self.postponed));
                    self.postponed = self.postponed.saturating_add(1);
                }
                self.refuse(reason, trigger);
                return;
            }
            Err(CheckpointError::Refused(reason)) => {
                request::answer(-libc::EAGAIN);
                self.fail_asked(&reason);
                self.refuse(reason, trigger);
            }
            Err(CheckpointError::Store(reason)) => {
                request::answer(-libc::EIO);
                self.fail_asked(&reason);
                self.refuse(reason, trigger);
            }
        }
        if trigger == Trigger::Command || answering {
            self.write_report();
        }
    }

    /// No checkpoint will be taken any more: the reason is to be found in the log and by
    /// `ckpt status`.
    fn last_words(&mut self) {
        let reason = refusal::disabled().unwrap_or("the program no longer permits it");
        log::line(format_args!("checkpoint refused from now on: {reason}"));
        self.fail_asked(reason);
        let (reason, time_ns) = (reason.to_owned(), identity::realtime_ns());
        self.report.last_refusal = Some(report::Refusal { reason, time_ns });
        self.write_report();
    }

    fn fail_asked(&mut self, reason: &str) {
        for nonce in std::mem::take(&mut self.asked) {
            self.report.answer(nonce, None, Some(reason.to_owned()));
        }
    }

    fn refuse(&mut self, reason: String, trigger: Trigger) {
        let same = self
            .report
            .last_refusal
            .as_ref()
            .is_some_and(|r| r.reason == reason);
        if !same {
            log::line(format_args!(
                "checkpoint refused ({}): {reason}",
                trigger.name()
            ));
        }
        self.report.refused += 1;
        let time_ns = identity::realtime_ns();
        self.report.last_refusal = Some(report::Refusal { reason, time_ns });
        if trigger == Trigger::Command {
            self.write_report();
        }
    }

    /// Claims the job at the first checkpoint.
    fn job(&mut self) -> Result<&mut Claimed, CheckpointError> {
        if self.claimed.is_none() {
            let root = PathBuf::from(std::ffi::OsStr::from_bytes(&self.settings.store_root));
            let name = String::from_utf8_lossy(&self.settings.job_key);
            let key = JobKey::from_dir_name(&name);
            let owner = match &self.owner {
                Some(owner) => owner.clone(),
                None => Owner::current().map_err(store_error)?,
            };
            let supersede = self.settings.config.resume == crate::config::Resume::Never;
            let claimed = claim(&root, &key, &owner, supersede).map_err(store_error)?;
            exit::set_job_dir(claimed.job.dir.as_os_str().as_bytes());
            AGENT.has_store.store(true, Ordering::SeqCst);
            self.owner = Some(owner);
            self.claimed = Some(claimed);
        }
        self.claimed
            .as_mut()
            .ok_or_else(|| CheckpointError::Store("no job".into()))
    }

    /// The files of a new generation, claimed from the store before the stop.
    fn begin(&mut self) -> Result<Pending<RawFs>, CheckpointError> {
        let fs = RawFs;
        let mut pending = self.job()?.job.begin().map_err(store_error)?;
        if let Err(error) = pending.create_member(&fs) {
            pending.abort(&fs);
            return Err(store_error(error));
        }
        Ok(pending)
    }

    fn before_the_stop(&self) -> Result<(), CheckpointError> {
        if let Some(reason) = refusal::disabled() {
            return Err(CheckpointError::Refused(reason.into()));
        }
        if request::MAILBOX.holds.load(Ordering::SeqCst) != 0 {
            return Err(CheckpointError::Postponed(HELD.into()));
        }
        if let Some(reason) = refusal::noted_reason() {
            return Err(CheckpointError::Refused(reason.into()));
        }
        children::none_alive().map_err(CheckpointError::Postponed)
    }

    fn try_checkpoint(&mut self, trigger: Trigger) -> Result<u64, CheckpointError> {
        self.before_the_stop()?;
        let cpu = cpu_time();
        let settings = self.settings;
        let last = self.last_generation;
        let ending = || CheckpointError::Refused("the program is ending".into());
        let fs = RawFs;
        if !exit::enter_store() {
            return Err(ending());
        }
        let begun = self.begin();
        exit::leave_store();
        let pending = begun?;
        let generation = pending.generation;
        let taken = self.take(&pending, trigger);
        let (beginning, taken) = match taken {
            Ok(taken) => taken,
            Err(error) => {
                table::close_previous();
                pending.abort(&fs);
                return Err(error);
            }
        };
        self.included = taken.call;
        let bytes_logical = self.logical(&taken);
        let files = files::finish(&beginning, &mut self.streams, taken.outputs);
        let record = GenerationRecord {
            generation,
            // Nobody asked for a state that is left by a name.
            id: if trigger == Trigger::Undo {
                0
            } else {
                taken.id
            },
            parent: last,
            time_ns: taken.realtime_ns,
            host: taken.host.clone(),
            boot_id: taken.boot_id.clone(),
            kind: if taken.increment {
                GenerationKind::Increment
            } else {
                GenerationKind::Full
            },
            members: vec![MemberRecord {
                pid: AGENT.pid.load(Ordering::Relaxed),
                cmdline: taken.cmdline.clone(),
                threads: taken.threads,
                bytes: taken.outcome.bytes_stored,
                header_crc: taken.outcome.header_crc,
            }],
            stop_us: taken.stop_us,
            persist_us: (now_ns() - taken.stopped_ns) / 1000,
            bytes_logical,
            bytes_stored: taken.outcome.bytes_stored,
            pages_dirty: taken.outcome.pages,
            tracker: self.increments.tracker.name().into(),
            snapshot: taken.snapshot.into(),
            trigger: trigger.name().into(),
            files,
            phases: taken.phases,
            merged: None,
        };
        if !exit::enter_store() {
            return Err(ending());
        }
        let going_to = self.going_to;
        let claimed = self.job()?;
        let published = claimed.job.publish(pending, &record).map_err(store_error);
        let (keep, now) = (settings.config.keep, taken.realtime_ns);
        let pruned = claimed.job.prune_but(keep, Some(generation), going_to, now);
        files::prune(&claimed.job);
        self.looked.look();
        exit::leave_store();
        published?;
        self.increments.published(generation);
        if let Some(claimed) = self.claimed.as_ref().filter(|_| exit::enter_store()) {
            self.merger.look(&claimed.job, settings.config.chain);
            exit::leave_store();
        }
        let p = &taken.phases;
        self.remember(&record);
        self.pace.measured(Cost {
            stop: Duration::from_micros(taken.stop_us),
            cpu: cpu_time().saturating_sub(cpu) + Duration::from_micros(taken.outcome.cpu_us),
            persist: Duration::from_micros(record.persist_us),
        });
        log::line(format_args!(
            "generation {generation}: {}, {} threads, {} pages ({} stored ahead in {} us, {} left), stop {} us (park {}, collect {}, scan {}, {} {}, release {}), persisted after {} us",
            record.kind.name(),
            taken.threads,
            taken.outcome.pages,
            p.precopied_pages,
            p.precopy_us,
            p.residue_pages,
            taken.stop_us,
            p.park_us,
            p.collect_us,
            p.scan_us,
            taken.snapshot,
            p.copy_us,
            p.release_us,
            record.persist_us,
        ));
        if let Err(error) = pruned {
            log::line(format_args!("{error}"));
        }
        Ok(generation)
    }

    /// Everything from the pre-copy to the finished image.
    fn take(
        &mut self,
        pending: &Pending<RawFs>,
        trigger: Trigger,
    ) -> Result<(Beginning, Taken), CheckpointError> {
        let settings = self.settings;
        let generation = pending.generation;
        let file = pending.member(0).expect("created by `begin`").as_fd();
        let job = &self.job()?.job;
        let job_dir = job.dir.clone();
        let records: Vec<GenerationRecord> = job.generations().into_iter().cloned().collect();
        let records: Vec<&GenerationRecord> = records.iter().collect();
        let ahead = self
            .increments
            .ahead(file, generation, &records, settings)?;
        let mut beginning = Beginning::new(&job_dir, generation, &settings.config);
        let leaving = trigger == Trigger::Undo;
        let (increments, known) = (&mut self.increments, &mut self.known);
        let taken = take(settings, increments, ahead, &mut beginning, known, leaving)?;
        Ok((beginning, taken))
    }

    /// The memory that a generation stands for: what is mapped from images does not
    /// count as resident, so an increment stands for no less than its base.
    fn logical(&self, taken: &Taken) -> u64 {
        let own = taken.outcome.pages * PAGE;
        let base = self.last_generation.filter(|_| taken.increment);
        let records = self.claimed.iter().flat_map(|c| c.job.generations());
        let base = records
            .filter(|r| Some(r.generation) == base)
            .map(|r| r.bytes_logical);
        base.fold(own, u64::max)
    }

    /// The generation's line in the job's history.
    fn remember(&self, record: &GenerationRecord) {
        let Some(claimed) = self.claimed.as_ref().filter(|_| exit::enter_store()) else {
            return;
        };
        let chain = increments::chain_length(&claimed.job.generations(), record.generation);
        let p = &record.phases;
        let entry = history::Entry {
            generation: record.generation,
            time_ns: record.time_ns,
            kind: record.kind.name().into(),
            chain: chain.unwrap_or(0),
            stop_us: record.stop_us,
            parts_us: [p.park_us, p.collect_us, p.scan_us, p.copy_us, p.release_us],
            precopy_us: p.precopy_us,
            persist_us: record.persist_us,
            pages: record.pages_dirty,
            bytes_stored: record.bytes_stored,
            bytes_logical: record.bytes_logical,
            snapshot: record.snapshot.clone(),
            tracker: record.tracker.clone(),
            trigger: record.trigger.clone(),
        };
        let noted = history::append(&RawFs, &claimed.job.dir, &entry);
        exit::leave_store();
        if let Err(error) = noted {
            log::line(format_args!("{error}"));
        }
    }

    /// Answers the `ckpt` command.
    fn write_report(&mut self) {
        self.report.pid = AGENT.real_pid.load(Ordering::Relaxed);
        self.report.start_time = self.owner.as_ref().map_or(0, |o| o.start_time);
        self.report.job = String::from_utf8_lossy(&self.settings.job_key).into_owned();
        if let Some(claimed) = &self.claimed {
            self.report.job = claimed.job.name();
            self.report.job_dir = claimed.job.dir.to_string_lossy().into_owned();
        }
        self.report.program_pid = AGENT.pid.load(Ordering::Relaxed);
        self.report.state = "idle".into();
        self.report.last_generation = self.last_generation;
        self.report.interval_ms =
            interval_ns(self.settings, &self.pace).map_or(0, |ns| ns / 1_000_000);
        self.report.recovered_from = self.settings.restored.as_ref().map(|r| r.1);
        self.report.net = crate::agent::callsites::summary::get();
        self.report.tracker = self.increments.tracker.name().into();
        self.report.files_incomplete = table::incomplete_reason();
        let said = interface::said();
        self.report.heartbeats = said.heartbeats;
        self.report.heartbeat_ns = said.heartbeat_ns;
        self.report.ready_ns = said.ready_ns;
        self.report.unseen.clone_from(&self.looked.found);
        let root = PathBuf::from(std::ffi::OsStr::from_bytes(&self.settings.store_root));
        if let Err(error) = self.report.write(&RawFs, &root) {
            log::line(format_args!("{error}"));
        }
    }
}
