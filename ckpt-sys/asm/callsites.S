# Common code of the call-site net (x86_64, AT&T syntax).
#
# A patched site is   jmp slot ; syscall   and a slot is 64 bytes:
#
#    0  moved instructions (if any); lea data(%rip), %r11; jmp *stage1_pointer(%rip)
#   32  data: resume  i64   where the call goes on (the `syscall`), relative to the data
#   40        unwind  i64   where an unwinder believes us to be, relative to the data
#   48        number  i32   what `mov $number, %eax` said; -1: %rax holds it already
#   52        flags   u32
#   56        after   i64   behind the `syscall`, relative to the data
#
# At a site %rax is about to be written, %rcx and %r11 die in the `syscall`: three free
# registers, so nothing touches the stack unless a hook wants the call.
#
# The unwind information is right at every instruction: glibc cancels threads by a signal
# that may arrive anywhere here, and without it destructors would be skipped silently. All of it is
# marked as signal frame, because the address given is the next instruction at the site, not the one
# behind a call. In the escapes 0x0f is DW_CFA_def_cfa_expression, 0x10 DW_CFA_expression, 0x16
# DW_CFA_val_expression; register 7 is rsp, 6 rbp, 2 rcx, 11 r11, 16 the return address.

# ------------------------------------------------------------------------------------------
# The hole: address space for slots. The slots of a library are put at the one place in it that is
# a multiple of HOLE_SPAN away from the library, so that a prepared copy of the library's text, with
# its 32-bit jumps, fits nearly every program.
    .set HOLE_SPAN, 16 << 20
    .set HOLE_MARGIN, 256 << 10

    .section ckpt_hole,"ax",@nobits
    .p2align 12
    .globl ckpt_hole_start, ckpt_hole_end
    .hidden ckpt_hole_start, ckpt_hole_end
ckpt_hole_start:
    .cfi_startproc
    .cfi_signal_frame
    .cfi_def_cfa 7, 0
    # return address: data + *(data + 8), with data = (rip & -64) + 32
    .cfi_escape 0x16, 16, 12, 0x80, 0, 0x09, 0xc0, 0x1a, 0x23, 32, 0x12, 0x23, 8, 0x06, 0x22
    .skip HOLE_SPAN + HOLE_MARGIN
    .cfi_endproc
ckpt_hole_end:

# ------------------------------------------------------------------------------------------
    .text
    .globl ckpt_stage1, ckpt_callsites_text, ckpt_callsites_text_end
    .hidden ckpt_stage1, ckpt_callsites_text, ckpt_callsites_text_end
    .p2align 6
ckpt_callsites_text:
ckpt_stage1:
    .cfi_startproc
    .cfi_signal_frame
    .cfi_def_cfa 7, 0
    .cfi_escape 0x16, 16, 6, 0x7b, 0, 0x7b, 8, 0x06, 0x22   # r11 + *(r11 + 8)
    movslq 16(%r11), %rcx
    test %rcx, %rcx
    cmovns %rcx, %rax                   # what the replaced `mov` did
    cmp $512, %rax                      # unsigned: garbage numbers too
    jae 1f
    lea ckpt_hook_table(%rip), %rcx
    movzbl (%rcx,%rax), %ecx
    test %ecx, %ecx
    jnz 2f
1:  mov (%r11), %rcx
    add %r11, %rcx
    jmp *%rcx                           # to the `syscall`

    # A byte is: 1 a hook wants the call, 2 it leaves an entry record, 4 the call may change files
    # (a thread stopped before its `syscall` is sent through here again), and from bit 3 on what
    # can be decided right here, without a stack (`Fast` in callsite.rs). %rcx is all there is to
    # work with; %r11 stays the slot's to the end.
