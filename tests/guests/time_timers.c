/* Proves: timers come back with their remaining time and their interval: setitimer (all
 * three), timer_create (signal, thread, thread-directed signal, none), timerfd. Long
 * one-shots must lose no more time than the program lived (the time it lay dead does not
 * count), periodic ones go on ticking, also after a restore, and ticking by checkpoint
 * alone does not turn one into a one-shot (a peer's bug). */
#include "guest.h"
#include <sys/time.h>
#include <sys/timerfd.h>

#define FAR 5000.0
#define DEAD 1.5 /* the tests leave it dead for longer than this */

static volatile long real_ticks, virtual_ticks, prof_ticks, signal_ticks, thread_ticks, directed_ticks;
static void on_signal(int sig, siginfo_t *info, void *context)
{
    (void)context;
    if (sig == SIGALRM)
        real_ticks++;
    else if (sig == SIGVTALRM)
        virtual_ticks++;
    else if (sig == SIGPROF)
        prof_ticks++;
    else if (sig == SIGRTMIN + 1) {
        if (info->si_code != SI_TIMER || info->si_value.sival_int != 321)
            FAIL("a timer's signal has code %d, value %d", info->si_code, info->si_value.sival_int);
        signal_ticks++;
    } else
        directed_ticks++;
}
static void on_thread(union sigval value)
{
    CHECK_EQ(value.sival_int, 654);
    __atomic_add_fetch(&thread_ticks, 1, __ATOMIC_SEQ_CST);
}

static double seconds(struct timespec t) { return t.tv_sec + t.tv_nsec / 1e9; }

int main(void)
{
    guest_begin();
    struct sigaction act = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    int sigs[] = {SIGALRM, SIGVTALRM, SIGPROF, SIGRTMIN + 1, SIGRTMIN + 2};
    for (int i = 0; i < 5; i++)
        CHECK(sigaction(sigs[i], &act, NULL) == 0);
    struct itimerval often = {{0, 25000}, {0, 25000}};
    CHECK(setitimer(ITIMER_REAL, &often, NULL) == 0);
    CHECK(setitimer(ITIMER_VIRTUAL, &often, NULL) == 0);
    CHECK(setitimer(ITIMER_PROF, &often, NULL) == 0);
    const struct itimerspec fast = {{0, 25000000}, {0, 25000000}};
    const struct itimerspec far = {{0, 0}, {(time_t)FAR, 0}};
    const struct itimerspec far_periodic = {{77, 5000}, {(time_t)FAR, 0}};

    timer_t periodic, thread, directed, once[3];
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 1, .sigev_value.sival_int = 321};
    CHECK(timer_create(CLOCK_MONOTONIC, &event, &periodic) == 0);
    CHECK(timer_settime(periodic, 0, &fast, NULL) == 0);
    event.sigev_signo = SIGRTMIN + 2;
    CHECK(timer_create(CLOCK_REALTIME, &event, &once[0]) == 0);
    CHECK(timer_settime(once[0], 0, &far, NULL) == 0);
    CHECK(timer_create(CLOCK_BOOTTIME, &event, &once[1]) == 0);
    CHECK(timer_settime(once[1], 0, &far_periodic, NULL) == 0);
    event.sigev_notify = SIGEV_NONE;
    CHECK(timer_create(CLOCK_MONOTONIC, &event, &once[2]) == 0);
    CHECK(timer_settime(once[2], 0, &far, NULL) == 0);
    struct sigevent by_thread = {.sigev_notify = SIGEV_THREAD, .sigev_value.sival_int = 654};
    by_thread.sigev_notify_function = on_thread;
    CHECK(timer_create(CLOCK_MONOTONIC, &by_thread, &thread) == 0);
    CHECK(timer_settime(thread, 0, &fast, NULL) == 0);
    struct sigevent to_me = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 2};
    to_me._sigev_un._tid = gettid();
    CHECK(timer_create(CLOCK_MONOTONIC, &to_me, &directed) == 0);
    CHECK(timer_settime(directed, 0, &fast, NULL) == 0);

    int ticking = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    int fd_far = timerfd_create(CLOCK_REALTIME, TFD_CLOEXEC);
    int ripe = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    const struct itimerspec now = {{0, 0}, {0, 1}};
    CHECK(timerfd_settime(ticking, 0, &fast, NULL) == 0);
    CHECK(timerfd_settime(fd_far, 0, &far_periodic, NULL) == 0);
    CHECK(timerfd_settime(ripe, 0, &now, NULL) == 0); /* expired, not read until the end */

    double last[5] = {FAR, FAR, FAR, FAR, FAR};
    uint64_t fd_ticks = 0;
    long progress[7] = {0};
    ROUNDS(round)
    {
        struct itimerval it;
        int which[] = {ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF};
        for (int i = 0; i < 3; i++) {
            CHECK(getitimer(which[i], &it) == 0);
            CHECK(labs(it.it_interval.tv_usec - 25000) < 5000 && it.it_interval.tv_sec == 0);
        }
        struct itimerspec ts[5];
        for (int i = 0; i < 3; i++)
            CHECK(timer_gettime(once[i], &ts[i]) == 0);
        CHECK(timerfd_gettime(fd_far, &ts[3]) == 0);
        CHECK_EQ(ts[1].it_interval.tv_sec, 77);
        CHECK_EQ(ts[3].it_interval.tv_nsec, 5000);
        for (int i = 0; i < 4; i++) {
            double left = seconds(ts[i].it_value);
            if (left > last[i] + 0.001 || left < last[i] - DEAD)
                FAIL("timer %d: %.3f s left, a round ago %.3f", i, left, last[i]);
            last[i] = left;
        }
        CHECK(timer_gettime(periodic, &ts[4]) == 0);
        CHECK_EQ(ts[4].it_interval.tv_nsec, 25000000);
        uint64_t n;
        if (read(ticking, &n, sizeof n) == sizeof n)
            fd_ticks += n;
        else
            CHECK_EQ(errno, EAGAIN);
        /* All of them tick in every half second of life. */
        volatile uint64_t x = 1;
        for (int i = 0; i < 200000; i++)
            x = guest_mix(x);
        if (round % 100 == 99) {
            long ticks[7] = {real_ticks, virtual_ticks, prof_ticks, signal_ticks, thread_ticks, directed_ticks, (long)fd_ticks};
            for (int i = 0; i < 7; i++) {
                if (ticks[i] <= progress[i])
                    FAIL("timer kind %d ticks no more (%ld)", i, ticks[i]);
                progress[i] = ticks[i];
            }
        }
    }
    uint64_t n = 0;
    CHECK_EQ(read(ripe, &n, sizeof n), sizeof n);
    CHECK_EQ(n, 1);
    CHECK(read(ripe, &n, sizeof n) == -1 && errno == EAGAIN);
    CHECK_EQ(timer_getoverrun(once[2]), 0);
    for (int i = 0; i < 3; i++)
        CHECK(timer_delete(once[i]) == 0);
    CHECK(timer_delete(thread) == 0 && timer_delete(periodic) == 0 && timer_delete(directed) == 0);
    printf("timers ok\n");
    guest_end();
}
