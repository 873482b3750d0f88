//! What others are told: the log, the job's history, the answers and the report that the
//! `ckpt` command reads.

use super::{Trigger, Worker, interval_ns};
use crate::agent::collect::identity;
use crate::agent::state::AGENT;
use crate::agent::{exit, interface, log, refusal};
use crate::config::Resume;
use crate::persist::table;
use crate::store::Owner;
use crate::store::generation::{GenerationRecord, chain_length};
use crate::store::report::ASLEEP;
use crate::store::start::Claimed;
use crate::store::{RawFs, history, report};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

impl Worker {
    /// No checkpoint will be taken any more: the reason is to be found in the log and by
    /// `ckpt status`.
    pub(super) fn last_words(&mut self) {
        let reason = refusal::disabled().unwrap_or("the program no longer permits it");
        log::line(format_args!("checkpoint refused from now on: {reason}"));
        self.fail_asked(reason);
        let (reason, time_ns) = (reason.to_owned(), identity::realtime_ns());
        self.keep_refusal(&reason, time_ns);
        self.report.last_refusal = Some(report::Refusal { reason, time_ns });
        if self.owner.is_none() {
            self.owner = Owner::current().ok();
        }
        if let (Some(claimed), Some(owner)) = (&self.claimed, &self.owner)
            && let Err(error) = claimed.lock.outlive(owner)
        {
            log::line(format_args!("{error}"));
        }
        self.write_report();
    }

    pub(super) fn fail_asked(&mut self, reason: &str) {
        for nonce in std::mem::take(&mut self.asked) {
            self.report.answer(nonce, None, Some(reason.to_owned()));
        }
    }

    /// `lasts`: it will not pass in a moment.
    pub(super) fn refuse(&mut self, reason: String, trigger: Trigger, lasts: bool) {
        // The child that is named in what passes may be another one each time.
        let kind = reason.split(" (").next().unwrap_or_default();
        let same = |told: &String| *told == reason || !lasts && told.starts_with(kind);
        if !self.told.as_ref().is_some_and(same) {
            self.told = Some(reason.clone());
            log::line(format_args!(
                "checkpoint refused ({}): {reason}",
                trigger.name()
            ));
        }
        self.report.refused += 1;
        let time_ns = identity::realtime_ns();
        if lasts {
            self.keep_refusal(&reason, time_ns);
        }
        self.report.last_refusal = Some(report::Refusal { reason, time_ns });
        if trigger == Trigger::Command {
            self.write_report();
        }
    }

    /// Into the journal, once for each reason: `ckpt status` has it when the program is dead.
    fn keep_refusal(&mut self, reason: &str, time_ns: u64) {
        let config = &self.settings.config;
        // What makes a job of a program, or drops an earlier one's, is its first checkpoint.
        let may_claim = config.interval.is_some() && config.resume != Resume::Never;
        if self.claimed.is_none() && !may_claim || !exit::enter_store() {
            return;
        }
        if let Ok(Claimed { job, .. }) = self.job() {
            let known = job.journal.last_refusal();
            if known.is_none_or(|refused| refused.reason != reason)
                && let Err(error) = job.note_refusal(reason, time_ns)
            {
                log::line(format_args!("{error}"));
            }
        }
        exit::leave_store();
    }

    /// A generation is committed: what was refused before is of no interest any more.
    pub(super) fn forget_refusal(&mut self) {
        let told = self.report.last_refusal.take();
        // What comes and goes (a child, and no child) is told once.
        if told.is_some() && self.postponed == 0 {
            self.told = None;
        }
    }

    /// The generation's line in the job's history.
    pub(super) fn remember(&self, record: &GenerationRecord) {
        let Some(claimed) = self.claimed.as_ref().filter(|_| exit::enter_store()) else {
            return;
        };
        let chain = chain_length(&claimed.job.generations(), record.generation);
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
    pub(super) fn write_report(&mut self) {
        self.report.pid = AGENT.real_pid.load(Ordering::Relaxed);
        self.report.start_time = self.owner.as_ref().map_or(0, |o| o.start_time);
        self.report.job = String::from_utf8_lossy(&self.settings.job_key).into_owned();
        if let Some(claimed) = &self.claimed {
            self.report.job = claimed.job.name();
            self.report.job_dir = claimed.job.dir.to_string_lossy().into_owned();
        }
        self.report.program_pid = AGENT.pid.load(Ordering::Relaxed);
        let retires = refusal::RETIRE.load(Ordering::SeqCst);
        self.report.state = if retires { ASLEEP } else { "idle" }.into();
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