2:  test $0xf8, %cl
    jz ckpt_stage2
    test $2, %cl
    jnz ckpt_stage2
    shr $3, %ecx
    cmp $9, %ecx                        # the one with the longest way first
    je 30f
    cmp $2, %ecx
    je 22f
    ja 23f

    # 1: writes at the descriptor's own position: any flag of its entry will do.
    cmp $4096, %rdi
    jae ckpt_stage2
    lea ckpt_fd_state(%rip), %rcx
    mov (%rcx,%rdi,4), %ecx
    xor ckpt_table_word(%rip), %ecx     # below 32: of this table, with these flags
    cmp $31, %ecx
    ja ckpt_stage2
    test $15, %ecx
    jz ckpt_stage2
    test $1, %ecx                       # PASS
    jnz 1b
    lea ckpt_fd_hot(%rip), %rcx
    mov (%rcx,%rdi,8), %rcx
    movl $1, (%rcx)
    jmp 1b

    # 2: anywhere in the file: all flags but the last (forward of the old end only).
22: cmp $4096, %rdi
    jae ckpt_stage2
    lea ckpt_fd_state(%rip), %rcx
    mov (%rcx,%rdi,4), %ecx
    xor ckpt_table_word(%rip), %ecx
    cmp $31, %ecx
    ja ckpt_stage2
    test $7, %ecx
    jz ckpt_stage2
    test $1, %ecx
    jnz 1b
    lea ckpt_fd_hot(%rip), %rcx
    mov (%rcx,%rdi,8), %rcx
    movl $1, (%rcx)
    jmp 1b

23: cmp $4, %ecx
    je 24f
    ja 25f
    # 3: only where the descriptor is no file of interest (PASS).
    cmp $4096, %rdi
    jae ckpt_stage2
    lea ckpt_fd_state(%rip), %rcx
    mov (%rcx,%rdi,4), %ecx
    xor ckpt_table_word(%rip), %ecx
    cmp $31, %ecx
    ja ckpt_stage2
    test $1, %ecx
    jz ckpt_stage2
    jmp 1b

    # 4: close: nothing is known of the descriptor any more.
24: cmp $4096, %rdi
    jae 29f
    lea ckpt_fd_state(%rip), %rcx
    movl $0, (%rcx,%rdi,4)
    incl ckpt_fd_changes(%rip)
    jmp 1b

25: cmp $6, %ecx
    je 26f
    ja 27f
    # 5: open(path, flags): straight on to read only, without O_CREAT, O_TRUNC, O_TMPFILE, O_DIRECT.
    test $0x404243, %esi
    jnz ckpt_stage2
    jmp 1b
    # 6: openat(dir, path, flags)
26: test $0x404243, %edx
    jnz ckpt_stage2
    jmp 1b

27: cmp $7, %ecx
    ja 28f
    # 7: fcntl: F_DUPFD, F_SETFL, F_DUPFD_CLOEXEC
    test %esi, %esi
    jz ckpt_stage2
    cmp $4, %esi
    je ckpt_stage2
    cmp $1030, %esi
    je ckpt_stage2
    jmp 1b
    # A close of a large number, or of a small one with rubbish in the upper half.
29: mov %edi, %ecx
    cmp $4096, %ecx
    jae 1b
    jmp ckpt_stage2
28: cmp $8, %ecx
    ja 30f
    # 8: ioctl: the families of FICLONE, FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR
    mov %esi, %ecx
    shr $8, %ecx
    cmp $0x94, %cl
    je ckpt_stage2
    cmp $0x66, %cl
    je ckpt_stage2
    cmp $0x58, %cl
    je ckpt_stage2
    jmp 1b

    # 9: pwrite64(fd, data, length, offset): as 2, and where the one or two blocks that it touches
    # are saved already (`SavedBlocks` in callsite.rs: limit, bias; never changed once it is there).
