/* Proves: a sleep of CPU time (clock_nanosleep on such a clock) lasts until so much has been worked, whatever stops there
 * are: after one it was counted by the wall clock, and woke an idle program ten times too early. Clocks that hold an id are the
 * same clocks after a restart under other ids: there a sleep that was going on ended with EINVAL. */
#include "guest.h"

#define LENGTH 0.1
#define TICK 0.012 /* the kernel looks at these clocks so often */

static volatile int over;

static double worked(void)
{
    struct timespec now;
    CHECK(clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now) == 0);
    return now.tv_sec + now.tv_nsec / 1e9;
}

static void *work_now_and_then(void *unused)
{
    volatile uint64_t x = 1;
    while (!over) {
        for (int i = 0; i < 300000; i++)
            x = guest_mix(x);
        guest_sleep_ms(20);
    }
    return unused;
}

int main(void)
{
    guest_begin();
    pthread_t worker = guest_thread(work_now_and_then, NULL);
    const struct timespec length = {0, (long)(LENGTH * 1e9)};
    for (long round = 0, rounds = (long)(guest_seconds() * 2) + 1; round < rounds; round++) {
        unsigned long before = guest_life();
        double from = worked();
        clockid_t clock = CLOCK_PROCESS_CPUTIME_ID;
        if (round % 3 == 1)
            CHECK(clock_getcpuclockid(getpid(), &clock) == 0);
        if (round % 3 == 2)
            CHECK(pthread_getcpuclockid(worker, &clock) == 0);
        CHECK_EQ(clock_nanosleep(clock, 0, &length, NULL), 0);
        double slept = worked() - from;
        /* A restored program's clock begins anew. */
        if (guest_life() == before && slept < LENGTH - TICK)
            FAIL("slept %.3f s of CPU time, not %.3f", slept, LENGTH);
    }
    over = 1;
    guest_join(worker);
    printf("sleeps of CPU time ok\n");
    guest_end();
}
