//! The order of a rollback: helper thread, called by the worker.
//!
//! arguments, generation, images -> stop -> once more what may have changed -> protected
//! bytes -> descriptors to the leader -> files -> no way back: all threads but the leader
//! end, the helper last.

use super::call::{LATEST, Region};
use super::leader::{self, Handover};
use super::*;
use crate::agent::checkpoint::increments::Increments;
use crate::agent::collect::descriptors::{handed, sys};
use crate::agent::collect::{credentials, identity};
use crate::agent::recover::files::{self, NotBack};
use crate::agent::restore::{self, check as machine, stay};
use crate::agent::resume::Payload;
use crate::agent::settings::Settings;
use crate::agent::state::AGENT;
use crate::agent::stop::{self, Stopped, now_ns};
use crate::agent::track::Dirty;
use crate::agent::{children, exit, helper, log, request, starter};
use crate::image::chain::{self, Sourced};
use crate::image::state::ThreadState;
use crate::persist::table;
use crate::store::RawFs;
use crate::store::find::{Found, FoundMember};
use crate::store::fs::FileOf;
use crate::store::generation::GenerationRecord;
use crate::store::report::RequestResult;
use crate::store::start::Claimed;
use ckpt_sys::context::CALLER_SP;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

/// Where to go back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The newest generation of this id; [`LATEST`]: of any.
    Id(i32),
    Generation(u64),
    /// The newest state that was left by going back (`ckpt undo`).
    Left,
}

impl Default for Which {
    fn default() -> Which {
        Which::Id(LATEST)
    }
}

/// `ckpt undo` without a state to go back to.
pub const NOTHING_LEFT: &str =
    "no state that was left by going back is kept (CKPT_UNDO=1 keeps one each time)";

/// What was asked for.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    pub which: Which,
    /// What `ckpt_checkpoint` returns; 0: 1.
    pub value: i32,
    /// The caller's array of regions: address and count.
    pub regions: (u64, u64),
    /// Nonces of the command's requests that this answers.
    pub asked: Vec<u32>,
    /// Those that were taken up and wait for something else, and what has been answered.
    pub open: Vec<u64>,
    pub answers: Vec<RequestResult>,
}

/// Why the program goes on as if nothing had been asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub errno: i32,
    pub reason: String,
}

fn refused(errno: i32, reason: impl std::fmt::Display) -> Refused {
    Refused {
        errno,
        reason: reason.to_string(),
    }
}

fn no_region(errno: i32) -> Refused {
    refused(errno, "a protected region cannot be kept")
}

/// Which generation is meant, if everything that can be known before the stop allows it.
pub fn check(
    settings: &Settings,
    claimed: Option<&Claimed>,
    wanted: &Wanted,
) -> Result<u64, Refused> {
    let claimed = claimed.ok_or_else(|| refused(libc::ENOENT, "there is no checkpoint yet"))?;
    let ready = prepare(settings, claimed, wanted)?;
    files::can_go_back(&claimed.job, &ready.record, &settings.config, None)
        .map_err(|reason| refused(libc::EIO, reason))?;
    Ok(ready.record.generation)
}

/// Goes back. Returns only when that was refused. `left`: the generation of the state that
/// is left, which stays.
pub fn go_back(
    settings: &Settings,
    claimed: Option<&mut Claimed>,
    increments: &mut Increments,
    wanted: &Wanted,
    left: Option<u64>,
) -> Refused {
    let Some(claimed) = claimed else {
        return refused(libc::ENOENT, "there is no checkpoint yet");
    };
    // Until it is refused; else the image has its own.
    let _numbers = limits::lift_numbers();
    match prepare(settings, claimed, wanted) {
        Ok(mut ready) => {
            ready.left = left;
            let base = increments.standing_on(ready.record.generation);
            ready.since = stay::changed_since(claimed, base, &ready.record);
            stopped(settings, claimed, increments, ready)
        }
        Err(refused) => refused,
    }
}

/// What is known before the stop.
struct Ready {
    record: GenerationRecord,
    left: Option<u64>,
    member: FoundMember<RawFs>,
    regions: Vec<Region>,
    value: i32,
    asked: Vec<u32>,
    open: Vec<u64>,
    answers: Vec<RequestResult>,
    started_ns: u64,
    /// What later generations have changed since, if that is known.
    since: Option<Dirty>,
    /// Files that memory maps are others now, and the tables bring them back.
    mapped_back: bool,
}

