/* A file of the checkpoint that was closed since and cannot be opened again is found before
 * there is no way back: EIO, nothing is touched, files least of all. Left alone by the
 * rollback (excluded), it was deleted, replaced, or locked away. One that the rollback itself
 * brings back is no obstacle. */
#include "guest.h"

#include "ckpt.h"

static volatile long global = 1;

static void make(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    CHECK(fd >= 0);
    CHECK_EQ(write(fd, text, strlen(text)), strlen(text));
    close(fd);
}

static void refused(int id)
{
    char now[64];
    global = 2;
    make("changed", "after\n");
    errno = 0;
    CHECK_EQ(ckpt_rollback(id, 1, NULL, 0), -1);
    CHECK_EQ(errno, EIO);
    CHECK_EQ(global, 2);
    CHECK(guest_slurp("changed", now, sizeof now) >= 0);
    CHECK(strcmp(now, "after\n") == 0);
}

int main(void)
{
    guest_begin();
    char dir[4000], glob[4100];
    CHECK(getcwd(dir, sizeof dir) != NULL);
    snprintf(glob, sizeof glob, "%s/left", dir);
    CHECK(ckpt_exclude(glob) == 0);
    snprintf(glob, sizeof glob, "%s/left/*", dir);
    CHECK(ckpt_exclude(glob) == 0);
    mkdir("left", 0755);
    make("left/alone", "left alone\n");
    make("back", "comes back\n");
    make("changed", "before\n");
    volatile int back = 0;
    CHECK(ckpt_checkpoint(1) == 0 || back);
    if (!back) {
        int alone = open("left/alone", O_RDONLY | O_CLOEXEC), other = open("back", O_RDWR);
        CHECK(alone >= 0 && other >= 0);
        char text[8];
        CHECK_EQ(read(alone, text, 5), 5);
        int result = ckpt_checkpoint(2);
        if (result != 0)
            FAIL("back from what must not work: %d, errno %d", result, errno);
        CHECK_EQ(lseek(alone, 0, SEEK_CUR), 5);
        close(alone);
        close(other);
        CHECK(unlink("back") == 0);
        CHECK(link("left/alone", "left/aside") == 0 && unlink("left/alone") == 0);
        refused(2);
        make("left/alone", "another one\n");
        refused(2);
        CHECK(rename("left/aside", "left/alone") == 0);
        if (geteuid() != 0) {
            CHECK(chmod("left", 0) == 0);
            refused(2);
            CHECK(chmod("left", 0755) == 0);
        }
        back = 1;
        struct ckpt_region keep = {(void *)&back, sizeof back};
        ckpt_rollback(1, 1, &keep, 1);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    CHECK_EQ(global, 1);
    /* What the rollback brings back can be opened. */
    int fd = open("back", O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0);
    volatile int again = 0;
    CHECK(ckpt_checkpoint(3) == again);
    CHECK_EQ(fcntl(fd, F_GETFD) >= 0, 1);
    if (!again) {
        again = 1;
        close(fd);
        CHECK(unlink("back") == 0);
        struct ckpt_region keep = {(void *)&again, sizeof again};
        ckpt_rollback(3, 1, &keep, 1);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    printf("reopen ok\n");
    guest_end();
}
