/* The micro measurements of scripts/bench: `micro KIND COUNT [ARG]` does COUNT operations
 * and prints nanoseconds for one of them. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static long count;

static void *allocate(void *argument)
{
    void *slot[64] = {0};
    unsigned dice = (unsigned)(size_t)argument;
    for (long i = 0; i < count; i++) {
        dice = dice * 1103515245 + 12345;
        unsigned s = dice >> 16 & 63;
        free(slot[s]);
        slot[s] = malloc(16 + (dice >> 8 & 1023));
        *(volatile char *)slot[s] = 1;
    }
    for (int i = 0; i < 64; i++)
        free(slot[i]);
    return NULL;
}

static void *nothing(void *argument) { return argument; }

static void spawn(char *path)
{
    char *argv[] = {path, NULL};
    pid_t child = fork();
    if (child == 0) {
        execv(path, argv);
        _exit(127);
    }
    int status;
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
        exit(1);
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    count = atol(argv[2]);
    double begin = now();
    if (!strcmp(argv[1], "malloc")) {
        pthread_t thread[4];
        for (size_t i = 0; i < 4; i++)
            pthread_create(&thread[i], NULL, allocate, (void *)(i + 1));
        for (int i = 0; i < 4; i++)
            pthread_join(thread[i], NULL);
        count *= 4;
    } else if (!strcmp(argv[1], "open")) {
        for (long i = 0; i < count; i++)
            close(open(argc > 3 ? argv[3] : "/dev/null", O_RDONLY));
    } else if (!strcmp(argv[1], "write")) {
        static char block[512];
        int fd = open(argc > 3 ? argv[3] : "bench.out", O_WRONLY | O_CREAT | O_TRUNC, 0600);
        for (long i = 0; i < count; i++) {
            if (write(fd, block, sizeof block) != sizeof block)
                return 1;
            if (i % 4096 == 4095)
                lseek(fd, 0, SEEK_SET);
        }
    } else if (!strcmp(argv[1], "thread")) {
        for (long i = 0; i < count; i++) {
            pthread_t thread;
            if (pthread_create(&thread, NULL, nothing, NULL) || pthread_join(thread, NULL))
                return 1;
        }
    } else if (!strcmp(argv[1], "spawn")) {
        for (long i = 0; i < count; i++)
            spawn("/bin/true");
    } else
        return 2;
    printf("%.1f\n", (now() - begin) / count);
    return 0;
}
