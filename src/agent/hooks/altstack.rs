//! sigaltstack: our stop handler runs with SA_ONSTACK, so an alternate stack that is
//! too small for it (and for the frame with all vector registers) is replaced by one
//! of ours while the program goes on seeing its own.
//!
//! One own stack per thread, kept for the thread's life: `ThreadBlock::altstack_slot`
//! names it, `altstack_{sp,size,flags}` hold the program's view, valid while the
//! kernel's stack is that very one. Stacks of dead threads are used again, so a
//! program that makes threads for ever does not grow. rt_sigreturn restores the
//! kernel's values from the frame, which are ours: consistent without any help. Only
//! `uc_stack` inside a handler shows ours. Any thread.

use super::frame::{CallFrame, Verdict};
use super::user;
use crate::agent::place;
use crate::agent::track::fault;
use ckpt_sys::{syscall, tls::ThreadBlock, tls::thread_block};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::*};

/// `stack_t`: sp, flags (and padding), size.
type Stack = [u64; 3];

const MINSIGSTKSZ: u64 = 2048;
const SS_ONSTACK: u64 = 1;
const SS_DISABLE: u64 = 2;

/// What our handler needs beside the kernel's frame.
const HANDLER_ROOM: u64 = 8192;

/// The kernel's signal frame here (AT_MINSIGSTKSZ).
static FRAME: AtomicU64 = AtomicU64::new(4096);

struct Own {
    base: AtomicU64,
    owner: AtomicU32,
}

static POOL: [Own; 4096] = [const {
    Own {
        base: AtomicU64::new(0),
        owner: AtomicU32::new(0),
    }
}; 4096];
static LEN: AtomicUsize = AtomicUsize::new(0);
static HAND: AtomicUsize = AtomicUsize::new(0);
/// The process whose threads the owners are; a forked child starts behind `FIRST`.
static PROCESS: AtomicU32 = AtomicU32::new(0);
static FIRST: AtomicUsize = AtomicUsize::new(0);

/// Reads AT_MINSIGSTKSZ; constructor.
pub fn configure() {
    const AT_MINSIGSTKSZ: libc::c_ulong = 51;
    // SAFETY: reads the auxiliary vector.
    let size = unsafe { libc::getauxval(AT_MINSIGSTKSZ) };
    if size != 0 {
        FRAME.store(size, Relaxed);
    }
}

/// The least size of an alternate stack that our handler can run on.
pub fn needed() -> u64 {
    FRAME.load(Relaxed) + HANDLER_ROOM
}

fn own_size() -> u64 {
    // A write fault inside the stop handler puts a second frame there.
    (2 * needed() + HANDLER_ROOM + 4095) & !4095
}

/// The stacks of ours that may be in use: never write-protected.
pub fn own_stacks() -> impl Iterator<Item = (u64, u64)> {
    let len = LEN.load(Relaxed).min(POOL.len());
    POOL[..len]
        .iter()
        .map(|own| own.base.load(Relaxed))
        .filter(|&base| base != 0)
        .map(|base| (base, base + own_size()))
}

/// Gives a thread without an alternate stack one of ours, by the frame that it returns
/// to: a write fault on its own stack could not be handled there. The program goes on
/// seeing none.
///
/// # Safety
/// `uc` is the frame of the present handler.
pub unsafe fn provide(uc: *mut libc::ucontext_t) {
    // SAFETY: the frame (the caller's promise); the thread's own block.
    unsafe {
        let stack = &mut (*uc).uc_stack;
        // The frame of a thread that never had one may not say so: only the size is 0 then.
        if stack.ss_flags & SS_DISABLE as i32 == 0 && stack.ss_size != 0 {
            return;
        }
        let block = &mut *thread_block();
        if let Some(base) = take(block) {
            (block.altstack_sp, block.altstack_size) = (0, 0);
            block.altstack_flags = SS_DISABLE as u32;
            stack.ss_sp = base as *mut libc::c_void;
            stack.ss_flags = 0;
            stack.ss_size = own_size() as usize;
        }
    }
}

