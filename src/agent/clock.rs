//! The clocks that count from the machine's start: CLOCK_MONOTONIC, _RAW, _COARSE, BOOTTIME and
//! the ticks of times(2). A restored program's go on from where they were.
//!
//! Behind a reboot, or on another machine, the kernel's clock may be behind what the program
//! has seen: times that it computed before would be met too late, by as much as
//! the machine had been up. Then an *offset* is added to what the kernel says, from then on and in
//! later lives. It takes three things:
//!
//! 1. The vdso's functions are led to ours ([`super::vdso`]), also those that libc has cached.
//! 2. System calls that tell or take such times are translated (`hooks::clock`).
//! 3. No thread is checkpointed between a look at the kernel's clock and the addition, or
//!    anywhere in the vdso: one that is found there goes on to the function's end ([`put_off`]). Where
//!    that cannot be done, the generation is bound to its kernel and its offset
//!    ([`ClockState::amid`]).
//!
//! The state lies in the image; the restored helper sets it before any thread runs.

use super::procfs::read_file;
use super::stop;
use super::vdso::{self, frames::Frame};
use crate::agent::state::AGENT;
use crate::image::state::ClockState;
use ckpt_sys::{callsite, syscall, tls::thread_block};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering::*};

/// Clocks with an offset of their own; the order is that of [`ClockState::kernel`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    Monotonic = 0,
    Raw = 1,
    Boot = 2,
    /// times(2), in ticks.
    Ticks = 3,
}

pub const CLOCKS: usize = 4;

/// Which of them a clock id of clock_gettime(2) shows.
pub fn of(id: i32) -> Option<Clock> {
    Some(match id {
        libc::CLOCK_MONOTONIC | libc::CLOCK_MONOTONIC_COARSE => Clock::Monotonic,
        libc::CLOCK_MONOTONIC_RAW => Clock::Raw,
        libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => Clock::Boot,
        _ => return None,
    })
}

const IDS: [i32; 5] = [
    libc::CLOCK_MONOTONIC,
    libc::CLOCK_MONOTONIC_COARSE,
    libc::CLOCK_MONOTONIC_RAW,
    libc::CLOCK_BOOTTIME,
    libc::CLOCK_BOOTTIME_ALARM,
];

/// By how much the program's clocks are ahead of the kernel's.
static OFFSETS: [AtomicU64; CLOCKS] = [const { AtomicU64::new(0) }; CLOCKS];

/// The kernel's own vdso; 0: not asked yet.
static REAL: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

/// The vdso as the program knows it where it is not the kernel's: memory that leads there.
static LED: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

/// By how much, in ns (or ticks).
pub fn offset(clock: Clock) -> u64 {
    OFFSETS[clock as usize].load(Relaxed)
}

pub fn offsets() -> [u64; CLOCKS] {
    std::array::from_fn(|k| OFFSETS[k].load(Relaxed))
}

/// Is anything to be translated?
pub fn active() -> bool {
    offsets() != [0; CLOCKS]
}

fn ns(id: i32) -> u64 {
    let mut time = [0u64; 2];
    // SAFETY: the kernel fills two words.
    unsafe { syscall!(libc::SYS_clock_gettime, id, &mut time) };
    time[0] * 1_000_000_000 + time[1]
}

/// What the kernel's clocks show.
pub fn kernel() -> [u64; CLOCKS] {
    // SAFETY: times takes no result with a null pointer.
    let ticks = unsafe { syscall!(libc::SYS_times, 0) };
    [
        ns(libc::CLOCK_MONOTONIC),
        ns(libc::CLOCK_MONOTONIC_RAW),
        ns(libc::CLOCK_BOOTTIME),
        ticks.max(0) as u64,
    ]
}

/// The time namespace's offsets, which tell it from others of this boot.
pub fn namespace() -> Vec<u8> {
    read_file(b"/proc/self/timens_offsets").unwrap_or_default()
}

/// Where the kernel's own vdso is; asked once, before the first stop.
pub fn kernel_vdso() -> (u64, u64) {
    let [start, end] = &REAL;
    if start.load(Relaxed) == 0 {
        // SAFETY: no pointers.
        let at = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
        // SAFETY: the kernel maps a page there at the least.
        let head = (at != 0).then(|| unsafe { std::slice::from_raw_parts(at as *const u8, 4096) });
        if let Some(len) = head.and_then(vdso::mapped_len) {
            end.store(at + len, Relaxed);
            start.store(at, Relaxed);
        }
    }
    (start.load(Relaxed), end.load(Relaxed))
}

