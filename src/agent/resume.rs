//! What runs in the image's own code once the restorer has rebuilt the memory.
//!
//! [`after_restore`] is the new helper thread: it finishes what needs the new thread
//! ids (timers, pending signals, scheduling), resets the agent's state and opens the
//! barrier. [`resume_thread`] runs in each of the program's threads, on its own
//! stack, and returns into the saved frame. The addresses of both are in the
//! manifest, since this code is part of the image.
//!
//! Here: these two and what they wait for. `payload` is what they are told, `rebuild`,
//! `attributes` and `timers` are what the helper does before the barrier opens.

mod attributes;
mod payload;
mod rebuild;
mod timers;

pub use payload::{HelperArgs, ImageFile, Payload, ThreadRecord};

use crate::agent::callsites::restart::{self, Clock};
use crate::agent::checkpoint::increments::lives::prepare_restored;
use crate::agent::collect::process::xcomp_perm;
use crate::agent::collect::signals::put_back_own;
use crate::agent::hooks;
use crate::agent::procfs::OwnFd;
use crate::agent::region::{self, Region};
use crate::agent::snapshot::copy;
use crate::agent::state::AGENT;
use crate::agent::track::{fault, mprotect};
use crate::agent::{
    ballast, helper, log, prefetch, request, rollback, settings, side, starter, stop, track,
};
use crate::image::codec;
use crate::image::state::Switches;
use crate::persist::table;
use ckpt_sys::blob::{RestorerArgs, RestorerThread};
use ckpt_sys::context::make_room_for_tiles;
use ckpt_sys::syscall;
use ckpt_sys::thread::sigreturn_to;
use rebuild::{begin_table, put_protected, rebuild};
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

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
        make_room_for_tiles(uc, xcomp_perm);
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
        wait_at_least(&restorer.ready, restorer.nthreads as u32);
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
