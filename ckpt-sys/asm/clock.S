# clock_gettime of a restored program whose clocks go on where they were (x86_64, AT&T syntax).
#
# The program calls it by the vdso's entry point (agent/vdso.rs). It asks the vdso of the running kernel
# and adds the clock's offset. A thread is not checkpointed between the two (agent/clock.rs).

    .text
    .globl ckpt_clock_gettime, ckpt_clock_gettime_end, ckpt_clock_system_call
    .hidden ckpt_clock_gettime, ckpt_clock_gettime_end, ckpt_clock_system_call
    .globl ckpt_clock_leave, ckpt_clock_return
    .hidden ckpt_clock_leave, ckpt_clock_return
    .p2align 5
ckpt_clock_gettime:
    .cfi_startproc
    push %rbx
    .cfi_adjust_cfa_offset 8
    .cfi_offset 3, -16
    push %rbp
    .cfi_adjust_cfa_offset 8
    .cfi_offset 6, -24
    sub $8, %rsp                        # aligned for the call
    .cfi_adjust_cfa_offset 8
    mov %edi, %ebx                      # the clock
    mov %rsi, %rbp                      # the timespec
    call *ckpt_clock_real(%rip)
    test %eax, %eax
    jnz 2f
    cmp $10, %ebx                       # unsigned: clocks of processes and devices too
    jae 2f
    shl $4, %ebx
    lea ckpt_clock_offsets(%rip), %rdx
    mov (%rdx,%rbx), %rcx               # seconds
    mov 8(%rdx,%rbx), %rdx              # nanoseconds, below one second
    add 8(%rbp), %rdx
    cmp $1000000000, %rdx
    jb 1f
    sub $1000000000, %rdx
    inc %rcx
1:  add %rcx, (%rbp)
    mov %rdx, 8(%rbp)
ckpt_clock_leave:
2:  add $8, %rsp
    .cfi_adjust_cfa_offset -8
    pop %rbp
    .cfi_adjust_cfa_offset -8
    pop %rbx
    .cfi_adjust_cfa_offset -8
    ret
    .cfi_endproc

    # Where the kernel has no such entry point.
    .p2align 4
ckpt_clock_system_call:
    .cfi_startproc
    mov $228, %eax                      # clock_gettime
    syscall
    ret
    .cfi_endproc
ckpt_clock_gettime_end:

# A function that reads the clock returns here when its thread was to be stopped amid it. What it
# returns is kept; everything else that it may change is dead.
    .p2align 4
ckpt_clock_return:
    sub $8, %rsp                        # where the return address was
    push %rax
    push %rdx
    sub $8, %rsp                        # aligned for the call
    call *ckpt_clock_returned(%rip)     # stops; tells where to return to
    mov %rax, 24(%rsp)
    add $8, %rsp
    pop %rdx
    pop %rax
    ret

    .data
    .globl ckpt_clock_real, ckpt_clock_offsets, ckpt_clock_returned
    .hidden ckpt_clock_real, ckpt_clock_offsets, ckpt_clock_returned
    .p2align 4
    # A clock each: seconds, nanoseconds.
ckpt_clock_offsets: .zero 16 * 10
ckpt_clock_real: .quad ckpt_clock_system_call
ckpt_clock_returned: .quad 0
    .text
