/* Proves: the brk heap comes back at its place with its content and goes on
 * growing and shrinking (by sbrk and by malloc), small and large blocks alike. */
#include "guest.h"
#include <malloc.h>

#define BLOCKS 512

int main(void)
{
    guest_begin();
    /* A break that only we move down. */
    CHECK(mallopt(M_TRIM_THRESHOLD, 1 << 30) == 1 && mallopt(M_MMAP_THRESHOLD, 128 * 1024) == 1);
    static unsigned char *block[BLOCKS];
    static size_t size[BLOCKS];
    static uint64_t seed[BLOCKS];
    unsigned char *start = sbrk(0);
    unsigned char *own = sbrk(64 * 1024); /* ours, inside the brk range */
    CHECK(own != (void *)-1);
    guest_fill(own, 64 * 1024, 7);
    unsigned char *last_end = sbrk(0);
    unsigned long life = guest_life();
    ROUNDS(round)
    {
        /* After a restart all of it, before anything is written over. */
        if (guest_life() != life) {
            life = guest_life();
            for (int i = 0; i < BLOCKS; i++)
                if (block[i] && !guest_holds(block[i], size[i], seed[i]))
                    FAIL("round %ld: block %d at %p, %zu bytes", round, i, block[i], size[i]);
        }
        for (int n = 0; n < 16; n++) {
            int i = guest_mix(round * 16 + n) % BLOCKS;
            if (block[i])
                CHECK(guest_holds(block[i], size[i], seed[i]));
            size_t want = 8 + guest_mix(seed[i] + round) % (n == 0 ? 400000 : 6000);
            block[i] = realloc(block[i], want);
            CHECK(block[i] != NULL);
            size_t kept = want < size[i] ? want & ~7ul : size[i] & ~7ul;
            if (seed[i])
                CHECK(guest_holds(block[i], kept, seed[i]));
            seed[i] = guest_mix(round * 977 + i) | 1;
            size[i] = want & ~7ul;
            guest_fill(block[i], size[i], seed[i]);
        }
        CHECK(guest_holds(own, 64 * 1024, 7));
        /* The break stays where it was and grows from there. */
        unsigned char *end = sbrk(0);
        CHECK(end >= last_end && end >= start + 64 * 1024);
        unsigned char *more = sbrk(8192);
        CHECK(more == end);
        CHECK(guest_is_zero(more, 8192));
        memset(more, 0xee, 8192);
        if (round % 2) {
            CHECK(sbrk(-8192) == more + 8192);
        }
        last_end = sbrk(0);
    }
    for (int i = 0; i < BLOCKS; i++)
        if (block[i]) {
            CHECK(guest_holds(block[i], size[i], seed[i]));
            free(block[i]);
        }
    printf("heap ok\n");
    guest_end();
}