/// The vdso as the program knows it.
fn known_vdso() -> (u64, u64) {
    match LED[0].load(Relaxed) {
        0 => kernel_vdso(),
        start => (start, LED[1].load(Relaxed)),
    }
}

/// Does this instruction lie between a call of one of the clock's functions and its return? A
/// thread cannot go on there in another life. Async-signal-safe.
pub fn amid(rip: u64) -> bool {
    let lies =
        |range: &[AtomicU64; 2]| (range[0].load(Relaxed)..range[1].load(Relaxed)).contains(&rip);
    lies(&REAL)
        || lies(&LED)
        || (ckpt_sys::clock::gettime()..ckpt_sys::clock::gettime_end()).contains(&rip)
}

/// The function amid which the thread of this frame is will come back to the library, which then
/// raises the stop request `value` again. False: where it returns to cannot be found out.
///
/// # Safety
/// In the handler whose frame `uc` is; [`amid`] is true of its instruction.
pub unsafe fn put_off(uc: *const libc::ucontext_t, value: u64) -> bool {
    // SAFETY: the handler's own frame and the thread's own block; the slot is on the thread's
    // stack, above its stack pointer, and in use.
    unsafe {
        let regs = &(*uc).uc_mcontext.gregs;
        let block = &mut *thread_block();
        let rsp = regs[libc::REG_RSP as usize] as u64;
        // One that was left by a longjmp does not come back.
        const STACK: u64 = 8 << 20;
        let left = block.clock_slot < rsp && rsp - block.clock_slot < STACK;
        if block.clock_return == 0 || left {
            let frame = Frame {
                rip: regs[libc::REG_RIP as usize] as u64,
                rsp,
                rbp: regs[libc::REG_RBP as usize] as u64,
            };
            let Some(slot) = return_slot(frame).filter(|_| !shadow_stack()) else {
                return false;
            };
            block.clock_slot = slot;
            block.clock_return = *(slot as *const u64);
            *(slot as *mut u64) = ckpt_sys::clock::return_here();
            ckpt_sys::clock::set_returned(returned);
        }
        block.put_off_value = value;
        block.stop_pending = 1;
        true
    }
}

/// Where the return address out of all that is [`amid`] lies.
///
/// # Safety
/// The frame of a thread that stands still, amid.
unsafe fn return_slot(mut frame: Frame) -> Option<u64> {
    let (start, end) = (REAL[0].load(Relaxed), REAL[1].load(Relaxed));
    // SAFETY: the kernel's mapping; a stack in use.
    let vdso = unsafe { std::slice::from_raw_parts(start as *const u8, (end - start) as usize) };
    // SAFETY: as above.
    let read = |at: u64| unsafe { *(at as *const u64) };
    for _ in 0..4 {
        let slot = if (start..end).contains(&frame.rip) {
            let (slot, caller) = vdso::frames::caller(vdso, start, frame, read)?;
            frame = caller;
            slot
        } else if (LED[0].load(Relaxed)..LED[1].load(Relaxed)).contains(&frame.rip) {
            // A jump, or a system call: nothing is on the stack.
            frame.rip = read(frame.rsp);
            frame.rsp += 8;
            frame.rsp - 8
        } else {
            let slot = frame.rsp + ckpt_sys::clock::return_slot(frame.rip);
            frame.rip = read(slot);
            frame.rsp = slot + 8;
            slot
        };
        if !amid(frame.rip) {
            return Some(slot);
        }
    }
    None
}

/// Does the processor keep return addresses of its own? Then none may be replaced.
fn shadow_stack() -> bool {
    let mut pointer = 0u64;
    // SAFETY: `rdsspq` does nothing where there is no shadow stack.
    unsafe {
        std::arch::asm!(".byte 0xf3, 0x48, 0x0f, 0x1e, 0xc8", inout("rax") pointer, options(nomem, nostack, preserves_flags));
    }
    pointer != 0
}

/// A function is over whose return address was replaced: the stop that was put off, and where to
/// go on.
extern "C" fn returned() -> u64 {
    // SAFETY: the block is this thread's own.
    unsafe {
        let block = thread_block();
        let to = (*block).clock_return;
        (*block).clock_slot = 0;
        (*block).clock_return = 0;
        if (*block).stop_pending != 0 && (*block).in_hook == 0 {
            stop::park_put_off();
        }
        to
    }
}

