/* Proves: a deep main stack comes back frame by frame and keeps growing after a
 * restore: each level of the recursion works for a while, checks its frame on the
 * way up, and the depth passes anything the stack had at the checkpoint. */
#include "guest.h"

static long rounds, level_step;

static uint64_t deep(long round)
{
    volatile unsigned char frame[16384];
    guest_fill((void *)frame, sizeof frame, round);
    guest_sleep_ms(10);
    uint64_t below = round + 1 < rounds && round * level_step < 6 << 20 ? deep(round + 1) : 0;
    if (below == 0) /* the bottom: stay here a while, so that most checkpoints see the whole depth */
        for (long i = 0; i < rounds / 2; i++) {
            guest_sleep_ms(10);
            CHECK(guest_holds((void *)frame, sizeof frame, round));
        }
    CHECK(guest_holds((void *)frame, sizeof frame, round));
    if (round % 8 == 0)
        guest_sleep_ms(5);
    return guest_mix(below + frame[round % sizeof frame]) | 1;
}

int main(void)
{
    guest_begin();
    rounds = guest_rounds();
    level_step = 16384 + 256;
    printf("stack ok %llx\n", (unsigned long long)deep(0));
    guest_end();
}
