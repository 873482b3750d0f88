/* A rollback for which there is no room on the disk: what is to be written back does not fit
 * beside what the program has filled it with and has open still. That is found before anything
 * is touched (EIO, the program goes on), and with the disk free again it goes back.
 * argv[1]: a directory on a small file system; argv[2]: the store is on it too. */
#include "guest.h"

#include "ckpt.h"

#define BLOCKS 100

int main(int argc, char **argv)
{
    static char block[4096];
    CHECK(argc >= 2);
    CHECK(chdir(argv[1]) == 0);
    int fd = open("work", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    memset(block, 'a', sizeof block);
    for (int k = 0; k < BLOCKS; k++)
        CHECK_EQ(write(fd, block, sizeof block), sizeof block);
    volatile int back = ckpt_checkpoint(1);
    CHECK(back == 0 || back == 1);
    if (!back) {
        CHECK(ftruncate(fd, 0) == 0);
        int fill = open("fill", O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
        while (write(fill, block, sizeof block) > 0)
            ;
        CHECK_EQ(errno, ENOSPC);
        errno = 0;
        CHECK_EQ(ckpt_rollback(1, 1, NULL, 0), -1);
        CHECK_EQ(errno, EIO);
        struct stat st;
        CHECK(fstat(fd, &st) == 0);
        CHECK_EQ(st.st_size, 0);
        CHECK(access("fill", F_OK) == 0);
        close(fill);
        /* Closed, it is removed by the rollback itself; but what that notes in the store
         * before needs room as well. */
        if (argc > 2) {
            errno = 0;
            CHECK_EQ(ckpt_rollback(1, 1, NULL, 0), -1);
            CHECK_EQ(errno, EIO);
            CHECK(unlink("fill") == 0);
        }
        ckpt_rollback(1, 1, NULL, 0);
        FAIL("ckpt_rollback with room: errno %d", errno);
    }
    CHECK_EQ(access("fill", F_OK), -1);
    CHECK_EQ(lseek(fd, 0, SEEK_END), BLOCKS * sizeof block);
    CHECK_EQ(pread(fd, block, sizeof block, 4096 * 50), sizeof block);
    CHECK_EQ(block[100], 'a');
    printf("full ok\n");
    guest_end();
}
