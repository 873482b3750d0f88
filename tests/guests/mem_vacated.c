/* Proves: a page that was given back is zeros, wherever its memory has been moved to: also to a place
 * that another thread's memory has just left.
 *
 * The list of what is mapped from images was told that a place is left after it had been left: what
 * another thread had moved there meanwhile was off the list, and given back it showed the image's bytes. */
#include "guest.h"

#define THREADS 6
#define PLACES 800
#define K 4096ul

static void *move(void *argument)
{
    uint64_t dice = (long)argument;
    const int rw = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS;
    static long *at[THREADS][PLACES];
    long **own = at[(long)argument - 1];
    for (int k = 0; k < PLACES; k++) {
        own[k] = guest_map(K, rw, flags, -1, 0);
        *own[k] = k + 1;
    }
    for (long turn = 0, turns = guest_rounds() * 150; turn < turns; turn++) {
        dice = guest_mix(dice);
        int k = dice % PLACES;
        CHECK_EQ(*own[k], k + 1);
        long *to = guest_map(K, PROT_NONE, flags, -1, 0);
        CHECK(mremap(own[k], K, K, MREMAP_MAYMOVE | MREMAP_FIXED, to) == (void *)to);
        CHECK_EQ(*to, k + 1);
        CHECK(madvise(to, K, MADV_DONTNEED) == 0);
        CHECK_EQ(*to, 0);
        *to = k + 1;
        own[k] = to;
    }
    for (int k = 0; k < PLACES; k++)
        CHECK_EQ(*own[k], k + 1);
    return NULL;
}

int main(void)
{
    guest_begin();
    pthread_t threads[THREADS];
    for (long t = 0; t < THREADS; t++)
        threads[t] = guest_thread(move, (void *)(t + 1));
    for (int t = 0; t < THREADS; t++)
        CHECK(pthread_join(threads[t], NULL) == 0);
    printf("all moved\n");
    guest_end();
}