/// Helper thread, all others stopped at `rips`.
pub fn collect(mut rips: impl Iterator<Item = u64>) -> ClockState {
    let (start, end) = known_vdso();
    let vdso = match start {
        0 => Vec::new(),
        // SAFETY: the kernel's mapping, or what the restorer has put in its place.
        _ => unsafe { std::slice::from_raw_parts(start as *const u8, (end - start) as usize) }
            .to_vec(),
    };
    ClockState {
        vdso_at: start,
        vdso,
        led: LED[0].load(Relaxed) != 0,
        gettime: ckpt_sys::clock::gettime(),
        sigreturn: callsite::program_sigreturn() as u64,
        kernel: kernel().to_vec(),
        offsets: offsets().to_vec(),
        namespace: namespace(),
        amid: rips.any(amid),
        net: AGENT.net_installed.load(Relaxed),
    }
}

/// What the restored process must know.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    pub offsets: [u64; CLOCKS],
    /// The kernel's own vdso, and its clock_gettime (0: it has none).
    pub real: (u64, u64),
    pub gettime: u64,
    /// [`ClockState::led`], from now on: where.
    pub led: (u64, u64),
    /// It has just been put there: the memory is not the image's.
    pub replaced: bool,
}

/// The restored helper, before any thread runs.
pub fn adopt(clocks: &Clocks) {
    for (mine, &offset) in OFFSETS.iter().zip(&clocks.offsets) {
        mine.store(offset, SeqCst);
    }
    for (mine, (start, end)) in [(&REAL, clocks.real), (&LED, clocks.led)] {
        mine[0].store(start, SeqCst);
        mine[1].store(end, SeqCst);
    }
    for id in IDS {
        if let Some(clock) = of(id) {
            ckpt_sys::clock::set_offset(id as usize, clocks.offsets[clock as usize]);
        }
    }
    ckpt_sys::clock::set_real(match clocks.gettime {
        0 => ckpt_sys::clock::system_call(),
        function => function,
    });
}

/// The offsets with which the clocks of an image go on. `same_clocks`: its kernel's clocks are
/// this one's, and have gone on by themselves.
pub fn go_on(then: &ClockState, same_clocks: bool, now: [u64; CLOCKS]) -> [u64; CLOCKS] {
    std::array::from_fn(|k| {
        let was = then.offsets.get(k).copied().unwrap_or(0);
        let seen = then
            .kernel
            .get(k)
            .map_or(0, |&kernel| kernel.saturating_add(was));
        let base = if same_clocks { was } else { 0 };
        let behind = seen.saturating_sub(now[k]);
        // The coarse clock, which has this one's offset, shows the time of the last tick.
        let coarse = k == Clock::Monotonic as usize && behind > base;
        base.max(behind + if coarse { TICK_NS } else { 0 })
    })
}

/// The longest tick that kernels are built with.
const TICK_NS: u64 = 10_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn state(kernel: [u64; CLOCKS], offsets: [u64; CLOCKS]) -> ClockState {
        ClockState {
            kernel: kernel.to_vec(),
            offsets: offsets.to_vec(),
            ..ClockState::default()
        }
    }

    #[test]
    fn clocks_go_on_from_the_checkpoint() {
        const DAY: u64 = 86_400_000_000_000;
        let none = [0; CLOCKS];
        // Killed and started again: they have gone on by themselves.
        let then = state([DAY, DAY, DAY, 100], none);
        assert_eq!(go_on(&then, true, [DAY + 5, DAY + 5, DAY + 5, 101]), none);
        // A reboot.
        let offsets = go_on(&then, false, [60, 70, 80, 90]);
        assert_eq!(offsets, [DAY - 60 + TICK_NS, DAY - 70, DAY - 80, 10]);
        // Killed and started again after that: nothing changes.
        let then = state([100, 110, 120, 130], offsets);
        assert_eq!(go_on(&then, true, [DAY, DAY, DAY, 10_000]), offsets);
        // A second reboot.
        let again = go_on(&then, false, [1, 1, 1, 1]);
        assert_eq!(again[2], DAY - 80 + 120 - 1);
        assert_eq!(again[3], 10 + 130 - 1);
        // A machine that has been up for longer.
        assert_eq!(go_on(&then, false, [9 * DAY; CLOCKS]), none);
        // An image of an older program says nothing.
        assert_eq!(go_on(&ClockState::default(), false, [1; CLOCKS]), none);
    }

    #[test]
    fn code_that_reads_the_clock_is_known() {
        let (start, end) = kernel_vdso();
        assert!(amid(start) && amid(end - 1) && !amid(end));
        assert!(amid(ckpt_sys::clock::gettime() + 4));
        assert!(!amid(kernel as *const () as u64));
        assert!(collect([start].into_iter()).amid);
        let state = collect([1, 2].into_iter());
        assert!(!state.amid && !state.led && state.vdso.starts_with(b"\x7fELF"));
    }
}
