//! The entry of every signal handler that the program installs.
//!
//! `rt_sigaction` is given [`entry`] instead of the program's function, which waits
//! in [`TABLE`]. The entry counts the handler (`ThreadBlock::handlers_run`) and
//! jumps on: the stack and the return address (libc's restorer, whose bytes
//! unwinders match) stay as the kernel made them, so backtraces, cancellation and
//! exceptions out of handlers see nothing. Runs in signal context, three
//! instructions more than without.

use crate::tls::ThreadBlock;
use std::arch::global_asm;
use std::sync::atomic::AtomicU64;

/// The program's handler of each signal (index = number). An entry is replaced,
/// never cleared: a signal that was delivered just before its action was reset
/// still finds a function here.
pub static TABLE: [AtomicU64; 65] = [const { AtomicU64::new(0) }; 65];

/// `unsafe extern "C" fn(*mut siginfo_t)` that corrects the information of every
/// signal before the program's handler sees it; 0 = none.
pub static INFO_FILTER: AtomicU64 = AtomicU64::new(0);

global_asm!(
    r#"
    .text
    .p2align 4
    .globl ckpt_handler_entry
    .hidden ckpt_handler_entry
    .type ckpt_handler_entry, @function
ckpt_handler_entry:
    .cfi_startproc
    endbr64
    mov r11, qword ptr [rip + ckpt_thread_block@gottpoff]
    inc qword ptr fs:[r11 + {run}]         # this thread ran one more handler
    cmp qword ptr [rip + {filter}], 0
    jne 2f
1:  mov r11d, edi                          # the signal's number
    lea rax, [rip + {table}]
    mov r11, qword ptr [rax + r11*8]
    xor eax, eax                           # no vector arguments, as the kernel has it
    jmp r11
2:  push rdi                               # three pushes align the stack
    .cfi_adjust_cfa_offset 8
    push rsi
    .cfi_adjust_cfa_offset 8
    push rdx
    .cfi_adjust_cfa_offset 8
    mov rdi, rsi
    call qword ptr [rip + {filter}]
    pop rdx
    .cfi_adjust_cfa_offset -8
    pop rsi
    .cfi_adjust_cfa_offset -8
    pop rdi
    .cfi_adjust_cfa_offset -8
    jmp 1b
    .cfi_endproc
    .size ckpt_handler_entry, . - ckpt_handler_entry
"#,
    run = const std::mem::offset_of!(ThreadBlock, handlers_run),
    filter = sym INFO_FILTER,
    table = sym TABLE,
);

unsafe extern "C" {
    fn ckpt_handler_entry();
}

/// The address that the kernel is given as the handler.
pub fn entry() -> u64 {
    ckpt_handler_entry as *const () as u64
}
