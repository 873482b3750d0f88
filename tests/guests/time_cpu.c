/* Proves: timers that count CPU time go on. setitimer(VIRTUAL, PROF): what remains at the
 * checkpoint remains after the restore, less what was worked, and one that was stopped with its
 * interval in place stays stopped: it was started by the restore, and its signal is the end of
 * a program without a handler. timer_create on the CPU clock of the process, of the thread that
 * makes it and of others: each goes on counting that thread's time, not that of whoever made it
 * again (which was a thread of ours, so that it never expired). */
#include "guest.h"
#include <sys/time.h>

#define FAR 5000.0
#define ROUND 1.5 /* no round works longer than this */

static volatile long ticks[3];
static volatile int over;
static volatile pid_t idler_id, worker_id;

static void on_tick(int sig, siginfo_t *info, void *context)
{
    (void)sig, (void)context;
    ticks[info->si_value.sival_int]++;
}

static timer_t timer(clockid_t clock, int number, double first, double interval)
{
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 1, .sigev_value.sival_int = number};
    if (number < 0)
        event.sigev_notify = SIGEV_NONE;
    timer_t made;
    CHECK(timer_create(clock, &event, &made) == 0);
    struct itimerspec when = {.it_interval.tv_nsec = (long)(interval * 1e9), .it_value.tv_sec = (time_t)first};
    when.it_value.tv_nsec = (long)((first - (double)when.it_value.tv_sec) * 1e9);
    CHECK(timer_settime(made, 0, &when, NULL) == 0);
    return made;
}

static double left(timer_t timer)
{
    struct itimerspec when;
    CHECK(timer_gettime(timer, &when) == 0);
    return when.it_value.tv_sec + when.it_value.tv_nsec / 1e9;
}

static double left_of(int which, double interval)
{
    struct itimerval when;
    CHECK(getitimer(which, &when) == 0);
    double is = when.it_interval.tv_sec + when.it_interval.tv_usec / 1e6;
    if (is < interval - 0.005 || is > interval + 0.005)
        FAIL("itimer %d: its interval is %.6f", which, is);
    return when.it_value.tv_sec + when.it_value.tv_usec / 1e6;
}

static void *idle(void *unused)
{
    idler_id = gettid();
    while (!over)
        guest_sleep_ms(20);
    return unused;
}

static void burn(long times)
{
    volatile uint64_t x = 1;
    for (long i = 0; i < times; i++)
        x = guest_mix(x);
}

static void *work(void *unused)
{
    timer(CLOCK_THREAD_CPUTIME_ID, 0, 0.02, 0.02);
    worker_id = gettid();
    while (!over)
        burn(100000);
    return unused;
}

/* Less and less, and never by more than a round can take. */
static void less(const char *what, double now, double *before)
{
    if (now > *before + 0.001 || now < *before - ROUND)
        FAIL("%s: %.4f s left, a round ago %.4f", what, now, *before);
    *before = now;
}

int main(int argc, char **argv)
{
    guest_begin();
    struct sigaction act = {.sa_sigaction = on_tick, .sa_flags = SA_SIGINFO | SA_RESTART};
    CHECK(sigaction(SIGRTMIN + 1, &act, NULL) == 0);
    int stopped = argc > 1 && strcmp(argv[1], "stopped") == 0;
    struct itimerval when = {{77, 5000}, {stopped ? 0 : (time_t)FAR, 0}};
    CHECK(setitimer(ITIMER_VIRTUAL, &when, NULL) == 0 && setitimer(ITIMER_PROF, &when, NULL) == 0);
    pthread_t idler = guest_thread(idle, NULL), worker = guest_thread(work, NULL);
    while (!idler_id || !worker_id)
        guest_sleep_ms(1);
    clockid_t clock;
    CHECK(pthread_getcpuclockid(worker, &clock) == 0);
    timer(clock, 1, 0.02, 0.02);
    timer(CLOCK_PROCESS_CPUTIME_ID, 2, 0.02, 0.02);
    CHECK(pthread_getcpuclockid(idler, &clock) == 0);
    timer_t of_idler = timer(clock, -1, FAR, 0), of_worker, own = timer(CLOCK_THREAD_CPUTIME_ID, -1, FAR, 0);
    CHECK(pthread_getcpuclockid(worker, &clock) == 0);
    of_worker = timer(clock, -1, FAR, 0);

    double idle_left = FAR, work_left = FAR, own_left = FAR, virtual_left = FAR + 0.02, prof_left = FAR + 0.02;
    long seen[3] = {0};
    ROUNDS(round)
    {
        burn(100000);
        less("the worker's", left(of_worker), &work_left);
        less("the idler's", left(of_idler), &idle_left);
        less("the main thread's", left(own), &own_left);
        if (stopped)
            CHECK(left_of(ITIMER_VIRTUAL, 77.005) == 0 && left_of(ITIMER_PROF, 77.005) == 0);
        else {
            less("ITIMER_VIRTUAL", left_of(ITIMER_VIRTUAL, 77.005), &virtual_left);
            less("ITIMER_PROF", left_of(ITIMER_PROF, 77.005), &prof_left);
        }
        if (round % 100 == 99)
            for (int i = 0; i < 3; i++) {
                if (ticks[i] <= seen[i])
                    FAIL("timer %d ticks no more (%ld)", i, ticks[i]);
                seen[i] = ticks[i];
            }
    }
    /* All of a run: the worker has worked for much of it, the idler has not. */
    double worked = FAR - work_left, idled = FAR - idle_left;
    if (worked < 10 * idled || worked < 0.02 * guest_seconds())
        FAIL("the worker has worked %.3f s, the idler %.3f s", worked, idled);
    if (!stopped && FAR - prof_left < 0.02 * guest_seconds())
        FAIL("ITIMER_PROF has counted %.3f s", FAR - prof_left);
    over = 1;
    guest_join(idler);
    guest_join(worker);
    printf("timers of CPU time ok\n");
    guest_end();
}
