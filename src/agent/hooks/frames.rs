//! A signal frame of our own making: the reserved signal's handler runs on the alternate
//! stack, but a program's handler without SA_ONSTACK must run on the stack that was
//! interrupted.
//!
//! [`move_to_stack`] copies the kernel's frame there, as the kernel would have laid it out, and changes
//! the present frame so that returning from it enters the handler. The handler returns
//! through [`returns`], which closes the reserved signal's mask again.
//! Signal context; called by [`super::foreign`] only.

use super::foreign;
use crate::image::state::KernelSigaction;

/// The kernel's `ucontext`: flags, link, stack, 32 words of registers, mask.
const UCONTEXT: usize = 304;
const SIGINFO: usize = 128;
/// `sw_reserved` of an FXSAVE area: magic number and whole size of the extended state.
const SW_RESERVED: usize = 464;
const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const RED_ZONE: usize = 128;
/// Direction, trap, resume: a handler begins without them.
const CLEARED_FLAGS: i64 = 0x400 | 0x100 | 0x1_0000;

/// Does the handler whose frame `uc` is run on the alternate stack while the interrupted code
/// does not?
///
/// # Safety
/// `uc` is the kernel's frame.
pub unsafe fn changed_stack(uc: *const libc::ucontext_t) -> bool {
    // SAFETY: the caller's promise.
    let (stack, rsp) = unsafe {
        (
            (*uc).uc_stack,
            (*uc).uc_mcontext.gregs[libc::REG_RSP as usize] as usize,
        )
    };
    let range = stack.ss_sp as usize..stack.ss_sp as usize + stack.ss_size;
    range.contains(&(uc as usize)) && !range.contains(&rsp)
}

/// Makes the return from this handler enter the program's, on the interrupted stack. `during`
/// is the mask for it; `info` and `uc` as the program is to see them.
///
/// # Safety
/// `info` and `uc` are the kernel's frame, from which the caller returns next.
pub unsafe fn move_to_stack(
    sig: i32,
    info: *const libc::siginfo_t,
    uc: *mut libc::ucontext_t,
    action: &KernelSigaction,
    during: u64,
) {
    // SAFETY: the kernel's frame has these sizes; the interrupted stack goes on below its red
    // zone (a stack that is full gets the program a SIGSEGV, as the kernel would give it).
    unsafe {
        let regs = &mut (*uc).uc_mcontext.gregs;
        let mut at = regs[libc::REG_RSP as usize] as usize - RED_ZONE;
        let state = (*uc).uc_mcontext.fpregs.cast::<u8>();
        let mut copied_state = std::ptr::null_mut();
        if !state.is_null() {
            let words = state.add(SW_RESERVED).cast::<u32>();
            let len = if *words == FP_XSTATE_MAGIC1 {
                *words.add(1) as usize
            } else {
                512
            };
            at = (at - len) & !63;
            copied_state = at as *mut u8;
            std::ptr::copy_nonoverlapping(state, copied_state, len);
        }
        at = ((at - SIGINFO) & !15) - UCONTEXT - 8;
        // The return address comes first; behind a call rsp is 8 off a multiple of 16.
        at = (at & !15) - 8;
        let (their_uc, their_info) = (at + 8, at + 8 + UCONTEXT);
        (at as *mut u64).write(returns as *const () as u64);
        std::ptr::copy_nonoverlapping(uc.cast::<u8>(), their_uc as *mut u8, UCONTEXT);
        std::ptr::copy_nonoverlapping(info.cast::<u8>(), their_info as *mut u8, SIGINFO);
        (*(their_uc as *mut libc::ucontext_t)).uc_mcontext.fpregs = copied_state.cast();
        regs[libc::REG_RSP as usize] = at as i64;
        regs[libc::REG_RIP as usize] = action.handler as i64;
        regs[libc::REG_RDI as usize] = i64::from(sig);
        regs[libc::REG_RSI as usize] = their_info as i64;
        regs[libc::REG_RDX as usize] = their_uc as i64;
        regs[libc::REG_RAX as usize] = 0;
        regs[libc::REG_EFL as usize] &= !CLEARED_FLAGS;
        // The initial state, as a handler finds it.
        (*uc).uc_mcontext.fpregs = std::ptr::null_mut();
        (&raw mut (*uc).uc_sigmask).cast::<u64>().write(during);
    }
}

/// Where the handler returns to: rsp is at its ucontext.
///
/// # Safety
/// Only a handler that [`move_to_stack`] has entered returns here.
#[unsafe(naked)]
unsafe extern "C" fn returns() {
    std::arch::naked_asm!(
        "mov rbx, rsp",
        "mov rdi, rsp",
        "and rsp, -16",
        "call {after}",
        "mov rsp, rbx",
        "jmp ckpt_program_sigreturn", // counts the handler, as for every other signal
        after = sym after_handler,
    )
}

unsafe extern "C" fn after_handler(uc: *mut libc::ucontext_t) {
    // SAFETY: the frame that is about to be returned from.
    unsafe { foreign::after_handler(uc) }
}
