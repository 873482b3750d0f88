/* Proves: the ends of threads work across checkpoints: a join in progress, a detached
 * thread, cancellation of threads blocked in read, in pause, in a condition and of one
 * with cancellation disabled for now, clean-up handlers, destructors of thread-specific
 * data, a thread that calls pthread_exit, another that returns. */
#include "guest.h"

static pthread_key_t key;
static int destroyed, cleaned, detached_done, disabled_ready, pipes[2];
static void destroy(void *value)
{
    CHECK_EQ((long)value, 4711);
    __atomic_add_fetch(&destroyed, 1, __ATOMIC_SEQ_CST);
}
static void clean(void *value)
{
    CHECK_EQ((long)value, 12);
    __atomic_add_fetch(&cleaned, 1, __ATOMIC_SEQ_CST);
}

static void *in_read(void *argument)
{
    char byte;
    CHECK(pthread_setspecific(key, (void *)4711) == 0);
    pthread_cleanup_push(clean, (void *)12);
    if (read(pipes[0], &byte, 1) >= 0 || 1)
        FAIL("read came back in a thread that waits for its cancellation: errno %d", errno);
    pthread_cleanup_pop(0);
    return argument;
}
static void *in_pause(void *argument)
{
    CHECK(pthread_setspecific(key, (void *)4711) == 0);
    pthread_cleanup_push(clean, (void *)12);
    pause();
    FAIL("pause came back");
    pthread_cleanup_pop(0);
    return argument;
}
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static void unlock(void *value)
{
    pthread_mutex_unlock(value);
    clean((void *)12);
}
static void *in_cond(void *argument)
{
    CHECK(pthread_setspecific(key, (void *)4711) == 0);
    pthread_mutex_lock(&mutex);
    pthread_cleanup_push(unlock, &mutex);
    for (;;)
        pthread_cond_wait(&cond, &mutex);
    pthread_cleanup_pop(0);
    return argument;
}
static void *disabled(void *argument)
{
    long rounds = (long)argument;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
    CHECK(pthread_setspecific(key, (void *)4711) == 0);
    pthread_cleanup_push(clean, (void *)12);
    __atomic_store_n(&disabled_ready, 1, __ATOMIC_SEQ_CST);
    for (long i = 0; i < rounds; i++)
        guest_sleep_ms(10); /* a cancellation is pending for most of this */
    pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, NULL);
    pthread_testcancel();
    FAIL("the pending cancellation was lost");
    pthread_cleanup_pop(0);
    return NULL;
}
static void *detached(void *argument)
{
    guest_sleep_ms((long)argument);
    __atomic_store_n(&detached_done, 1, __ATOMIC_SEQ_CST);
    return NULL;
}
static void *joiner(void *argument)
{
    void *result;
    CHECK_EQ(pthread_join(*(pthread_t *)argument, &result), 0);
    CHECK(result == PTHREAD_CANCELED);
    return (void *)99L;
}
static void *exits(void *argument)
{
    CHECK(pthread_setspecific(key, (void *)4711) == 0);
    guest_sleep_ms((long)argument);
    pthread_exit((void *)55L);
}

int main(void)
{
    guest_begin();
    CHECK(pipe(pipes) == 0 && pthread_key_create(&key, destroy) == 0);
    long rounds = guest_rounds();
    pthread_t blocked[3] = {guest_thread(in_read, NULL), guest_thread(in_pause, NULL), guest_thread(in_cond, NULL)};
    pthread_t later = guest_thread(disabled, (void *)rounds);
    pthread_t waits = guest_thread(joiner, &blocked[2]); /* a join in progress all the time */
    pthread_t leaves = guest_thread(exits, (void *)(rounds * 5));
    pthread_t alone = guest_thread(detached, (void *)(rounds * 5));
    CHECK_EQ(pthread_detach(alone), 0);
    while (!__atomic_load_n(&disabled_ready, __ATOMIC_SEQ_CST))
        guest_sleep_ms(1);
    CHECK_EQ(pthread_cancel(later), 0);
    ROUNDS(round)
    {
        CHECK_EQ(cleaned > 1, 0); /* the thread `later` may be through a moment early */
        CHECK(pthread_tryjoin_np(waits, NULL) == EBUSY);
    }
    for (int i = 0; i < 3; i++)
        CHECK_EQ(pthread_cancel(blocked[i]), 0);
    void *result;
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(pthread_join(blocked[i], &result), 0);
        CHECK(result == PTHREAD_CANCELED);
    }
    CHECK_EQ(pthread_join(waits, &result), 0);
    CHECK_EQ((long)result, 99);
    CHECK_EQ(pthread_join(later, &result), 0);
    CHECK(result == PTHREAD_CANCELED);
    CHECK_EQ(pthread_join(leaves, &result), 0);
    CHECK_EQ((long)result, 55);
    CHECK_EQ(detached_done, 1);
    CHECK_EQ(cleaned, 4);
    CHECK_EQ(destroyed, 5);
    printf("ends ok\n");
    guest_end();
}