30: cmp $4096, %rdi
    jae ckpt_stage2
    lea ckpt_fd_state(%rip), %rcx
    mov (%rcx,%rdi,4), %ecx
    xor ckpt_table_word(%rip), %ecx
    cmp $31, %ecx
    ja ckpt_stage2
    test $1, %ecx
    jnz 1b
    test $7, %ecx
    jnz 31f
    test $16, %ecx                      # KNOWN: the entry below is of this table
    jz ckpt_stage2
    lea -1(%rdx), %rcx                  # 1..4096 bytes
    cmp $4096, %rcx
    jae ckpt_stage2
    lea ckpt_fd_saved(%rip), %rcx
    mov (%rcx,%rdi,8), %rcx
    test %rcx, %rcx
    jz ckpt_stage2
    cmp (%rcx), %r10                    # unsigned: negative offsets too
    jae ckpt_stage2
    mov 8(%rcx), %rcx
    add %r10, %rcx
    sar $12, %rcx
    bt %rcx, ckpt_saved_anchor(%rip)
    jnc ckpt_stage2
    mov %r10d, %ecx
    and $4095, %ecx
    add %edx, %ecx
    cmp $4096, %ecx
    jbe 31f
    lea ckpt_fd_saved(%rip), %rcx       # the same for the last byte; a pointer that has been
    mov (%rcx,%rdi,8), %rcx             # changed meanwhile is as good as the one before
    test %rcx, %rcx
    jz ckpt_stage2
    cmp (%rcx), %r10
    jae ckpt_stage2
    mov 8(%rcx), %rcx
    add %r10, %rcx
    lea -1(%rcx,%rdx), %rcx
    sar $12, %rcx
    bt %rcx, ckpt_saved_anchor(%rip)
    jnc ckpt_stage2
31: lea ckpt_fd_hot(%rip), %rcx
    mov (%rcx,%rdi,8), %rcx
    movl $1, (%rcx)
    jmp 1b
    .globl ckpt_stage1_end
    .hidden ckpt_stage1_end
ckpt_stage1_end:
    .cfi_endproc

    .macro RESTORE_ARGUMENTS
    pop %rdi
    pop %rsi
    pop %rdx
    pop %r10
    pop %r8
    pop %r9
    .endm

# Stage 2: a hook wants the call. Saves everything that Rust code may change.
    .p2align 6
ckpt_stage2:
    .cfi_startproc
    .cfi_signal_frame
    .cfi_def_cfa 7, 0
    .cfi_escape 0x16, 16, 6, 0x7b, 0, 0x7b, 8, 0x06, 0x22
    lea -128(%rsp), %rsp                # the red zone stays the site's
    .cfi_def_cfa_offset 128
    pushq ckpt_table_word(%rip)         # which table the hook's decision is about
    .cfi_def_cfa_offset 136
    push %r11                           # CallFrame::slot
    .cfi_def_cfa_offset 144
    push %rbp                           # CallFrame::rbp
    .cfi_def_cfa_offset 152
    .cfi_offset 6, -152
    mov %rsp, %rbp
    .cfi_def_cfa_register 6
    # return address: slot + *(slot + 8), with slot = *(rbp + 8)
    .cfi_escape 0x16, 16, 8, 0x76, 8, 0x06, 0x12, 0x23, 8, 0x06, 0x22
    push %r9                            # CallFrame::args, last to first
    push %r8
    push %r10
    push %rdx
    push %rsi
    push %rdi
    push %rax                           # CallFrame::rax
    cld                                 # the ABI's state for the callee
    mov %rsp, %rdi
    # Hooks use the lower halves of these and leave the rest of the vector state alone, mask registers
    # and what others call upper halves: neither this library's code nor the memory functions of
    # memory.S have such an instruction (scripts/check looks).
    sub $256, %rsp
    and $-16, %rsp
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    movaps %xmm\n, 16*\n(%rsp)
    .endr
    call *ckpt_dispatch_pointer(%rip)
    mov %rax, %rsi                      # the verdict
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    movaps 16*\n(%rsp), %xmm\n
    .endr
    lea -56(%rbp), %rsp
    test %rsi, %rsi
    jnz 21f
    pop %rax
    # Verdict::Forward of a call that may change files: there must not have been a new table
    # since the hook looked. A thread stopped from the comparison on is sent to stage 1.
    cmp $512, %rax
    jae 19f
    lea ckpt_hook_table(%rip), %rcx
    testb $4, (%rcx,%rax)
    jz 19f
    .cfi_remember_state
    RESTORE_ARGUMENTS
    mov 16(%rbp), %ecx
    mov 8(%rbp), %r11
    pop %rbp
    .cfi_restore 6
    .cfi_def_cfa 7, 144
    .cfi_escape 0x16, 16, 6, 0x7b, 0, 0x7b, 8, 0x06, 0x22
    lea 144(%rsp), %rsp
    .cfi_def_cfa_offset 0
    .globl ckpt_forward, ckpt_forward_end
    .hidden ckpt_forward, ckpt_forward_end