/// A stack for this thread: its own, one of a dead thread, or a new one.
fn take(block: &mut ThreadBlock) -> Option<u64> {
    if block.altstack_slot != 0 {
        return Some(POOL[block.altstack_slot as usize - 1].base.load(Relaxed));
    }
    // SAFETY: calls without pointers, then an anonymous mapping.
    unsafe {
        let (pid, tid) = (
            syscall!(libc::SYS_getpid) as u32,
            syscall!(libc::SYS_gettid) as u32,
        );
        if PROCESS.swap(pid, AcqRel) != pid {
            FIRST.store(LEN.load(Relaxed), Relaxed);
        }
        let (first, len) = (FIRST.load(Relaxed), LEN.load(Relaxed).min(POOL.len()));
        // A few looks each time keep the dead ones bounded without a search.
        for _ in 0..4.min(len.saturating_sub(first)) {
            let at = first + HAND.fetch_add(1, Relaxed) % (len - first);
            let owner = POOL[at].owner.load(Acquire);
            if owner != 0
                && POOL[at].base.load(Relaxed) != 0
                && syscall!(libc::SYS_tgkill, pid, owner, 0) == -(libc::ESRCH as isize)
                && POOL[at]
                    .owner
                    .compare_exchange(owner, tid, AcqRel, Relaxed)
                    .is_ok()
            {
                block.altstack_slot = at as u32 + 1;
                return Some(POOL[at].base.load(Relaxed));
            }
        }
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let base = place::lasting(own_size(), prot, flags).ok()?;
        let at = LEN.fetch_add(1, AcqRel);
        if at >= POOL.len() {
            LEN.store(POOL.len(), Relaxed);
            syscall!(libc::SYS_munmap, base, own_size());
            return None;
        }
        // In this order: one without an owner is marked dead (`settle`).
        POOL[at].owner.store(tid, Release);
        POOL[at].base.store(base, Release);
        block.altstack_slot = at as u32 + 1;
        Some(base)
    }
}

/// After a restore: the owners are named by ids that may not be theirs any more, and a stack
/// whose owner seems to be dead is given away. Until [`settle`] none is. Helper, before the
/// program's threads run.
pub fn after_restore(pid: i32) {
    for own in &POOL[..LEN.load(Relaxed).min(POOL.len())] {
        own.owner.store(0, Relaxed);
    }
    PROCESS.store(pid as u32, Release);
}

/// A restored thread takes its own stack again. What the kernel has for it is forgotten: the
/// leader of a rollback may have got a stack since the checkpoint, which is not mapped any more,
/// and the frame that it goes on with says nothing (a size of 0 is refused) where it had none
/// then. The next signal was its death.
pub fn claim() {
    let none: Stack = [0, SS_DISABLE, 0];
    // SAFETY: a structure of ours; the thread is on no alternate stack here.
    unsafe { syscall!(libc::SYS_sigaltstack, &raw const none, 0) };
    // SAFETY: the thread's own block; no arguments.
    let (slot, tid) = unsafe {
        let slot = (*thread_block()).altstack_slot as usize;
        (slot, syscall!(libc::SYS_gettid) as u32)
    };
    if slot != 0 {
        POOL[slot - 1].owner.store(tid, Release);
    }
}

/// No thread has this id.
const NOBODY: u32 = i32::MAX as u32;

/// Every restored thread has claimed its own: what is left was a dead thread's. Helper.
pub fn settle() {
    for own in &POOL[..LEN.load(Acquire).min(POOL.len())] {
        if own.base.load(Acquire) != 0 {
            let _ = own.owner.compare_exchange(0, NOBODY, AcqRel, Relaxed);
        }
    }
}

