/* `start COUNT PROGRAM`: microseconds (median, one a line) to start PROGRAM and see it end,
 * with the environment that start itself was given but for BENCH_PRELOAD, which becomes
 * LD_PRELOAD for PROGRAM alone. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    int count = atoi(argv[1]);
    double *took = calloc(count, sizeof *took);
    const char *preload = getenv("BENCH_PRELOAD");
    if (preload && *preload)
        setenv("LD_PRELOAD", preload, 1); /* this process itself was started without */
    for (int i = 0; i < count; i++) {
        struct timespec a, b;
        int status;
        clock_gettime(CLOCK_MONOTONIC, &a);
        pid_t child = vfork();
        if (child == 0) {
            execv(argv[2], argv + 2);
            _exit(127);
        }
        if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
            return 1;
        clock_gettime(CLOCK_MONOTONIC, &b);
        took[i] = (b.tv_sec - a.tv_sec) * 1e6 + (b.tv_nsec - a.tv_nsec) / 1e3;
    }
    qsort(took, count, sizeof *took, by_size);
    printf("%.1f\n", took[count / 2]);
    return 0;
}
