/* Rollback with threads (arguments: threads, rollbacks, who calls: 0 main, else a worker): threads born since
 * end, those that ended are back, all others go back to their frames, in locks and waits
 * of every kind; ids, thread-local memory and masks as before. */
#include "guest.h"

#include "ckpt.h"
#include <poll.h>
#include <semaphore.h>
#include <sys/eventfd.h>

#define MOST 256
#define KINDS 8

static int nthreads, nback, caller;
static volatile int back;      /* protected */
static volatile long work[MOST];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER, held = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static pthread_rwlock_t rwlock = PTHREAD_RWLOCK_INITIALIZER;
static pthread_barrier_t barrier, go;
static sem_t sem;
static int fds[2], event;
static volatile int phase;
static __thread long own = -1;
static volatile long cond_ready;

static void roll(void)
{
    back++;
    struct ckpt_region keep = {(void *)&back, sizeof back};
    ckpt_rollback(1, back, &keep, 1);
    FAIL("ckpt_rollback: errno %d", errno);
}

static void *sleeper(void *arg)
{
    while (pause() < 0) {
    }
    return arg;
}

/* Each waits in its own way until phase is 1, then does its part. */
static void *worker(void *argument)
{
    long k = (long)argument;
    own = k;
    pid_t tid = gettid();
    char c;
    uint64_t one;
    pthread_barrier_wait(&go);
    switch (k % KINDS) {
    case 0:
        pthread_mutex_lock(&mutex);
        while (!cond_ready)
            pthread_cond_wait(&cond, &mutex);
        pthread_mutex_unlock(&mutex);
        break;
    case 1:
        pthread_mutex_lock(&held); /* the main thread has it */
        pthread_mutex_unlock(&held);
        break;
    case 2:
        pthread_rwlock_rdlock(&rwlock);
        pthread_rwlock_unlock(&rwlock);
        break;
    case 3:
        while (sem_wait(&sem) != 0)
            CHECK_EQ(errno, EINTR);
        break;
    case 4:
        CHECK_EQ(read(fds[0], &c, 1), 1);
        break;
    case 5:
        CHECK_EQ(read(event, &one, 8), 8);
        break;
    case 6:
        while (!phase)
            guest_sleep_ms(5);
        break;
    case 7:
        while (!phase) {
            unsigned char *p = malloc(1 + (work[k] * 97) % 5000);
            p[0] = 1;
            free(p);
            work[k] = work[k] + 1;
        }
        break;
    }
    CHECK_EQ(own, k);
    CHECK_EQ(gettid(), tid);
    work[k] = -1;
    pthread_barrier_wait(&barrier);
    if (k + 1 == caller && back < nback)
        roll();
    pthread_barrier_wait(&barrier);
    return (void *)k;
}

int main(int argc, char **argv)
{
    guest_begin();
    nthreads = argc > 1 ? atoi(argv[1]) : 8;
    nback = argc > 2 ? atoi(argv[2]) : 3;
    caller = argc > 3 ? atoi(argv[3]) : 0;
    pthread_t threads[MOST], late;
    CHECK(pipe(fds) == 0);
    event = eventfd(0, EFD_SEMAPHORE);
    sem_init(&sem, 0, 0);
    pthread_barrier_init(&barrier, NULL, nthreads + 1);
    pthread_barrier_init(&go, NULL, nthreads + 1);
    pthread_mutex_lock(&held);
    pthread_rwlock_wrlock(&rwlock);
    for (long k = 0; k < nthreads; k++)
        threads[k] = guest_thread(worker, (void *)k);
    pthread_barrier_wait(&go);
    guest_sleep_ms(20);
    int result = ckpt_checkpoint(1);
    if (result < 0)
        FAIL("ckpt_checkpoint: errno %d", errno);
    CHECK_EQ(result, back);
    CHECK_EQ(phase, 0);
    for (int k = 0; k < nthreads; k++)
        CHECK(k % KINDS == 7 ? work[k] >= 0 : work[k] == 0);
    late = guest_thread(sleeper, NULL);
    pthread_mutex_lock(&mutex);
    cond_ready = 1;
    pthread_cond_broadcast(&cond);
    pthread_mutex_unlock(&mutex);
    pthread_mutex_unlock(&held);
    pthread_rwlock_unlock(&rwlock);
    for (int k = 0; k < nthreads; k++) {
        uint64_t one = 1;
        sem_post(&sem);
        CHECK_EQ(write(fds[1], "x", 1), 1);
        CHECK_EQ(write(event, &one, 8), 8);
    }
    phase = 1;
    pthread_barrier_wait(&barrier);
    for (int k = 0; k < nthreads; k++)
        CHECK_EQ(work[k], -1);
    if (caller == 0 && back < nback)
        roll();
    pthread_barrier_wait(&barrier);
    for (int k = 0; k < nthreads; k++) {
        void *end;
        CHECK(pthread_join(threads[k], &end) == 0);
        CHECK_EQ((long)end, k);
    }
    /* The threads have ended: they must come back as well. */
    if (caller == 0 && back == nback) {
        nback++; /* lost again, so it happens once */
        back = nback;
        struct ckpt_region keep[] = {{(void *)&back, sizeof back}, {&nback, sizeof nback}, {&caller, sizeof caller}};
        caller = -1;
        ckpt_rollback(1, back, keep, 3);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    pthread_cancel(late);
    guest_join(late);
    printf("%d threads, %d times\n", nthreads, back);
    guest_end();
}
