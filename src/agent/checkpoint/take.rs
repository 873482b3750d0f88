//! One stop of the program: collect, snapshot, release (FIG. 6). Helper thread, called
//! by the worker with the files of the new generation at hand.

use super::files::Beginning;
use super::increments::ahead::Ahead;
use super::increments::{Increments, with_own};
use super::{CheckpointError, mapped, refused, store_error};
use crate::agent::collect::descriptors::{self, ContentSink, InheritedFd, Known, Target};
use crate::agent::collect::{
    credentials, identity, keys, memory, process, rare, signals, threads, timers,
};
use crate::agent::outputs::keep::{self, Output};
use crate::agent::refusal;
use crate::agent::settings::Settings;
use crate::agent::side::SideBuffer;
use crate::agent::snapshot::contents::Contents;
use crate::agent::snapshot::stretch::store_frozen;
use crate::agent::snapshot::{self, Frame, Method, Outcome, SnapshotError, fork, priority};
use crate::agent::state::AGENT;
use crate::agent::stop::{self, Stopped, now_ns};
use crate::agent::track::{Dirty, blank};
use crate::agent::{children, clock, hooks, request, resume, rollback};
use crate::config::SnapshotChoice;
use crate::image::state::{EntryPoints, Manifest, Privileges};
use crate::image::writer::ImageSink;
use crate::store::generation::Phases;
use std::path::Path;
use std::sync::atomic::Ordering;

/// What the stop and the writer have yielded.
pub(super) struct Taken {
    /// The call that waits for this checkpoint, and the id that it gave.
    pub call: *const request::InsertedCall,
    pub id: i32,
    pub outcome: Outcome,
    pub phases: Phases,
    pub stop_us: u64,
    pub stopped_ns: u64,
    pub realtime_ns: u64,
    pub host: String,
    pub boot_id: String,
    pub cmdline: Vec<u8>,
    pub threads: u32,
    pub snapshot: &'static str,
    /// Does the image stand on another one?
    pub increment: bool,
    pub outputs: Vec<Output>,
}

pub(super) const HELD: &str = "the program holds checkpoints off (ckpt_hold)";

