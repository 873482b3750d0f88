/* Proves: sleeps in progress end when they would have ended: nanosleep, clock_nanosleep
 * (relative, and until a time of the monotonic clock), sleep, poll, select, a condition's and a semaphore's timed wait and an alarm,
 * each about the length of the run, measured in rounds of the main thread (which is dead
 * when they are dead): the time in which the process lay dead must not shorten them, and
 * a restore must not start them again. */
#include "guest.h"
#include <poll.h>
#include <sys/select.h>

static long now_round;
static double length;
static volatile sig_atomic_t alarmed;
static void on_alarm(int sig) { alarmed = sig; }

static struct timespec span(double s)
{
    struct timespec t = {(time_t)s, (long)((s - (time_t)s) * 1e9)};
    return t;
}

static struct timespec after(struct timespec t)
{
    struct timespec now;
    CHECK(clock_gettime(CLOCK_MONOTONIC, &now) == 0);
    t.tv_sec += now.tv_sec;
    t.tv_nsec += now.tv_nsec;
    if (t.tv_nsec >= 1000000000) {
        t.tv_sec++;
        t.tv_nsec -= 1000000000;
    }
    return t;
}

static int sleep_by(long kind)
{
    struct timespec t = span(length);
    switch (kind) {
    case 0:
        return nanosleep(&t, NULL);
    case 1:
        return clock_nanosleep(CLOCK_MONOTONIC, 0, &t, NULL);
    case 2:
        return poll(NULL, 0, (int)(length * 1000));
    case 3: {
        struct timeval v = {t.tv_sec, t.tv_nsec / 1000};
        return select(0, NULL, NULL, NULL, &v);
    }
    case 4:
        return ppoll(NULL, 0, &t, NULL);
    case 5: {
        t = after(t);
        return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
    }
    case 6: {
        pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
        pthread_condattr_t attr;
        pthread_cond_t never;
        CHECK(pthread_condattr_init(&attr) == 0 && pthread_condattr_setclock(&attr, CLOCK_MONOTONIC) == 0);
        CHECK(pthread_cond_init(&never, &attr) == 0 && pthread_mutex_lock(&mutex) == 0);
        t = after(t);
        return pthread_cond_timedwait(&never, &mutex, &t) == ETIMEDOUT ? 0 : -1;
    }
    default: {
        int fds[2];
        CHECK(pipe(fds) == 0);
        struct pollfd p = {fds[0], POLLIN, 0};
        return poll(&p, 1, (int)(length * 1000));
    }
    }
}

enum { KINDS = 8 };
static long woke[KINDS];
static void *sleeper(void *argument)
{
    long kind = (long)argument;
    if (sleep_by(kind) != 0)
        FAIL("sleep %ld was interrupted: errno %d", kind, errno);
    woke[kind] = __atomic_load_n(&now_round, __ATOMIC_SEQ_CST);
    return NULL;
}

int main(void)
{
    guest_begin();
    length = guest_seconds() * 0.6;
    struct sigaction act = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGALRM, &act, NULL) == 0);
    sigset_t set, old;
    sigemptyset(&set);
    sigaddset(&set, SIGALRM);
    CHECK(pthread_sigmask(SIG_BLOCK, &set, &old) == 0);
    pthread_t threads[KINDS];
    for (long i = 0; i < KINDS; i++)
        threads[i] = guest_thread(sleeper, (void *)i);
    CHECK(pthread_sigmask(SIG_SETMASK, &old, NULL) == 0);
    alarm(1000);
    unsigned left = alarm(1000);
    CHECK(left >= 999 && left <= 1000);
    /* A round is 10 ms and a bit; on a busy machine much more, hence only bounds. */
    ROUNDS(round) __atomic_store_n(&now_round, round + 1, __ATOMIC_SEQ_CST);
    for (int i = 0; i < KINDS; i++)
        guest_join(threads[i]);
    long rounds = guest_rounds();
    for (int i = 0; i < KINDS; i++)
        /* Too early: the dead time was counted. At the very end: it began again. */
        if (woke[i] < rounds / 8 || woke[i] > rounds * 9 / 10)
            FAIL("sleep %d ended in round %ld of %ld", i, woke[i], rounds);
    left = alarm(0);
    CHECK(left > 1000 - 20 * guest_seconds() && left <= 1000);
    CHECK_EQ(alarmed, 0);
    alarm(1);
    guest_sleep_ms(1500);
    CHECK_EQ(alarmed, SIGALRM);
    printf("sleeps ok\n");
    guest_end();
}
