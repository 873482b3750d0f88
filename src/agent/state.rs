//! The agent's state block: whether it is awake here, what it may do, and the
//! words that hooks, the stop handler and the helper thread share.
//!
//! Everything is an atomic or written once in the constructor (before any other
//! thread exists) or by `resume` (while all threads are held).

use ckpt_sys::{
    syscall,
    tls::{lent, thread_block},
};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicPtr, AtomicU32, Ordering};

/// The reserved signal: the highest real-time signal, which the kernel dequeues last.
pub const RESERVED_SIGNAL: i32 = 64;

/// Its bit in a 64-bit kernel signal set.
pub const RESERVED_BIT: u64 = 1 << (RESERVED_SIGNAL - 1);

/// The agent's state block; one per process, in `.bss`, part of the image.
pub struct Agent {
    /// A page with MADV_WIPEONFORK: non-zero = the agent is awake in this
    /// process, zero = never started or a forked child.
    awake: AtomicPtr<AtomicU32>,
    /// The process id the program sees (`getpid()` in the first life).
    pub pid: AtomicI32,
    /// The process id the kernel knows; equal to `pid` unless ids are translated.
    pub real_pid: AtomicI32,
    /// The process that was started and stands in for this one ([`super::starter`]), or 0.
    pub starter: AtomicI32,
    /// Ids differ from what the program believes (`hooks::ids` translates).
    pub ids_translated: AtomicBool,
    /// The call-site net is installed.
    pub net_installed: AtomicBool,
    /// The program has made a process that shares its memory for longer than a vfork does.
    pub memory_shared: AtomicBool,
    /// At least one checkpoint was committed or restored in this process's life, so
    /// that the clean-up at exit has something to remove.
    pub has_store: AtomicBool,
    /// glibc's `__rseq_offset` and `__rseq_size`; size 0 = glibc does not register.
    pub rseq_offset: AtomicI64,
    pub rseq_size: AtomicU32,
    /// What `ckpt_checkpoint` returns after a recovery.
    pub return_value: AtomicI32,
}

impl Agent {
    /// Where glibc's rseq area lies from the thread pointer, and its size.
    pub fn rseq(&self) -> (i64, u32) {
        (
            self.rseq_offset.load(Ordering::Relaxed),
            self.rseq_size.load(Ordering::Relaxed),
        )
    }
}

pub static AGENT: Agent = Agent {
    awake: AtomicPtr::new(std::ptr::null_mut()),
    pid: AtomicI32::new(0),
    real_pid: AtomicI32::new(0),
    starter: AtomicI32::new(0),
    ids_translated: AtomicBool::new(false),
    net_installed: AtomicBool::new(false),
    memory_shared: AtomicBool::new(false),
    has_store: AtomicBool::new(false),
    rseq_offset: AtomicI64::new(0),
    rseq_size: AtomicU32::new(0),
    return_value: AtomicI32::new(1),
};

/// Is the agent awake in this process? False in forked children (also vfork and
/// CLONE_VM children as far as memory can tell: those share the page and are told
/// apart by [`is_agents_process`]).
pub fn awake() -> bool {
    let page = AGENT.awake.load(Ordering::Relaxed);
    // SAFETY: the page is mapped for the life of the process once set.
    !page.is_null() && unsafe { (*page).load(Ordering::Relaxed) } != 0
}

/// The address of the wipe-on-fork page.
pub fn awake_page() -> u64 {
    AGENT.awake.load(Ordering::Relaxed) as u64
}

/// Does the calling thread belong to the process that the agent watches? A vfork
/// child shares all memory, so only the kernel can tell.
pub fn is_agents_process() -> bool {
    awake() && process().1
}

/// The kernel's id of the calling process, and whether it is the one that the agent watches: both of
/// the same life, though a checkpoint may come between the two and a restart follow.
pub fn process() -> (i32, bool) {
    loop {
        let known = AGENT.real_pid.load(Ordering::SeqCst);
        // SAFETY: getpid has no arguments.
        let pid = unsafe { syscall!(libc::SYS_getpid) } as i32;
        if known == AGENT.real_pid.load(Ordering::SeqCst) {
            return (pid, pid == known);
        }
    }
}

/// Does this thread belong to a child that shares our memory but is not us?
pub fn in_shared_child() -> bool {
    awake() && !process().1
}

/// Does the calling thread's block belong to another thread, whose child this is? A thread that was
/// never lent out need not ask the kernel.
pub fn is_on_lent_block() -> bool {
    // SAFETY: the block is this thread's own, or of the parent that waits for this child.
    let lent = unsafe { &mut (*thread_block()).lent };
    // (Where the net could not be laid nobody sees children being made.)
    let all_seen =
        AGENT.net_installed.load(Ordering::Relaxed) && !AGENT.memory_shared.load(Ordering::Relaxed);
    if *lent == lent::NO && all_seen {
        return false;
    }
    let is_child = in_shared_child();
    if !is_child && *lent == lent::UNTIL_BACK {
        *lent = lent::NO;
    }
    is_child
}

/// [`is_agents_process`] for hooks, which are called too often to ask the kernel each time.
pub fn is_agents_thread() -> bool {
    awake() && !is_on_lent_block()
}

/// Maps the wipe-on-fork page and wakes the agent.
///
/// # Safety
/// Constructor or restored helper only, while no other thread runs hooks.
pub unsafe fn wake() -> Result<(), i32> {
    use ckpt_sys::raw::check;
    let mut page = AGENT.awake.load(Ordering::Relaxed);
    // SAFETY: a fresh anonymous page; madvise on it.
    unsafe {
        if page.is_null() {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            page = crate::agent::place::lasting(4096, prot, flags)? as *mut AtomicU32;
        }
        check(syscall!(
            libc::SYS_madvise,
            page,
            4096,
            libc::MADV_WIPEONFORK
        ))?;
        (*page).store(1, Ordering::SeqCst);
    }
    AGENT.awake.store(page, Ordering::SeqCst);
    Ok(())
}

/// Puts the agent to sleep for good in this process (a sandbox was entered, an
/// internal error was met): no more checkpoints, the program runs on.
pub fn sleep() {
    let page = AGENT.awake.load(Ordering::Relaxed);
    if !page.is_null() {
        // SAFETY: as in `awake`.
        unsafe { (*page).store(0, Ordering::SeqCst) };
    }
}

/// Guard of a hook (law 3): while one exists in a thread, a stop request to this
/// thread is put off; the outermost guard's end raises it again.
#[must_use = "the guard marks the hook's extent"]
pub struct InHook(());

impl InHook {
    #[inline]
    pub fn enter() -> InHook {
        // SAFETY: the block is this thread's own.
        unsafe {
            let block = thread_block();
            let depth = (*block).in_hook;
            if depth == 0 {
                let here = 0u8;
                std::ptr::write_volatile(&raw mut (*block).hook_sp, &raw const here as u64);
            }
            std::ptr::write_volatile(&raw mut (*block).in_hook, depth + 1);
        }
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
        InHook(())
    }
}

impl Drop for InHook {
    #[inline]
    fn drop(&mut self) {
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
        // SAFETY: the block is this thread's own; tgkill to ourselves.
        unsafe {
            let block = thread_block();
            let depth = (*block).in_hook - 1;
            std::ptr::write_volatile(&raw mut (*block).in_hook, depth);
            std::sync::atomic::compiler_fence(Ordering::SeqCst);
            if depth == 0 && std::ptr::read_volatile(&raw const (*block).stop_pending) != 0 {
                crate::agent::stop::park_put_off();
            }
        }
    }
}