/// sigaltstack(new, old).
pub fn sigaltstack(frame: &mut CallFrame) -> Verdict {
    let [new, old, ..] = frame.args;
    // SAFETY: the thread's own block, used by this thread only.
    let block = unsafe { &mut *thread_block() };
    let mut asked: Stack = [0; 3];
    if new != 0 {
        match user::read(new) {
            Ok(stack) => asked = stack,
            Err(_) => return Verdict::Forward,
        }
    }
    let disables = asked[1] & SS_DISABLE != 0;
    if new != 0 && !disables {
        fault::release(asked[0], asked[2]);
    }
    // While pages are protected every thread has one.
    let keeps = disables && new != 0 && fault::active();
    let small = new != 0 && !disables && (MINSIGSTKSZ..needed()).contains(&asked[2]);
    if !small && !keeps && block.altstack_slot == 0 {
        return Verdict::Forward;
    }
    let mut given = asked;
    if keeps && let Some(base) = take(block) {
        given = [base, 0, own_size()];
    }
    if small && let Some(base) = take(block) {
        given[0] = base;
        given[2] = own_size();
    }
    let at = if new == 0 { 0 } else { &raw const given as u64 };
    let mut before: Stack = [0; 3];
    // SAFETY: our own copies. The hook runs on the program's stack, so the kernel's
    // "on that stack now" is the program's.
    let ret = unsafe { syscall!(libc::SYS_sigaltstack, at, &raw mut before) };
    frame.rax = ret as i64;
    if ret < 0 {
        return Verdict::Done;
    }
    if is_own(block, before[0]) {
        let hidden = u64::from(block.altstack_flags) & SS_DISABLE;
        let state = before[1] & (SS_ONSTACK | SS_DISABLE) | hidden;
        before = [
            block.altstack_sp,
            (u64::from(block.altstack_flags) & !3) | state,
            block.altstack_size,
        ];
    }
    if new != 0 && given[0] != asked[0] {
        block.altstack_sp = asked[0];
        block.altstack_size = asked[2];
        block.altstack_flags = asked[1] as u32;
    }
    if old != 0
        && let Err(e) = user::write(old, &before)
    {
        frame.rax = -i64::from(e);
    }
    Verdict::Done
}

