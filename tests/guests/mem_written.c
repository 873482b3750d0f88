/* Proves: a file that the program maps privately and writes itself. What it writes is seen through
 * pages that were not modified, also through those that it gave back after a checkpoint; a page
 * of zeros is its own, also where forks do not pass the mapping on.
 *
 * There was no restart where the file was written between a checkpoint's stop and its end: it counted as
 * another build of a library. A page that a checkpoint had protected and that was discarded then
 * was stored as the program's and hid the file; a zeroed page of a forked writer's was lost. */
#include "guest.h"

#define K 4096ul
#define PAGES 32

int main(void)
{
    guest_begin();
    int file = open("named.dat", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    CHECK(file >= 0);
    uint64_t holds[PAGES], bytes[K / 8];
    for (int page = 0; page < PAGES; page++) {
        holds[page] = 1 + page;
        guest_fill(bytes, K, holds[page]);
        CHECK_EQ(pwrite(file, bytes, K, page * K), K);
    }
    const int rw = PROT_READ | PROT_WRITE;
    unsigned char *zeros = guest_map(PAGES * K, rw, MAP_PRIVATE, file, 0);
    unsigned char *given = guest_map(PAGES * K, rw, MAP_PRIVATE, file, 0);
    CHECK(madvise(zeros, PAGES * K, MADV_DONTFORK) == 0);
    for (int page = 0; page < PAGES; page += 2)
        memset(zeros + page * K, 0, K);
    ROUNDS(round)
    {
        int page = round % PAGES, other = (round + 9) % PAGES;
        guest_fill(given + page * K, K, 5000 + round);
        guest_sleep_ms(guest_mix(round) % 12);
        CHECK(guest_holds(given + page * K, K, 5000 + round));
        CHECK(madvise(given + page * K, K, MADV_DONTNEED) == 0);
        guest_sleep_ms(guest_mix(round + 1) % 12);
        holds[other] = 100000 + round;
        guest_fill(bytes, K, holds[other]);
        CHECK_EQ(pwrite(file, bytes, K, other * K), K);
        for (int k = 0; k < PAGES; k++) {
            if (round % 8 == 7)
                CHECK(guest_holds(given + k * K, K, holds[k]));
            if (k % 2 == 0)
                CHECK(guest_is_zero(zeros + k * K, K));
        }
    }
    printf("written ok\n");
    guest_end();
}
