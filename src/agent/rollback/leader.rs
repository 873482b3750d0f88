//! The threads' part of a rollback. The leader, whose id is the process's and cannot be
//! given to another, stays and restores; all others end, without joins or clean-ups: their
//! memory is about to be replaced.
//!
//! [`obey`] runs in stopped threads (the stop handler, or the wait of `ckpt_checkpoint`),
//! all signals blocked; raw system calls only. [`go_back`] is the leader once it is alone,
//! on the stack and with the control block and the heap of the helper, which has ended.

use super::check::Protected;
use super::*;
use crate::agent::checkpoint::increments::lives::Knowledge;
use crate::agent::collect::descriptors::handed;
use crate::agent::collect::{signals, timers};
use crate::agent::procfs::{self, TaskList};
use crate::agent::region::{REGION, Region};
use crate::agent::restore::{self, Inside};
use crate::agent::resume::Payload;
use crate::agent::state::AGENT;
use crate::agent::stop::Slot;
use crate::agent::{log, refusal};
use crate::image::state::{Manifest, PendingSignal, PosixTimer};
use crate::store::RawFs;
use crate::store::find::FoundMember;
use ckpt_sys::raw::check;
use ckpt_sys::thread::go_on_at;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::AtomicU64;

/// Exit status when there is no way back (as of a failed recovery).
const OUR_FAILURE: i32 = 125;

/// Everything that the helper has prepared, in its heap.
pub struct Handover {
    /// Its descriptors are those of the helper's table.
    pub member: FoundMember<RawFs>,
    pub options: restore::Options,
    pub payload: Payload,
    pub protected: Protected,
    /// What has changed since, where that is known.
    pub pages: Option<Knowledge>,
    /// The tracker's descriptor comes behind the lock's.
    pub watching: bool,
    /// For messages.
    pub job: String,
}

/// Carries out an order of the helper, if there is one for the calling thread. Returns when
/// there is none, or when the rollback was called off.
pub fn obey(slot: &Slot, tid: i32) {
    let leader = tid == AGENT.real_pid.load(Ordering::Relaxed);
    match CONTROL.order.load(Ordering::SeqCst) {
        SERVE if leader => serve((slot.rseq, slot.rseq_len)),
        END if !leader => leave(),
        _ => {}
    }
}

/// Ends the calling thread. The kernel must not write into the memory that protected
/// regions were copied from, nor wake anybody.
fn leave() -> ! {
    loop {
        // SAFETY: this thread's stack and data are never looked at again.
        unsafe {
            syscall!(libc::SYS_set_robust_list, 0, 24);
            syscall!(libc::SYS_set_tid_address, 0);
            syscall!(libc::SYS_exit, 0);
        }
    }
}

/// The leader's side until the helper commits or calls it off.
fn serve(rseq: (u64, u32)) {
    if CONTROL.step.load(Ordering::SeqCst) != IDLE {
        return;
    }
    let mut ends = [-1i32; 2];
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: the kernel fills two words.
    let made = check(unsafe { syscall!(libc::SYS_socketpair, libc::AF_UNIX, kind, 0, &mut ends) });
    let made = made.and_then(|_| match handed::is_expected() {
        true => handed::hand(ends[1]).inspect_err(|_| close(&ends)),
        false => Ok(()),
    });
    if let Err(errno) = made {
        CONTROL.error.store(errno, Ordering::SeqCst);
        step(FAILED);
        await_step(FAILED);
        return;
    }
    CONTROL.ends[0].store(ends[0], Ordering::SeqCst);
    CONTROL.ends[1].store(ends[1], Ordering::SeqCst);
    step(CONNECTED);
    if await_step(CONNECTED) != SENT {
        close(&ends);
        return;
    }
    let count = CONTROL.count.load(Ordering::SeqCst) as usize;
    let mut have = 0;
    let received = pass::receive(ends[0], count, |number, fd| {
        CONTROL.received[number].store(fd, Ordering::SeqCst);
        have = number + 1;
    });
    close(&ends);
    let next = match received {
        Ok(()) => RECEIVED,
        Err(errno) => {
            CONTROL.error.store(errno, Ordering::SeqCst);
            FAILED
        }
    };
    step(next);
    if await_step(next) != COMMIT {
        for fd in &CONTROL.received[..have] {
            close(&[fd.load(Ordering::SeqCst)]);
        }
        return;
    }
    // The helper leaves its region to the leader.
    await_helper();
    let region = REGION.load(Ordering::SeqCst) as *mut Region;
    // SAFETY: the region stays mapped, its thread is gone; all signals are blocked, and
    // the handover is the helper's last word.
    unsafe {
        RSEQ[0].store(rseq.0, Ordering::SeqCst);
        RSEQ[1].store(u64::from(rseq.1), Ordering::SeqCst);
        let handover = CONTROL.handover.load(Ordering::SeqCst) as u64;
        go_on_at((*region).stack_top, (*region).tls, alone, handover)
    }
}

