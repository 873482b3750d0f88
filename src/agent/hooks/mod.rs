//! What each intercepted system call does. The call-site net ends in [`dispatch`];
//! where that net could not be laid, the exported symbols end in [`symbol`].
//!
//! Any thread and any context: signal handlers, forked and vforked children, threads
//! that glibc knows nothing of. Only raw system calls; no allocation, no locks.
//!
//! | file | calls |
//! |---|---|
//! | [`signal`], [`sigaction`], [`foreign`], [`frames`], [`altstack`], [`masks`] | the reserved signal stays invisible |
//! | [`memory`], [`ranges`], [`maps`] | ranges mapped from our image after a lazy restore |
//! | [`ids`] | old pid and tids after a restore with new ones |
//! | [`clock`] | times of clocks that go on after a reboot |
//! | [`listening`] | TCP servers leave their addresses to the next life |
//! | [`senders`] | who sent a signal, after such a restore |
//! | [`sent`] | which threads were sent one |
//! | [`files`] | what modifies files, names and attributes |
//! | [`process`] | the end, exec, sandboxes, namespaces, facilities that cannot be saved |
//! | [`privileges`] | what the program may do: ids, capabilities, landlock, chroot |
//! | [`user`] | the program's memory without crashes |
//!
//! Timers need next to no hook: what alarm, setitimer and timerfd hold can be read during the stop, a
//! timer of timer_create keeps its number over a restore (the restorer asks for that
//! number), and its thread id is translated ([`ids`]). Only one of the calling thread's CPU time
//! must name that thread ([`own_clock`]).

pub mod altstack;
pub mod clock;
pub mod files;
pub mod foreign;
pub mod frame;
pub mod frames;
pub mod ids;
pub mod listening;
pub mod maps;
pub mod masks;
pub mod memory;
pub mod pinned;
pub mod privileges;
pub mod process;
pub mod ranges;
pub mod senders;
pub mod sent;
pub mod sigaction;
pub mod signal;
pub mod symbol;
#[cfg(test)]
pub mod testing;
pub mod user;

use crate::agent::callsites::HOOKED;
use crate::agent::collect::timers;
use crate::agent::refusal;
use crate::agent::resume::ImageFile;
use crate::agent::state::{AGENT, is_agents_process};
use crate::agent::track::{fault, touch};
use ckpt_sys::callsite::hook_byte;
use ckpt_sys::tls::thread_block;
use frame::{CallFrame, Verdict};
use std::sync::atomic::Ordering::Relaxed;

const SIGNAL_CALLS: &[libc::c_long] = &[
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigsuspend,
    libc::SYS_sigaltstack,
    libc::SYS_signalfd,
    libc::SYS_signalfd4,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    IO_PGETEVENTS,
];

const IO_PGETEVENTS: libc::c_long = 333;

const ADVICE_CALLS: &[libc::c_long] = &[
    libc::SYS_madvise,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_munlock,
    libc::SYS_mlockall,
    libc::SYS_munlockall,
    // Trackers split mappings, which the kernel then does not move in one.
    libc::SYS_mremap,
    libc::SYS_mmap,
];

/// Limits: what we have reserved of an address space that becomes small must go.
const LIMIT_CALLS: &[libc::c_long] = &[libc::SYS_setrlimit, libc::SYS_prlimit64];

/// Timers of the calling thread's CPU time, servers.
const SELDOM_CALLS: &[libc::c_long] = &[libc::SYS_timer_create, libc::SYS_listen];

/// What puts a mapping where another was: only where flags count (`memory::changes_flags`).
const PLACING_CALLS: &[libc::c_long] = &[libc::SYS_mmap, libc::SYS_shmat];

/// Only after a lazy restore.
const IMAGE_CALLS: &[libc::c_long] = &[libc::SYS_mprotect, libc::SYS_pkey_mprotect];

/// Which calls go to [`dispatch`] *now*: one byte per number, 0 = none, else [`HOOKED`] and what
/// stage 1 lets through by itself. What is only
/// of interest after a restore is marked after a restore, so ask again then; what is only
/// of interest while a table of files is open, by [`files::arm`].
pub fn table() -> [u8; 512] {
    let mut table = table_of_others();
    for &(nr, fast) in pinned::CALLS {
        let byte = &mut table[nr as usize];
        if *byte == 0 {
            *byte = HOOKED | fast.bits();
        }
    }
    files::wanted_at_start(|nr| table[nr as usize] = 1);
    table
}

/// From now on [`PLACING_CALLS`] are of interest. Any thread.
pub fn look_at_placing() {
    for &nr in PLACING_CALLS {
        if let Some(byte) = hook_byte(nr as usize) {
            files::no_shortcut(nr as usize);
            byte.fetch_or(HOOKED, Relaxed);
        }
    }
}

