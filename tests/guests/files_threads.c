/*
 * Four threads write records through one descriptor over a file that existed at the checkpoint; then
 * SIGKILL. Resumed, the program ends with 73 if the file is what it was, with 1 if blocks of the
 * threads are left.
 */
#define _GNU_SOURCE
#include "ckpt.h"
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { RECORDS = 2000, LEN = 4096 };
static int fd;
static char record[LEN];

static void *writer(void *argument)
{
    for (int i = 0; i < 400; i++)
        if (write(fd, record, LEN) != LEN)
            _exit(2);
    return argument;
}

int main(void)
{
    memset(record, 'B', LEN);
    fd = open("shared", O_RDWR | O_CREAT | O_TRUNC, 0644);
    for (int i = 0; i < RECORDS; i++)
        if (write(fd, record, LEN) != LEN)
            return 2;
    lseek(fd, 0, SEEK_SET);
    if (ckpt_checkpoint(0) > 0) {
        int wrong = 0;
        for (int i = 0; i < RECORDS; i++) {
            if (pread(fd, record, LEN, (off_t)i * LEN) != LEN)
                return 2;
            wrong += record[0] != 'B' || record[LEN - 1] != 'B';
        }
        printf("%d records of the threads are left\n", wrong);
        return wrong ? 1 : 73;
    }
    memset(record, 'Z', LEN);
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, writer, NULL);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    kill(getpid(), SIGKILL);
}
