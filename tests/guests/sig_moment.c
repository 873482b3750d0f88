/* Proves: a signal that comes into being while the program is being stopped is neither lost nor
 * doubled: of a timer that expires once (timer_create, setitimer), and of a thread that sends
 * one to another that stands already. Each is waited for before the next is ordered: a lost one
 * is a hang. Eight threads, so that not all are looked at one by one. */
#include "guest.h"
#include <sched.h>
#include <sys/time.h>

#define IDLERS 4

static volatile long ticks, alarms, got, sent, rounds;
static pthread_t target;
static sigset_t all;

static void on_tick(int signo) { (void)signo, ticks++; }
static void on_alarm(int signo) { (void)signo, alarms++; }
static void on_kill(int signo) { (void)signo, got++; }

static long pause_us(uint64_t *x, long least, long most)
{
    *x = guest_mix(*x);
    return least + (long)(*x % (uint64_t)(most - least));
}

/* Waits until `count` is `wanted`, with `signo` let in by nobody else. */
static void await(volatile long *count, long wanted, int signo)
{
    sigset_t open = all;
    sigdelset(&open, signo);
    while (*count != wanted) {
        if (*count > wanted)
            FAIL("signal %d came %ld times, not %ld", signo, *count, wanted);
        sigsuspend(&open);
    }
}

static void *posix_timer(void *unused)
{
    (void)unused;
    uint64_t x = 1;
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 1};
    CHECK(timer_create(CLOCK_MONOTONIC, &event, &timer) == 0);
    for (long n = 0; n < rounds; n++) {
        struct itimerspec once = {{0, 0}, {0, pause_us(&x, 100, 1000) * 1000}};
        CHECK(timer_settime(timer, 0, &once, NULL) == 0);
        await(&ticks, n + 1, SIGRTMIN + 1);
    }
    return NULL;
}

static void *interval_timer(void *unused)
{
    (void)unused;
    uint64_t x = 2;
    for (long n = 0; n < rounds / 4; n++) {
        struct itimerval once = {{0, 0}, {0, pause_us(&x, 500, 4000)}};
        CHECK(setitimer(ITIMER_REAL, &once, NULL) == 0);
        await(&alarms, n + 1, SIGALRM);
    }
    return NULL;
}

static void *receiver(void *unused)
{
    (void)unused;
    while (got < rounds)
        await(&got, got + 1, SIGUSR1);
    return NULL;
}

static void *sender(void *unused)
{
    (void)unused;
    uint64_t x = 3;
    while (sent < rounds) {
        struct timespec pause = {0, pause_us(&x, 1, 1000) * 1000};
        nanosleep(&pause, NULL);
        sent++;
        CHECK(pthread_kill(target, SIGUSR1) == 0);
        while (got != sent)
            sched_yield();
    }
    return NULL;
}

static void *idler(void *stop)
{
    while (!*(volatile int *)stop)
        guest_sleep_ms(20);
    return NULL;
}

int main(void)
{
    guest_begin();
    static int stop;
    rounds = (long)(guest_seconds() * 900);
    sigfillset(&all);
    CHECK(pthread_sigmask(SIG_SETMASK, &all, NULL) == 0);
    struct sigaction tick = {.sa_handler = on_tick}, alarm = {.sa_handler = on_alarm};
    struct sigaction kill = {.sa_handler = on_kill};
    CHECK(sigaction(SIGRTMIN + 1, &tick, NULL) == 0 && sigaction(SIGALRM, &alarm, NULL) == 0);
    CHECK(sigaction(SIGUSR1, &kill, NULL) == 0);
    pthread_t idlers[IDLERS];
    for (int k = 0; k < IDLERS; k++)
        idlers[k] = guest_thread(idler, &stop);
    target = guest_thread(receiver, NULL);
    pthread_t busy[] = {guest_thread(posix_timer, NULL), guest_thread(interval_timer, NULL),
                        guest_thread(sender, NULL), target};
    for (size_t k = 0; k < sizeof busy / sizeof *busy; k++)
        guest_join(busy[k]);
    stop = 1;
    for (int k = 0; k < IDLERS; k++)
        guest_join(idlers[k]);
    CHECK_EQ(ticks, rounds);
    CHECK_EQ(alarms, rounds / 4);
    CHECK_EQ(got, rounds);
    printf("%ld %ld %ld\n", ticks, alarms, got);
    guest_end();
}
