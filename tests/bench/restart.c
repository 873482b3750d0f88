/* `restart MIB FILE`: fills MIB of memory with random content and waits until FILE (mapped
 * shared) says go. Then it reads 1 % of the pages at random, reads all, writes all, and notes in
 * FILE when each was done (CLOCK_MONOTONIC, ns). For measuring restarts: see
 * scripts/bench-restart. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

struct control {
    volatile uint64_t ready, go, linger_us;
    volatile uint64_t done[4]; /* running, 1 % read, all read, all written */
};

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    size_t pages = (size_t)atol(argv[1]) << 8;
    int fd = open(argv[2], O_RDWR | O_CREAT, 0600);
    if (fd < 0 || ftruncate(fd, 4096) != 0)
        return 2;
    struct control *control = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    uint64_t *memory = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (control == MAP_FAILED || memory == MAP_FAILED)
        return 2;
    uint64_t dice = 88172645463325252ull, sum = 0;
    for (size_t i = 0; i < pages * 512; i++) {
        dice ^= dice << 13, dice ^= dice >> 7, dice ^= dice << 17;
        memory[i] = dice;
    }
    control->ready = 1;
    while (!control->go)
        usleep(100);
    control->done[0] = now();
    for (size_t i = 0; i < pages / 100; i++) {
        dice ^= dice << 13, dice ^= dice >> 7, dice ^= dice << 17;
        sum += memory[dice % pages * 512];
    }
    control->done[1] = now();
    /* Time to be looked at, before everything is touched. */
    usleep(control->linger_us);
    uint64_t lingered = now() - control->done[1];
    for (size_t i = 0; i < pages; i++)
        sum += memory[i * 512];
    control->done[2] = now() - lingered;
    for (size_t i = 0; i < pages; i++)
        memory[i * 512] = sum;
    control->done[3] = now() - lingered;
    return 1; /* the job stays */
}
