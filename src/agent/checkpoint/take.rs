//! One stop of the program: collect, snapshot, release (FIG. 6). Helper thread, called
//! by the worker with the files of the new generation at hand.

use super::files::Beginning;
use super::{CheckpointError, mapped, refused, store_error};
use crate::agent::collect::descriptors::{self, InheritedFd, Target};
use crate::agent::collect::{identity, memory, process, signals, threads, timers};
use crate::agent::outputs::keep::{self, Output};
use crate::agent::settings::Settings;
use crate::agent::side::SideBuffer;
use crate::agent::snapshot::{self, Outcome};
use crate::agent::state::AGENT;
use crate::agent::stop::{self, Stopped, now_ns};
use crate::agent::{callsites, children, hooks, procfs, request, resume, writer};
use crate::config::SnapshotChoice;
use crate::image::state::{EntryPoints, FileKind, Manifest};
use crate::image::writer::ImageWriter;
use std::path::Path;
use std::sync::atomic::Ordering;

/// What the stop and the writer have yielded.
pub(super) struct Taken {
    /// The call that waits for this checkpoint, and the id that it gave.
    pub call: *const request::InsertedCall,
    pub id: i32,
    pub outcome: Outcome,
    pub phases: [u64; 4],
    pub stop_us: u64,
    pub stopped_ns: u64,
    pub realtime_ns: u64,
    pub host: String,
    pub boot_id: String,
    pub cmdline: Vec<u8>,
    pub threads: u32,
    pub snapshot: &'static str,
    pub outputs: Vec<Output>,
}

pub(super) const HELD: &str = "the program holds checkpoints off (ckpt_hold)";

/// Stops the program, collects, snapshots, releases, and waits for the image.
pub(super) fn take(
    settings: &Settings,
    generation: u64,
    file: std::os::fd::BorrowedFd<'_>,
    table: &mut Beginning,
) -> Result<Taken, CheckpointError> {
    let inserted = request::inserted_call().map(request::copy_slot);
    let t0 = now_ns();
    let stopped = stop::stop_all(inserted).map_err(|error| match error {
        // A thread inside vfork waits for its child; a storm of births or of signals
        // passes.
        stop::StopError::Stuck { .. }
        | stop::StopError::TooMany(_)
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
    let collected = collect(settings, &stopped, table.job());
    let t2 = now_ns();
    let (manifest, mut plan, mut side, outputs) = match collected {
        Ok(collected) => collected,
        Err(error) => {
            stop::release(stopped);
            return Err(error);
        }
    };
    if let Err(error) =
        plan.copy_unfrozen(&mut side, &|dev, ino| has_descriptor(&manifest, dev, ino))
    {
        stop::release(stopped);
        return Err(refused(error));
    }
    let threads = manifest.threads.len() as u32;
    let (realtime_ns, host, boot_id) = (
        manifest.identity.realtime_ns,
        manifest.identity.hostname.clone(),
        manifest.identity.boot_id.clone(),
    );
    let cmdline = manifest.process.cmdline.clone();
    let mut phases = [(t1 - t0) / 1000, (t2 - t1) / 1000, 0, 0];
    let mut manifest = manifest;
    manifest.stop_phases_us = phases;

    let mapped = mapped::of(plan.pieces.iter().map(|piece| &piece.vma));
    let forked = if settings.config.snapshot == SnapshotChoice::Copy {
        None
    } else {
        writer::fork(|| {
            let image = ImageWriter::new(file, generation);
            snapshot::write(
                image,
                manifest.clone(),
                plan.clone(),
                side.bytes(),
                true,
                true,
            )
        })
    };
    let (outcome, name, t3, t4) = match forked {
        Some(child) => {
            table.install(&mapped);
            let t3 = now_ns();
            stop::release(stopped);
            let t4 = now_ns();
            let outcome = child.wait().map_err(|error| match error {
                writer::WriterError::NotInherited(reason) => {
                    hooks::memory::note_special_advice();
                    CheckpointError::Postponed(reason)
                }
                other => store_error(other),
            })?;
            (outcome, "fork", t3, t4)
        }
        None => {
            let image = ImageWriter::new(file, generation);
            let result = snapshot::write(image, manifest, plan, side.bytes(), false, true);
            if result.is_ok() {
                table.install(&mapped);
            }
            let t3 = now_ns();
            stop::release(stopped);
            (result.map_err(store_error)?, "copy", t3, now_ns())
        }
    };
    phases[2] = (t3 - t2) / 1000;
    phases[3] = (t4 - t3) / 1000;
    Ok(Taken {
        call,
        id,
        outcome,
        phases,
        stop_us: (t4 - t0) / 1000,
        stopped_ns: t0,
        realtime_ns,
        host,
        boot_id,
        cmdline,
        threads,
        snapshot: name,
        outputs,
    })
}

/// Is the content of this shared object kept with a descriptor?
fn has_descriptor(manifest: &Manifest, dev: u64, ino: u64) -> bool {
    manifest
        .descriptors
        .files
        .iter()
        .any(|file| match &file.kind {
            FileKind::Memfd {
                object_dev,
                object_ino,
                ..
            } => (*object_dev, *object_ino) == (dev, ino),
            FileKind::Unlinked { dev: d, ino: i, .. } => (*d, *i) == (dev, ino),
            _ => false,
        })
}

type Collected = (Manifest, memory::Plan, SideBuffer, Vec<Output>);

fn collect(
    settings: &Settings,
    stopped: &Stopped,
    job: &Path,
) -> Result<Collected, CheckpointError> {
    let leader = AGENT.real_pid.load(Ordering::Relaxed);
    children::none_alive().map_err(CheckpointError::Postponed)?;
    let first = stopped
        .threads()
        .map(|slot| slot.tid.load(Ordering::Relaxed) as i32)
        .min_by_key(|&tid| (tid != leader, tid))
        .ok_or_else(|| CheckpointError::Refused("no thread of the program is left".into()))?;
    if process::credentials(first) != settings.credentials {
        return Err(CheckpointError::Refused(
            "the program has changed its user, its groups or its seccomp filters since it was started".into(),
        ));
    }
    let mut thread_states = threads::collect(stopped);
    let signals = signals::collect(stopped, &mut thread_states);
    let timers = timers::collect();
    let process = process::collect(first).map_err(refused)?;
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
    let descriptors = descriptors::collect(&target, &mut side).map_err(refused)?;
    let mut store = settings.store_root.clone();
    store.extend_from_slice(b"/jobs");
    let mut store = procfs::real_path(&store).unwrap_or(store);
    store.push(b'/');
    let own = memory::Own {
        store: &store,
        is_cache: callsites::cache::is_cache_path,
    };
    let mut plan = memory::collect(&own).map_err(refused)?;
    if hooks::memory::special_advice_seen() || !AGENT.net_installed.load(Ordering::Relaxed) {
        plan.read_flags();
    }
    let manifest = Manifest {
        identity: identity::collect(),
        process,
        threads: thread_states,
        signals,
        timers,
        descriptors,
        entry: EntryPoints {
            after_restore: resume::after_restore as *const () as u64,
            resume_thread: resume::resume_thread as *const () as u64,
            agent: &raw const AGENT as u64,
        },
        ..Manifest::default()
    };
    let outputs = keep::scan(&manifest, first);
    Ok((manifest, plan, side, outputs))
}