fn prepare(settings: &Settings, claimed: &Claimed, wanted: &Wanted) -> Result<Ready, Refused> {
    let started_ns = now_ns();
    may_go_back()?;
    let journal = &claimed.job.journal;
    let record = choose(&journal.order(), &journal.left(), wanted.which)?;
    let generation = record.generation;
    let damaged = |error: &dyn std::fmt::Display| {
        refused(libc::EIO, format_args!("generation {generation}: {error}"))
    };
    let Found { record, members } = claimed
        .job
        .open_generation(&record, settings.config.verify)
        .map_err(|error| damaged(&error))?;
    let member = members.into_iter().next();
    let member = member.ok_or_else(|| damaged(&"it has no member"))?;
    if 3 + member.older.len() > pass::MOST {
        return Err(damaged(&"it stands on too many images"));
    }
    let manifest = &member.image.manifest;
    machine::machine(manifest).map_err(|error| damaged(&error))?;
    restore::handlers::check(&member).map_err(|error| damaged(&error))?;
    let mapped = reopen::mapped(manifest, &claimed.job, &record, &settings.config);
    let mapped_back = mapped.map_err(|error| damaged(&error))?;
    let (array, count) = wanted.regions;
    let regions = check::read_regions(array, count).map_err(no_region)?;
    if !regions.is_empty() {
        let pieces = member.compose().map_err(|error| damaged(&error))?;
        let stacks = check::stacks(manifest, |thread| saved_sp(&member, &pieces, thread));
        let stacks = stacks.map_err(no_region)?;
        check::allowed(manifest, &stacks, &regions).map_err(no_region)?;
    }
    Ok(Ready {
        record,
        left: None,
        member,
        regions,
        value: wanted.value,
        asked: wanted.asked.clone(),
        open: wanted.open.clone(),
        answers: wanted.answers.clone(),
        started_ns,
        since: None,
        mapped_back,
    })
}

fn choose(
    records: &[&GenerationRecord],
    left: &[u64],
    which: Which,
) -> Result<GenerationRecord, Refused> {
    let fits = |record: &&&GenerationRecord| match which {
        Which::Id(LATEST) => true,
        Which::Id(id) => record.id == id,
        Which::Generation(generation) => record.generation == generation,
        Which::Left => left.last() == Some(&record.generation),
    };
    let found = records.iter().rev().find(fits);
    let reason = match which {
        Which::Id(LATEST) => "there is no checkpoint yet".to_owned(),
        Which::Id(id) => format!("there is no checkpoint with id {id}"),
        Which::Generation(generation) => format!("there is no generation {generation}"),
        Which::Left => NOTHING_LEFT.to_owned(),
    };
    found
        .map(|record| (*record).clone())
        .ok_or_else(|| refused(libc::ENOENT, reason))
}

/// Where the program's part of a thread's stack ended, from the frame that the image has.
fn saved_sp(
    member: &FoundMember<RawFs>,
    pieces: &[Sourced],
    thread: &ThreadState,
) -> Result<u64, i32> {
    let sp = std::mem::offset_of!(libc::ucontext_t, uc_mcontext) as u64 + 8 * libc::REG_RSP as u64;
    let saved = saved_word(member, pieces, thread.ucontext + sp)?;
    if !thread.inserted {
        return Ok(saved);
    }
    // Its stack pointer is that of our own frames, below which the caller's had ended.
    let caller = saved_word(member, pieces, thread.ucontext + CALLER_SP)?;
    Ok(caller.max(saved))
}

fn saved_word(member: &FoundMember<RawFs>, pieces: &[Sourced], at: u64) -> Result<u64, i32> {
    let piece = chain::piece_at(pieces, at).ok_or(libc::EIO)?;
    let number = piece.file as usize;
    let (file, image) = member.chain().nth(number).ok_or(libc::EIO)?;
    let mut word = [0u8; 8];
    let offset = piece.offset + (at - piece.addr);
    let read = image
        .blocks()
        .read(&FileOf(&RawFs, file), &mut word, offset);
    read.map_err(|_| libc::EIO)?;
    Ok(u64::from_ne_bytes(word))
}

