/* Rollback while threads wait in every other way (arguments: threads, rollbacks): mutexes of every type, a rwlock to write,
 * a spin lock, a barrier, a timed condition, poll, select, epoll_wait, sigwaitinfo, sleeps, a futex, a join.
 * What they wait for happens after the checkpoint; each time they wait again, and get through once. */
#include "guest.h"

#include "ckpt.h"
#include <linux/futex.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/syscall.h>

#define MOST 256
enum { NORMAL, RECURSIVE, ERRORCHECK, ROBUST, PI, SHARED, ROBUST_PI, MUTEXES };
enum {
    WRLOCK = MUTEXES,
    SPIN,
    BARRIER,
    TIMED,
    POLL,
    SELECT,
    EPOLL,
    SIGNAL,
    SLEEP,
    ABSOLUTE,
    FUTEX,
    JOIN,
    KINDS
};

static int nthreads, nback;
static volatile int back; /* protected */
static volatile int through[MOST];
static pthread_mutex_t mutex[MUTEXES], cond_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static pthread_rwlock_t rwlock;
static pthread_spinlock_t spin;
static pthread_barrier_t barrier, go;
static pthread_t awaited, threads[MOST];
static int fds[2], epoll;
static volatile int happened, word;

static void *sleeper(void *arg)
{
    while (!happened)
        guest_sleep_ms(3);
    return arg;
}

static void wait_for(int kind)
{
    struct timespec late;
    clock_gettime(CLOCK_REALTIME, &late);
    late.tv_sec += 1000;
    switch (kind) {
    case WRLOCK:
        CHECK_EQ(pthread_rwlock_wrlock(&rwlock), 0);
        CHECK_EQ(pthread_rwlock_unlock(&rwlock), 0);
        break;
    case SPIN:
        /* Not pthread_spin_lock: so many would leave the others no processor. */
        while (pthread_spin_trylock(&spin) != 0)
            sched_yield();
        CHECK_EQ(pthread_spin_unlock(&spin), 0);
        break;
    case BARRIER: {
        int result = pthread_barrier_wait(&barrier);
        CHECK(result == 0 || result == PTHREAD_BARRIER_SERIAL_THREAD);
        break;
    }
    case TIMED:
        CHECK_EQ(pthread_mutex_lock(&cond_mutex), 0);
        while (!happened)
            CHECK_EQ(pthread_cond_timedwait(&cond, &cond_mutex, &late), 0);
        CHECK_EQ(pthread_mutex_unlock(&cond_mutex), 0);
        break;
    case POLL: {
        struct pollfd p = {.fd = fds[0], .events = POLLIN};
        CHECK_EQ(poll(&p, 1, 1000000), 1);
        break;
    }
    case SELECT: {
        fd_set set;
        FD_ZERO(&set);
        FD_SET(fds[0], &set);
        CHECK_EQ(select(fds[0] + 1, &set, NULL, NULL, NULL), 1);
        break;
    }
    case EPOLL: {
        struct epoll_event event;
        CHECK_EQ(epoll_wait(epoll, &event, 1, -1), 1);
        break;
    }
    case SIGNAL: {
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, SIGUSR2);
        int signo;
        while ((signo = sigwaitinfo(&set, NULL)) < 0)
            CHECK_EQ(errno, EINTR);
        CHECK_EQ(signo, SIGUSR2);
        break;
    }
    case SLEEP:
        while (!happened)
            CHECK_EQ(usleep(30000), 0);
        break;
    case ABSOLUTE: {
        struct timespec at;
        while (!happened) {
            clock_gettime(CLOCK_MONOTONIC, &at);
            at.tv_nsec += 20000000;
            at.tv_sec += at.tv_nsec / 1000000000;
            at.tv_nsec %= 1000000000;
            CHECK_EQ(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL), 0);
        }
        break;
    }
    case FUTEX:
        while (word == 0)
            CHECK(syscall(SYS_futex, &word, FUTEX_WAIT, 0, NULL, NULL, 0) == 0 || errno == EAGAIN);
        break;
    case JOIN: {
        void *end;
        CHECK_EQ(pthread_join(awaited, &end), 0);
        CHECK(end == (void *)7);
        break;
    }
    default:
        CHECK_EQ(pthread_mutex_lock(&mutex[kind]), 0);
        CHECK_EQ(pthread_mutex_unlock(&mutex[kind]), 0);
    }
}