/// [`table`] without what [`files`] and [`pinned`] want.
fn table_of_others() -> [u8; 512] {
    let mut table = [0; 512];
    let mut mark = |numbers: &[libc::c_long]| {
        for &nr in numbers {
            table[nr as usize] = 1;
        }
    };
    mark(SIGNAL_CALLS);
    sent::CALLS.iter().for_each(|(nr, _)| mark(&[*nr]));
    mark(ADVICE_CALLS);
    mark(LIMIT_CALLS);
    mark(SELDOM_CALLS);
    mark(process::NUMBERS);
    mark(privileges::NUMBERS);
    if memory::special_advice_seen() {
        mark(PLACING_CALLS);
    }
    if ranges::active() {
        mark(IMAGE_CALLS);
    }
    if fault::active() {
        mark(touch::NUMBERS);
    }
    if clock_ahead() {
        mark(clock::NUMBERS);
    }
    if AGENT.ids_translated.load(Relaxed) {
        mark(ids::calls::NUMBERS);
        mark(ids::locks::NUMBERS);
        for (nr, _) in ids::paths::CALLS {
            mark(&[*nr]);
        }
    }
    table
}

/// Are the program's clocks ahead of the kernel's?
fn clock_ahead() -> bool {
    crate::agent::clock::active()
}

/// Must a thread that is stopped on its way to this call look at the table again?
pub fn looks_again(nr: i64) -> bool {
    files::may_modify(nr) || clock::looks_again(nr) || ids::names_ids(nr) || memory::looks_again(nr)
}

/// Handles a call of the table. The frame is a system call that the program is about
/// to make: its pointers are used as the kernel would use them.
pub fn dispatch(frame: &mut CallFrame) -> Verdict {
    if memory::is_made_here(frame) {
        return memory::make_here(frame, dispatch_call);
    }
    dispatch_call(frame)
}

fn dispatch_call(frame: &mut CallFrame) -> Verdict {
    // Also as long as no page is protected: the first checkpoint may come before the call. (A
    // thread's id was not written, and it could not be joined.)
    // SAFETY: the block is this thread's own.
    unsafe { (*thread_block()).call_frame = frame as *const CallFrame as u64 };
    if !fault::active() {
        return handle(frame);
    }
    if memory::changes_map(frame) {
        return memory::change_map(frame, handle);
    }
    touch::call(frame.rax, &frame.args);
    memory::release_for(frame.rax, &frame.args);
    if let Some(verdict) = memory::marked_mmap(frame) {
        return verdict;
    }
    handle(frame)
}

/// What each hook has to say, one after the other.
fn handle(frame: &mut CallFrame) -> Verdict {
    // Key 0 is every mapping's, and -1 stands for none.
    if frame.rax == libc::SYS_pkey_mprotect && frame.args[3] as i32 > 0 {
        refusal::note(refusal::Kind::ProtectionKeys);
    }
    pinned::look(frame);
    if let Some(verdict) = files::dispatch(frame) {
        return verdict;
    }
    pinned::look_at_path(frame);
    if process::hide_writer(frame) {
        return Verdict::Done;
    }
    match frame.rax {
        libc::SYS_rt_sigprocmask => return signal::rt_sigprocmask(frame),
        libc::SYS_rt_sigaction => return sigaction::rt_sigaction(frame),
        libc::SYS_ppoll => return signal::masked(frame, 3, 4),
        libc::SYS_epoll_pwait | libc::SYS_epoll_pwait2 => return signal::masked(frame, 4, 5),
        libc::SYS_rt_sigsuspend => return signal::masked(frame, 0, 1),
        libc::SYS_pselect6 | IO_PGETEVENTS => return signal::masked_pair(frame),
        libc::SYS_rt_sigtimedwait => return signal::rt_sigtimedwait(frame),
        libc::SYS_rt_sigpending => return signal::rt_sigpending(frame),
        libc::SYS_signalfd | libc::SYS_signalfd4 => return signal::signalfd(frame),
        libc::SYS_tkill => sent::note(frame.args[0] as i32),
        libc::SYS_tgkill | libc::SYS_rt_tgsigqueueinfo => sent::note(frame.args[1] as i32),
        libc::SYS_sigaltstack => return altstack::sigaltstack(frame),
        libc::SYS_madvise => return memory::madvise(frame),
        libc::SYS_mlock | libc::SYS_mlock2 | libc::SYS_munlock => return memory::mlock(frame),
        libc::SYS_mlockall | libc::SYS_munlockall => return memory::mlockall(frame),
        libc::SYS_timer_create => own_clock(frame),
        libc::SYS_listen => listening::listen(frame),
        libc::SYS_mmap => memory::mmap(frame),
        libc::SYS_setrlimit | libc::SYS_prlimit64 => memory::limited(frame),
        libc::SYS_mremap => return memory::mremap(frame),
        libc::SYS_mprotect | libc::SYS_pkey_mprotect => return memory::mprotect(frame),
        _ => {}
    }
    let ids = AGENT.ids_translated.load(Relaxed);
    // Locks are taken here, by the program's own clock.
    if let Some(verdict) = ids.then(|| ids::locks::dispatch(frame)).flatten() {
        return verdict;
    }
    if let Some(verdict) = clock::dispatch(frame) {
        return verdict;
    }
    if ids
        && let Some(verdict) = ids::calls::dispatch(frame).or_else(|| ids::paths::dispatch(frame))
    {
        return verdict;
    }
    let privileges = frame.rax == libc::SYS_prctl || privileges::NUMBERS.contains(&frame.rax);
    if privileges && privileges::dispatch(frame) == Verdict::Done {
        return Verdict::Done;
    }
    process::dispatch(frame)
}