fn is_own(block: &ThreadBlock, sp: u64) -> bool {
    let slot = block.altstack_slot as usize;
    slot != 0 && POOL[slot - 1].base.load(Relaxed) == sp
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::{call, in_child};

    fn kernels() -> Stack {
        let mut now: Stack = [0; 3];
        // SAFETY: asks the kernel.
        unsafe { syscall!(libc::SYS_sigaltstack, 0, &raw mut now) };
        now
    }

    #[test]
    fn small_stacks_are_replaced_and_not_shown() {
        in_child(|| {
            let memory = vec![0u8; 65536];
            let base = memory.as_ptr() as u64;
            let off: Stack = [0, SS_DISABLE, 0];
            // SAFETY: the test runner's own stack goes.
            unsafe { syscall!(libc::SYS_sigaltstack, &raw const off, 0) };
            let small: Stack = [base, 0, 4096];
            let large: Stack = [base, 0, 65536];
            let tiny: Stack = [base, 0, 100];
            let mut old: Stack = [9; 3];
            let o = &raw mut old as u64;
            let set = |s: &Stack| call(libc::SYS_sigaltstack, &[s as *const Stack as u64, o]);
            assert_eq!(set(&large), None);
            assert_eq!(set(&small), Some(0));
            assert!(kernels()[0] != base && kernels()[2] >= needed());
            assert_eq!(call(libc::SYS_sigaltstack, &[0, o]), Some(0));
            assert_eq!(old, small);
            assert_eq!(set(&tiny), Some(-12));
            assert_eq!(set(&large), Some(0));
            assert_eq!(old, small);
            assert_eq!(kernels()[0], base);
            assert_eq!(set(&small), Some(0));
            assert_eq!(old, large);
            assert_eq!(set(&off), Some(0));
            assert_eq!(old, small);
            assert_eq!(kernels()[1], SS_DISABLE);
            assert_eq!(call(libc::SYS_sigaltstack, &[8, o]), None);
        });
    }

    /// A thread that had a stack of its own at its first stop, and gave it up then, had none: its
    /// next write to a protected page, on a stack that it had switched to, was its death.
    #[test]
    fn there_is_always_one_while_pages_are_protected() {
        in_child(|| {
            let memory = vec![0u8; 65536];
            let large: Stack = [memory.as_ptr() as u64, 0, 65536];
            let off: Stack = [0, SS_DISABLE, 0];
            let mut old: Stack = [9; 3];
            // SAFETY: the test runner's own stack goes.
            unsafe { syscall!(libc::SYS_sigaltstack, &raw const large, 0) };
            crate::agent::track::table::create().unwrap();
            let (new, o) = (&raw const off as u64, &raw mut old as u64);
            assert_eq!(call(libc::SYS_sigaltstack, &[new, o]), Some(0));
            assert_eq!(old, large);
            assert!(kernels()[1] & SS_DISABLE == 0 && kernels()[2] >= needed());
            assert_eq!(call(libc::SYS_sigaltstack, &[0, o]), Some(0));
            assert_eq!(old[1], SS_DISABLE);
        });
    }

    /// The kernel's frame shows a thread without a stack as one without SS_DISABLE, where an exec
    /// has taken it: the thread was given none, and a write to a protected page, on a stack that
    /// it had just switched to (swapcontext), was its death at the first checkpoint.
    #[test]
    fn a_size_of_zero_is_none() {
        in_child(|| {
            // SAFETY: all-zero is a valid frame for this purpose.
            let mut uc: libc::ucontext_t = unsafe { std::mem::zeroed() };
            // SAFETY: a frame of ours; nobody returns to it.
            unsafe { provide(&raw mut uc) };
            assert!(uc.uc_stack.ss_size as u64 >= needed() && !uc.uc_stack.ss_sp.is_null());
        });
    }

    #[test]
    fn dead_threads_leave_their_stacks() {
        in_child(|| {
            let memory = vec![0u8; 4096];
            let base = memory.as_ptr() as u64;
            for _ in 0..50 {
                std::thread::spawn(move || {
                    let small: Stack = [base, 0, 4096];
                    let at = &raw const small as u64;
                    assert_eq!(call(libc::SYS_sigaltstack, &[at, 0]), Some(0));
                })
                .join()
                .unwrap();
            }
            assert!(LEN.load(Relaxed) < 10, "{}", LEN.load(Relaxed));
        });
    }

    /// A restored thread had another id than its stack said: the stack counted as a dead
    /// thread's, a second thread got it, and their signal frames lay upon each other.
    #[test]
    fn restored_threads_keep_their_stacks_whatever_their_ids() {
        in_child(|| {
            let memory = vec![0u8; 4096];
            let base = memory.as_ptr() as u64;
            let small: Stack = [base, 0, 4096];
            let at = &raw const small as u64;
            // SAFETY: no arguments.
            let pid = unsafe { syscall!(libc::SYS_getpid) } as i32;
            let (tell, told) = std::sync::mpsc::channel();
            let (go, gone) = std::sync::mpsc::channel::<()>();
            let keeper = std::thread::spawn(move || {
                assert_eq!(call(libc::SYS_sigaltstack, &[at, 0]), Some(0));
                tell.send(kernels()[0]).unwrap();
                gone.recv().unwrap();
                claim();
                // The frame that it goes on with says what is in force.
                assert_eq!(kernels()[1], SS_DISABLE);
                // SAFETY: the thread's own block.
                tell.send(take(unsafe { &mut *thread_block() }).unwrap())
                    .unwrap();
                gone.recv().unwrap();
            });
            let kept = told.recv().unwrap();
            let others = || {
                let other = std::thread::spawn(move || {
                    assert_eq!(call(libc::SYS_sigaltstack, &[at, 0]), Some(0));
                    kernels()[0]
                });
                other.join().unwrap()
            };
            // As the image has it: the id of another life.
            for own in &POOL[..LEN.load(Relaxed)] {
                own.owner.store(NOBODY, Relaxed);
            }
            after_restore(pid);
            assert_ne!(others(), kept);
            go.send(()).unwrap();
            assert_eq!(told.recv().unwrap(), kept);
            settle();
            for _ in 0..8 {
                assert_ne!(others(), kept);
            }
            assert!(LEN.load(Relaxed) <= 3, "{}", LEN.load(Relaxed));
            go.send(()).unwrap();
            keeper.join().unwrap();
        });
    }
}
