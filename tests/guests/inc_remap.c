/* Proves: a page may vanish or be replaced at any instant of a checkpoint. The program does
 * little but change its map, so most stops fall between what is done for a call that changes
 * mappings and the call itself. Three threads, each with places of its own. */
#include "guest.h"

#define PAGE 4096ul
#define PAGES 16
#define PLACES 8

static void fill(unsigned char *at, uint64_t seed)
{
    for (int p = 0; p < PAGES; p++)
        *(uint64_t *)(at + p * PAGE) = seed + p;
}

static void check(const unsigned char *at, uint64_t seed)
{
    for (int p = 0; p < PAGES; p++)
        CHECK_EQ(*(uint64_t *)(at + p * PAGE), (long)(seed ? seed + p : 0));
}

static void *change(void *argument)
{
    const int rw = PROT_READ | PROT_WRITE, anon = MAP_PRIVATE | MAP_ANONYMOUS;
    unsigned char *place[PLACES];
    uint64_t seed[PLACES] = {0}, dice = (long)argument + 1;
    for (int k = 0; k < PLACES; k++)
        place[k] = guest_map(PAGES * PAGE, rw, anon, -1, 0);
    for (long i = 0, n = guest_rounds() * 40; i < n; i++) {
        dice = guest_mix(dice);
        int k = dice % PLACES;
        unsigned char *at = place[k];
        check(at, seed[k]);
        switch ((dice >> 20) % 6) {
        case 0: /* replaced, with flags of its own and without */
            CHECK(mmap(at, PAGES * PAGE, rw, anon | MAP_FIXED | ((dice >> 30) % 2 ? MAP_NORESERVE : 0), -1, 0) == at);
            seed[k] = 0;
            break;
        case 1:
            CHECK(munmap(at, PAGES * PAGE) == 0);
            place[k] = guest_map(PAGES * PAGE, rw, anon, -1, 0);
            seed[k] = 0;
            break;
        case 2: {
            unsigned char *to = guest_map(PAGES * PAGE, PROT_NONE, anon, -1, 0);
            CHECK(mremap(at, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
            place[k] = to;
            break;
        }
        case 3:
            CHECK(madvise(at, PAGES * PAGE, MADV_DONTNEED) == 0);
            seed[k] = 0;
            break;
        case 4:
            CHECK(mprotect(at, PAGES * PAGE, PROT_READ) == 0);
            CHECK(mprotect(at, PAGES * PAGE, rw) == 0);
            break;
        default:
            break;
        }
        check(place[k], seed[k]);
        seed[k] = dice | 1;
        fill(place[k], seed[k]);
    }
    for (int k = 0; k < PLACES; k++)
        check(place[k], seed[k]);
    return (void *)dice;
}

int main(void)
{
    guest_begin();
    pthread_t threads[3];
    for (long t = 0; t < 3; t++)
        threads[t] = guest_thread(change, (void *)t);
    for (long t = 0; t < 3; t++) {
        void *result;
        CHECK(pthread_join(threads[t], &result) == 0);
        printf("%lx\n", (long)result);
    }
    guest_end();
}