/// The leader's rseq area and its length.
static RSEQ: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

fn close(fds: &[i32]) {
    for &fd in fds {
        // SAFETY: descriptors made for this.
        unsafe { syscall!(libc::SYS_close, fd) };
    }
}

/// Until the kernel has cleared the helper's word: its very last access.
fn await_helper() {
    loop {
        let now = refusal::HELPER_ALIVE.load(Ordering::SeqCst);
        if now == 0 {
            return;
        }
        // SAFETY: a futex word of ours; the kernel's own wake is not a private one.
        unsafe {
            let word = &refusal::HELPER_ALIVE;
            syscall!(libc::SYS_futex, word, libc::FUTEX_WAIT, now, 0, 0, 0)
        };
    }
}

extern "C" fn alone(handover: u64) -> ! {
    // SAFETY: made by Box::into_raw in the helper, whose heap this thread has now.
    let handover = unsafe { Box::from_raw(handover as *mut Handover) };
    let (job, generation) = (handover.job.clone(), handover.payload.generation);
    let error = go_back(*handover);
    end(format_args!(
        "cannot go back to generation {generation} of job {job}: {error}; the checkpoint is untouched, start the program again"
    ))
}

/// One line and the end of the process.
pub fn end(message: std::fmt::Arguments<'_>) -> ! {
    log::complain(message);
    log::line(message);
    loop {
        // SAFETY: ends the process; its state is neither the old nor the new one.
        unsafe { syscall!(libc::SYS_exit_group, OUR_FAILURE) };
    }
}

