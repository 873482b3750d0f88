//! Write faults on pages that we protect: the handler of SIGSEGV, and opening pages.
//!
//! [`on_fault`] runs in any thread (of the program, in a forked child, in the helper); it
//! allocates nothing. [`release`] and [`touch`] are for hooks: the program is about to
//! change a range of memory, or to have the kernel write into it.
//!
//! Laws:
//! 1. The state bytes and the real protection change together under [`Lock`], which is held
//!    over nothing but system calls on memory maps; with all other signals blocked, so that
//!    no handler of the program runs inside it.
//! 2. What is opened is marked [`table::OPEN`] only after the kernel has opened it.
//! 3. The program's own SIGSEGV is delivered as the kernel would have.
//! 4. SIGSEGV is never really blocked while pages are protected: the kernel kills for a
//!    fault while it is. What the program believes is kept beside ([`super::blocked`]).

use super::table::{self, EXEC, OPEN, STORE, WATCHED};
use super::{blocked, store, touch as touching};
use crate::agent::callsites::restart;
use crate::agent::collect::memory::PAGE;
use crate::agent::hooks::{frames, sigaction};
use crate::agent::state::{InHook, RESERVED_BIT};
use crate::image::state::KernelSigaction;
use ckpt_sys::raw::check;
use ckpt_sys::{syscall, tls::thread_block};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*};

/// SIGSEGV in a 64-bit kernel signal set.
pub const FAULT_BIT: u64 = 1 << (libc::SIGSEGV - 1);

/// 1: our handler is the kernel's action for SIGSEGV. Sticky, also over a restore: the action
/// is in the image.
static INSTALLED: AtomicU32 = AtomicU32::new(0);

/// Is the program's SIGSEGV kept in a table of ours?
#[inline]
pub fn installed() -> bool {
    INSTALLED.load(Relaxed) != 0
}

/// Are there pages that may be protected by us?
#[inline]
pub fn active() -> bool {
    table::exists()
}

/// The signals that a mask must not hold.
#[inline]
pub fn never_blocked() -> u64 {
    never_blocked_if(INSTALLED.load(Relaxed))
}

/// The word on which that depends.
pub fn word() -> &'static AtomicU32 {
    &INSTALLED
}

/// The signals that a mask must not hold, by what stands in [`word`].
#[inline]
pub fn never_blocked_if(word: u32) -> u64 {
    if word != 0 { FAULT_BIT } else { 0 }
}

/// The code that a frame belongs to goes on with SIGSEGV open (law 4).
///
/// # Safety
/// In the handler whose frame `uc` is, or in the restorer that goes back to it.
pub unsafe fn keep_open_in(uc: *mut libc::ucontext_t) {
    if !installed() {
        return;
    }
    // SAFETY: the frame is the caller's; the thread's own block.
    unsafe {
        let mask = (&raw mut (*uc).uc_sigmask).cast::<u64>();
        if *mask & FAULT_BIT != 0 {
            *mask &= !FAULT_BIT;
            blocked::block(touching::stack_pointer(uc));
        }
    }
}

/// 0 free, else the holder's process id (a forked child may find its parent's).
static LOCK: AtomicU32 = AtomicU32::new(0);

/// Held while protections and state bytes change together.
pub struct Lock(u64);

impl Lock {
    pub fn take() -> Lock {
        let all = !FAULT_BIT;
        let mut before = 0u64;
        // SAFETY: our own words.
        let pid = unsafe {
            let set = libc::SIG_SETMASK;
            syscall!(
                libc::SYS_rt_sigprocmask,
                set,
                &raw const all,
                &raw mut before,
                8
            );
            syscall!(libc::SYS_getpid) as u32
        };
        let mut tries = 0u32;
        while let Err(holder) = LOCK.compare_exchange(0, pid, Acquire, Relaxed) {
            tries += 1;
            if tries < 100 {
                std::hint::spin_loop();
                continue;
            }
            let pause = [0u64, 50_000];
            // SAFETY: a time of ours.
            unsafe { syscall!(libc::SYS_nanosleep, &raw const pause, 0) };
            // Held by a thread of the parent when this process was forked.
            let stale = holder != pid && tries > 2000;
            if stale && LOCK.compare_exchange(holder, pid, Acquire, Relaxed).is_ok() {
                break;
            }
        }
        Lock(before)
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        LOCK.store(0, Release);
        // SAFETY: the mask of before.
        unsafe {
            let set = libc::SIG_SETMASK;
            syscall!(libc::SYS_rt_sigprocmask, set, &raw const self.0, 0, 8);
        }
    }
}

