/* Proves: increments hold what several threads write at full speed: single words all over
 * an arena of each, whole pages that become zero and come back, pages discarded. A model of
 * each page is compared with it before it is written again, and all of them now and then. */
#include "guest.h"

#define THREADS 4
#define PAGES 1024
#define WORDS 512

/* What the words of a page must be: a seed, 0 = all zero. */
static uint64_t *model[THREADS];
static uint64_t *arena[THREADS];
/* In a private mapping of a file (the executable's data): zeros are content there too. */
static uint64_t data[8 * WORDS] __attribute__((aligned(4096))) = {1, 2, 3};

static const int places[4] = {0, 200, 201, 511};

static void verify(long t, long page)
{
    uint64_t *at = arena[t] + page * WORDS, seed = model[t][page];
    for (int k = 0; k < 4; k++) {
        uint64_t wanted = seed ? guest_mix(seed + k) : 0;
        if (at[places[k]] != wanted)
            FAIL("thread %ld page %ld word %d is %lx, not %lx", t, page, places[k],
                 (long)at[places[k]], (long)wanted);
    }
}

static void *writer(void *argument)
{
    long t = (long)argument;
    uint64_t dice = t + 1;
    for (long i = 0, n = guest_rounds() * 12000; i < n; i++) {
        dice = guest_mix(dice);
        long page = dice % PAGES;
        uint64_t *at = arena[t] + page * WORDS;
        verify(t, page);
        switch ((dice >> 40) % 64) {
        case 0:
            memset(at, 0, WORDS * 8);
            model[t][page] = 0;
            break;
        case 1:
            CHECK(madvise(at, WORDS * 8, MADV_DONTNEED) == 0);
            model[t][page] = 0;
            break;
        default:
            model[t][page] = dice | 1;
            for (int k = 0; k < 4; k++)
                at[places[k]] = guest_mix(model[t][page] + k);
        }
        if (i % 4096 == 0)
            for (long p = 0; p < PAGES; p++)
                verify(t, p);
        if (t == 0 && i % 1024 == 0) {
            /* Each page of the data in turn holds something, or only zeros. */
            long turn = i / 1024;
            for (int p = 0; p < 8; p++) {
                uint64_t wanted = turn > 8 && (turn - 1 - p) % 16 < 8 ? 77 : 0;
                if (turn > 8 && data[p * WORDS + 5] != wanted)
                    FAIL("data page %d is %ld in turn %ld", p, (long)data[p * WORDS + 5], turn);
                memset(data + p * WORDS, 0, WORDS * 8);
                if ((turn - p) % 16 < 8 && turn >= p)
                    data[p * WORDS + 5] = 77;
            }
        }
    }
    return (void *)dice;
}

int main(void)
{
    guest_begin();
    pthread_t threads[THREADS];
    const int rw = PROT_READ | PROT_WRITE;
    for (long t = 0; t < THREADS; t++) {
        model[t] = calloc(PAGES, 8);
        arena[t] = guest_map(PAGES * WORDS * 8, rw, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    for (long t = 0; t < THREADS; t++)
        threads[t] = guest_thread(writer, (void *)t);
    for (long t = 0; t < THREADS; t++) {
        void *result;
        CHECK(pthread_join(threads[t], &result) == 0);
        printf("%lx\n", (long)result);
    }
    for (long t = 0; t < THREADS; t++)
        for (long p = 0; p < PAGES; p++)
            verify(t, p);
    guest_end();
}
