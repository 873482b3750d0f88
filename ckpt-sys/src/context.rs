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

/// XSAVE component of the tiles (AMX), which the kernel gives room for only when a thread first
/// uses them.
const TILE_DATA: u64 = 1 << 18;

/// Has the thread whose frame `uc` is used tiles? Of a captured context nobody knows.
///
/// # Safety
/// `uc` is the kernel's (or [`capture`]'s) frame.
unsafe fn may_hold_tiles(uc: *const libc::ucontext_t) -> bool {
    /// `struct _fpx_sw_bytes` (asm/sigcontext.h) in the FXSAVE image: magic1, extended_size,
    /// xfeatures.
    const SOFTWARE_BYTES: usize = 464;
    const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
    // SAFETY: the caller's promise; where there is an image it has 512 bytes.
    unsafe {
        let image = (*uc).uc_mcontext.fpregs.cast::<u8>();
        if image.is_null() {
            return false;
        }
        let words = image.add(SOFTWARE_BYTES);
        if words.cast::<u32>().read_unaligned() != FP_XSTATE_MAGIC1 {
            return true;
        }
        words.add(8).cast::<u64>().read_unaligned() & TILE_DATA != 0
    }
}

/// Makes room for tiles in the calling thread where the frame that it goes back to may need it:
/// into less room rt_sigreturn puts back nothing but x87 and SSE (`check_xstate_in_sigframe`,
/// Linux 5.16 and later). Tiles must be permitted (`permitted`: ARCH_GET_XCOMP_PERM); they are
/// empty afterwards.
///
/// # Safety
/// As for [`sigreturn_to`](crate::thread::sigreturn_to), which follows.
pub unsafe fn make_room_for_tiles(uc: *const libc::ucontext_t, permitted: fn() -> u64) {
    // SAFETY: the caller's promise.
    if unsafe { !may_hold_tiles(uc) } || permitted() & TILE_DATA == 0 {
        return;
    }
    /// ldtilecfg's operand (Intel SDM): palette 1, one tile of a row of 4 bytes.
    #[repr(align(64))]
    struct Configuration([u8; 64]);
    let mut one = Configuration([0; 64]);
    (one.0[0], one.0[16], one.0[48]) = (1, 4, 1);
    // SAFETY: the processor has tiles and they are permitted; nobody uses them here.
    unsafe {
        std::arch::asm!("ldtilecfg [{one}]", "tilezero tmm0", "tilerelease",
                        one = in(reg) &raw const one, options(nostack));
    }
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
