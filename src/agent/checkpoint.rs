//! The order of a checkpoint (FIG. 6): helper thread.
//!
//! trigger -> files of the new generation -> pre-copy -> stop -> collect -> sweep ->
//! snapshot (copy, fork or write) -> release -> write -> publish -> prune. A checkpoint
//! that fails leaves the previous generation the latest and the program running, and what
//! had changed is kept for the next one.

mod back;
pub mod files;
pub mod increments;
pub mod mapped;
mod rounds;
mod take;
mod tell;

use crate::agent::collect::descriptors::Known;
use crate::agent::collect::memory::PAGE;
use crate::agent::collect::process;
use crate::agent::helper::Life;
use crate::agent::hooks::files::outside;
use crate::agent::merge::Merger;
use crate::agent::outputs::{self, keep::Streams};
use crate::agent::prefetch::{self, Prefetch};
use crate::agent::settings::{self, Settings};
use crate::agent::state::AGENT;
use crate::agent::stop::now_ns;
use crate::agent::{ballast, children, exit, log, refusal, request};
use crate::config::Interval;
use crate::interval::{Cost, Pace};
use crate::persist::table;
use crate::store::generation::{GenerationKind, GenerationRecord, MemberRecord};
use crate::store::start::{Claimed, claim};
use crate::store::{Job, JobKey, Pending, RawFs, report};
use crate::store::{JobLock, Owner};
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

const UNREADABLE: &str = "the program forbids this user to read its memory (PR_SET_DUMPABLE 0)";

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
    /// Who had asked for it.
    retried: Trigger,
    /// How often in a row it was postponed.
    postponed: u32,
    /// When to look whether the program has ended by itself.
    look_ns: u64,
    last_generation: Option<u64>,
    /// The refusal that the log tells of.
    told: Option<String>,
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
            retried: Trigger::Clock,
            postponed: 0,
            look_ns: now_ns(),
            last_generation: None,
            told: None,
            report: report::Report::default(),
            included: std::ptr::null(),
            increments: increments::lives::take_restored()
                .unwrap_or_else(|| Increments::new(settings.config.tracker)),
            merger: Merger::new(),
            prefetch: prefetch::take(),
            asked: Vec::new(),
            going_to: None,
        };
        ballast::take();
        if life == Life::Restored {
            worker.report.requests = crate::agent::rollback::ask::answers();
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
        if !process::may_be_read() {
            return Err(CheckpointError::Refused(UNREADABLE.into()));
        }
        children::none_alive().map_err(CheckpointError::Postponed)
    }

    fn try_checkpoint(&mut self, trigger: Trigger) -> Result<u64, CheckpointError> {
        self.before_the_stop()?;
        if let Some(prefetch) = self.prefetch.as_mut() {
            prefetch.unwatch();
        }
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
        self.looked.look();
        let unseen = self.looked.writes();
        let claimed = self.job()?;
        if unseen {
            let told = outputs::expect_unseen(&claimed.job.dir);
            told.unwrap_or_else(|problem| log::line(format_args!("{problem}")));
        }
        let published = claimed.job.publish(pending, &record).map_err(store_error);
        let (keep, now) = (settings.config.keep, taken.realtime_ns);
        let pruned = claimed.job.prune_but(keep, Some(generation), going_to, now);
        files::prune(&claimed.job);
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
}
