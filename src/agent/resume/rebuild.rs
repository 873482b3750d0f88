//! What the new helper puts in place before the program's threads run: the agent's state, what
//! needs the new thread ids, memory that is kept over a rollback, the table of file changes.
//!
//! New helper thread, the program's threads waiting at the barrier.

use super::{Payload, attributes, timers};
use crate::agent::checkpoint::files;
use crate::agent::clock;
use crate::agent::collect::signals::put_back;
use crate::agent::collect::{keys, process, rare};
use crate::agent::state::AGENT;
use crate::agent::track::fault;
use crate::agent::{
    exit, heap, hooks, interface, log, own_memory, request, rollback, settings, start, starter,
    state,
};
use ckpt_sys::blob::{RestorerArgs, RestorerThread};
use ckpt_sys::syscall;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::Ordering;

/// Everything that needs the new threads to exist.
pub(super) fn rebuild(restorer: &RestorerArgs, payload: &Payload) {
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
pub(super) fn put_protected(payload: &Payload) {
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
pub(super) fn begin_table(payload: &Payload) {
    let Some(settings) = settings::get() else {
        return;
    };
    let job = std::path::Path::new(std::ffi::OsStr::from_bytes(&payload.job_dir));
    if let Err(reason) = files::resume(job, payload.generation, &settings.config, &payload.shared) {
        start::give_up(format_args!("cannot go on from the checkpoint: {reason}"));
    }
}
