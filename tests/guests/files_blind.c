/*
 * Hides the loaded libraries, so that no call-site net is laid: what it does to files is not
 * seen. Writes before the checkpoint and after it, and dies by SIGKILL; resumed, it ends with 73.
 */
#define _GNU_SOURCE
#include "ckpt.h"
#include <fcntl.h>
#include <link.h>
#include <signal.h>
#include <unistd.h>

/* Instead of libc's: none are loaded. */
int dl_iterate_phdr(int (*each)(struct dl_phdr_info *, size_t, void *), void *data)
{
    (void)each;
    (void)data;
    return 0;
}

int main(void)
{
    int fd = open("out", O_RDWR | O_CREAT, 0600);
    for (int generation = 0; generation < 2; generation++) {
        if (write(fd, "before ", 7) != 7)
            return 1;
        int taken = ckpt_checkpoint(0);
        if (taken != 0)
            return taken > 0 ? 73 : 2;
        if (write(fd, "after ", 6) != 6)
            return 1;
    }
    kill(getpid(), SIGKILL);
}
