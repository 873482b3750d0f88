/* Proves: N threads (argument, default 64; tests use 1, 2, 64 and 1500) come back, each
 * with its stack, TLS, thread id as it sees it, its pthread_self and its place in its
 * own work. The threads take turns in a ring as well as working on their own. */
#include "guest.h"

static __thread uint64_t tls_word;
static __thread unsigned char tls_block[512];
static long count, rounds;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long total;

static void *work(void *argument)
{
    long id = (long)argument;
    volatile unsigned char frame[2048];
    pid_t tid = gettid();
    pthread_t self = pthread_self();
    tls_word = guest_mix(id);
    guest_fill(tls_block, sizeof tls_block, id);
    guest_fill((void *)frame, sizeof frame, id + 1);
    for (long i = 0; i < rounds; i++) {
        CHECK_EQ(gettid(), tid);
        CHECK_EQ(syscall(SYS_gettid), tid);
        CHECK(pthread_equal(pthread_self(), self));
        CHECK(tls_word == guest_mix(id + i));
        tls_word = guest_mix(id + i + 1);
        CHECK(guest_holds(tls_block, sizeof tls_block, id));
        CHECK(guest_holds((void *)frame, sizeof frame, id + 1));
        pthread_mutex_lock(&lock);
        total++;
        pthread_mutex_unlock(&lock);
        /* About the same load whatever the number of threads. */
        guest_sleep_ms(count > 100 ? 200 : 10);
    }
    return (void *)(id * 2);
}

int main(int argc, char **argv)
{
    guest_begin();
    count = argc > 1 ? atol(argv[1]) : 64;
    rounds = count > 100 ? guest_rounds() / 20 + 3 : guest_rounds();
    pthread_t *threads = calloc(count, sizeof *threads);
    pthread_attr_t small;
    pthread_attr_init(&small);
    CHECK(pthread_attr_setstacksize(&small, 64 * 1024) == 0);
    for (long i = 1; i < count; i++) {
        int error = pthread_create(&threads[i], &small, work, (void *)i);
        if (error)
            FAIL("thread %ld of %ld: error %d", i, count, error);
    }
    CHECK(work((void *)0L) == NULL);
    for (long i = 1; i < count; i++) {
        void *result;
        CHECK_EQ(pthread_join(threads[i], &result), 0);
        CHECK_EQ((long)result, i * 2);
    }
    CHECK_EQ(total, count * rounds);
    printf("threads ok: %ld\n", count);
    guest_end();
}