ckpt_forward:
    cmp ckpt_table_word(%rip), %ecx
    jne ckpt_stage1
    mov (%r11), %rcx
    add %r11, %rcx
    jmp *%rcx
ckpt_forward_end:
    .cfi_restore_state
    .cfi_remember_state
19: RESTORE_ARGUMENTS
    mov 8(%rbp), %r11
    pop %rbp
    .cfi_restore 6
    .cfi_def_cfa 7, 144
    .cfi_escape 0x16, 16, 6, 0x7b, 0, 0x7b, 8, 0x06, 0x22
    lea 144(%rsp), %rsp
    .cfi_def_cfa_offset 0
    mov (%r11), %rcx                    # to the `syscall`
    add %r11, %rcx
    jmp *%rcx
    .cfi_restore_state
21: pop %rax                            # Verdict::Done: behind it
    RESTORE_ARGUMENTS
    mov 8(%rbp), %r11
    pop %rbp
    .cfi_restore 6
    .cfi_def_cfa 7, 144
    .cfi_escape 0x16, 16, 6, 0x7b, 0, 0x7b, 8, 0x06, 0x22
    lea 144(%rsp), %rsp
    .cfi_def_cfa_offset 0
    mov 24(%r11), %rcx
    add %r11, %rcx
    jmp *%rcx
    .cfi_endproc

# ------------------------------------------------------------------------------------------
# The restart stub: executes an interrupted call again with changed arguments and gives the
# site its registers back. %rsp -> RestartRecord (callsite.rs), which lies on the thread's stack below
# all that is in use; %rax = number.
    .globl ckpt_restart, ckpt_restart_call, ckpt_restart_after, ckpt_restart_gather, ckpt_restart_end
    .hidden ckpt_restart, ckpt_restart_call, ckpt_restart_after, ckpt_restart_gather, ckpt_restart_end
    .p2align 5
ckpt_restart:
    .cfi_startproc
    .cfi_signal_frame
    .cfi_escape 0x0f, 3, 0x77, 56, 0x06         # CFA: record.rsp
    .cfi_escape 0x10, 16, 2, 0x77, 48           # return address: record.back
    # A handler of the program that ran since the decision to restart must end the call.
    # ckpt_program_sigreturn sends a thread that it finds before the `syscall` through here again.
    mov 64(%rsp), %rcx
    mov (%rcx), %rcx
    cmp 72(%rsp), %rcx
    jne 7f
ckpt_restart_call:
    syscall
ckpt_restart_after:
    cmpl $0, 80(%rsp)
    jne 3f
    # Mode 0: a sleep that has ended well leaves the place for its remainder as it was.
    mov 136(%rsp), %rcx
    test %rcx, %rcx
    jz 2f
    test %rax, %rax
    jnz 2f
    mov 144(%rsp), %rdx
    mov %rdx, (%rcx)
    mov 152(%rsp), %rdx
    mov %rdx, 8(%rcx)
2:  mov 0(%rsp), %rdi
    mov 8(%rsp), %rsi
    mov 16(%rsp), %rdx
    mov 24(%rsp), %r10
    mov 32(%rsp), %r8
    mov 40(%rsp), %r9
    mov 48(%rsp), %rcx
    mov 56(%rsp), %rsp
    .cfi_remember_state
    .cfi_def_cfa 7, 0
    .cfi_escape 0x16, 16, 2, 0x72, 0            # return address: rcx
    jmp *%rcx
    .cfi_restore_state
3:  cmpl $1, 80(%rsp)
    jne 5f
    # Mode 1: this was a poll for the rest of a socket's timeout.
    test %rax, %rax
    js 2b
    jnz 4f
    mov 96(%rsp), %rax                          # timed out: what the call would have returned
    jmp 2b
