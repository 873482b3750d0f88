//! Calling a function on another stack. Any context.

use core::arch::asm;

/// Calls `function(argument)` with the stack that ends at `top`.
///
/// # Safety
/// `top` is aligned to 16 bytes and the end of memory that nobody else uses until the call is over,
/// enough of it. No signal handler that needs more, or leaves by a jump, may run meanwhile. The function
/// does not unwind.
pub unsafe fn call_on(top: *mut u8, function: extern "C" fn(*mut u8), argument: *mut u8) {
    // SAFETY: the stack pointer comes back from a register that the function preserves.
    unsafe {
        asm!(
            "xchg rsp, r12",
            "call r13",
            "mov rsp, r12",
            inout("r12") top => _,
            in("r13") function,
            in("rdi") argument,
            clobber_abi("C"),
        );
    }
}
