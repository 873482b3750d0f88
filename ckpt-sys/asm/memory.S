# memcpy, memmove, memset, memcmp, bcmp and strlen (x86_64, AT&T syntax) for whatever is linked with
# this: with the lower halves of %xmm0-%xmm15 and nothing else of the vector state. libc's use the
# upper halves and mask registers, on some processors without ever clearing them, and stage 2 of the
# call-site net would have to save all of that around each hook (90 ns of a call of 100).
#
# Copies of overlapping ends instead of loops for what is short; loads before stores throughout.

    .macro FUNCTION name
    .globl \name
    .hidden \name
    .type \name, @function
    .p2align 5
\name:
    .endm

    .text
    FUNCTION memcpy
    FUNCTION memmove
    .cfi_startproc
    mov %rdi, %rax
    cmp $16, %rdx
    jb 3f
    cmp $32, %rdx
    ja 1f
    movups (%rsi), %xmm0
    movups -16(%rsi,%rdx), %xmm1
    movups %xmm0, (%rdi)
    movups %xmm1, -16(%rdi,%rdx)
    ret
1:  cmp $64, %rdx
    ja 2f
    movups (%rsi), %xmm0
    movups 16(%rsi), %xmm1
    movups -32(%rsi,%rdx), %xmm2
    movups -16(%rsi,%rdx), %xmm3
    movups %xmm0, (%rdi)
    movups %xmm1, 16(%rdi)
    movups %xmm2, -32(%rdi,%rdx)
    movups %xmm3, -16(%rdi,%rdx)
    ret
2:  mov %rdi, %rcx
    sub %rsi, %rcx
    cmp %rdx, %rcx                      # unsigned: the target begins within the source
    jb 8f
    movups -64(%rsi,%rdx), %xmm4
    movups -48(%rsi,%rdx), %xmm5
    movups -32(%rsi,%rdx), %xmm6
    movups -16(%rsi,%rdx), %xmm7
    lea -64(%rdi,%rdx), %r8
7:  movups (%rsi), %xmm0
    movups 16(%rsi), %xmm1
    movups 32(%rsi), %xmm2
    movups 48(%rsi), %xmm3
    movups %xmm0, (%rdi)
    movups %xmm1, 16(%rdi)
    movups %xmm2, 32(%rdi)
    movups %xmm3, 48(%rdi)
    add $64, %rsi
    add $64, %rdi
    cmp %r8, %rdi
    jb 7b
    movups %xmm4, (%r8)
    movups %xmm5, 16(%r8)
    movups %xmm6, 32(%r8)
    movups %xmm7, 48(%r8)
    ret
8:  movups (%rsi), %xmm4                # from the end
    movups 16(%rsi), %xmm5
    movups 32(%rsi), %xmm6
    movups 48(%rsi), %xmm7
    lea (%rdi,%rdx), %r8
    lea (%rsi,%rdx), %r9
    lea 64(%rdi), %r10
9:  movups -16(%r9), %xmm0
    movups -32(%r9), %xmm1
    movups -48(%r9), %xmm2
    movups -64(%r9), %xmm3
    movups %xmm0, -16(%r8)
    movups %xmm1, -32(%r8)
    movups %xmm2, -48(%r8)
    movups %xmm3, -64(%r8)
    sub $64, %r9
    sub $64, %r8
    cmp %r10, %r8
    ja 9b
    movups %xmm4, (%rdi)
    movups %xmm5, 16(%rdi)
    movups %xmm6, 32(%rdi)
    movups %xmm7, 48(%rdi)
    ret
3:  cmp $8, %rdx
    jb 4f
    mov (%rsi), %rcx
    mov -8(%rsi,%rdx), %r8
    mov %rcx, (%rdi)
    mov %r8, -8(%rdi,%rdx)
    ret
4:  cmp $4, %rdx
    jb 5f
    mov (%rsi), %ecx
    mov -4(%rsi,%rdx), %r8d
    mov %ecx, (%rdi)
    mov %r8d, -4(%rdi,%rdx)
    ret
5:  cmp $2, %rdx
    jb 6f
    movzwl (%rsi), %ecx
    movzbl -1(%rsi,%rdx), %r8d
    mov %cx, (%rdi)
    mov %r8b, -1(%rdi,%rdx)
    ret
