/* `progress MIB FILE`: fills MIB of memory with random content and then counts for ever,
 * showing in FILE (mapped shared) how far it is and the longest gap between two steps: the
 * stop as the program itself feels it. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

struct shown {
    volatile uint64_t steps; /* 0: nothing yet, or set to 0 by the one who measures */
    volatile double longest; /* ns; likewise */
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    size_t words = (size_t)atol(argv[1]) << 17;
    int fd = open(argv[2], O_RDWR | O_CREAT, 0600);
    if (fd < 0 || ftruncate(fd, 4096) != 0)
        return 1;
    struct shown *shown = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    uint64_t *memory = mmap(NULL, words * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (shown == MAP_FAILED || memory == MAP_FAILED)
        return 1;
    uint64_t dice = 88172645463325252ull;
    for (size_t i = 0; i < words; i++) {
        dice ^= dice << 13, dice ^= dice >> 7, dice ^= dice << 17;
        memory[i] = dice;
    }
    double last = now();
    for (uint64_t step = 1;; step++) {
        for (int i = 0; i < 100; i++) {
            dice ^= dice << 13, dice ^= dice >> 7, dice ^= dice << 17;
            if (memory[dice % words] == 1)
                return 3;
        }
        double time = now();
        if (time - last > shown->longest)
            shown->longest = time - last;
        last = time;
        shown->steps = step;
    }
}
