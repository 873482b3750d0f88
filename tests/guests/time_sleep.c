/* Proves: sleeps in progress end when they would have ended: nanosleep, clock_nanosleep
 * (relative, and until a time of the monotonic clock), sleep, poll, select, a condition's and a semaphore's
 * timed wait (this one until a time of the wall clock, too) and an alarm.
 *
 * The main thread adds up the time that the process has lived: a gap that is too long for a round
 * is the time in which it lay dead. Each sleep must have lasted its length of that: the dead time must
 * not shorten it, and a restore must not start it again. */
#include "guest.h"
#include <poll.h>
#include <semaphore.h>
#include <sys/select.h>
#include <sys/time.h>

static double lived, seen_at; /* life until the last round, and when that was */
#define GAP 0.06 /* a restart takes longer; a round that does, on a slow machine, counts too little */
static double length;
static volatile sig_atomic_t alarmed;
static void on_alarm(int sig) { alarmed = sig; }

static struct timespec span(double s)
{
    struct timespec t = {(time_t)s, (long)((s - (time_t)s) * 1e9)};
    return t;
}

static struct timespec after(struct timespec t, clockid_t clock)
{
    struct timespec now;
    CHECK(clock_gettime(clock, &now) == 0);
    t.tv_sec += now.tv_sec;
    t.tv_nsec += now.tv_nsec;
    if (t.tv_nsec >= 1000000000) {
        t.tv_sec++;
        t.tv_nsec -= 1000000000;
    }
    return t;
}

/* sleep() knows whole seconds only. */
static double length_of(long kind) { return kind == 7 ? (length < 1 ? 1 : (long)length) : length; }

static int sleep_by(long kind)
{
    struct timespec t = span(length_of(kind));
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
        t = after(t, CLOCK_MONOTONIC);
        return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
    }
    case 6: {
        pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
        pthread_condattr_t attr;
        pthread_cond_t never;
        CHECK(pthread_condattr_init(&attr) == 0 && pthread_condattr_setclock(&attr, CLOCK_MONOTONIC) == 0);
        CHECK(pthread_cond_init(&never, &attr) == 0 && pthread_mutex_lock(&mutex) == 0);
        t = after(t, CLOCK_MONOTONIC);
        return pthread_cond_timedwait(&never, &mutex, &t) == ETIMEDOUT ? 0 : -1;
    }
    case 7:
        return sleep((unsigned)length_of(kind));
    case 8:
    case 9: {
        sem_t never;
        CHECK(sem_init(&never, 0, 0) == 0);
        if (kind == 8) {
            t = after(t, CLOCK_MONOTONIC);
            return sem_clockwait(&never, CLOCK_MONOTONIC, &t) == -1 && errno == ETIMEDOUT ? 0 : -1;
        }
        t = after(t, CLOCK_REALTIME);
        int result = sem_timedwait(&never, &t);
        CHECK(result == -1 && errno == ETIMEDOUT);
        struct timespec now;
        CHECK(clock_gettime(CLOCK_REALTIME, &now) == 0);
        CHECK(now.tv_sec > t.tv_sec || (now.tv_sec == t.tv_sec && now.tv_nsec >= t.tv_nsec));
        return 0;
    }
    default: {
        int fds[2];
        CHECK(pipe(fds) == 0);
        struct pollfd p = {fds[0], POLLIN, 0};
        return poll(&p, 1, (int)(length * 1000));
    }
    }
}

enum { WALL = 9, KINDS = 11 };
static double woke[KINDS];
static void *sleeper(void *argument)
{
    long kind = (long)argument;
    if (sleep_by(kind) != 0)
        FAIL("sleep %ld was interrupted: errno %d", kind, errno);
    /* The main thread changes both in one go, but for a moment. */
    double since = guest_now() - seen_at;
    woke[kind] = lived + (since < GAP ? since : 0);
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
    struct itimerval rest;
    double last = 1001;
    seen_at = guest_now();
    /* A round is 10 ms and a bit; on a busy machine much more, hence only bounds. */
    ROUNDS(round)
    {
        double now = guest_now(), gap = now - seen_at;
        lived += gap < GAP ? gap : 0.01;
        seen_at = now;
        /* What is left of the alarm goes down by what a round takes, dead or not: never up, never by more. */
        CHECK(getitimer(ITIMER_REAL, &rest) == 0);
        double left_now = rest.it_value.tv_sec + rest.it_value.tv_usec / 1e6;
        if (left_now > last + 0.001 || left_now < last - 1.5)
            FAIL("alarm: %.3f s left, a round ago %.3f", left_now, last);
        last = left_now;
    }
    for (int i = 0; i < KINDS; i++)
        guest_join(threads[i]);
    for (int i = 0; i < KINDS; i++)
        /* Too early: the dead time was counted (which it must be by the wall clock). Late: it began
         * again; a restart that was quicker than a gap adds a little. */
        if ((i != WALL && woke[i] < length_of(i) * 0.25) || woke[i] > length_of(i) + 0.25)
            FAIL("sleep %d of %.2f s ended after %.2f s of life", i, length_of(i), woke[i]);
    left = alarm(0);
    CHECK(left > 1000 - 20 * guest_seconds() && left <= 1000);
    CHECK_EQ(alarmed, 0);
    alarm(1);
    guest_sleep_ms(1500);
    CHECK_EQ(alarmed, SIGALRM);
    printf("sleeps ok\n");
    guest_end();
}
