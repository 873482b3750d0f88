/* A library that starts threads when it is loaded, as linear algebra libraries do with
 * their pools: preloaded after libckpt.so, its constructor runs first. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <time.h>

static volatile long counts[2];

static void *spin(void *arg)
{
    volatile long *count = arg;
    for (;;) {
        for (int k = 0; k < 100; k++) {
            ++*count;
            sched_yield();
        }
        nanosleep(&(struct timespec){0, 500000}, NULL);
    }
    return NULL;
}

long early_count(int k) { return counts[k]; }

__attribute__((constructor)) static void start(void)
{
    pthread_t thread;
    for (int k = 0; k < 2; k++)
        pthread_create(&thread, NULL, spin, (void *)&counts[k]);
}
