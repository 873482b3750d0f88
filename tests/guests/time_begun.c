/* Proves: no sleep ends before its time, also not one that has begun while a stop was waiting for other threads. Forty
 * threads sleep a second each, one after the other; the processors are busy, so that a stop takes a while. */
#include "guest.h"

#define SLEEPERS 40
#define BUSY 6
#define SLEEP_MS 1000

static volatile int over;

static double now_ms(void)
{
    struct timespec now;
    CHECK(clock_gettime(CLOCK_MONOTONIC, &now) == 0);
    return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

static void *sleeps(void *argument)
{
    long k = (long)argument;
    guest_sleep_ms(k * SLEEP_MS / SLEEPERS);
    for (long round = 0; round < guest_rounds() * 10 / SLEEP_MS; round++) {
        double begun = now_ms();
        guest_sleep_ms(SLEEP_MS);
        double slept = now_ms() - begun;
        if (slept < SLEEP_MS - 1)
            FAIL("thread %ld slept %.1f ms in round %ld", k, slept, round);
    }
    return NULL;
}

static void *works(void *argument)
{
    uint64_t x = (uintptr_t)argument;
    while (!over)
        x = guest_mix(x);
    return (void *)(uintptr_t)(x & 1);
}

int main(void)
{
    pthread_t sleeper[SLEEPERS], busy[BUSY];
    guest_begin();
    for (long k = 0; k < BUSY; k++)
        busy[k] = guest_thread(works, (void *)k);
    for (long k = 0; k < SLEEPERS; k++)
        sleeper[k] = guest_thread(sleeps, (void *)k);
    for (int k = 0; k < SLEEPERS; k++)
        guest_join(sleeper[k]);
    over = 1;
    for (int k = 0; k < BUSY; k++)
        guest_join(busy[k]);
    printf("%d threads slept long enough\n", SLEEPERS);
    guest_end();
}