/// How many runs were opened since the last sweep, and how many may be (the kernel limits
/// the mappings of a process).
static OPENED: AtomicU32 = AtomicU32::new(0);
static BUDGET: AtomicU32 = AtomicU32::new(16 << 10);

/// At a sweep: nothing is open any more, and so many runs may be.
pub fn begin_interval(budget: u32) {
    OPENED.store(0, Relaxed);
    BUDGET.store(budget.max(64), Relaxed);
}

/// Pages opened by one fault: the fuller the map, the more.
fn run_pages() -> u64 {
    let (opened, budget) = (OPENED.load(Relaxed), BUDGET.load(Relaxed));
    match () {
        _ if opened < budget / 2 => 1,
        _ if opened < budget / 4 * 3 => 4,
        _ if opened < budget / 8 * 7 => 16,
        _ if opened < budget => 64,
        _ => 512,
    }
}

fn set_protection(start: u64, end: u64, prot: i32) -> Result<(), i32> {
    // SAFETY: memory that we have protected ourselves, or are about to.
    check(unsafe { syscall!(libc::SYS_mprotect, start, end - start, prot) }).map(|_| ())
}

/// What the program believes of a page with these bits.
fn writable(state: u8) -> i32 {
    let exec = if state & EXEC != 0 {
        libc::PROT_EXEC
    } else {
        0
    };
    libc::PROT_READ | libc::PROT_WRITE | exec
}

/// How far from `addr` on the pages satisfy `wanted`, both ways, at most to `low..high`.
fn extent(addr: u64, (low, high): (u64, u64), wanted: impl Fn(u8) -> bool) -> (u64, u64) {
    let (mut start, mut end) = (addr, addr + PAGE);
    while start > low && wanted(table::get(start - PAGE)) {
        start -= PAGE;
    }
    while end < high && wanted(table::get(end)) {
        end += PAGE;
    }
    (start, end)
}

fn mark_open(start: u64, end: u64) {
    for page in (start..end).step_by(PAGE as usize) {
        if let Some(byte) = table::byte(page) {
            let _ = byte.fetch_update(AcqRel, Acquire, |state| {
                Some(if state & WATCHED != 0 {
                    state & !WATCHED | OPEN
                } else {
                    state
                })
            });
        }
    }
}

/// Opens the page at `addr` and some around it. False: it is none of ours.
fn open(addr: u64) -> bool {
    let addr = addr & !(PAGE - 1);
    let mut state = table::get(addr);
    while state & STORE != 0 {
        store::before_write(addr);
        state = table::get(addr);
    }
    if state & WATCHED == 0 {
        return state & OPEN != 0;
    }
    let _lock = Lock::take();
    let state = table::get(addr);
    if state & WATCHED == 0 {
        return state & OPEN != 0;
    }
    let alike = |other: u8| other & (WATCHED | EXEC | STORE) == WATCHED | (state & EXEC);
    let block = run_pages() * PAGE;
    let low = addr / block * block;
    let (start, end) = extent(addr, (low, low + block), alike);
    OPENED.fetch_add(1, Relaxed);
    if set_protection(start, end, writable(state)).is_ok() {
        mark_open(start, end);
        return true;
    }
    // No more mappings: everything around becomes one again.
    let known = |other: u8| {
        other & (WATCHED | OPEN) != 0 && other & EXEC == state & EXEC && other & STORE == 0
    };
    let (start, end) = extent(addr, (PAGE, u64::MAX - PAGE), known);
    OPENED.store(BUDGET.load(Relaxed), Relaxed);
    if set_protection(start, end, writable(state)).is_ok() {
        mark_open(start, end);
        return true;
    }
    false
}

/// The kernel, or one of our own calls, is about to write there: opens what is protected.
#[inline]
pub fn touch(addr: u64, len: u64) {
    if active() && len != 0 && addr >= PAGE {
        // No image may hold a thread with the table's addresses in its registers.
        let _hook = InHook::enter();
        touch_pages(addr, len);
    }
}

