/* Proves, with the test's eyes on the store: of much shared memory, in a mapping and in a
 * memfd without one, only what changes is stored again, and all of it comes back. */
#include "guest.h"

#define PAGE 4096ul
#define PAGES (16l << 8) /* 16 MiB each */

static uint64_t *page_of(unsigned char *at, long page) { return (uint64_t *)(at + page * PAGE); }

int main(void)
{
    guest_begin();
    unsigned char *at = guest_map(PAGES * PAGE, PROT_READ | PROT_WRITE,
                                  MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int fd = memfd_create("big", 0);
    CHECK(fd >= 0);
    static uint64_t model[PAGES], words[PAGE / 8];
    for (long i = 0; i < PAGES; i++) {
        model[i] = guest_mix(i) | 1;
        for (unsigned k = 0; k < PAGE / 8; k++)
            words[k] = model[i] + k;
        memcpy(at + i * PAGE, words, PAGE);
        CHECK_EQ(pwrite(fd, words, PAGE, i * PAGE), (long)PAGE);
    }
    guest_note("filled");
    uint64_t dice = 3;
    ROUNDS(round)
    {
        for (int n = 0; n < 4; n++) {
            dice = guest_mix(dice);
            long i = dice % PAGES;
            model[i] = dice | 1;
            *page_of(at, i) = model[i];
            CHECK_EQ(pwrite(fd, &model[i], 8, i * PAGE), 8);
        }
        for (long i = round % 16; i < PAGES; i += 16) {
            uint64_t got;
            CHECK_EQ(pread(fd, &got, 8, i * PAGE), 8);
            if (*page_of(at, i) != model[i] || got != model[i])
                FAIL("page %ld is not what was written", i);
        }
    }
    printf("shared %lx\n", (long)dice);
    guest_end();
}
