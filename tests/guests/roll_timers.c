/* Rollback and timers: what was set at the checkpoint goes on from there, whatever has become
 * of it since (changed, stopped, deleted); what was made since is gone. setitimer, timer_create
 * with a signal, a thread and nothing, timerfd. */
#include "guest.h"

#include "ckpt.h"
#include <sys/time.h>
#include <sys/timerfd.h>

#define FAR 5000.0
/* Of a far timer no more than this may be gone after a rollback: what it lived. */
#define LIVED 3.0

static volatile long real_ticks, signal_ticks, thread_ticks;

static void on_signal(int sig, siginfo_t *info, void *context)
{
    (void)context;
    if (sig == SIGALRM) {
        real_ticks++;
        return;
    }
    if (info->si_code != SI_TIMER || info->si_value.sival_int != 321)
        FAIL("a timer's signal has code %d, value %d", info->si_code, info->si_value.sival_int);
    signal_ticks++;
}

static void on_thread(union sigval value)
{
    CHECK_EQ(value.sival_int, 654);
    __atomic_add_fetch(&thread_ticks, 1, __ATOMIC_SEQ_CST);
}

static struct kept {
    int rounds;
    timer_t extra; /* made after the checkpoint */
    int extra_fd;
} kept;

static void ticks(volatile long *count, const char *what)
{
    long before = *count;
    double limit = guest_now() + 20;
    while (*count == before) {
        if (guest_now() > limit)
            FAIL("%s: no more ticks after rollback %d", what, kept.rounds);
        guest_sleep_ms(1);
    }
}

static void is_far(struct itimerspec now, const char *what)
{
    double left = now.it_value.tv_sec + now.it_value.tv_nsec / 1e9;
    if (left > FAR || left < FAR - LIVED)
        FAIL("%s: %.3f s left after rollback %d", what, left, kept.rounds);
}

int main(void)
{
    guest_begin();
    struct sigaction act = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    CHECK(sigaction(SIGALRM, &act, NULL) == 0 && sigaction(SIGRTMIN + 1, &act, NULL) == 0);
    const struct itimerval often = {{0, 15000}, {0, 15000}};
    const struct itimerspec fast = {{0, 15000000}, {0, 15000000}}, never = {{0, 0}, {0, 0}};
    const struct itimerspec far = {{77, 0}, {(time_t)FAR, 0}}, soon = {{0, 0}, {100, 0}};
    timer_t by_signal, by_thread, quiet, deleted;
    struct sigevent signal_event = {.sigev_notify = SIGEV_SIGNAL,
                                    .sigev_signo = SIGRTMIN + 1,
                                    .sigev_value.sival_int = 321};
    struct sigevent thread_event = {.sigev_notify = SIGEV_THREAD, .sigev_value.sival_int = 654};
    thread_event.sigev_notify_function = on_thread;
    struct sigevent no_event = {.sigev_notify = SIGEV_NONE};
    CHECK(setitimer(ITIMER_REAL, &often, NULL) == 0);
    CHECK(timer_create(CLOCK_MONOTONIC, &signal_event, &by_signal) == 0);
    CHECK(timer_create(CLOCK_MONOTONIC, &thread_event, &by_thread) == 0);
    CHECK(timer_create(CLOCK_REALTIME, &no_event, &quiet) == 0);
    CHECK(timer_create(CLOCK_BOOTTIME, &no_event, &deleted) == 0);
    CHECK(timer_settime(by_signal, 0, &fast, NULL) == 0);
    CHECK(timer_settime(by_thread, 0, &fast, NULL) == 0);
    int ticking = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    int far_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    int ripe = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    const struct itimerspec now = {{0, 0}, {0, 1}};
    CHECK(timerfd_settime(ticking, 0, &fast, NULL) == 0);
    CHECK(timerfd_settime(ripe, 0, &now, NULL) == 0);
    guest_sleep_ms(5);
    CHECK(timer_settime(quiet, 0, &far, NULL) == 0);
    CHECK(timer_settime(deleted, 0, &far, NULL) == 0);
    CHECK(timerfd_settime(far_fd, 0, &far, NULL) == 0);

    int result = ckpt_checkpoint(6);
    if (result < 0)
        FAIL("ckpt_checkpoint: errno %d", errno);
    CHECK_EQ(result, kept.rounds);
    struct itimerspec left;
    CHECK(timer_gettime(quiet, &left) == 0);
    CHECK_EQ(left.it_interval.tv_sec, 77);
    is_far(left, "timer_create");
    CHECK(timer_gettime(deleted, &left) == 0);
    is_far(left, "the deleted timer");
    CHECK(timerfd_gettime(far_fd, &left) == 0);
    CHECK_EQ(left.it_interval.tv_sec, 77);
    is_far(left, "timerfd");
    struct itimerval real;
    CHECK(getitimer(ITIMER_REAL, &real) == 0);
    CHECK(labs((long)real.it_interval.tv_usec - 15000) < 5000);
    ticks(&real_ticks, "setitimer");
    ticks(&signal_ticks, "a timer's signal");
    ticks(&thread_ticks, "a timer's thread");
    uint64_t n = 0;
    CHECK_EQ(read(ticking, &n, sizeof n), sizeof n);
    CHECK(n > 0);
    n = 0;
    CHECK_EQ(read(ripe, &n, sizeof n), sizeof n); /* had expired, not read */
    CHECK_EQ(n, 1);
    if (kept.rounds > 0) {
        CHECK(timer_gettime(kept.extra, &left) == -1 && errno == EINVAL);
        CHECK_EQ(fcntl(kept.extra_fd, F_GETFD), -1);
    }
    if (kept.rounds < 4) {
        kept.rounds++;
        CHECK(timer_create(CLOCK_MONOTONIC, &no_event, &kept.extra) == 0);
        kept.extra_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
        struct itimerval off = {{0, 0}, {0, 0}};
        CHECK(setitimer(ITIMER_REAL, &off, NULL) == 0);
        CHECK(timer_settime(by_signal, 0, kept.rounds % 2 ? &never : &soon, NULL) == 0);
        CHECK(timer_settime(quiet, 0, &soon, NULL) == 0);
        CHECK(timerfd_settime(far_fd, 0, &soon, NULL) == 0);
        if (kept.rounds > 1)
            CHECK(timer_delete(deleted) == 0);
        if (kept.rounds > 2) {
            CHECK(timer_delete(by_thread) == 0);
            close(ticking);
        }
        struct ckpt_region keep = {&kept, sizeof kept};
        ckpt_rollback(6, kept.rounds, &keep, 1);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    printf("%d times\n", kept.rounds);
    guest_end();
}
