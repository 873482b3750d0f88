/* Proves: a large heap (GUEST_MIB, default 256) with random content survives while it
 * is being written, lazily mapped or read; each round checks and rewrites a part. */
#include "guest.h"

int main(void)
{
    guest_begin();
    const char *text = getenv("GUEST_MIB");
    size_t pages = (text ? atol(text) : 256) * 256ul;
    unsigned char *memory = guest_map(pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint32_t *version = calloc(pages, sizeof *version);
    CHECK(version != NULL);
    for (size_t i = 0; i < pages; i++)
        guest_fill(memory + i * 4096, 4096, i);
    uint64_t dice = 3;
    ROUNDS(round)
    {
        for (int n = 0; n < 500; n++) {
            dice = guest_mix(dice);
            size_t i = dice % pages;
            CHECK(guest_holds(memory + i * 4096, 4096, i + version[i] * 0x100000000ul));
            version[i]++;
            guest_fill(memory + i * 4096, 4096, i + version[i] * 0x100000000ul);
        }
    }
    for (size_t i = 0; i < pages; i++)
        CHECK(guest_holds(memory + i * 4096, 4096, i + version[i] * 0x100000000ul));
    printf("big ok\n");
    guest_end();
}
