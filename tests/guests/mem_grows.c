/* Proves: memory that grows in its place while a checkpoint is being prepared is all there after a
 * restart.
 *
 * What had grown between the look at the map and the tracker's sweep of a complete generation was
 * watched from then on, and in no image: zeros in the next life (one kill in a hundred of a program
 * that reallocates large blocks). */
#include "guest.h"

#define PLACES 600
#define K 4096ul
#define MOST 4

static unsigned char *place[PLACES];
static int pages[PLACES], holds[PLACES];

static void look(int k)
{
    for (int page = 0; page < pages[k]; page++)
        if (place[k][page * K + 8] != (unsigned char)(holds[k] + page))
            FAIL("place %d page %d of %d: %d, not %d", k, page, pages[k], place[k][page * K + 8], (unsigned char)(holds[k] + page));
}

static void fill(int k, int with)
{
    holds[k] = with;
    for (int page = 0; page < pages[k]; page++)
        memset(place[k] + page * K, with + page, 64);
}

int main(void)
{
    guest_begin();
    uint64_t dice = 5;
    for (int k = 0; k < PLACES; k++) {
        /* A page, a hole to grow into, and another mapping. */
        place[k] = guest_map((MOST + 1) * K, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(munmap(place[k] + K, (MOST - 1) * K) == 0);
        place[k][MOST * K] = 1;
        pages[k] = 1;
        fill(k, k);
    }
    for (long turn = 0, turns = guest_rounds() * 1000; turn < turns; turn++) {
        dice = guest_mix(dice);
        int k = dice % PLACES, to = pages[k] == 1 ? 2 + (int)((dice >> 20) % (MOST - 1)) : 1;
        look(k);
        CHECK(mremap(place[k], pages[k] * K, to * K, 0) == (void *)place[k]);
        pages[k] = to;
        fill(k, dice >> 40 & 127);
    }
    for (int k = 0; k < PLACES; k++)
        look(k);
    printf("all grown\n");
    guest_end();
}