static void *worker(void *argument)
{
    long k = (long)argument;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    CHECK_EQ(pthread_sigmask(SIG_BLOCK, &set, NULL), 0);
    pthread_barrier_wait(&go);
    /* One alone can wait for a join. */
    int kind = k % KINDS;
    wait_for(kind == JOIN && k != JOIN ? NORMAL : kind);
    through[k]++;
    return argument;
}

int main(int argc, char **argv)
{
    guest_begin();
    nthreads = argc > 1 ? atoi(argv[1]) : KINDS;
    nback = argc > 2 ? atoi(argv[2]) : 3;
    CHECK(nthreads <= MOST);
    int waiting = 0;
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
    for (int k = 0; k < nthreads; k++)
        waiting += k % KINDS == BARRIER;
    CHECK_EQ(pthread_rwlock_init(&rwlock, NULL), 0);
    CHECK_EQ(pthread_rwlock_rdlock(&rwlock), 0);
    CHECK_EQ(pthread_spin_init(&spin, 0), 0);
    CHECK_EQ(pthread_spin_lock(&spin), 0);
    CHECK_EQ(pthread_barrier_init(&barrier, NULL, waiting + 1), 0);
    CHECK_EQ(pthread_barrier_init(&go, NULL, nthreads + 1), 0);
    CHECK(pipe(fds) == 0);
    epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN};
    CHECK(epoll >= 0 && epoll_ctl(epoll, EPOLL_CTL_ADD, fds[0], &event) == 0);
    awaited = guest_thread(sleeper, (void *)7);
    for (long k = 0; k < nthreads; k++)
        threads[k] = guest_thread(worker, (void *)k);
    pthread_barrier_wait(&go);
    guest_sleep_ms(30);
    int result = ckpt_checkpoint(1);
    if (result < 0)
        FAIL("ckpt_checkpoint: errno %d", errno);
    CHECK_EQ(result, back);
    guest_sleep_ms(back % 2 * 10);
    for (int k = 0; k < nthreads; k++)
        CHECK_EQ(through[k], 0);
    for (int i = 0; i < MUTEXES; i++)
        CHECK_EQ(pthread_mutex_trylock(&mutex[i]), i == RECURSIVE ? 0 : EBUSY);
    CHECK_EQ(pthread_mutex_unlock(&mutex[RECURSIVE]), 0);
    CHECK_EQ(pthread_rwlock_trywrlock(&rwlock), EBUSY);
    CHECK_EQ(pthread_spin_trylock(&spin), EBUSY);
    struct pollfd empty = {.fd = fds[0], .events = POLLIN};
    CHECK_EQ(poll(&empty, 1, 0), 0);

    happened = word = 1;
    for (int i = 0; i < MUTEXES; i++)
        CHECK_EQ(pthread_mutex_unlock(&mutex[i]), 0);
    CHECK_EQ(pthread_rwlock_unlock(&rwlock), 0);
    CHECK_EQ(pthread_spin_unlock(&spin), 0);
    pthread_barrier_wait(&barrier);
    CHECK_EQ(pthread_mutex_lock(&cond_mutex), 0);
    CHECK_EQ(pthread_cond_broadcast(&cond), 0);
    CHECK_EQ(pthread_mutex_unlock(&cond_mutex), 0);
    CHECK_EQ(write(fds[1], "x", 1), 1);
    syscall(SYS_futex, &word, FUTEX_WAKE, MOST, NULL, NULL, 0);
    for (int k = 0; k < nthreads; k++)
        if (k % KINDS == SIGNAL)
            CHECK_EQ(pthread_kill(threads[k], SIGUSR2), 0);
    for (long k = 0; k < nthreads; k++) {
        void *end;
        CHECK_EQ(pthread_join(threads[k], &end), 0);
        CHECK(end == (void *)k);
        CHECK_EQ(through[k], 1);
    }
    if (back < nback) {
        back++;
        struct ckpt_region keep = {(void *)&back, sizeof back};
        ckpt_rollback(1, back, &keep, 1);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    if (nthreads <= JOIN)
        guest_join(awaited);
    printf("%d waits, %d times\n", nthreads, back);
    guest_end();
}