6:  test %rdx, %rdx
    jz 10f
    movzbl (%rsi), %ecx
    mov %cl, (%rdi)
10: ret
    .cfi_endproc
    .size memcpy, . - memcpy
    .size memmove, . - memmove

    FUNCTION memset
    .cfi_startproc
    mov %rdi, %rax
    movzbl %sil, %esi
    movabs $0x0101010101010101, %rcx
    imul %rcx, %rsi
    cmp $16, %rdx
    jb 3f
    movq %rsi, %xmm0
    punpcklqdq %xmm0, %xmm0
    cmp $64, %rdx
    ja 2f
    movups %xmm0, (%rdi)
    movups %xmm0, -16(%rdi,%rdx)
    cmp $32, %rdx
    jbe 1f
    movups %xmm0, 16(%rdi)
    movups %xmm0, -32(%rdi,%rdx)
1:  ret
2:  lea -64(%rdi,%rdx), %r8
7:  movups %xmm0, (%rdi)
    movups %xmm0, 16(%rdi)
    movups %xmm0, 32(%rdi)
    movups %xmm0, 48(%rdi)
    add $64, %rdi
    cmp %r8, %rdi
    jb 7b
    movups %xmm0, (%r8)
    movups %xmm0, 16(%r8)
    movups %xmm0, 32(%r8)
    movups %xmm0, 48(%r8)
    ret
3:  cmp $8, %rdx
    jb 4f
    mov %rsi, (%rdi)
    mov %rsi, -8(%rdi,%rdx)
    ret
4:  cmp $4, %rdx
    jb 5f
    mov %esi, (%rdi)
    mov %esi, -4(%rdi,%rdx)
    ret
5:  test %rdx, %rdx
    jz 6f
    mov %sil, (%rdi)
    mov %sil, -1(%rdi,%rdx)
    shr $1, %rdx                        # 2 or 3: the middle
    mov %sil, (%rdi,%rdx)
6:  ret
    .cfi_endproc
    .size memset, . - memset

    FUNCTION memcmp
    FUNCTION bcmp
    .cfi_startproc
    xor %ecx, %ecx
    cmp $16, %rdx
    jb 3f
    lea -16(%rdx), %r8
1:  movups (%rdi,%rcx), %xmm0
    movups (%rsi,%rcx), %xmm1
    pcmpeqb %xmm1, %xmm0
    pmovmskb %xmm0, %eax
    xor $0xffff, %eax
    jnz 2f
    add $16, %rcx
    cmp %r8, %rcx
    jb 1b
    mov %r8, %rcx                       # the last sixteen, some of them again
    movups (%rdi,%rcx), %xmm0
    movups (%rsi,%rcx), %xmm1
    pcmpeqb %xmm1, %xmm0
    pmovmskb %xmm0, %eax
    xor $0xffff, %eax
    jnz 2f
    ret                                 # %eax is 0
2:  bsf %eax, %eax
    add %rax, %rcx
    movzbl (%rdi,%rcx), %eax
    movzbl (%rsi,%rcx), %edx
    sub %edx, %eax
    ret
3:  cmp %rdx, %rcx
    jae 5f
    movzbl (%rdi,%rcx), %eax
    movzbl (%rsi,%rcx), %r8d
    inc %rcx
    sub %r8d, %eax
    jz 3b
    ret
5:  xor %eax, %eax
    ret
    .cfi_endproc
    .size memcmp, . - memcmp
    .size bcmp, . - bcmp

    # Sixteen aligned bytes at a time: no page is touched that holds nothing of the string.
    FUNCTION strlen
    .cfi_startproc
    mov %rdi, %rcx
    mov %rdi, %rax
    and $15, %ecx
    sub %rcx, %rax
    pxor %xmm0, %xmm0
    pcmpeqb (%rax), %xmm0
    pmovmskb %xmm0, %edx
    shr %cl, %edx
    test %edx, %edx
    jnz 2f
1:  add $16, %rax
    pxor %xmm0, %xmm0
    pcmpeqb (%rax), %xmm0
    pmovmskb %xmm0, %edx
    test %edx, %edx
    jz 1b
    bsf %edx, %edx
    add %rdx, %rax
    sub %rdi, %rax
    ret
2:  bsf %edx, %eax
    ret
    .cfi_endproc
    .size strlen, . - strlen
