/*
 * A program under RLIMIT_FSIZE of argv[1] bytes, which writes small files and never reaches it, with
 * checkpoints by a clock. It ends with 0 by itself.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

static char heap[3 << 20];

int main(int argc, char **argv)
{
    long most = argc > 1 ? atol(argv[1]) : 4096;
    const struct rlimit limit = {most, most};
    memset(heap, 7, sizeof heap);
    if (setrlimit(RLIMIT_FSIZE, &limit))
        return 1;
    for (int i = 0; i < 200; i++) {
        char name[16];
        snprintf(name, sizeof name, "r%d", i % 20);
        int fd = open(name, O_RDWR | O_CREAT, 0644);
        if (pwrite(fd, "hello", 5, i) != 5)
            return 2;
        close(fd);
        usleep(5000);
        heap[i * 4096]++;
    }
    return 0;
}