/// A timer that counts the CPU time of the thread that makes it: which one that was the kernel
/// tells nobody, unless the clock says it.
fn own_clock(frame: &mut CallFrame) {
    if timers::of_calling_thread(frame.args[0] as i32) && is_agents_process() {
        frame.args[0] = timers::thread_clock(ids::own_tid()) as u64;
    }
}

/// What a restore tells the hooks.
#[derive(Debug, Clone, Copy)]
pub struct Restored<'a> {
    /// `(old, new)` id of every thread.
    pub pairs: &'a [(i32, i32)],
    pub old_pid: i32,
    pub new_pid: i32,
    /// The ranges that are mapped from images, ascending, with their `vma_flag`s.
    pub mapped: &'a [(u64, u64, u32)],
    pub image_files: &'a [ImageFile],
    /// As the program knows them.
    pub pgid: i32,
    pub sid: i32,
}

/// Sets the tables of [`ids`] and [`memory`] and marks the calls that are of interest
/// from now on in the net's table.
///
/// # Safety
/// In the restored process before the program's threads run.
pub unsafe fn after_restore(restored: &Restored) {
    use ckpt_sys::callsite::MAY_CHANGE_FILES;
    use ckpt_sys::syscall;
    // SAFETY: no pointers.
    let (pgid, sid) = unsafe {
        (
            syscall!(libc::SYS_getpgid, 0) as i32,
            syscall!(libc::SYS_getsid, 0) as i32,
        )
    };
    altstack::after_restore(restored.new_pid);
    let ids = ids::set_identity(restored.pairs, restored.old_pid, restored.new_pid);
    ids::set_groups(restored.pgid, pgid, restored.sid, sid);
    // The map's idea of the device is what the hooks compare with; stat(2) has
    // another one on some file systems.
    let mut maps = match restored.image_files {
        [] => None,
        _ => maps::Maps::open().ok(),
    };
    let files: Vec<(u64, u64)> = restored
        .image_files
        .iter()
        .map(|file| {
            let mapping = maps.as_mut().and_then(|maps| maps.at(file.example).ok()?);
            match mapping {
                Some(m) if m.start <= file.example && m.ino != 0 => (m.dev, m.ino),
                _ => {
                    let (major, minor) = (libc::major(file.dev), libc::minor(file.dev));
                    (u64::from(major) << 32 | u64::from(minor), file.ino)
                }
            }
        })
        .collect();
    if AGENT.ids_translated.load(Relaxed) {
        senders::adopt();
    }
    let known = memory::set_image_files(&files);
    let ranges = memory::set_image_ranges(restored.mapped);
    if ids.is_err() || ranges.is_err() || !known {
        refusal::disable("no memory for the tables of the restored process");
    }
    for (nr, wanted) in table()
        .iter()
        .enumerate()
        .filter(|(_, wanted)| **wanted != 0)
    {
        if let Some(byte) = hook_byte(nr) {
            files::no_shortcut(nr);
            byte.fetch_or(*wanted, Relaxed);
        }
    }
    if clock_ahead() {
        // A hook that was left without a translation is entered again.
        for &nr in clock::WAITS {
            if let Some(byte) = hook_byte(nr as usize) {
                byte.fetch_or(MAY_CHANGE_FILES, Relaxed);
            }
        }
    }
}

/// Resolves the symbol net's real functions (constructor).
pub fn touch_symbols() {
    symbol::touch();
}