/// Stops the program, collects, snapshots, releases, and waits for the image. `leaving`: it
/// is about to go back, and the caller of that may be in the image.
pub(super) fn take<S: ImageSink>(
    settings: &Settings,
    increments: &mut Increments,
    mut ahead: Ahead<S>,
    table: &mut Beginning,
    known: &mut Known,
    leaving: bool,
) -> Result<Taken, CheckpointError> {
    let inserted = request::inserted_call().map(request::copy_slot);
    let t0 = now_ns();
    let stopped = stop::stop_all(inserted).map_err(|error| match error {
        // A thread inside vfork waits for its child; a storm of births or of signals
        // passes.
        stop::StopError::Stuck { .. }
        | stop::StopError::TooMany(_)
        | stop::StopError::Exec
        | stop::StopError::Signal { .. } => CheckpointError::Postponed(error.to_string()),
        other => refused(other),
    })?;
    // A call that came while the others were being stopped is in the image too; a later one is not.
    let call = request::inserted_call();
    let (call, id) = call.map_or((std::ptr::null(), 0), |call| (&raw const *call, call.id));
    let t1 = now_ns();
    // Once more: the files of the generation were made since `before_the_stop`, and the
    // program may have called ckpt_hold meanwhile. Now it cannot.
    if request::MAILBOX.holds.load(Ordering::SeqCst) != 0 {
        stop::release(stopped);
        return Err(CheckpointError::Postponed(HELD.into()));
    }
    if !leaving && rollback::call::any_inside() {
        stop::release(stopped);
        return Err(CheckpointError::Postponed(
            "the program is about to go back (ckpt_rollback)".into(),
        ));
    }
    let based = ahead.base.is_some();
    increments.contents.stopped();
    let collected = collect(settings, increments, &stopped, table.job(), known);
    let t2 = now_ns();
    let (manifest, mut plan, side, outputs) = match collected {
        Ok(collected) => collected,
        Err(error) => {
            stop::release(stopped);
            return Err(error);
        }
    };
    if Increments::swept_too_early(&ahead) {
        stop::release(stopped);
        return Err(CheckpointError::Postponed(
            "direct input or output, or writing to /proc/self/mem, has begun".into(),
        ));
    }
    let mapped = mapped::hold(mapped::of(plan.pieces.iter().map(|piece| &piece.vma)));
    if mapped::any_removed(&mapped) {
        stop::release(stopped);
        return Err(CheckpointError::Postponed(
            "a file that the program has mapped was removed just now".into(),
        ));
    }
    let residue = increments.residue(&mut ahead, &mut plan);
    if based && ahead.base.is_none() {
        // The tracker has failed: the image is to be complete, and contents were left out.
        let seen = std::mem::take(&mut ahead.pending);
        stop::release(stopped);
        increments.keep(&seen);
        increments.contents.forget();
        return Err(CheckpointError::Postponed(
            "what has changed is not known: the next one is complete".into(),
        ));
    }
    let t3 = now_ns();
    let mut phases = Phases {
        park_us: (t1 - t0) / 1000,
        collect_us: (t2 - t1) / 1000,
        scan_us: (t3 - t2) / 1000,
        precopy_us: ahead.precopy_us,
        precopied_pages: ahead.precopied,
        residue_pages: increments.residue_pages(),
        ..Phases::default()
    };
    let mut taken = Taken {
        call,
        id,
        outcome: Outcome::default(),
        phases,
        stop_us: 0,
        stopped_ns: t0,
        realtime_ns: manifest.identity.realtime_ns,
        host: manifest.identity.hostname.clone(),
        boot_id: manifest.identity.boot_id.clone(),
        cmdline: manifest.process.cmdline.clone(),
        threads: manifest.threads.len() as u32,
        snapshot: "",
        increment: ahead.base.is_some(),
        outputs,
    };
    let mut shot = Shot {
        ahead,
        manifest,
        plan,
        side,
    };
    shot.manifest.stop_phases_us = [phases.park_us, phases.collect_us, phases.scan_us, 0];
    let frozen = match residue {
        Ok(()) => shot.freeze(increments, settings.config.snapshot),
        Err(error) => Err(error),
    };
    if frozen.is_ok() {
        table.install(&mapped);
    }
    drop(mapped);
    let t4 = now_ns();
    let t5 = stop::release(stopped);
    // Whoever has come too late for the stop has nothing to wait for.
    request::want_childless(false);
    increments.keep(&shot.ahead.pending);
    phases.copy_us = (t4 - t3) / 1000;
    phases.release_us = (t5 - t4) / 1000;
    taken.phases = phases;
    taken.stop_us = (t5 - t0) / 1000;
    let frozen = frozen.map_err(store_error)?;
    let (method, pages, ns) = (frozen.method(), increments.residue_pages(), t4 - t3);
    match method {
        Method::Copy => increments.costs.copied(pages, ns),
        Method::Fork => increments.costs.forked(shot.ahead.room.tables, ns),
        Method::Write => increments.costs.written(pages, ns),
        Method::Priority => {}
    }
    taken.snapshot = method.name();
    let room = shot.ahead.room;
    let outcome = shot.store(frozen, increments);
    increments.shrink(&room);
    taken.outcome = outcome?;
    Ok(taken)
}

/// Everything that goes into the image.
struct Shot<S> {
    ahead: Ahead<S>,
    manifest: Manifest,
    plan: memory::Plan,
    side: SideBuffer,
}

/// Where the residue is once the program may go on.
enum Frozen {
    /// In the buffer.
    Copied,
    /// Under guard where it is; the second, which could not be guarded, in the buffer.
    Guarded(priority::Guarded, Dirty),
    /// With the child.
    Forked(fork::Writer),
    /// In the image.
    Written,
}

impl Frozen {
    fn method(&self) -> Method {
        match self {
            Frozen::Copied => Method::Copy,
            Frozen::Forked(_) => Method::Fork,
            Frozen::Guarded(..) => Method::Priority,
            Frozen::Written => Method::Write,
        }
    }
}

impl<S: ImageSink> Shot<S> {
    /// During the stop: brings the residue to where the program cannot change it.
    fn freeze(
        &mut self,
        increments: &mut Increments,
        choice: SnapshotChoice,
    ) -> Result<Frozen, SnapshotError> {
        let wanted = increments.method(&self.ahead, choice);
        if wanted == Method::Copy {
            self.read_flags();
            let pending = &self.ahead.pending;
            // SAFETY: the program is stopped, and the plan is its map.
            if unsafe { increments.buffer.copy(&self.plan.pieces, pending)? } {
                return Ok(Frozen::Copied);
            }
        }
        if wanted == Method::Fork
            && let Some(child) = self.fork(increments)?
        {
            return Ok(Frozen::Forked(child));
        }
        if wanted == Method::Priority {
            return self.guard(increments);
        }
        self.read_flags();
        let Ahead { pages, pending, .. } = &mut self.ahead;
        // SAFETY: as above.
        unsafe { store_frozen(pages, &self.plan.pieces, pending)? };
        Ok(Frozen::Written)
    }

