/* Changes files in ways that an ordinary user's rights make hard to take back, after a checkpoint
 * that it asks for: which one says its argument. Killed there and started again it finds itself
 * behind that checkpoint once more, and ends. */
#include "ckpt.h"
#include "guest.h"
#include <stdio.h>
#include <sys/xattr.h>

static void make(const char *name, int mode)
{
    char block[20000];
    memset(block, 'o', sizeof block);
    int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0);
    CHECK_EQ(write(fd, block, sizeof block), sizeof block);
    CHECK_EQ(fchmod(fd, mode), 0);
    close(fd);
}

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    const char *what = argv[1];
    if (!strcmp(what, "setup")) {
        CHECK_EQ(mkdir("d", 0700) | mkdir("d/e", 0700), 0);
        make("d/f", 0400);
        make("d/g", 0644);
        make("d/e/x", 0644);
        make("w", 0200);
        make("m", 0644);
        CHECK_EQ(chmod("d/e", 0) | chmod("d", 0500), 0);
        return 0;
    }
    int w = open("w", O_WRONLY), m = open("m", O_RDWR);
    CHECK(w >= 0 && m >= 0);
    int result = ckpt_checkpoint(5);
    CHECK(result >= 0);
    if (result > 0)
        exit(GUEST_END);
    if (!strcmp(what, "dirs")) {
        CHECK_EQ(chmod("d", 0700) | chmod("d/e", 0700), 0);
        CHECK_EQ(unlink("d/g") | rename("d/e/x", "d/e/y"), 0);
        CHECK_EQ(chmod("d/f", 0600), 0);
        CHECK_EQ(truncate("d/f", 5), 0);
        make("d/new", 0400);
        CHECK_EQ(chmod("d/f", 0400) | chmod("d/e", 0), 0);
        CHECK_EQ(rename("d/e", "d/moved"), 0);
        CHECK_EQ(mkdir("b", 0700) | mkdir("b/c", 0700), 0);
        make("b/c/x", 0444);
        CHECK_EQ(chmod("b/c", 0555) | chmod("b", 0555) | chmod("d", 0500), 0);
    } else if (!strcmp(what, "mapped")) {
        char *at = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, m, 0);
        CHECK(at != MAP_FAILED);
        guest_sleep_ms(50);
        at[0] = 1;
    } else if (!strcmp(what, "unreadable")) {
        CHECK_EQ(pwrite(w, "Z", 1, 100), 1);
    } else if (!strcmp(what, "theirs")) {
        CHECK_EQ(unlink("theirs"), 0);
    }
    raise(SIGKILL);
    return 1;
}