fn touch_pages(addr: u64, len: u64) {
    const LIMIT: u64 = 1 << 47;
    let end = addr.saturating_add(len.min(1 << 32)).min(LIMIT);
    let mut page = addr & !(PAGE - 1);
    while page < end {
        match table::byte(page) {
            Some(byte) => {
                if byte.load(Acquire) & (WATCHED | STORE) != 0 {
                    open(page);
                }
                page += PAGE;
            }
            // Nothing is marked in this GiB.
            None => page = (page | ((1 << 30) - 1)) + 1,
        }
    }
}

/// The program is about to change the mappings of a range: its pages are given back as the
/// program believes them to be, and are new to the next sweep.
pub fn release(start: u64, len: u64) {
    let end = start
        .saturating_add(len)
        .next_multiple_of(PAGE)
        .min(1 << 47);
    let start = start & !(PAGE - 1);
    if !active() || start >= end {
        return;
    }
    let _hook = InHook::enter();
    let mut any = false;
    table::runs(start, end, |_, _, state| any |= state != 0);
    if !any {
        return;
    }
    store::settle(start, end);
    let _lock = Lock::take();
    table::runs(start, end, |from, to, state| {
        if state & WATCHED != 0 && set_protection(from, to, writable(state)).is_err() {
            let known = |other: u8| other & (WATCHED | OPEN) != 0 && other & EXEC == state & EXEC;
            let (low, high) = extent(from, (PAGE, u64::MAX - PAGE), known);
            if set_protection(low, high, writable(state)).is_ok() {
                mark_open(low, high);
            }
        }
    });
    table::set(start, end, 0);
}

/// The program gives a range flags of its own.
pub fn mark_borders(start: u64, len: u64) {
    let end = start.saturating_add(len).next_multiple_of(PAGE);
    if active() && start < end && end < 1 << 47 {
        let _hook = InHook::enter();
        table::mark_border(start & !(PAGE - 1));
        table::mark_border(end);
    }
}

const SEGV_ACCERR: i32 = 2;
/// Page-fault error code: the access was a write.
const WRITE: i64 = 2;

/// The handler of SIGSEGV.
unsafe extern "C" fn on_fault(sig: i32, info: *mut libc::siginfo_t, uc: *mut libc::ucontext_t) {
    // SAFETY: the kernel's frame; the thread's own block.
    unsafe {
        let regs = &(*uc).uc_mcontext.gregs;
        let by_write = regs[libc::REG_ERR as usize] & WRITE != 0;
        if (*info).si_code == SEGV_ACCERR && by_write {
            let addr = (*info).si_addr() as u64;
            if let Some(byte) = table::byte(addr) {
                let state = byte.load(Acquire);
                if state & (WATCHED | STORE) != 0 && open(addr) {
                    return;
                }
                // The page may have been opened, or given back, since the fault.
                let tries = if state & OPEN != 0 { 16 } else { 3 };
                if !again(addr, tries) {
                    return;
                }
            }
        }
        deliver(sig, info, uc);
    }
}

/// The write is tried again, but not for ever: true after so many times in a row.
fn again(addr: u64, limit: u32) -> bool {
    let block = thread_block();
    // SAFETY: the thread's own block.
    unsafe {
        if (*block).fault_addr == addr {
            (*block).fault_count += 1;
        } else {
            (*block).fault_addr = addr;
            (*block).fault_count = 0;
        }
        let too_often = (*block).fault_count >= limit;
        if too_often {
            (*block).fault_addr = 0;
        }
        too_often
    }
}

