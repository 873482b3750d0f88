/* Proves the calls of inserted mode: ckpt_checkpoint returns 0 when taken and the return
 * value (GUEST_RETURN, default 1) after a recovery, with the caller's locals and the control
 * words of x87 and SSE as a call must leave them; between ckpt_hold and ckpt_release
 * none is taken; bare every call fails with ENOSYS. It works step by step: a step is one
 * note in $GUEST_LOG when it is done for the first time in a life. */
#include "ckpt.h"
#include "guest.h"

int main(void)
{
    guest_begin();
    long returns = 0;
    volatile uint64_t local = 1;
    unsigned char *heap = malloc(100000);
    const char *text = getenv("GUEST_RETURN");
    int want = text ? atoi(text) : 1;
    long rounds = guest_rounds() / 5;
    for (long round = 0; round < rounds; round++) {
        guest_fill(heap, 100000, round);
        local = guest_mix(local);
        uint64_t before = local;
        uint16_t x87 = 0x037f | (round % 4) << 10, x87_now; /* rounding */
        uint32_t sse = 0x1f80 | (round % 4) << 13, sse_now;
        __asm__ volatile("fldcw %0\n ldmxcsr %1" : : "m"(x87), "m"(sse));
        int result = ckpt_checkpoint(round % 2);
        __asm__ volatile("fnstcw %0\n stmxcsr %1" : "=m"(x87_now), "=m"(sse_now));
        CHECK_EQ(x87_now & 0x0f3f, x87 & 0x0f3f);
        CHECK_EQ(sse_now & ~0x3fu, sse);
        if (result == -1)
            CHECK_EQ(errno, ENOSYS); /* bare */
        else if (result > 0) {
            CHECK_EQ(result, want);
            returns++;
            guest_note("returned");
        }
        CHECK(local == before && guest_holds(heap, 100000, round));
        guest_sleep_ms(50);
    }
    fprintf(stderr, "%ld returns from a restore\n", returns);
    printf("calls ok\n");
    guest_end();
}
