/* The file measurements of scripts/bench: `files KIND COUNT` prepares, takes a checkpoint by
 * call where the library is loaded (so that a table is open and every modification is
 * looked at), does COUNT operations and prints nanoseconds for one of them. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

__attribute__((weak)) int ckpt_checkpoint(int id);

/* BENCH_CLOCK=cpu: the time that the process has computed, for a machine with other work. */
static double now(void)
{
    struct timespec t;
    const char *clock = getenv("BENCH_CLOCK");
    clock_gettime(clock && !strcmp(clock, "cpu") ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static void checkpoint(void)
{
    if (ckpt_checkpoint && ckpt_checkpoint(0) < 0) {
        perror("ckpt_checkpoint");
        exit(1);
    }
}

#define MUST(condition) do { if (!(condition)) { perror(#condition); exit(1); } } while (0)

enum { BLOCK = 4096 };

/* A file of COUNT blocks, and an order to overwrite them in. */
static int big(const char *name, long count)
{
    static char block[BLOCK];
    int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
    MUST(fd >= 0);
    for (long i = 0; i < count; i++) {
        memset(block, (int)i, sizeof block);
        MUST(write(fd, block, sizeof block) == sizeof block);
    }
    return fd;
}

static void overwrite(int fd, long count)
{
    static char block[BLOCK];
    unsigned long at = 1;
    for (long i = 0; i < count; i++) {
        at = (at * 1103515245 + 12345) % (unsigned long)count;
        MUST(pwrite(fd, block, sizeof block, (off_t)at * BLOCK) == sizeof block);
    }
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    const char *kind = argv[1];
    long count = atol(argv[2]);
    double begin = 0;
    char small[512], name[64];
    memset(small, 'x', sizeof small);
    if (!strcmp(kind, "append")) {
        int fd = big("bench.append", 16);
        checkpoint();
        begin = now();
        for (long i = 0; i < count; i++)
            MUST(write(fd, small, sizeof small) == sizeof small);
    } else if (!strcmp(kind, "overwrite") || !strcmp(kind, "overwrite-again")) {
        int fd = big("bench.over", count);
        checkpoint();
        if (kind[9])
            overwrite(fd, count);
        begin = now();
        overwrite(fd, count);
    } else if (!strcmp(kind, "fprintf")) {
        FILE *file = fopen("bench.lines", "w");
        MUST(file != NULL);
        fprintf(file, "head\n");
        fflush(file);
        checkpoint();
        begin = now();
        for (long i = 0; i < count; i++)
            fprintf(file, "%ld %f line\n", i, i / 3.0);
        fclose(file);
    } else if (!strcmp(kind, "open")) {
        close(big("bench.open", 1));
        checkpoint();
        begin = now();
        for (long i = 0; i < count; i++)
            MUST(close(open("bench.open", O_RDWR)) == 0);
    } else if (!strcmp(kind, "open-read")) {
        close(big("bench.open", 1));
        checkpoint();
        begin = now();
        for (long i = 0; i < count; i++)
            MUST(close(open("bench.open", O_RDONLY)) == 0);
    } else if (!strcmp(kind, "stat")) {
        close(big("bench.stat", 1));
        struct stat st;
        checkpoint();
        begin = now();
        for (long i = 0; i < count; i++)
            MUST(stat("bench.stat", &st) == 0);
    } else if (!strcmp(kind, "held")) {
        /* Checkpoints with COUNT files open that nobody touches; the log tells what they take. */
        for (long i = 0; i < count; i++) {
            snprintf(name, sizeof name, "bench.held.%ld", i);
            int fd = open(name, O_RDWR | O_CREAT, 0600);
            MUST(fd >= 0 && write(fd, small, sizeof small) == sizeof small);
        }
        begin = now();
        for (int i = 0; i < 9; i++)
            checkpoint();
        count = 9;
    } else if (!strcmp(kind, "create")) {
        /* As `tar x` of many small files. */
        mkdir("bench.dir", 0700);
        for (long i = 0; i < count; i++) {
            snprintf(name, sizeof name, "bench.dir/%ld", i);
            unlink(name);
        }
        checkpoint();
        begin = now();
        for (long i = 0; i < count; i++) {
            snprintf(name, sizeof name, "bench.dir/%ld", i);
            int fd = open(name, O_WRONLY | O_CREAT | O_EXCL, 0600);
            MUST(fd >= 0 && write(fd, small, sizeof small) == sizeof small && close(fd) == 0);
        }
    } else if (!strcmp(kind, "create-absolute")) {
        /* The same by absolute paths, some directories deep. */
        char base[4096], path[5000];
        MUST(mkdir("bench.a", 0700) == 0 && mkdir("bench.a/b", 0700) == 0 && mkdir("bench.a/b/c", 0700) == 0);
        MUST(getcwd(base, sizeof base) != NULL);
        checkpoint();
        begin = now();
        for (long i = 0; i < count; i++) {
            snprintf(path, sizeof path, "%s/bench.a/b/c/%ld", base, i);
            int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0600);
            MUST(fd >= 0 && write(fd, small, sizeof small) == sizeof small && close(fd) == 0);
        }
    } else if (!strcmp(kind, "tree")) {
        /* What `tar x` does: ten files a directory, with modes and times. */
        struct timespec times[2] = {{1000000000, 0}, {1000000000, 0}};
        checkpoint();
        begin = now();
        for (long i = 0; i < count; i++) {
            snprintf(name, sizeof name, "bench.%ld", i / 10);
            if (i % 10 == 0)
                MUST(mkdir(name, 0700) == 0);
            snprintf(name, sizeof name, "bench.%ld/%ld", i / 10, i);
            int fd = openat(AT_FDCWD, name, O_WRONLY | O_CREAT | O_EXCL, 0600);
            MUST(fd >= 0 && write(fd, small, sizeof small) == sizeof small);
            MUST(futimens(fd, times) == 0 && fchmod(fd, 0644) == 0 && close(fd) == 0);
        }
    } else if (!strcmp(kind, "create-unlink")) {
        /* A temporary file, over and over. */
        checkpoint();
        begin = now();
        for (long i = 0; i < count; i++) {
            int fd = open("bench.tmp", O_WRONLY | O_CREAT | O_EXCL, 0600);
            MUST(fd >= 0 && write(fd, small, sizeof small) == sizeof small && close(fd) == 0);
            MUST(unlink("bench.tmp") == 0);
        }
    } else if (!strcmp(kind, "unlink")) {
        /* Files that were there. */
        mkdir("bench.dir", 0700);
        for (long i = 0; i < count; i++) {
            snprintf(name, sizeof name, "bench.dir/%ld", i);
            close(open(name, O_WRONLY | O_CREAT, 0600));
        }
        checkpoint();
        begin = now();
        for (long i = 0; i < count; i++) {
            snprintf(name, sizeof name, "bench.dir/%ld", i);
            MUST(unlink(name) == 0);
        }
    } else
        return 2;
    printf("%.1f\n", (now() - begin) / count);
    return 0;
}
