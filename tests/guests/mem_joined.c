/* Proves: memory is kept that an empty mapping was moved beside, so that the kernel joined the
 * two: by mremap to a place, and with MREMAP_DONTUNMAP (both ranges are written afterwards),
 * locked and unlocked in between. */
#include "guest.h"

#define K 4096ul
#define PAGES 3ul /* few: a restore reads them, and they can be joined again */
#define REST 25

int main(void)
{
    guest_begin();
    const int rw = PROT_READ | PROT_WRITE, own = MAP_PRIVATE | MAP_ANONYMOUS;
    unsigned char *place = guest_map(64 * K, PROT_NONE, own, -1, 0);
    unsigned char *kept = place + 8 * K, *beside = kept + PAGES * K, *apart = beside + 20 * K;
    CHECK(mmap(kept, PAGES * K, rw, own | MAP_FIXED, -1, 0) == kept);
    uint64_t seeds[PAGES];
    for (unsigned long i = 0; i < PAGES; i++)
        guest_fill(kept + i * K, K, seeds[i] = i);
    ROUNDS(round)
    {
        if (round % REST == 0) {
            /* Empty, and there for a checkpoint or two. */
            CHECK(mmap(apart, 4 * K, rw, own | MAP_FIXED, -1, 0) == apart);
            CHECK(mmap(beside, 4 * K, PROT_NONE, own | MAP_FIXED, -1, 0) == beside);
            guest_sleep_ms(130);
            int how = MREMAP_MAYMOVE | MREMAP_FIXED | (round % 2 ? MREMAP_DONTUNMAP : 0);
            CHECK(mremap(apart, 4 * K, 4 * K, how, beside) == beside);
        }
        long moved = round - round % REST;
        if (round % REST == 9) {
            guest_fill(beside + K, K, 800 + moved);
            if (moved % 2)
                guest_fill(apart, K, 900 + moved);
            if (mlock(kept, PAGES * K) == 0)
                CHECK(munlock(kept, PAGES * K) == 0);
        }
        if (round % REST > 9) {
            CHECK(guest_holds(beside + K, K, 800 + moved));
            CHECK(moved % 2 == 0 || guest_holds(apart, K, 900 + moved));
        }
        for (unsigned long i = 0; i < PAGES; i++)
            CHECK(guest_holds(kept + i * K, K, seeds[i]));
        unsigned long i = round * 5 % PAGES;
        guest_fill(kept + i * K, K, seeds[i] = 100000 + round * 16 + i);
    }
    printf("joined ok\n");
    guest_end();
}
