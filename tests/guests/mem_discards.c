/* Proves: pages that threads give back with MADV_DONTNEED are zeros, whatever a restart does just
 * then; memory moves (mremap) with what is in it.
 *
 * A thread that was stopped while it looked at the list of what is mapped from images looked at it
 * where it had been: its death in the next life (one restart in ten or so with two such threads). One that
 * had just looked went by the list of the life before, and got the image's bytes back. */
#include "guest.h"

#define THREADS 2
#define PAGES 32
#define ISLANDS 400
#define K 4096ul
#define ISLAND (4 * K)

static void *give_back(void *argument)
{
    uint64_t dice = (long)argument;
    const int rw = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS;
    volatile long *at = guest_map(PAGES * K, rw, flags, -1, 0);
    void *empty = guest_map(K, rw, flags, -1, 0);
    long turns = guest_rounds() * 300;
    for (int page = 0; page < PAGES; page++)
        at[page * 512] = page + 1;
    for (long turn = 0; turn < turns; turn++) {
        /* Nothing to give back: most of such a call is the look at the list. */
        for (int k = 0; k < 40; k++)
            CHECK(madvise(empty, K, MADV_DONTNEED) == 0);
        dice = guest_mix(dice);
        int page = dice % PAGES;
        volatile long *word = at + page * 512;
        if (dice >> 20 & 1) {
            CHECK_EQ(*word, page + 1);
            CHECK(madvise((void *)word, K, MADV_DONTNEED) == 0);
            CHECK_EQ(*word, 0);
            *word = page + 1;
        } else if (turn % 64 == 0) {
            volatile long *to = guest_map(PAGES * K, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            const int how = MREMAP_MAYMOVE | MREMAP_FIXED;
            CHECK(mremap((void *)at, PAGES * K, PAGES * K, how, to) == (void *)to);
            at = to;
        }
    }
    for (int page = 0; page < PAGES; page++)
        CHECK_EQ(at[page * 512], page + 1);
    return NULL;
}

int main(void)
{
    guest_begin();
    pthread_t threads[THREADS];
    /* Each is a mapping from the image after a restart: the list is long. */
    unsigned char *sea = guest_map(2 * ISLANDS * ISLAND, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int k = 0; k < ISLANDS; k++) {
        CHECK(mprotect(sea + 2 * k * ISLAND, ISLAND, PROT_READ | PROT_WRITE) == 0);
        memset(sea + 2 * k * ISLAND, 1 + k % 200, ISLAND);
    }
    for (long t = 0; t < THREADS; t++)
        CHECK(pthread_create(&threads[t], NULL, give_back, (void *)(t + 1)) == 0);
    for (int t = 0; t < THREADS; t++)
        CHECK(pthread_join(threads[t], NULL) == 0);
    for (int k = 0; k < ISLANDS; k++)
        CHECK_EQ(sea[2 * k * ISLAND + 4 * k], 1 + k % 200);
    printf("all given back\n");
    guest_end();
}
