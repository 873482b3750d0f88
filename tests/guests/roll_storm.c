/* Rollbacks at random between checkpoints at random, asked for by threads of their own, while
 * others work on their stacks (arguments: workers, rollbacks): every word on every stack is what
 * it was, whatever tracker says which pages have changed. */
#include "guest.h"

#include "ckpt.h"

#define WORDS 5120

/* Protected: a mapping's worth of it, so that nothing else shares its page. */
static struct {
    volatile long asked, wanted;
    volatile unsigned random;
} kept __attribute__((aligned(4096)));
static char behind[4096] __attribute__((aligned(4096)));
static volatile long shown[64];

static unsigned random_number(void)
{
    return (kept.random = kept.random * 1103515245 + 12345) >> 8;
}

static void *worker(void *argument)
{
    long k = (long)argument;
    volatile long here[WORDS];
    for (int i = 0; i < WORDS; i++)
        here[i] = k;
    for (long n = k;; n++) {
        for (int i = 0; i < WORDS; i++) {
            CHECK_EQ(here[i], n);
            here[i] = n + 1;
        }
        shown[k] = n + 1;
        usleep(700);
        CHECK_EQ(shown[k], n + 1);
    }
    return NULL;
}

static void *roller(void *arg)
{
    while (1) {
        usleep(2000 + random_number() % 15000);
        if (kept.asked >= kept.wanted) {
            printf("%ld rollbacks\n", kept.asked);
            guest_end();
        }
        kept.asked++;
        struct ckpt_region keep = {&kept, sizeof kept};
        if (ckpt_rollback(random_number() % 4, 1, &keep, 1) == 0)
            FAIL("ckpt_rollback: 0");
        CHECK(errno == ENOENT || errno == EAGAIN || errno == EBUSY);
        kept.asked--;
    }
    return arg;
}

static void *taker(void *arg)
{
    while (1) {
        usleep(random_number() % 20000);
        ckpt_checkpoint(1 + random_number() % 3);
    }
    return arg;
}

int main(int argc, char **argv)
{
    CHECK_EQ(argc, 3);
    guest_begin();
    kept.wanted = atol(argv[2]);
    kept.random = getpid();
    behind[0] = 1;
    pthread_t thread;
    for (long k = 0; k < atol(argv[1]); k++)
        CHECK_EQ(pthread_create(&thread, NULL, worker, (void *)k), 0);
    CHECK_EQ(pthread_create(&thread, NULL, roller, NULL), 0);
    CHECK_EQ(pthread_create(&thread, NULL, taker, NULL), 0);
    /* So each of the two is stopped by the other's as well. */
    taker(NULL);
}