/// What may change at any time while the program runs.
fn may_go_back() -> Result<(), Refused> {
    if request::MAILBOX.holds.load(Ordering::SeqCst) != 0 {
        return Err(refused(
            libc::EAGAIN,
            "the program is in a critical section (ckpt_hold)",
        ));
    }
    children::none_alive().map_err(|reason| refused(libc::EAGAIN, reason))
}

fn stopped(
    settings: &Settings,
    claimed: &mut Claimed,
    increments: &mut Increments,
    ready: Ready,
) -> Refused {
    let inserted = request::inserted_call().map(request::copy_slot);
    let stopped = match stop::stop_all(inserted) {
        Ok(stopped) => stopped,
        Err(error) => return refused(libc::EAGAIN, error),
    };
    let refused = while_stopped(settings, claimed, increments, ready, &stopped);
    stop::release(stopped);
    // The leader has left its part: it is released last of all by the step.
    CONTROL.step.store(IDLE, Ordering::SeqCst);
    refused
}

fn while_stopped(
    settings: &Settings,
    claimed: &mut Claimed,
    increments: &mut Increments,
    mut ready: Ready,
    stopped: &Stopped,
) -> Refused {
    if increments.standing_on(ready.record.generation).is_none() {
        ready.since = None;
    }
    // Put back when it is refused.
    let lifted = limits::lift(&ready.member.image.manifest, &settings.limits);
    let prepared = may_go_back().and_then(|()| last_checks(settings, claimed, &ready, stopped));
    let protected = match prepared {
        Ok(protected) => protected,
        Err(refused) => return refused,
    };
    let watching = ready.since.as_ref();
    let watching = watching.and_then(|_| increments.tracker.descriptor());
    if let Err(errno) = hand_over(&ready.member, claimed, watching) {
        call_off();
        return refused(errno, "the descriptors cannot be handed over");
    }
    if !exit::enter_store() {
        call_off();
        return refused(libc::EAGAIN, "the program is ending");
    }
    let (job, record) = (&mut claimed.job, &ready.record);
    // Nobody but the program has changed anything up to here.
    table::alive(identity::realtime_ns() as i64);
    let files = match files::go_back_inside(job, record, ready.left, &settings.config, &output) {
        Ok(files) => files,
        Err(NotBack::Unchanged(reason)) => {
            exit::leave_store();
            call_off();
            return refused(libc::EIO, reason);
        }
        Err(NotBack::Broken(reason)) => leader::end(format_args!(
            "cannot go back to generation {} of job {}: {reason}",
            record.generation,
            job.name()
        )),
    };
    exit::leave_store();
    let generation = record.generation;
    if ready.mapped_back
        && let Err(error) = machine::files(&ready.member.image.manifest)
    {
        leader::end(format_args!(
            "cannot go back to generation {generation} of job {}: {error}",
            job.name()
        ));
    }
    let payload = Payload {
        env: settings.env.clone(),
        job_dir: job.dir.as_os_str().as_bytes().to_vec(),
        job_key: settings.job_key.clone(),
        store_root: settings.store_root.clone(),
        generation,
        starter: starter::id(),
        started_ns: ready.started_ns,
        return_value: Some(ready.value.max(1)),
        asked: ready.asked,
        open: ready
            .open
            .into_iter()
            .chain(request::open_asked())
            .collect(),
        answers: ready.answers,
        ..Payload::default()
    };
    log::line(format_args!(
        "going back to generation {generation} of job {}, prepared in {} us",
        job.name(),
        (now_ns() - ready.started_ns) / 1000
    ));
    let handover = Box::new(Handover {
        member: ready.member,
        options: restore::Options {
            method: settings.config.restore,
            job: job.dir.clone(),
            files,
            inside: None,
            contents: None,
        },
        payload,
        protected,
        pages: ready.since.map(|since| {
            let mut pages = increments.pass_on();
            let later = std::mem::replace(&mut pages.changed, since);
            pages.changed.unite(&later);
            pages
        }),
        watching: watching.is_some(),
        job: job.name(),
    });
    let handover = Box::into_raw(handover);
    // The image has its own.
    std::mem::forget(lifted);
    CONTROL.handover.store(handover, Ordering::SeqCst);
    step(COMMIT);
    CONTROL.order.store(END, Ordering::SeqCst);
    request::order_inserted();
    stop::look_again();
    helper::leave()
}

