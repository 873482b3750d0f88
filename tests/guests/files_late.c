/*
 * Closes its standard error and holds the lock of a file, takes a checkpoint and dies by SIGKILL.
 * Where somebody else has the lock by then, a restore fails when the program's own descriptors
 * are there already. Resumed, it ends with 73.
 */
#include "ckpt.h"
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <unistd.h>

int main(void)
{
    int fd = open("locked", O_RDWR | O_CREAT, 0600);
    if (fd < 0 || flock(fd, LOCK_EX | LOCK_NB) != 0 || close(2) != 0)
        return 1;
    int taken = ckpt_checkpoint(0);
    if (taken != 0)
        return taken > 0 ? 73 : 2;
    kill(getpid(), SIGKILL);
}
