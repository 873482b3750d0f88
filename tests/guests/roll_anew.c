/* Rollbacks to one checkpoint whose files and directories each rollback has to make anew, or to find
 * under other names: removed, replaced and exchanged while they are open, closed, or the working
 * directory. And one that is not brought back: it was renamed while it was excluded. */
#include "guest.h"

#include "ckpt.h"

static volatile int turn; /* protected */

static void put(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    CHECK(fd >= 0);
    CHECK_EQ(write(fd, text, strlen(text)), strlen(text));
    close(fd);
}

static void has(int fd, const char *text)
{
    char now[16] = "";
    CHECK(pread(fd, now, sizeof now - 1, 0) >= 0);
    if (strcmp(now, text) != 0)
        FAIL("turn %d: descriptor %d holds '%s', not '%s'", turn, fd, now, text);
}

static int back(void)
{
    turn++;
    struct ckpt_region keep = {(void *)&turn, sizeof turn};
    ckpt_rollback(1, turn, &keep, 1);
    return errno;
}

int main(void)
{
    guest_begin();
    char base[4096];
    CHECK(getcwd(base, sizeof base) != NULL);
    CHECK(mkdir("dir", 0755) == 0 && mkdir("work", 0755) == 0);
    put("dir/inside", "inside");
    put("one", "1");
    put("two", "2");
    put("left", "left");
    CHECK(mkfifo("fifo", 0644) == 0);
    int dir = open("dir", O_RDONLY | O_DIRECTORY | O_CLOEXEC), inside = open("dir/inside", O_RDONLY | O_CLOEXEC);
    int one = open("one", O_RDONLY | O_CLOEXEC), two = open("two", O_RDWR | O_CLOEXEC);
    int fifo = open("fifo", O_RDWR | O_NONBLOCK | O_CLOEXEC), left = open("left", O_RDONLY | O_CLOEXEC);
    CHECK(dir >= 0 && inside >= 0 && one >= 0 && two >= 0 && fifo >= 0 && left >= 0);
    CHECK(chdir("work") == 0);
    CHECK_EQ(ckpt_checkpoint(1), turn);
    /* All is there, behind the names and behind the descriptors. */
    struct stat by_name, by_fd;
    CHECK(chdir("..") == 0);
    CHECK(stat("dir", &by_name) == 0 && fstat(dir, &by_fd) == 0);
    CHECK_EQ(by_name.st_ino, by_fd.st_ino);
    int again = openat(dir, "inside", O_RDONLY | O_CLOEXEC);
    CHECK(again >= 0);
    has(again, "inside"), has(inside, "inside"), has(one, "1"), has(two, "2"), has(left, "left");
    CHECK(write(fifo, "f", 1) == 1);
    switch (turn) {
    case 0: /* removed, open */
    case 2: /* the same again, closed */
        CHECK(unlink("dir/inside") == 0 && rmdir("dir") == 0 && rmdir("work") == 0);
        CHECK(unlink("fifo") == 0 && unlink("one") == 0);
        if (turn == 2) {
            close(dir), close(inside), close(one), close(fifo);
            put("dir", "a file");
        }
        break;
    case 1: /* nothing but closed */
        close(dir), close(inside), close(one), close(two), close(fifo);
        break;
    case 3: /* exchanged, closed */
        close(one), close(inside);
        CHECK(renameat2(AT_FDCWD, "one", AT_FDCWD, "dir/inside", RENAME_EXCHANGE) == 0);
        break;
    case 4: /* replaced, closed */
        close(one), close(two);
        put("new", "new");
        CHECK(rename("new", "one") == 0);
        CHECK(rename("one", "two") == 0);
        break;
    case 5: /* renamed by the way, excluded */
        CHECK(ckpt_exclude(strcat(base, "/lef*")) == 0);
        CHECK(rename("left", "left2") == 0);
        break;
    case 6: /* ... modified, and closed: it is not where it was, and nothing leads there */
        put("left2", "other");
        close(left);
        CHECK_EQ(back(), EIO);
        printf("anew ok\n");
        guest_end();
    }
    back();
    FAIL("turn %d: ckpt_rollback: errno %d", turn, errno);
}
