/* Proves: AMX tiles and their configuration survive where the processor and the kernel
 * permit them; elsewhere the guest says so in its output and ends well. */
#include "guest.h"

/* It still lives as long as it would. */
__attribute__((noreturn)) static void without(void)
{
    NOT_TESTED("this processor or kernel permits no AMX");
    ROUNDS(round);
    printf("no AMX here\n");
    guest_end();
    __builtin_unreachable();
}

#if defined(__x86_64__)
#include <cpuid.h>

static int permitted(void)
{
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1))
        return 0;
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
}

/* Each thread has tiles of its own, and the kernel makes room for them when it first uses them. */
static void *hold(void *seed)
{
    struct {
        uint8_t palette, start_row, zero[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((packed, aligned(64))) config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = 16;
    }
    unsigned char in[8][1024] __attribute__((aligned(64))), out[8][1024] __attribute__((aligned(64)));
    unsigned char config_out[64] __attribute__((aligned(64)));
    guest_fill(in, sizeof in, (long)seed);
    for (long turn = 0, turns = guest_rounds() * 12; turn < turns; turn++) {
        long spin = 2000000, stride = 64;
        in[turn % 8][turn % 1024]++;
        __asm__ volatile("ldtilecfg %[config]\n"
                         "tileloadd 0(%[in],%[stride],1), %%tmm0\n tileloadd 1024(%[in],%[stride],1), %%tmm1\n"
                         "tileloadd 2048(%[in],%[stride],1), %%tmm2\n tileloadd 7168(%[in],%[stride],1), %%tmm7\n"
                         "1: decq %[spin]\n jnz 1b\n"
                         "tilestored %%tmm0, 0(%[out],%[stride],1)\n tilestored %%tmm1, 1024(%[out],%[stride],1)\n"
                         "tilestored %%tmm2, 2048(%[out],%[stride],1)\n tilestored %%tmm7, 7168(%[out],%[stride],1)\n"
                         "sttilecfg %[config_out]\n tilerelease\n"
                         : [spin] "+r"(spin), [config_out] "=m"(config_out)
                         : [config] "m"(config), [in] "r"(in), [out] "r"(out), [stride] "r"(stride)
                         : "memory", "cc");
        CHECK(memcmp(config_out, &config, 64) == 0);
        CHECK(memcmp(in[0], out[0], 3 * 1024) == 0 && memcmp(in[7], out[7], 1024) == 0);
    }
    return NULL;
}

int main(void)
{
    guest_begin();
    if (!permitted()) {
        without();
    }
    pthread_t other;
    CHECK(pthread_create(&other, NULL, hold, (void *)78) == 0);
    hold((void *)77);
    CHECK(pthread_join(other, NULL) == 0);
    printf("AMX ok\n");
    guest_end();
}
#else
int main(void)
{
    guest_begin();
    without();
}
#endif
