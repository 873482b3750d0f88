//! Context capture for the calling thread of an inserted checkpoint.
//!
//! [`capture`] writes the callee-saved registers into the same `ucontext_t` that
//! the kernel builds for a signal, so that a captured thread and an interrupted
//! one are restored by one mechanism: `rt_sigreturn` (sigreturn(2)).

use std::arch::naked_asm;

/// The kernel's signal frame as far as `rt_sigreturn` reads it, with an FXSAVE
/// area: at a function call only the control words of x87 and SSE are live, so
/// the legacy area (no XSAVE header; fxsave in the Intel SDM) is all there is to keep.
#[repr(C, align(64))]
pub struct CapturedContext {
    /// FXSAVE image.
    pub fx: [u8; 512],
    /// Kernel layout: flags, link, stack (24 bytes), 23 registers, fpstate, reserved[8], sigmask.
    pub uc_flags: u64,
    pub uc_link: u64,
    pub stack_sp: u64,
    pub stack_flags: u64,
    pub stack_size: u64,
    /// r8-r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, eflags, csgsfs(ss), err, trapno, oldmask, cr2.
    pub regs: [u64; 23],
    pub fpstate: u64,
    pub reserved: [u64; 8],
    pub sigmask: u64,
    /// glibc's ucontext_t is larger than the kernel's; nobody reads this part.
    pub tail: [u64; 64],
}

/// From the `ucontext_t` to what [`CapturedContext::set_caller`] has noted.
pub const CALLER_SP: u64 = (std::mem::offset_of!(CapturedContext, reserved)
    - std::mem::offset_of!(CapturedContext, uc_flags)) as u64;

/// UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS (asm/ucontext.h): the frame has a valid ss.
const UC_FLAGS: u64 = 0x2 | 0x4;
/// cs = 0x33 (user code), ss = 0x2b (user data), 16 bits each: cs, gs, fs, ss.
const SEGMENTS: u64 = 0x33 | (0x2b << 48);

impl CapturedContext {
    pub fn new() -> CapturedContext {
        // SAFETY: all-zero is a valid value of these plain fields.
        unsafe { std::mem::zeroed() }
    }

    /// Fills everything that [`capture`] does not: flags, segments, signal mask and
    /// alternate stack, to be in force when the context is resumed.
    pub fn prepare(&mut self, sigmask: u64, altstack: [u64; 3]) {
        self.uc_flags = UC_FLAGS;
        self.sigmask = sigmask;
        [self.stack_sp, self.stack_flags, self.stack_size] = altstack;
        self.regs[18] = SEGMENTS;
        self.fpstate = &raw const self.fx as u64;
    }

    /// Where the stack of the program ended when it called (`thread`s are told apart by
    /// `ThreadState::inserted`; the kernel does not read this).
    pub fn set_caller(&mut self, sp: u64) {
        self.reserved[0] = sp;
    }

    /// The captured stack pointer.
    pub fn stack_pointer(&self) -> u64 {
        self.regs[15]
    }

    /// The address that `rt_sigreturn` takes.
    pub fn ucontext(&self) -> u64 {
        &raw const self.uc_flags as u64
    }
}

impl Default for CapturedContext {
    fn default() -> Self {
        Self::new()
    }
}

/// Captures the caller's context. Returns 0 when captured and, a second time, the
/// value 1 when the context is resumed (setjmp(3)-like).
///
/// # Safety
/// The frame of the calling function must still be alive whenever the context is
/// resumed.
#[unsafe(naked)]
pub unsafe extern "C" fn capture(context: *mut CapturedContext) -> i32 {
    // Offsets: fx at 0; regs at 512 + 40; register k at 552 + 8k.
    naked_asm!(
        "fxsave64 [rdi]",
        "mov qword ptr [rdi + 552 + 32], r12",
        "mov qword ptr [rdi + 552 + 40], r13",
        "mov qword ptr [rdi + 552 + 48], r14",
        "mov qword ptr [rdi + 552 + 56], r15",
        "mov qword ptr [rdi + 552 + 80], rbp",
        "mov qword ptr [rdi + 552 + 88], rbx",
        "mov qword ptr [rdi + 552 + 104], 1", // rax on resume
        "lea rax, [rsp + 8]",
        "mov qword ptr [rdi + 552 + 120], rax", // rsp after the return
        "mov rax, qword ptr [rsp]",
        "mov qword ptr [rdi + 552 + 128], rax", // rip
        "pushfq",
        "pop rax",
        "mov qword ptr [rdi + 552 + 136], rax", // eflags
        "xor eax, eax",
        "ret",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::thread::sigreturn_to;

    #[test]
    fn a_captured_context_is_resumed_by_sigreturn() {
        let mut context = Box::new(CapturedContext::new());
        context.prepare(0, [0, 2, 0]);
        let mut rounds = 0u32;
        let counter = &raw mut rounds;
        // SAFETY: this frame stays alive; the counter is read and written through
        // a pointer, so no stale register copy survives the second return.
        unsafe {
            let value = capture(&mut *context);
            let n = counter.read_volatile() + 1;
            counter.write_volatile(n);
            if value == 0 {
                assert_eq!(n, 1);
                sigreturn_to(context.ucontext() as *mut _);
            }
            assert_eq!(value, 1);
            assert_eq!(n, 2);
        }
    }
}
