/* Proves: no deadlock with the allocator's locks: four threads allocate, grow and free
 * blocks of all sizes as fast as they can, exchange them, and check their content. */
#include "guest.h"

#define SLOTS 256
static struct {
    unsigned char *block;
    size_t size;
    uint64_t seed;
} slot[SLOTS];
static pthread_mutex_t lock[SLOTS];

static void *storm(void *argument)
{
    uint64_t dice = (uint64_t)argument;
    for (long i = 0, n = guest_rounds() * 800; i < n; i++) {
        dice = guest_mix(dice);
        int s = dice % SLOTS;
        pthread_mutex_lock(&lock[s]);
        if (slot[s].block)
            CHECK(guest_holds(slot[s].block, slot[s].size, slot[s].seed));
        size_t size = (dice >> 20) % ((dice >> 50) % 64 ? 2000 : 300000) & ~7ul;
        if (dice >> 63) {
            free(slot[s].block);
            slot[s].block = malloc(size + 8);
        } else
            slot[s].block = realloc(slot[s].block, size + 8);
        CHECK(slot[s].block != NULL);
        slot[s].size = size;
        slot[s].seed = dice;
        guest_fill(slot[s].block, size, dice);
        pthread_mutex_unlock(&lock[s]);
    }
    return NULL;
}

int main(void)
{
    guest_begin();
    for (int i = 0; i < SLOTS; i++)
        pthread_mutex_init(&lock[i], NULL);
    pthread_t threads[4];
    for (long i = 0; i < 4; i++)
        threads[i] = guest_thread(storm, (void *)(i + 1));
    for (int i = 0; i < 4; i++)
        guest_join(threads[i]);
    printf("malloc storm ok\n");
    guest_end();
}
