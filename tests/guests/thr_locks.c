/* Proves: locks held or waited on come back: mutexes of every type (normal, recursive,
 * errorcheck, robust, priority-inheriting, process-shared), a read- and a write-locked
 * rwlock, a spin lock, a semaphore at zero, a condition, a barrier with one missing.
 * The main thread holds them all for most of the run while others wait, then
 * releases and everyone gets through exactly once. */
#include "guest.h"
#include <semaphore.h>

enum { NORMAL, RECURSIVE, ERRORCHECK, ROBUST, PI, SHARED, ROBUST_PI, MUTEXES };
static pthread_mutex_t mutex[MUTEXES];
static pthread_rwlock_t reading, writing;
static pthread_spinlock_t spin;
static sem_t semaphore;
static pthread_mutex_t cond_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static int cond_open, through, waiting;
static pthread_barrier_t barrier;

static void passed(void) { __atomic_add_fetch(&through, 1, __ATOMIC_SEQ_CST); }
static void arrive(void) { __atomic_add_fetch(&waiting, 1, __ATOMIC_SEQ_CST); }

static void *wait_mutex(void *argument)
{
    arrive();
    CHECK_EQ(pthread_mutex_lock(argument), 0);
    passed();
    CHECK_EQ(pthread_mutex_unlock(argument), 0);
    return NULL;
}
static void *wait_write(void *argument)
{
    arrive();
    CHECK_EQ(pthread_rwlock_wrlock(argument), 0);
    passed();
    CHECK_EQ(pthread_rwlock_unlock(argument), 0);
    return NULL;
}
static void *wait_read(void *argument)
{
    arrive();
    CHECK_EQ(pthread_rwlock_rdlock(argument), 0);
    passed();
    CHECK_EQ(pthread_rwlock_unlock(argument), 0);
    return NULL;
}
static void *wait_semaphore(void *argument)
{
    arrive();
    CHECK_EQ(sem_wait(&semaphore), 0); /* no EINTR: no handler of ours ran */
    passed();
    return argument;
}
static void *wait_cond(void *argument)
{
    CHECK_EQ(pthread_mutex_lock(&cond_mutex), 0);
    arrive();
    while (!cond_open)
        CHECK_EQ(pthread_cond_wait(&cond, &cond_mutex), 0);
    passed();
    CHECK_EQ(pthread_mutex_unlock(&cond_mutex), 0);
    return argument;
}
static void *wait_barrier(void *argument)
{
    arrive();
    int result = pthread_barrier_wait(&barrier);
    CHECK(result == 0 || result == PTHREAD_BARRIER_SERIAL_THREAD);
    passed();
    return argument;
}

int main(void)
{
    guest_begin();
    for (int i = 0; i < MUTEXES; i++) {
        pthread_mutexattr_t attr;
        pthread_mutexattr_init(&attr);
        if (i == RECURSIVE)
            pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_RECURSIVE);
        if (i == ERRORCHECK)
            pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_ERRORCHECK);
        if (i == ROBUST || i == ROBUST_PI)
            pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
        if (i == PI || i == ROBUST_PI)
            pthread_mutexattr_setprotocol(&attr, PTHREAD_PRIO_INHERIT);
        if (i == SHARED)
            pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
        CHECK_EQ(pthread_mutex_init(&mutex[i], &attr), 0);
        CHECK_EQ(pthread_mutex_lock(&mutex[i]), 0);
    }
    CHECK_EQ(pthread_mutex_lock(&mutex[RECURSIVE]), 0);
    CHECK_EQ(pthread_rwlock_init(&reading, NULL), 0);
    CHECK_EQ(pthread_rwlock_init(&writing, NULL), 0);
    CHECK_EQ(pthread_rwlock_rdlock(&reading), 0);
    CHECK_EQ(pthread_rwlock_wrlock(&writing), 0);
    CHECK_EQ(pthread_spin_init(&spin, 0), 0);
    CHECK_EQ(pthread_spin_lock(&spin), 0);
    CHECK_EQ(sem_init(&semaphore, 0, 0), 0);
    CHECK_EQ(pthread_barrier_init(&barrier, NULL, 4), 0);

    pthread_t thread[64];
    int n = 0;
    for (int i = 0; i < MUTEXES; i++)
        for (int twice = 0; twice < 2; twice++)
            thread[n++] = guest_thread(wait_mutex, &mutex[i]);
    thread[n++] = guest_thread(wait_write, &reading);
    thread[n++] = guest_thread(wait_write, &writing);
    thread[n++] = guest_thread(wait_read, &writing);
    for (int i = 0; i < 3; i++) {
        thread[n++] = guest_thread(wait_semaphore, NULL);
        thread[n++] = guest_thread(wait_cond, NULL);
        thread[n++] = guest_thread(wait_barrier, NULL);
    }
    while (__atomic_load_n(&waiting, __ATOMIC_SEQ_CST) < n)
        guest_sleep_ms(1);

    ROUNDS(round)
    {
        CHECK_EQ(__atomic_load_n(&through, __ATOMIC_SEQ_CST), 0);
        for (int i = 0; i < MUTEXES; i++) {
            if (i == RECURSIVE) {
                CHECK_EQ(pthread_mutex_trylock(&mutex[i]), 0);
                CHECK_EQ(pthread_mutex_unlock(&mutex[i]), 0);
            } else if (i == ERRORCHECK) {
                CHECK_EQ(pthread_mutex_lock(&mutex[i]), EDEADLK);
            } else
                CHECK_EQ(pthread_mutex_trylock(&mutex[i]), EBUSY);
        }
        CHECK_EQ(pthread_rwlock_trywrlock(&reading), EBUSY);
        CHECK_EQ(pthread_rwlock_tryrdlock(&writing), EBUSY);
        CHECK_EQ(pthread_spin_trylock(&spin), EBUSY);
        CHECK(sem_trywait(&semaphore) == -1 && errno == EAGAIN);
    }

    for (int i = 0; i < MUTEXES; i++)
        CHECK_EQ(pthread_mutex_unlock(&mutex[i]), 0);
    CHECK_EQ(pthread_mutex_unlock(&mutex[RECURSIVE]), 0);
    CHECK_EQ(pthread_mutex_unlock(&mutex[ERRORCHECK]), EPERM);
    CHECK_EQ(pthread_rwlock_unlock(&reading), 0);
    CHECK_EQ(pthread_rwlock_unlock(&writing), 0);
    CHECK_EQ(pthread_spin_unlock(&spin), 0);
    for (int i = 0; i < 3; i++)
        CHECK_EQ(sem_post(&semaphore), 0);
    pthread_mutex_lock(&cond_mutex);
    cond_open = 1;
    pthread_cond_broadcast(&cond);
    pthread_mutex_unlock(&cond_mutex);
    wait_barrier(NULL);
    for (int i = 0; i < n; i++)
        guest_join(thread[i]);
    CHECK_EQ(through, n + 1);
    printf("locks ok: %d waited\n", n);
    guest_end();
}
