/* Proves: huge reservations with few pages (1 TiB NORESERVE, 64 GiB PROT_NONE, 8 GiB
 * of zero pages never written) are neither read nor stored: the run would not end
 * in time, and the test looks at the size of the image. */
#include "guest.h"

#define GIB (1ul << 30)
#define PAGES 64

int main(void)
{
    guest_begin();
    unsigned char *wide = guest_map(1024 * GIB, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    unsigned char *none = guest_map(64 * GIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    unsigned char *shared = guest_map(64 * GIB, PROT_READ | PROT_WRITE,
                                      MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    unsigned char *zeros = guest_map(64ul << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(zeros, 0, 64ul << 20); /* present, and zero: they cost nothing either */
    size_t at[PAGES];
    for (size_t i = 0; i < PAGES; i++) {
        at[i] = (guest_mix(i) % (1024 * GIB)) & ~4095ul;
        guest_fill(wide + at[i], 4096, i);
        guest_fill(shared + at[i] % (64 * GIB), 4096, i);
    }
    CHECK(mprotect(none + 7 * GIB, 8192, PROT_READ | PROT_WRITE) == 0);
    guest_fill(none + 7 * GIB, 8192, 99);
    ROUNDS(round)
    {
        size_t i = round % PAGES;
        CHECK(guest_holds(wide + at[i], 4096, i));
        CHECK(guest_holds(shared + at[i] % (64 * GIB), 4096, i));
        CHECK(guest_holds(none + 7 * GIB, 8192, 99));
        size_t probe = (guest_mix(round + 1000) % (64ul << 20)) & ~4095ul;
        CHECK(guest_is_zero(zeros + probe, 4096));
    }
    printf("sparse ok\n");
    guest_end();
}
