/* Proves: memory in tens of thousands of pieces comes back, stays below the kernel's limit of
 * mappings, and leaves room for more: single pages with holes between them, and runs of
 * four pages, each of which could be a mapping of its own. */
#include "guest.h"

#define K 4096ul
enum { SINGLES = 40000, RUNS = 40000 };

static long mappings(void)
{
    static char text[16 << 20];
    CHECK(guest_slurp("/proc/self/maps", text, sizeof text) > 0);
    long n = 0;
    for (char *p = text; *p; p++)
        n += *p == '\n';
    return n;
}

int main(void)
{
    guest_begin();
    char text[32];
    CHECK(guest_slurp("/proc/sys/vm/max_map_count", text, sizeof text) > 0);
    long limit = atol(text);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    unsigned char *single = guest_map(SINGLES * 2 * K, PROT_READ | PROT_WRITE, flags, -1, 0);
    unsigned char *run = guest_map(RUNS * 6 * K, PROT_READ | PROT_WRITE, flags, -1, 0);
    CHECK(madvise(single, SINGLES * 2 * K, MADV_NOHUGEPAGE) == 0);
    CHECK(madvise(run, RUNS * 6 * K, MADV_NOHUGEPAGE) == 0);
    for (long i = 0; i < SINGLES; i++)
        *(long *)(single + i * 2 * K) = i + 1;
    for (long i = 0; i < RUNS * 4; i++)
        *(long *)(run + (i / 4 * 6 + i % 4) * K) = i + 1;
    ROUNDS(round)
    {
        for (long i = round % 100; i < SINGLES; i += 100) {
            CHECK_EQ(*(long *)(single + i * 2 * K), i + 1);
            CHECK_EQ(*(long *)(single + (i * 2 + 1) * K), 0);
        }
        for (long i = round % 100; i < RUNS * 4; i += 100)
            CHECK_EQ(*(long *)(run + (i / 4 * 6 + i % 4) * K), i + 1);
        if (round % 10 == 0)
            CHECK(mappings() < limit * 7 / 10);
        /* Room for a mapping that is split. */
        unsigned char *more = guest_map(100 * K, PROT_READ | PROT_WRITE, flags, -1, 0);
        for (int i = 0; i < 100; i += 2)
            CHECK(mprotect(more + i * K, K, PROT_READ) == 0);
        CHECK(munmap(more, 100 * K) == 0);
    }
    printf("scatter ok\n");
    guest_end();
}
