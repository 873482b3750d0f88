/* Proves: what a handler that runs at the first checkpoint returns to, and what waits under a mask
 * of its own, goes on writing to memory with all signals blocked that it had blocked, and sees
 * just that mask. */
#include "guest.h"
#include <poll.h>
#include <sys/select.h>
#include <sys/time.h>

static volatile long page[4096];
static volatile sig_atomic_t inner, alarms;
static long rounds;

static void in_progress(int sig)
{
    for (long i = 0; i < rounds / 3; i++) {
        guest_sleep_ms(10);
        page[i % 4096] += sig;
    }
    inner++;
}

static void on_alarm(int sig) { alarms += sig == SIGALRM; }

static void all_blocked_but(int open)
{
    sigset_t now;
    CHECK(sigprocmask(SIG_SETMASK, NULL, &now) == 0);
    for (int sig = 1; sig < NSIG; sig++)
        if (sig != SIGKILL && sig != SIGSTOP && sig != 32 && sig != 33)
            CHECK_EQ(sigismember(&now, sig), sig != open);
}

int main(void)
{
    guest_begin();
    rounds = guest_rounds();
    struct sigaction act = {.sa_handler = in_progress};
    sigfillset(&act.sa_mask);
    CHECK(sigaction(SIGUSR1, &act, NULL) == 0);
    act.sa_handler = on_alarm;
    CHECK(sigaction(SIGALRM, &act, NULL) == 0);
    sigset_t all, alarm_open;
    sigfillset(&all);
    sigdelset(&all, SIGUSR1);
    CHECK(sigprocmask(SIG_SETMASK, &all, NULL) == 0);
    CHECK(raise(SIGUSR1) == 0);
    CHECK_EQ(inner, 1);
    for (int k = 0; k < 4096; k++)
        page[k]++;
    all_blocked_but(SIGUSR1);
    sigfillset(&alarm_open);
    sigdelset(&alarm_open, SIGALRM);
    for (int k = 0; k < rounds / 20; k++) {
        struct timespec limit = {30, 0};
        struct itimerval soon = {{0, 0}, {0, 100000}};
        CHECK(setitimer(ITIMER_REAL, &soon, NULL) == 0);
        int got = k % 3 == 0   ? ppoll(NULL, 0, &limit, &alarm_open)
                  : k % 3 == 1 ? pselect(0, NULL, NULL, NULL, &limit, &alarm_open)
                               : sigsuspend(&alarm_open);
        CHECK(got == -1 && errno == EINTR);
        CHECK_EQ(alarms, k + 1);
        page[k * 64 % 4096]++;
        all_blocked_but(SIGUSR1);
    }
    long sum = 0;
    for (int k = 0; k < 4096; k++)
        sum += page[k];
    printf("sum %ld, %d alarms\n", sum, (int)alarms);
    guest_end();
}
