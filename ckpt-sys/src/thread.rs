//! Threads that glibc knows nothing of, and the switch into the restorer.

use std::arch::{asm, naked_asm};

/// `clone` with a new stack: the child calls `entry(arg)` and must not return.
/// Returns the kernel's result in the parent (child id or `-errno`).
///
/// # Safety
/// `stack_top` is the 16-byte aligned top of writable memory that stays mapped
/// as long as the child runs; `tls` is a valid thread control block (its first
/// word points to itself); `flags` contain CLONE_VM and CLONE_SETTLS.
pub unsafe fn spawn_raw(
    flags: u64,
    stack_top: u64,
    tls: u64,
    entry: extern "C" fn(u64) -> !,
    arg: u64,
) -> isize {
    let ret: isize;
    // SAFETY: the parent sees an ordinary system call; the child has its own stack
    // and leaves by calling `entry`.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r13",
            "call r12",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone as isize => ret,
            in("rdi") flags, in("rsi") stack_top, in("rdx") 0u64, in("r10") 0u64, in("r8") tls,
            in("r12") entry as *const () as u64, in("r13") arg,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    ret
}

/// Leaves the present stack for good and enters the restorer blob.
///
/// # Safety
/// `blob` is the copied restorer, `args` its valid arguments, `stack_top` a
/// 16-byte aligned stack in the area; all signals are blocked.
pub unsafe fn enter_restorer(blob: u64, args: u64, stack_top: u64) -> ! {
    // SAFETY: per contract; nothing of the old stack is used afterwards.
    unsafe {
        asm!("mov rsp, {stack}", "xor ebp, ebp", "push 0", "jmp {blob}",
             stack = in(reg) stack_top, blob = in(reg) blob, in("rdi") args, options(noreturn))
    }
}

/// Returns from a saved signal frame: `rt_sigreturn` with `uc` as the frame.
///
/// # Safety
/// `uc` is the kernel's (or [`crate::context::capture`]'s) ucontext of the calling
/// thread, whose stack above it is intact.
#[unsafe(naked)]
pub unsafe extern "C" fn sigreturn_to(uc: *mut libc::ucontext_t) -> ! {
    naked_asm!("mov rsp, rdi", "mov eax, 15", "syscall", "ud2")
}

/// The `sa_restorer` of our own handlers.
///
/// # Safety
/// Only the kernel jumps here, at a handler's return.
#[unsafe(naked)]
pub unsafe extern "C" fn restorer() -> ! {
    // Unwinders recognise these very bytes (mov $15,%rax; syscall).
    naked_asm!(".byte 0x48, 0xc7, 0xc0, 0x0f, 0x00, 0x00, 0x00", "syscall")
}

/// Leaves the present stack and thread pointer for good and goes on in `entry(arg)`.
///
/// # Safety
/// `stack_top` is the 16-byte aligned top of writable memory that nobody else uses, `tls` a
/// valid thread control block; all signals are blocked.
#[unsafe(naked)]
pub unsafe extern "C" fn go_on_at(
    stack_top: u64,
    tls: u64,
    entry: extern "C" fn(u64) -> !,
    arg: u64,
) -> ! {
    naked_asm!(
        "mov r12, rdx",
        "mov r13, rcx",
        "mov rsp, rdi",
        "xor ebp, ebp",
        "mov edi, 0x1002", // ARCH_SET_FS; rsi is the thread pointer
        "mov eax, 158",    // arch_prctl
        "syscall",
        "mov rdi, r13",
        "call r12",
        "ud2",
    )
}