fn go_back(mut handover: Handover) -> restore::RestoreError {
    await_others();
    let mut number = 0;
    let mut here = |theirs: &mut OwnedFd| {
        let fd = CONTROL.received[number].load(Ordering::SeqCst);
        number += 1;
        // SAFETY: received for this. The other number belongs to a table that is gone.
        let own = unsafe { OwnedFd::from_raw_fd(fd) };
        std::mem::forget(std::mem::replace(theirs, own));
    };
    here(&mut handover.member.file);
    for link in &mut handover.member.older {
        here(&mut link.file);
    }
    let own = |number: usize| {
        let fd = CONTROL.received[number].load(Ordering::SeqCst);
        // SAFETY: as above.
        unsafe { OwnedFd::from_raw_fd(fd) }
    };
    let lock = own(number);
    let watching = handover.watching.then(|| own(number + 1));
    let manifest = &handover.member.image.manifest;
    handover.payload.kept_timers = stop_timers(manifest);
    handover.payload.kept_signals = take_signals(manifest);
    let [rseq, len] = [0, 1].map(|k| RSEQ[k].load(Ordering::SeqCst));
    limits::make_room(manifest, rseq);
    handover.options.inside = Some(Inside {
        rseq: (rseq, len as u32),
        protected: handover.protected,
        pages: handover.pages,
        watching,
    });
    match restore::restore(
        handover.member,
        Some(lock),
        handover.options,
        handover.payload,
    ) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

/// Waits until the leader is the only thread. All others have been told to end. One that is
/// left would go on in memory that has been replaced under it.
fn await_others() {
    // SAFETY: no arguments.
    let own = unsafe { syscall!(libc::SYS_gettid) } as i32;
    let mut list = TaskList::new();
    let mut pause = 20_000u64;
    loop {
        if list.read().is_ok() && no_other(own, list.ids(), procfs::task_state) {
            return;
        }
        let time = [0u64, pause];
        // SAFETY: a valid timespec.
        unsafe { syscall!(libc::SYS_nanosleep, &time, 0) };
        pause = (pause * 2).min(1_000_000);
    }
}

/// Is none of the listed threads alive but `own`, and is the list all there is? It ends early
/// where a thread ends while it is told. One that is nearly gone (`X`) still has its id, which
/// its successor wants.
fn no_other(own: i32, listed: &[i32], state: impl Fn(i32) -> Option<u8>) -> bool {
    let mut there = 0;
    for &tid in listed {
        match state(tid) {
            _ if tid == own => there += 1,
            None => {}
            // One that is traced stays until its tracer has looked at it.
            Some(b'Z') => there += 1,
            Some(_) => return false,
        }
    }
    procfs::thread_count().is_none_or(|count| count <= there)
}

/// Takes all signals off the queues. Returned are those that must not be lost: what others
/// have sent since the checkpoint. The rest belongs to the time that is undone, or is in
/// the image.
fn take_signals(manifest: &Manifest) -> Vec<PendingSignal> {
    let threads = manifest.threads.iter().flat_map(|t| &t.pending);
    let mut known: Vec<&PendingSignal> = manifest.signals.pending.iter().chain(threads).collect();
    let mut kept = Vec::new();
    // SAFETY: all signals are blocked here.
    while let Some(signal) = unsafe { signals::take(!0) } {
        if let Some(at) = known.iter().position(|k| **k == signal) {
            known.swap_remove(at);
        } else if is_from_outside(&signal) {
            kept.push(signal);
        }
    }
    kept
}

fn is_from_outside(signal: &PendingSignal) -> bool {
    let word = |at: usize| {
        let bytes = signal.info.get(at..at + 4);
        bytes.map_or(0, |b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
    };
    let own = AGENT.real_pid.load(Ordering::Relaxed);
    match word(8) {
        // A terminal's ^C, say.
        libc::SI_KERNEL => true,
        libc::SI_USER | libc::SI_QUEUE | libc::SI_TKILL => word(16) != own,
        _ => false,
    }
}

/// Stops all timers, and removes those that the image does not have. What stays is set
/// again later: before Linux 6.15 a timer could not be made with an id of its own.
fn stop_timers(manifest: &Manifest) -> Vec<i32> {
    let none = [0u64; 4];
    let same = |a: &PosixTimer, b: &PosixTimer| {
        let of = |t: &PosixTimer| (t.id, t.clock, t.notify, t.signo, t.sigval, t.tid);
        of(a) == of(b) && a.tid == 0
    };
    let mut kept = Vec::new();
    // SAFETY: valid structs; ids of this process.
    unsafe {
        for which in 0..3 {
            syscall!(libc::SYS_setitimer, which, &none, 0);
        }
        for timer in timers::collect().posix {
            if manifest.timers.posix.iter().any(|t| same(t, &timer)) {
                syscall!(libc::SYS_timer_settime, timer.id, 0, &none, 0);
                kept.push(timer.id);
            } else {
                syscall!(libc::SYS_timer_delete, timer.id);
            }
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;

    /// A list that was read while threads ended missed one that lived: the leader replaced the
    /// memory under it, and it went on in the new life beside the thread that had its place.
    #[test]
    fn a_thread_that_the_list_has_missed_is_waited_for() {
        in_child(|| {
            // SAFETY: no arguments.
            let own = unsafe { syscall!(libc::SYS_gettid) } as i32;
            let (gone, mut list) = (i32::MAX, TaskList::new());
            assert!(no_other(own, &[own], procfs::task_state));
            assert!(no_other(own, &[own, gone], procfs::task_state));
            let (end, ended) = std::sync::mpsc::channel::<()>();
            let other = std::thread::spawn(move || ended.recv());
            assert!(!no_other(own, &[own], procfs::task_state));
            assert!(!no_other(own, &[own, gone], procfs::task_state));
            list.read().unwrap();
            assert!(!no_other(own, list.ids(), procfs::task_state));
            end.send(()).unwrap();
            other.join().unwrap().unwrap();
            await_others();
        });
    }
}