4:  mov 88(%rsp), %rax                          # ready: the call itself, at its site
    subq $2, 48(%rsp)
    jmp 2b
5:  cmpl $3, 80(%rsp)
    je 8f
    ja 12f
    # Mode 2: this was the rest of a transfer of which `value` bytes were done before.
    test %rax, %rax
    js 6f
    add 96(%rsp), %rax
    jmp 2b
6:  mov 96(%rsp), %rax
    jmp 2b
7:  mov $-4, %rax                               # -EINTR
    jmp ckpt_restart_after
    # Mode 3: this was a poll for what is still to be transferred. With something done the
    # call returns that, whatever ended it.
ckpt_restart_gather:
8:  test %rax, %rax
    js 10f
    jz 9f
    mov 96(%rsp), %rdx
    mov 168(%rsp), %rsi
    imul %rdx, %rsi
    add 8(%rsp), %rsi
    neg %rdx
    add 160(%rsp), %rdx
    mov 0(%rsp), %rdi
    mov 184(%rsp), %r10
    mov 192(%rsp), %r8
    mov 200(%rsp), %r9
    mov 176(%rsp), %rax
    syscall
    cmp $-11, %rax                              # -EAGAIN: another thread has taken it
    je 11f
    test %rax, %rax
    jle 10f
    add %rax, 96(%rsp)
    mov 96(%rsp), %rax
    cmp 160(%rsp), %rax
    jae 2b
    cmpq $1, 168(%rsp)
    je 11f
    mov 208(%rsp), %rcx                         # each message has the whole time
    mov %rcx, 104(%rsp)
    mov 216(%rsp), %rcx
    mov %rcx, 112(%rsp)
11: lea 120(%rsp), %rdi                         # ppoll writes back what remains of the time
    mov $1, %esi
    lea 104(%rsp), %rdx
    xor %r10d, %r10d
    mov $8, %r8d
    xor %r9d, %r9d
    mov 128(%rsp), %rax
    jmp ckpt_restart
9:  mov $-11, %rax
10: cmpq $0, 96(%rsp)
    je 2b
    jmp 6b
    # Mode 4: this was a connect with the rest of the socket's timeout.
12: mov %rax, 224(%rsp)
    mov 0(%rsp), %rdi
    mov $1, %esi                                # SOL_SOCKET
    mov $21, %edx                               # SO_SNDTIMEO
    lea 208(%rsp), %r10
    mov $16, %r8d
    mov $54, %eax                               # setsockopt
    syscall
    mov 224(%rsp), %rax
    jmp 2b
ckpt_restart_end:
    .cfi_endproc

# ------------------------------------------------------------------------------------------
# A call that a hook makes with arguments that hold for one life only. %rdi -> LifeCall
# (callsite.rs). Between the comparison and the `syscall` no stop may come and another life
# go on: a thread stopped there compares again. Returns i64::MIN without a call when the word has changed.
    .globl ckpt_life_call, ckpt_life_compare, ckpt_life_after
    .hidden ckpt_life_call, ckpt_life_compare, ckpt_life_after
    .p2align 4
ckpt_life_call:
    .cfi_startproc
    push %rbx
    .cfi_def_cfa_offset 16
    .cfi_offset 3, -16
    mov %rdi, %rbx
ckpt_life_compare:
    mov 56(%rbx), %rax
    mov (%rax), %eax
    cmp 64(%rbx), %eax
    jne 1f
    mov 0(%rbx), %rax
    mov 8(%rbx), %rdi
    mov 16(%rbx), %rsi
    mov 24(%rbx), %rdx
    mov 32(%rbx), %r10
    mov 40(%rbx), %r8
    mov 48(%rbx), %r9
    syscall
ckpt_life_after:
    pop %rbx
    .cfi_remember_state
    .cfi_def_cfa_offset 8
    .cfi_restore 3
    ret
    .cfi_restore_state
1:  movabs $0x8000000000000000, %rax
    jmp ckpt_life_after
    .cfi_endproc