/// A copy of one of the program's descriptors.
fn output(fd: i32) -> Option<OwnedFd> {
    let leader = AGENT.real_pid.load(Ordering::Relaxed);
    let pidfd = sys::pidfd_of(leader, leader).ok()?;
    let copy = handed::copy(pidfd.raw(), fd).ok()?;
    // SAFETY: new, and ours alone.
    Some(unsafe { OwnedFd::from_raw_fd(copy.release()) })
}

/// Everything that is still to be found out with the program stopped, and the bytes to be
/// kept.
fn last_checks(
    settings: &Settings,
    claimed: &Claimed,
    ready: &Ready,
    stopped: &Stopped,
) -> Result<check::Protected, Refused> {
    let leader = AGENT.real_pid.load(Ordering::Relaxed) as u32;
    let mut threads = stopped.threads();
    if !threads.any(|slot| slot.tid.load(Ordering::Relaxed) == leader) {
        return Err(refused(
            libc::ENOTSUP,
            "the first thread of the program has ended",
        ));
    }
    let then = &settings.credentials;
    if let Some(reason) = credentials::changed(stopped, leader as i32, then) {
        return Err(refused(libc::EPERM, reason));
    }
    let open = reopen::open_now();
    let (job, inodes) = (&claimed.job, open.inodes());
    files::can_go_back(job, &ready.record, &settings.config, Some(&inodes))
        .map_err(|reason| refused(libc::EIO, reason))?;
    let manifest = &ready.member.image.manifest;
    let images = 3 + ready.member.older.len();
    limits::check(manifest, &settings.limits, &ready.regions, images)
        .map_err(|(errno, reason)| refused(errno, reason))?;
    if let Some(path) = redirect::aimless(&manifest.descriptors) {
        let path = String::from_utf8_lossy(&path);
        let reason = format!("ckpt_redirect: nothing was open at {path} at the checkpoint");
        return Err(refused(libc::EINVAL, reason));
    }
    reopen::check(manifest, open, job, &ready.record, &settings.config)
        .map_err(|reason| refused(libc::EIO, reason))?;
    check::copy(&ready.regions).map_err(|errno| match errno {
        libc::ENOMEM => refused(errno, "no memory for what is to be kept"),
        errno => no_region(errno),
    })
}

/// Sends the images' descriptors, the lock's and the tracker's to the program's table.
fn hand_over(
    member: &FoundMember<RawFs>,
    claimed: &Claimed,
    watching: Option<i32>,
) -> Result<(), i32> {
    let leader = AGENT.real_pid.load(Ordering::Relaxed);
    let pidfd = sys::pidfd_of(leader, leader)?;
    // Where the leader must hand its end over itself.
    let socket = handed::expect(pidfd.raw());
    CONTROL.order.store(SERVE, Ordering::SeqCst);
    request::order_inserted();
    stop::look_again();
    if await_step(IDLE) == FAILED {
        return Err(CONTROL.error.load(Ordering::SeqCst));
    }
    let end = match socket {
        Some(socket) => handed::accept(&socket)?,
        None => sys::pidfd_getfd(pidfd.raw(), CONTROL.ends[1].load(Ordering::SeqCst))?,
    };
    let mut fds: Vec<i32> = vec![member.file.as_raw_fd()];
    fds.extend(member.older.iter().map(|link| link.file.as_raw_fd()));
    fds.push(claimed.lock.as_fd().as_raw_fd());
    fds.extend(watching);
    CONTROL.count.store(fds.len() as u32, Ordering::SeqCst);
    // Fewer than a socket's buffer holds: this does not wait.
    pass::send(end.raw(), &fds)?;
    step(SENT);
    match await_step(SENT) {
        RECEIVED => Ok(()),
        _ => Err(CONTROL.error.load(Ordering::SeqCst)),
    }
}

/// The leader closes what it has and waits for the release like the others.
fn call_off() {
    CONTROL.order.store(NO_ORDER, Ordering::SeqCst);
    step(OFF);
}