    fn guard(&mut self, increments: &mut Increments) -> Result<Frozen, SnapshotError> {
        self.read_flags();
        let watched = increments.tracker.name() == "mprotect";
        let Ahead { pages, pending, .. } = &mut self.ahead;
        let (guarded, mut rest) = priority::guard(&self.plan.pieces, pending, watched)?;
        // SAFETY: the program is stopped, and the plan is its map.
        unsafe {
            if !increments.buffer.copy(&self.plan.pieces, &rest)? {
                store_frozen(pages, &self.plan.pieces, &rest)?;
                rest.clear();
                increments.buffer.shrink(u64::MAX);
            }
        }
        Ok(Frozen::Guarded(guarded, rest))
    }

    /// What nobody can read later.
    fn read_flags(&mut self) {
        if !self.plan.flags_known() {
            self.plan.read_flags();
        }
    }

    /// `None` when the kernel refuses (memory, process limit).
    fn fork(&mut self, increments: &Increments) -> Result<Option<fork::Writer>, SnapshotError> {
        // The fork drops these ranges; should it fail they are in the image all the same.
        let by_child = increments.by_child();
        self.plan
            .copy_unfrozen(&mut self.side, by_child)
            .map_err(SnapshotError::Memory)?;
        // What the program cuts off a file is gone from private copies of it in every process, the
        // writer's too: such pages are stored now.
        let of_files = blank::over_files(&self.plan.pieces);
        if !by_child {
            let Ahead { pages, pending, .. } = &mut self.ahead;
            let mut now = pending.clone();
            now.retain(&of_files);
            // SAFETY: the program is stopped, and the plan is its map.
            unsafe { store_frozen(pages, &self.plan.pieces, &now)? };
        }
        Ok(fork::fork(&mut || {
            let Ahead { pages, pending, .. } = &mut self.ahead;
            let mut rest = pending.clone();
            rest.remove(&of_files);
            // SAFETY: this is the forked writer, with the plan as its map.
            unsafe { store_frozen(pages, &self.plan.pieces, &rest)? };
            let mut dirty = increments.dirty.clone();
            dirty.unite(pending);
            self.finish(&dirty, true)
        }))
    }

    /// After the release: the rest.
    fn store(
        mut self,
        frozen: Frozen,
        increments: &mut Increments,
    ) -> Result<Outcome, CheckpointError> {
        match frozen {
            Frozen::Forked(child) => {
                return child.wait().map_err(|error| match error {
                    fork::WriterError::NotInherited(reason) => {
                        hooks::memory::note_special_advice();
                        CheckpointError::Postponed(reason)
                    }
                    other => store_error(other),
                });
            }
            Frozen::Copied => {
                let Ahead { pages, pending, .. } = &mut self.ahead;
                increments
                    .buffer
                    .store(pages, pending)
                    .map_err(store_error)?;
            }
            Frozen::Guarded(guarded, rest) => {
                let Ahead { pages, pending, .. } = &mut self.ahead;
                pages.drop_absent(pending);
                guarded
                    .store(pages, &mut increments.live, &self.plan.pieces)
                    .map_err(store_error)?;
                increments.buffer.store(pages, &rest).map_err(store_error)?;
            }
            Frozen::Written => {}
        }
        self.finish(&increments.dirty, false).map_err(store_error)
    }

    fn finish(&mut self, dirty: &Dirty, forked: bool) -> Result<Outcome, SnapshotError> {
        snapshot::finish(
            &mut self.ahead.pages,
            Frame {
                manifest: std::mem::take(&mut self.manifest),
                plan: std::mem::take(&mut self.plan),
                side: self.side.bytes(),
                base: self.ahead.base,
                dirty,
            },
            forked,
            true,
        )
    }
}

/// Contents of open files go to the buffer unless the base holds them.
struct Compared<'a>(&'a mut SideBuffer, &'a mut Contents);

