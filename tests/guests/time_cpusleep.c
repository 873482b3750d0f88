/* Proves: a sleep of CPU time (clock_nanosleep on such a clock) lasts until so much has been worked, whatever stops there
 * are: after one it was counted by the wall clock, and woke an idle program ten times too early. */
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

/* When this life began: a restored program's clock begins anew. */
static unsigned long life(void)
{
    char text[2048];
    CHECK(guest_slurp("/proc/self/stat", text, sizeof text) > 0);
    char *word = strrchr(text, ')') + 2;
    for (int field = 3; field < 22; field++)
        word = strchr(word, ' ') + 1;
    return strtoul(word, NULL, 10);
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
        unsigned long before = life();
        double from = worked();
        CHECK_EQ(clock_nanosleep(CLOCK_PROCESS_CPUTIME_ID, 0, &length, NULL), 0);
        double slept = worked() - from;
        if (life() == before && slept < LENGTH - TICK)
            FAIL("slept %.3f s of CPU time, not %.3f", slept, LENGTH);
    }
    over = 1;
    guest_join(worker);
    printf("sleeps of CPU time ok\n");
    guest_end();
}
