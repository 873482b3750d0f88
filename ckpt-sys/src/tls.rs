//! The agent's per-thread block.
//!
//! One zero-initialised block per thread in the static TLS area, reached by one
//! `%fs`-relative access (initial-exec model): safe in signal handlers, in
//! threads that have just been born and in threads that glibc knows nothing of,
//! because nothing is ever allocated lazily. A vfork child and other CLONE_VM
//! children without CLONE_SETTLS share their parent's block.

use std::arch::global_asm;

/// What the agent keeps for each thread. All-zero is the valid initial state.
#[repr(C)]
pub struct ThreadBlock {
    /// Depth of agent hooks this thread is in; while non-zero a stop request is
    /// put off until the outermost hook ends.
    pub in_hook: u32,
    /// A stop request arrived inside a hook: the hook's end raises it again.
    pub stop_pending: u32,
    /// Entry record of the last call that can end with EINTR: its number. The record is
    /// that of a frame whose `rip` equals `call_after`.
    pub call_nr: i64,
    /// CLOCK_MONOTONIC at the entry of that call, nanoseconds.
    pub call_start_ns: u64,
    /// The relative timeout of that call as given by the program, nanoseconds;
    /// `u64::MAX` when it has none.
    pub call_timeout_ns: u64,
    /// How many of the program's own signal handlers this thread has run; the
    /// value at the entry of the call is in `call_handlers`.
    pub handlers_run: u64,
    pub call_handlers: u64,
    /// The program's view of its alternate signal stack where the agent has
    /// substituted a larger one (see `agent::hooks::signal`).
    pub altstack_sp: u64,
    pub altstack_size: u64,
    pub altstack_flags: u32,
    /// Non-zero in the agent's own helper thread.
    pub is_helper: u32,
    /// The program asked to have the agent's reserved signal blocked (its view).
    pub reserved_blocked: u32,
    /// The thread's id as the program sees it, where that is not the kernel's
    /// (restored without set_tid): positive = that id, else `agent::hooks::ids` knows.
    pub virtual_tid: i32,
    /// What the mask of the signal call in progress says about the reserved
    /// signal (`agent::hooks::foreign`).
    pub masked_call: u32,
    /// 1 + index of the alternate stack the agent gave this thread
    /// (`agent::hooks::altstack`), 0 for none.
    pub altstack_slot: u32,
    /// `si_value` of the stop request that was put off.
    pub put_off_value: u64,
    /// Address behind the `syscall` of the site that made the recorded call; 0: no record.
    pub call_after: u64,
    /// What stood, before the recorded call, where the kernel writes the rest of an interrupted
    /// sleep. Of a `connect`: was the socket being connected already?
    pub remainder: [u64; 2],
    /// By how much, ns, restores have put off the recorded call's absolute deadline.
    pub deadline_shift: i64,
    /// The stack pointer at the outermost hook's entry: a stop request on the same stack
    /// above it finds that the hook was left by a longjmp of a signal handler.
    pub hook_sp: u64,
    /// The page whose write fault was last found resolved already, and how often in a row.
    pub fault_addr: u64,
    pub fault_count: u32,
    /// Depth of the program's own handlers of checkpoint events (`agent::events`).
    pub in_handler: u32,
    /// The frame of the call that was last looked at; of interest as long as it lies above the
    /// stack pointer.
    pub call_frame: u64,
    /// Absolute times of this thread's latest calls on the kernel's clock, where the program
    /// gave them on its own (`agent::hooks::clock`), and how many there have been.
    pub kernel_times: [[i64; 2]; KERNEL_TIMES],
    pub kernel_times_made: u64,
    /// A function that reads the clock was to be stopped, and comes back to `ckpt_clock_return`
    /// (`agent::clock`): where its return address lies, and what it was; 0 when there is none.
    pub clock_slot: u64,
    pub clock_return: u64,
    /// The clock that the recorded call's start and timeout count by, where that is one of CPU
    /// time (`agent::callsites::entry`); 0: CLOCK_MONOTONIC.
    pub call_clock: i32,
    /// The program asked to have SIGSEGV blocked while that is not done (its view): where on
    /// the stack; 0 when it has not (`agent::track::blocked`).
    pub faults_blocked_at: u64,
    /// May a process run on this block that this thread has made (vfork, clone with CLONE_VM)? One
    /// of [`lent`]'s values.
    pub lent: u32,
    /// `reserved_blocked` in such a process, plus one; 0: as here.
    pub lent_blocked: u32,
}

/// Values of [`ThreadBlock::lent`].
pub mod lent {
    /// Only this thread runs on its block.
    pub const NO: u32 = 0;
    /// Until the child of a vfork has gone, and this thread goes on.
    pub const UNTIL_BACK: u32 = 1;
    /// The two run side by side.
    pub const FOR_GOOD: u32 = 2;
}

/// Signal handlers may wait in the midst of a wait: so many calls of a thread keep their times.
pub const KERNEL_TIMES: usize = 6;

/// Size reserved in assembly; checked against the struct below.
const BLOCK_SIZE: usize = 320;
const _: () = assert!(size_of::<ThreadBlock>() <= BLOCK_SIZE);

global_asm!(
    r#"
    .section .tbss,"awT",@nobits
    .p2align 6
    .globl ckpt_thread_block
    .hidden ckpt_thread_block
    .type ckpt_thread_block, @object
    .size ckpt_thread_block, 320
ckpt_thread_block: .zero 320
    .text
"#
);

/// The calling thread's block. Never null; valid for the life of the thread.
#[inline(always)]
pub fn thread_block() -> *mut ThreadBlock {
    let p: *mut ThreadBlock;
    // SAFETY: reads the thread pointer and adds the block's constant offset; the
    // symbol is defined above in this crate's static TLS.
    unsafe {
        std::arch::asm!(
            "mov {p}, qword ptr [rip + ckpt_thread_block@gottpoff]",
            "add {p}, qword ptr fs:[0]",
            p = out(reg) p, options(nostack, pure, readonly),
        );
    }
    p
}