impl ContentSink for Compared<'_> {
    fn append(&mut self, pages: &[u8]) -> Result<u64, i32> {
        self.0.append(pages)
    }

    fn same(&mut self, file: (u64, u64), number: u64, page: &[u8]) -> bool {
        self.1.same(file, number, page)
    }
}

type Collected = (Manifest, memory::Plan, SideBuffer, Vec<Output>);

fn collect(
    settings: &Settings,
    increments: &mut Increments,
    stopped: &Stopped,
    job: &Path,
    known: &mut Known,
) -> Result<Collected, CheckpointError> {
    let leader = AGENT.real_pid.load(Ordering::Relaxed);
    children::none_alive().map_err(CheckpointError::Postponed)?;
    let first = stopped
        .threads()
        .map(|slot| slot.tid.load(Ordering::Relaxed) as i32)
        .min_by_key(|&tid| (tid != leader, tid))
        .ok_or_else(|| CheckpointError::Refused("no thread of the program is left".into()))?;
    // The program has run on since that was asked first.
    if let Some(reason) = refusal::disabled().or_else(refusal::noted_reason) {
        return Err(CheckpointError::Refused(reason.into()));
    }
    if let Some(reason) = credentials::changed(stopped, first, &settings.credentials) {
        return Err(CheckpointError::Refused(reason));
    }
    let mut thread_states = threads::collect(stopped, &settings.affinity);
    let (signals, timers) = signals::collect(stopped, &mut thread_states);
    if let Some(timer) = timers::nobodys(&timers) {
        return Err(CheckpointError::Refused(format!(
            "timer {} (timer_create) counts the CPU time of a thread, it is not known which",
            timer.id
        )));
    }
    let process = process::collect(first).map_err(refused)?;
    let privileges = Privileges {
        credentials: settings.credentials.clone(),
        mdwe: process::mdwe().unwrap_or(0),
        protection_keys: keys::allocated(),
        threads: threads::switches(stopped),
    };
    let mut side = SideBuffer::default();
    let target = Target {
        pid: leader,
        tid: first,
        program_pid: AGENT.pid.load(Ordering::Relaxed),
        inherited: settings
            .inherited
            .iter()
            .map(|&(fd, dev, ino)| InheritedFd { fd, dev, ino })
            .collect(),
        path_hints: Vec::new(),
        job: job.to_owned(),
    };
    let mut sink = Compared(&mut side, &mut increments.contents);
    let descriptors = descriptors::collect(&target, known, &mut sink).map_err(refused)?;
    let mut mappable = |dev, ino| {
        let open = descriptors.of_contents((dev, ino));
        open.is_some_and(|open| open.private)
    };
    let collected = with_own(&settings.store_root, |own| {
        memory::collect_with(own, &mut mappable)
    });
    let mut plan = collected.map_err(refused)?;
    let net = AGENT.net_installed.load(Ordering::Relaxed);
    let flags_known = net && increments.flags(&mut plan);
    if !flags_known && (!net || hooks::memory::special_advice_seen()) {
        plan.read_flags();
    }
    let mut rare = rare::collect(&thread_states);
    rare.hung_up = descriptors.hung_up.clone();
    let mut manifest = Manifest {
        identity: identity::collect(),
        process,
        threads: thread_states,
        signals,
        timers,
        descriptors,
        privileges,
        entry: EntryPoints {
            after_restore: resume::after_restore as *const () as u64,
            resume_thread: resume::resume_thread as *const () as u64,
            agent: &raw const AGENT as u64,
        },
        clock: clock::collect(stopped.rips()),
        cwd_object: process::cwd_object(first),
        rare,
        ..Manifest::default()
    };
    let outputs = keep::scan(&manifest, first);
    let contents = &mut increments.contents;
    let elsewhere = |dev, ino| manifest.descriptors.of_contents((dev, ino)).is_some();
    plan.copy_shared(&mut side, contents, &elsewhere)
        .map_err(refused)?;
    let files = manifest.descriptors.files.iter_mut();
    let files = files.filter_map(|file| file.contents_mut().map(|(id, size, _)| (id, size)));
    let mut objects: Vec<_> = files.collect();
    objects.extend(plan.shared.iter().map(|o| ((o.dev, o.ino), o.size)));
    plan.objects = contents
        .spaces(&objects)
        .ok_or_else(|| CheckpointError::Postponed("no memory for checksums".into()))?;
    Ok((manifest, plan, side, outputs))
}
