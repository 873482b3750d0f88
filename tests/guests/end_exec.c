/* Executes itself again and again, from the first thread and from another one, after calls of
 * exec that fail, while checkpoints are taken as often as can be. It ends well when the last
 * one of them has run. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static char left[16];
static char *program;

static long now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000L + t.tv_nsec / 1000;
}

static void *execute(void *argument)
{
    char *const arguments[] = {program, left, NULL};
    char *const nothing[] = {"nothing", NULL};
    for (int i = 0; i < 3; i++) {
        execv("/nonexistent/nothing", nothing);
        if (errno != ENOENT)
            _exit(3);
    }
    execv("/proc/self/exe", arguments);
    _exit(4);
    return argument;
}

static void *idle(void *argument)
{
    for (;;)
        usleep(200);
    return argument;
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    program = argv[0];
    int count = atoi(argv[1]);
    pthread_t thread;
    pthread_create(&thread, NULL, idle, NULL);
    for (long end = now_us() + 2000 + count * 7919 % 5000; now_us() < end;)
        ;
    if (count == 0) {
        puts("the last one has run");
        return 0;
    }
    snprintf(left, sizeof left, "%d", count - 1);
    if (count % 2)
        execute(NULL);
    pthread_create(&thread, NULL, execute, NULL);
    pthread_join(thread, NULL);
    return 5;
}