# ------------------------------------------------------------------------------------------
# Signal restorer for the program's own handlers: counts the handler that just ended, so that an EINTR
# that it caused is never taken for ours, then rt_sigreturn. %rsp -> ucontext.
    .macro IN_UCONTEXT reg, offset              # register saved at rsp + offset (two-byte SLEB128)
    .cfi_escape 0x10, \reg, 3, 0x77, (\offset & 0x7f) | 0x80, \offset >> 7
    .endm
    .globl ckpt_program_sigreturn
    .hidden ckpt_program_sigreturn
    .p2align 4
    .cfi_startproc
    .cfi_signal_frame
    .cfi_escape 0x0f, 4, 0x77, (160 & 0x7f) | 0x80, 160 >> 7, 0x06
    IN_UCONTEXT 8, 40
    IN_UCONTEXT 9, 48
    IN_UCONTEXT 10, 56
    IN_UCONTEXT 11, 64
    IN_UCONTEXT 12, 72
    IN_UCONTEXT 13, 80
    IN_UCONTEXT 14, 88
    IN_UCONTEXT 15, 96
    IN_UCONTEXT 5, 104
    IN_UCONTEXT 4, 112
    IN_UCONTEXT 6, 120
    IN_UCONTEXT 3, 128
    IN_UCONTEXT 1, 136
    IN_UCONTEXT 0, 144
    IN_UCONTEXT 2, 152
    IN_UCONTEXT 16, 168
    nop                                         # an unwinder looks up the address before
ckpt_program_sigreturn:
    mov ckpt_thread_block@gottpoff(%rip), %rax
    incq %fs:32(%rax)                           # ThreadBlock::handlers_run
    mov 168(%rsp), %rcx                         # the interrupted rip
    lea ckpt_restart(%rip), %rdx
    lea ckpt_restart_call(%rip), %rax
    cmp %rdx, %rcx
    jb 1f
    cmp %rax, %rcx
    ja 1f
    mov %rdx, 168(%rsp)                         # compare the counts again
1:  mov %rsp, %rdi                              # a frame on its way to a call that may change
    cld                                         # files looks at the table again
    mov ckpt_rewind_pointer(%rip), %rax
    test %rax, %rax
    jz 2f
    call *%rax
2:  mov $15, %rax
    syscall
    hlt
    .cfi_endproc

# Signal restorer for the agent's own handlers. Unwinders know these very bytes, so it has
# no unwind information, and neither has the byte before it.
    .globl ckpt_sigreturn
    .hidden ckpt_sigreturn
    .p2align 4
    nop
ckpt_sigreturn:
    mov $15, %rax
    syscall
    hlt
ckpt_callsites_text_end:

# ------------------------------------------------------------------------------------------
    .data
    .globl ckpt_dispatch_pointer, ckpt_rewind_pointer
    .hidden ckpt_dispatch_pointer, ckpt_rewind_pointer
    .p2align 3
ckpt_rewind_pointer: .quad 0
ckpt_dispatch_pointer: .quad 0

    .bss
    .globl ckpt_hook_table
    .hidden ckpt_hook_table
    .p2align 6
ckpt_hook_table: .zero 512

    # The descriptor cache of `agent::hooks::files::cache`: the present table's number << 5, or 0;
    # an entry a descriptor (number << 5 | flags); where a write that passes by leaves its mark.
    # (an entry a descriptor), and what is saved of its inode. The anchor is where bits are counted
    # from.
    .globl ckpt_table_word, ckpt_fd_changes, ckpt_fd_state, ckpt_fd_hot, ckpt_fd_saved
    .hidden ckpt_table_word, ckpt_fd_changes, ckpt_fd_state, ckpt_fd_hot, ckpt_fd_saved
    .globl ckpt_saved_anchor
    .hidden ckpt_saved_anchor
    .p2align 6
ckpt_table_word: .zero 8
    .p2align 6
ckpt_fd_changes: .zero 8
    .p2align 6
ckpt_fd_state: .zero 4 * 4096
ckpt_fd_hot: .zero 8 * 4096
ckpt_fd_saved: .zero 8 * 4096
ckpt_saved_anchor: .zero 8
    .text
