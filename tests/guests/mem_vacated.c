/* Proves: memory that was given back is zeros, wherever it has been moved to: also to a place that
 * another thread's memory has just left.
 *
 * The list of what is mapped from images was told that a place is left after it had been left: what
 * another thread had moved there meanwhile was off the list, and given back it showed the image's bytes.
 * And two threads could take the same entry of the list. */
#include "guest.h"

#define THREADS 6
#define PLACES 50
#define K 4096ul
#define LEN (16 * K) /* a restart reads what is much smaller, and maps the rest */

static void *move(void *argument)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS, first = (long)argument;
    unsigned char *own[PLACES];
    for (int k = 0; k < PLACES; k++) {
        own[k] = guest_map(LEN, PROT_READ | PROT_WRITE, flags, -1, 0);
        memset(own[k], first + k, LEN);
    }
    for (long turn = 0, turns = guest_rounds() * 6; turn < turns; turn++) {
        int k = turn % PLACES;
        for (int moves = 0; moves < 8; moves++) {
            unsigned char *to = guest_map(LEN, PROT_NONE, flags, -1, 0);
            CHECK(mremap(own[k], LEN, LEN, MREMAP_MAYMOVE | MREMAP_FIXED, to) == (void *)to);
            own[k] = to;
        }
        for (unsigned page = 0; page < LEN / K; page++)
            CHECK_EQ(own[k][page * K + 8], first + k);
        CHECK(madvise(own[k], LEN, MADV_DONTNEED) == 0);
        for (unsigned page = 0; page < LEN / K; page++)
            CHECK_EQ(own[k][page * K + 8], 0);
        memset(own[k], first + k, LEN);
    }
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
