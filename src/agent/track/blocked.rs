//! What a thread believes of SIGSEGV in its mask while that is never really blocked
//! (law 4 of [`super::fault`]).
//!
//! A signal handler's end puts the mask of before back: the kernel's, from the frame, but not
//! what is kept here. So it is kept with the stack pointer of the code that has blocked it, and
//! the restorer of the program's handlers takes back what a handler has blocked. In doubt (code
//! far down the stack blocks it and returns, then a handler runs; a handler opens what the code
//! that it interrupts has blocked) it counts as open: a fault that the program expects is its
//! death otherwise. Signal hooks, the stop handler, the fault handler: each for its own thread.

use ckpt_sys::tls::thread_block;

/// No handler uses more of the stack that it interrupts.
const HANDLER_DEPTH: u64 = 64 << 20;

fn place() -> &'static mut u64 {
    // SAFETY: the thread's own block; nobody keeps the reference over another call of this.
    unsafe { &mut (*thread_block()).faults_blocked_at }
}

/// Does the calling thread believe that SIGSEGV is blocked?
#[inline]
pub fn is_blocked() -> bool {
    *place() != 0
}

/// The code that runs with the stack pointer `sp` has blocked it, or finds it so.
pub fn block(sp: u64) {
    let place = place();
    if *place == 0 {
        *place = sp;
    }
}

/// It is open again.
pub fn open() {
    *place() = 0;
}

/// The handler whose frame `uc` is ends: what it has blocked is open.
///
/// # Safety
/// `uc` is the frame that the calling thread's handler goes back to.
pub unsafe fn leave(uc: *const libc::ucontext_t) {
    let place = place();
    if *place == 0 {
        return;
    }
    let frame = uc as u64;
    // SAFETY: the caller's promise.
    let stack = unsafe { &(*uc).uc_stack };
    let base = stack.ss_sp as u64;
    let on_alternate = stack.ss_flags & libc::SS_DISABLE == 0
        && (base..base.saturating_add(stack.ss_size as u64)).contains(&frame);
    let lowest = if on_alternate {
        base
    } else {
        frame.saturating_sub(HANDLER_DEPTH)
    };
    if (lowest..frame).contains(place) {
        *place = 0;
    }
}

/// What is kept; for [`put_back`].
pub fn kept() -> u64 {
    *place()
}

/// As it was.
pub fn put_back(kept: u64) {
    *place() = kept;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a thread of its own: the block is fresh.
    fn alone(f: impl FnOnce() + Send + 'static) {
        std::thread::spawn(f).join().unwrap();
    }

    /// A frame in the middle of `memory`, whose lower `alternate` bytes are the alternate stack.
    fn frame(memory: &mut [u64], alternate: Option<usize>) -> u64 {
        let base = memory.as_ptr() as u64;
        let uc = (&raw mut memory[2048]).cast::<libc::ucontext_t>();
        // SAFETY: the slice has room for a frame there; all-zero is a valid one.
        unsafe {
            uc.write_bytes(0, 1);
            match alternate {
                Some(size) => {
                    (*uc).uc_stack.ss_sp = base as *mut libc::c_void;
                    (*uc).uc_stack.ss_size = size;
                }
                None => (*uc).uc_stack.ss_flags = libc::SS_DISABLE,
            }
        }
        uc as u64
    }

    fn leave_at(frame: u64) {
        // SAFETY: a frame made above.
        unsafe { leave(frame as *const libc::ucontext_t) };
    }

    #[test]
    fn what_a_handler_blocks_is_open_behind_it() {
        alone(|| {
            let mut memory = vec![0u64; 4096];
            let alternate = frame(&mut memory, Some(4096 * 8));
            block(alternate - 128);
            assert!(is_blocked());
            leave_at(alternate);
            assert!(!is_blocked());
            let ordinary = frame(&mut memory, None);
            block(ordinary - 128);
            leave_at(ordinary);
            assert!(!is_blocked());
        });
    }

    #[test]
    fn what_the_interrupted_code_has_blocked_stays() {
        alone(|| {
            let mut memory = vec![0u64; 4096];
            let uc = frame(&mut memory, None);
            block(uc + 4096);
            block(uc - 128);
            leave_at(uc);
            assert!(is_blocked());
            open();
            assert!(!is_blocked());
        });
    }

    #[test]
    fn an_alternate_stack_is_no_part_of_the_other() {
        alone(|| {
            let mut memory = vec![0u64; 4096];
            let base = memory.as_ptr() as u64;
            let uc = frame(&mut memory, Some(2048 * 8 + 1024));
            block(base - 4096);
            leave_at(uc);
            assert!(is_blocked());
        });
    }
}
