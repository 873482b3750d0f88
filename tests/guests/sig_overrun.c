/* Proves: a periodic timer whose signal is blocked has one signal waiting, which counts what was missed, whatever
 * checkpoints look at it: each added a signal of its own, until there was no room for any. Of the process and of a thread. */
#include "guest.h"

#define PERIOD_MS 20
#define BLOCKED_MS 400
#define MOST 3 /* one, one more since the latest checkpoint, one since the first was taken */

static sigset_t both;

static timer_t ticking(int notify, int signal)
{
    struct sigevent event = {.sigev_notify = notify, .sigev_signo = signal, .sigev_value.sival_int = signal};
    event._sigev_un._tid = gettid();
    timer_t timer;
    const struct itimerspec often = {{0, PERIOD_MS * 1000000}, {0, PERIOD_MS * 1000000}};
    CHECK(timer_create(CLOCK_MONOTONIC, &event, &timer) == 0 && timer_settime(timer, 0, &often, NULL) == 0);
    return timer;
}

static void *wait_for_ticks(void *argument)
{
    int notify = argument ? SIGEV_THREAD_ID : SIGEV_SIGNAL, signal = SIGRTMIN + (argument != NULL);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, signal);
    ticking(notify, signal);
    long rounds = (long)(guest_seconds() * 1000 / BLOCKED_MS) + 1, ticks = 0;
    for (long round = 0; round < rounds; round++) {
        guest_sleep_ms(BLOCKED_MS);
        const struct timespec none = {0, 0};
        siginfo_t info;
        int count = 0;
        while (sigtimedwait(&set, &info, &none) > 0) {
            CHECK_EQ(info.si_code, SI_TIMER);
            CHECK_EQ(info.si_value.sival_int, signal);
            ticks += 1 + info.si_overrun;
            count++;
        }
        if (count < 1 || count > MOST)
            FAIL("%d signals of one timer (%s)", count, argument ? "thread" : "process");
    }
    long least = rounds * (BLOCKED_MS / PERIOD_MS) / 2;
    if (ticks < least)
        FAIL("%ld ticks, not %ld", ticks, least);
    return NULL;
}

int main(void)
{
    guest_begin();
    sigemptyset(&both);
    sigaddset(&both, SIGRTMIN);
    sigaddset(&both, SIGRTMIN + 1);
    CHECK(pthread_sigmask(SIG_BLOCK, &both, NULL) == 0);
    pthread_t thread = guest_thread(wait_for_ticks, &both);
    wait_for_ticks(NULL);
    guest_join(thread);
    printf("overruns ok\n");
    guest_end();
}