/// The program's own fault (or a SIGSEGV that was sent).
///
/// # Safety
/// The arguments of the handler.
unsafe fn deliver(sig: i32, info: *mut libc::siginfo_t, uc: *mut libc::ucontext_t) {
    type Handler = unsafe extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::ucontext_t);
    const SA_RESETHAND: u64 = 0x8000_0000;
    // SAFETY: the kernel's frame; the thread's own block; the program's handler.
    unsafe {
        let block = thread_block();
        let sent = (*info).si_code <= 0;
        let action = sigaction::fault_action();
        let blocked = blocked::is_blocked();
        if action.handler == 1 && sent {
            return;
        }
        if action.handler <= 1 || (blocked && !sent) {
            let default = KernelSigaction::default();
            syscall!(libc::SYS_rt_sigaction, sig, &raw const default, 0, 8);
            if sent {
                let (pid, tid) = (syscall!(libc::SYS_getpid), syscall!(libc::SYS_gettid));
                syscall!(libc::SYS_tgkill, pid, tid, sig);
            }
            return; // to the same fault, with the default action
        }
        if action.flags & SA_RESETHAND != 0 {
            sigaction::set_fault_action(&KernelSigaction::default());
        }
        let frame_mask = (&raw mut (*uc).uc_sigmask).cast::<u64>();
        if (*block).reserved_blocked != 0 {
            *frame_mask |= RESERVED_BIT;
        }
        let during = (*frame_mask | action.mask) & !(RESERVED_BIT | FAULT_BIT);
        if action.flags & libc::SA_ONSTACK as u64 == 0 && frames::changed_stack(uc) {
            let sp = (*uc).uc_mcontext.gregs[libc::REG_RSP as usize] as u64;
            touch(sp.saturating_sub(32 << 10), 32 << 10);
            frames::move_to_stack(sig, info, uc, &action, during);
            return;
        }
        let set = libc::SIG_SETMASK;
        syscall!(libc::SYS_rt_sigprocmask, set, &raw const during, 0, 8);
        let run: Handler = std::mem::transmute(action.handler);
        let kept = blocked::kept();
        run(sig, info, uc);
        blocked::put_back(kept);
        (*block).handlers_run += 1;
        restart::program_handler_runs(uc);
        *frame_mask &= !(RESERVED_BIT | FAULT_BIT);
    }
}

/// Puts the handler in place. The world is stopped, or there is one thread. Asks the
/// kernel each time: an image may hold memory that says it is done, and signal actions
/// that were collected just before it was.
pub fn install() -> Result<(), i32> {
    const SA_RESTORER: u64 = 0x0400_0000;
    let sig = libc::SIGSEGV;
    let action = KernelSigaction {
        handler: on_fault as *const () as u64,
        flags: (libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER | libc::SA_RESTART) as u64
            | SA_RESTORER,
        restorer: ckpt_sys::thread::restorer as *const () as u64,
        mask: !FAULT_BIT,
    };
    let mut before = KernelSigaction::default();
    // SAFETY: our own structures; the handler is async-signal-safe.
    unsafe {
        check(syscall!(libc::SYS_rt_sigaction, sig, 0, &raw mut before, 8))?;
        if before.handler == action.handler {
            return Ok(());
        }
        check(syscall!(
            libc::SYS_rt_sigaction,
            sig,
            &raw const action,
            0,
            8
        ))?;
    }
    if INSTALLED.load(SeqCst) == 0 {
        sigaction::program_view(sig, &mut before);
        sigaction::set_fault_action(&before);
        INSTALLED.store(1, SeqCst);
    }
    sigaction::open_masks();
    Ok(())
}

/// Lets faults through in a thread that has all signals blocked, if there may be any.
pub fn let_through() {
    if installed() {
        unblock();
    }
}

/// Lets faults through in the calling thread.
pub fn unblock() {
    let bit = FAULT_BIT;
    // SAFETY: our own word.
    unsafe {
        let how = libc::SIG_UNBLOCK;
        syscall!(libc::SYS_rt_sigprocmask, how, &raw const bit, 0, 8);
    }
}

/// Memory of the agent that is never protected: handlers and the kernel write there.
static KEPT: [(AtomicU64, AtomicU64); 256] =
    [const { (AtomicU64::new(0), AtomicU64::new(0)) }; 256];
static NKEPT: AtomicU32 = AtomicU32::new(0);

/// Notes such a range; any thread.
pub fn keep_open(start: u64, len: u64) {
    let at = NKEPT.fetch_add(1, AcqRel) as usize;
    match KEPT.get(at) {
        Some((from, to)) => {
            from.store(start, Relaxed);
            to.store(start + len, Release);
        }
        // No room: neighbours of the last one are taken with it.
        None => {
            NKEPT.store(KEPT.len() as u32, Release);
            let (from, to) = &KEPT[KEPT.len() - 1];
            from.fetch_min(start, Relaxed);
            to.fetch_max(start + len, Release);
        }
    }
}

/// The ranges noted.
pub fn kept_open() -> impl Iterator<Item = (u64, u64)> {
    let n = (NKEPT.load(Acquire) as usize).min(KEPT.len());
    KEPT[..n]
        .iter()
        .map(|(from, to)| (from.load(Relaxed), to.load(Acquire)))
}
