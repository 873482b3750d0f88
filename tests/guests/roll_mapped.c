/* Files mapped privately, written to, moved, replaced or removed since the checkpoint: the
 * rollback brings them back, and the mappings show what they showed. Pages of them that the
 * program has made its own go back as all memory. */
#include "guest.h"

#include "ckpt.h"

#define SIZE 16384

static const char *const names[] = {"written", "replaced", "removed", "own"};
static volatile char *maps[4];

static void check_all(void)
{
    for (int k = 0; k < 4; k++) {
        char now[SIZE];
        int fd = open(names[k], O_RDONLY | O_CLOEXEC);
        CHECK(fd >= 0);
        CHECK_EQ(read(fd, now, SIZE), SIZE);
        close(fd);
        for (int i = 0; i < SIZE; i++) {
            CHECK_EQ(now[i], 'a' + k);
            CHECK_EQ(maps[k][i], k == 3 && i == 5000 ? 'X' : 'a' + k);
        }
    }
}

int main(void)
{
    guest_begin();
    char text[SIZE];
    for (int k = 0; k < 4; k++) {
        int fd = open(names[k], O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
        CHECK(fd >= 0);
        memset(text, 'a' + k, SIZE);
        CHECK_EQ(write(fd, text, SIZE), SIZE);
        int prot = k == 3 ? PROT_READ | PROT_WRITE : PROT_READ;
        maps[k] = mmap(NULL, SIZE, prot, MAP_PRIVATE, fd, 0);
        CHECK(maps[k] != MAP_FAILED);
        close(fd);
    }
    maps[3][5000] = 'X';
    check_all();
    volatile int back = 0;
    CHECK_EQ(ckpt_checkpoint(1), back);
    check_all();
    if (back < 3) {
        back++;
        for (int k = 0; k < 4; k += 3) {
            int fd = open(names[k], O_WRONLY | O_CLOEXEC);
            CHECK(fd >= 0);
            CHECK_EQ(pwrite(fd, "changed", 7, 9000), 7);
            close(fd);
        }
        maps[3][5000] = 'Y';
        maps[3][1] = 'Z';
        CHECK_EQ(rename("replaced", "elsewhere"), 0);
        int fd = open("replaced", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
        CHECK(fd >= 0 && write(fd, "new", 3) == 3);
        close(fd);
        CHECK_EQ(unlink("removed"), 0);
        struct ckpt_region keep = {(void *)&back, sizeof back};
        ckpt_rollback(1, back, &keep, 1);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    CHECK(access("elsewhere", F_OK) != 0);
    printf("mapped ok\n");
    guest_end();
}
