/* Proves: every register a program can use survives a stop at any instruction. Hot
 * loops in assembly fill the integer, flags, x87, SSE, AVX, AVX-512 and mask
 * registers with values of their own, spin (nearly all time is spent there), and
 * store them again for comparison; one thread per family and the main thread on the
 * integers. Iterations are counted: the same number in every run. */
#include "guest.h"

#if !defined(__x86_64__)
#error "write the register loops of this architecture"
#endif
#include <cpuid.h>

#define SPIN 300000L

static long turns;

/* All integer registers but the stack pointer. */
static void integers(uint64_t seed)
{
    uint64_t in[16], out[16];
    for (int i = 0; i < 16; i++)
        in[i] = guest_mix(seed + i);
    in[2] = SPIN;
    register uint64_t *from __asm__("rax") = in;
    register uint64_t *to __asm__("rcx") = out;
    __asm__ volatile("leaq -128(%%rsp), %%rsp\n" /* step over the red zone */
                     "pushq %%rbp\n pushq %%rbx\n pushq %%rcx\n"
                     "movq 8(%%rax), %%rbx\n movq 16(%%rax), %%rcx\n movq 24(%%rax), %%rdx\n"
                     "movq 32(%%rax), %%rsi\n movq 40(%%rax), %%rdi\n movq 48(%%rax), %%rbp\n"
                     "movq 56(%%rax), %%r8\n movq 64(%%rax), %%r9\n movq 72(%%rax), %%r10\n"
                     "movq 80(%%rax), %%r11\n movq 88(%%rax), %%r12\n movq 96(%%rax), %%r13\n"
                     "movq 104(%%rax), %%r14\n movq 112(%%rax), %%r15\n movq 0(%%rax), %%rax\n"
                     /* carry set and direction down while it spins: lea and jrcxz leave the flags alone */
                     "std\n stc\n"
                     "1: leaq -1(%%rcx), %%rcx\n jrcxz 2f\n jmp 1b\n"
                     "2: jnc 3f\n pushfq\n testq $0x400, (%%rsp)\n jz 3f\n cld\n popfq\n cld\n"
                     "popq %%rcx\n"
                     "movq %%rax, 0(%%rcx)\n movq %%rbx, 8(%%rcx)\n movq %%rdx, 24(%%rcx)\n"
                     "movq %%rsi, 32(%%rcx)\n movq %%rdi, 40(%%rcx)\n movq %%rbp, 48(%%rcx)\n"
                     "movq %%r8, 56(%%rcx)\n movq %%r9, 64(%%rcx)\n movq %%r10, 72(%%rcx)\n"
                     "movq %%r11, 80(%%rcx)\n movq %%r12, 88(%%rcx)\n movq %%r13, 96(%%rcx)\n"
                     "movq %%r14, 104(%%rcx)\n movq %%r15, 112(%%rcx)\n"
                     "popq %%rbx\n popq %%rbp\n leaq 128(%%rsp), %%rsp\n jmp 4f\n"
                     "3: cld\n ud2\n" /* the flags were lost */
                     "4:\n"
                     : "+r"(from), "+r"(to)
                     :
                     : "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "cc", "memory");
    for (int i = 0; i < 15; i++)
        if (i != 2 && in[i] != out[i])
            FAIL("integer register %d: %llx, not %llx", i, (unsigned long long)out[i], (unsigned long long)in[i]);
}

/* The x87 stack, its control word and MXCSR. */
static void x87(uint64_t seed)
{
    struct {
        unsigned char area[512] __attribute__((aligned(64)));
    } saved;
    double in[8];
    for (int i = 0; i < 8; i++)
        in[i] = (double)(long)guest_mix(seed + i) / 3;
    /* Rounding up, single precision of the control word; flush to zero, rounding down. */
    uint16_t control = 0x0b7f, normal = 0x037f;
    uint32_t mxcsr = 0x9f80 | 0x2000, usual = 0x1f80;
    long spin = SPIN;
    __asm__ volatile("fninit\n fldcw %[control]\n ldmxcsr %[mxcsr]\n"
                     "fldl 0(%[in])\n fldl 8(%[in])\n fldl 16(%[in])\n fldl 24(%[in])\n"
                     "fldl 32(%[in])\n fldl 40(%[in])\n fldl 48(%[in])\n fldl 56(%[in])\n"
                     "1: decq %[spin]\n jnz 1b\n"
                     "fxsave64 (%[to])\n fninit\n fldcw %[normal]\n ldmxcsr %[usual]\n"
                     : [spin] "+r"(spin)
                     : [in] "r"(in), [to] "r"(saved.area), [control] "m"(control), [normal] "m"(normal),
                       [mxcsr] "m"(mxcsr), [usual] "m"(usual)
                     : "memory", "cc");
    uint16_t got_control;
    uint32_t got_mxcsr;
    memcpy(&got_control, saved.area, 2);
    memcpy(&got_mxcsr, saved.area + 24, 4);
    CHECK_EQ(got_control & 0x1f3f, control & 0x1f3f);
    CHECK_EQ(got_mxcsr, mxcsr);
    for (int i = 0; i < 8; i++) {
        long double value;
        memset(&value, 0, sizeof value);
        memcpy(&value, saved.area + 32 + 16 * i, 10);
        if (value != (long double)in[7 - i])
            FAIL("st(%d) is wrong", i);
    }
}

#define VECTOR_LOOP(name, mov, reg, width, count, list_in, list_out)                             \
    static void name(uint64_t seed)                                                              \
    {                                                                                            \
        unsigned char in[width * count] __attribute__((aligned(64))); \
        unsigned char out[width * count] __attribute__((aligned(64)));\
        guest_fill(in, sizeof in, seed);                                                         \
        memset(out, 0, sizeof out);                                                              \
        long spin = SPIN;                                                                        \
        __asm__ volatile(list_in "1: decq %[spin]\n jnz 1b\n" list_out                           \
                         : [spin] "+r"(spin)                                                     \
                         : [in] "r"(in), [out] "r"(out)                                          \
                         : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5",       \
                           "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13",   \
                           "xmm14", "xmm15");                                                    \
        if (memcmp(in, out, sizeof in) != 0)                                                     \
            FAIL(#name " registers changed");                                                    \
    }

#define LOAD(mov, reg, n, width) mov " " #width "*" #n "(%[in]), %%" reg #n "\n"
#define STORE(mov, reg, n, width) mov " %%" reg #n ", " #width "*" #n "(%[out])\n"
#define SIXTEEN(X, mov, reg, w)                                                                  \
    X(mov, reg, 0, w) X(mov, reg, 1, w) X(mov, reg, 2, w) X(mov, reg, 3, w) X(mov, reg, 4, w)    \
    X(mov, reg, 5, w) X(mov, reg, 6, w) X(mov, reg, 7, w) X(mov, reg, 8, w) X(mov, reg, 9, w)    \
    X(mov, reg, 10, w) X(mov, reg, 11, w) X(mov, reg, 12, w) X(mov, reg, 13, w)                  \
    X(mov, reg, 14, w) X(mov, reg, 15, w)
#define UPPER(X, mov, reg, w)                                                                    \
    X(mov, reg, 16, w) X(mov, reg, 17, w) X(mov, reg, 18, w) X(mov, reg, 19, w)                  \
    X(mov, reg, 20, w) X(mov, reg, 21, w) X(mov, reg, 22, w) X(mov, reg, 23, w)                  \
    X(mov, reg, 24, w) X(mov, reg, 25, w) X(mov, reg, 26, w) X(mov, reg, 27, w)                  \
    X(mov, reg, 28, w) X(mov, reg, 29, w) X(mov, reg, 30, w) X(mov, reg, 31, w)
#define MASKS(X, mov)                                                                            \
    X(mov, "k", 0, 8) X(mov, "k", 1, 8) X(mov, "k", 2, 8) X(mov, "k", 3, 8) X(mov, "k", 4, 8)    \
    X(mov, "k", 5, 8) X(mov, "k", 6, 8) X(mov, "k", 7, 8)

VECTOR_LOOP(sse, "movups", "xmm", 16, 16, SIXTEEN(LOAD, "movups", "xmm", 16), SIXTEEN(STORE, "movups", "xmm", 16))
VECTOR_LOOP(avx, "vmovups", "ymm", 32, 16, SIXTEEN(LOAD, "vmovups", "ymm", 32),
            SIXTEEN(STORE, "vmovups", "ymm", 32) "vzeroupper\n")
VECTOR_LOOP(avx512, "vmovups", "zmm", 64, 32,
            SIXTEEN(LOAD, "vmovups", "zmm", 64) UPPER(LOAD, "vmovups", "zmm", 64),
            SIXTEEN(STORE, "vmovups", "zmm", 64) UPPER(STORE, "vmovups", "zmm", 64) "vzeroupper\n")
VECTOR_LOOP(masks, "kmovq", "k", 8, 8, MASKS(LOAD, "kmovq"), MASKS(STORE, "kmovq"))

static long done[8];

struct family {
    void (*loop)(uint64_t);
    int number;
};

static void *work(void *argument)
{
    struct family *family = argument;
    for (long i = 0; i < turns; i++) {
        family->loop(i * 1000003 + family->number);
        done[family->number]++;
    }
    return NULL;
}

int main(void)
{
    guest_begin();
    __builtin_cpu_init();
    struct family families[] = {{integers, 0}, {x87, 1}, {sse, 2}, {avx, 3}, {avx512, 4}, {masks, 5}};
    int n = 3;
    if (__builtin_cpu_supports("avx"))
        n = 4;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"))
        n = 6;
    else
        NOT_TESTED("this processor has no AVX-512");
    turns = guest_rounds() * 40;
    pthread_t threads[8];
    for (int i = 1; i < n; i++)
        threads[i] = guest_thread(work, &families[i]);
    work(&families[0]);
    for (int i = 1; i < n; i++)
        guest_join(threads[i]);
    for (int i = 0; i < n; i++)
        CHECK_EQ(done[i], turns);
    printf("registers ok: %d families\n", n);
    guest_end();
}
