/* Rollback with files (FIG. 8A steps 810-820, FIG. 8B "table modified" and "open file table
 * modified"): contents, sizes, names and modes go back, descriptors and positions too;
 * excluded files keep what they have; a second rollback does it all again. */
#include "guest.h"

#include "ckpt.h"

static void put(const char *path, const char *text, int flags)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC | flags, 0644);
    CHECK(fd >= 0);
    CHECK_EQ(write(fd, text, strlen(text)), strlen(text));
    close(fd);
}

static void holds(const char *path, const char *text)
{
    char now[4096];
    CHECK(guest_slurp(path, now, sizeof now) >= 0);
    if (strcmp(now, text) != 0)
        FAIL("%s holds '%s', not '%s'", path, now, text);
}

static int is_open(int fd) { return fcntl(fd, F_GETFD) >= 0; }

int main(void)
{
    guest_begin();
    char dir[4096], excluded[8192];
    CHECK(getcwd(dir, sizeof dir) != NULL);
    snprintf(excluded, sizeof excluded, "%s/kept", dir);
    put("plain", "first\n", O_TRUNC);
    put("gone", "to be unlinked\n", O_TRUNC);
    put("name", "to be renamed\n", O_TRUNC);
    put("kept", "", O_TRUNC);
    CHECK(chmod("plain", 0600) == 0);
    int fd = open("plain", O_RDWR | O_CLOEXEC), closed = open("gone", O_RDONLY);
    int twin = dup(fd), copy = open("plain", O_RDONLY);
    CHECK(fd >= 0 && closed >= 0 && twin >= 0 && copy >= 0);
    char text[16];
    CHECK_EQ(read(fd, text, 2), 2);
    CHECK_EQ(read(copy, text, 4), 4);
    CHECK_EQ(read(closed, text, 3), 3);
    volatile int rounds = 0;
    printf("before\n");
    fflush(stdout);
    int result = ckpt_checkpoint(0);
    CHECK(result >= 0);
    CHECK_EQ(result, rounds ? 7 : 0);
    holds("plain", "first\n");
    holds("gone", "to be unlinked\n");
    holds("name", "to be renamed\n");
    CHECK(access("other", F_OK) != 0 && access("made", F_OK) != 0);
    CHECK(access("folder", F_OK) != 0);
    struct stat st;
    CHECK(stat("plain", &st) == 0);
    CHECK_EQ(st.st_mode & 0777, 0600);
    CHECK_EQ(lseek(fd, 0, SEEK_CUR), 2);
    CHECK_EQ(lseek(twin, 0, SEEK_CUR), 2);
    CHECK_EQ(lseek(copy, 0, SEEK_CUR), 4);
    CHECK_EQ(lseek(closed, 0, SEEK_CUR), 3);
    CHECK_EQ(fcntl(fd, F_GETFD), FD_CLOEXEC);
    CHECK_EQ(fcntl(closed, F_GETFD), 0);
    CHECK(!is_open(99));
    char now[64];
    CHECK_EQ(guest_slurp("kept", now, sizeof now), rounds);
    if (rounds < 3) {
        rounds++;
        CHECK(ckpt_exclude(excluded) == 0);
        put("kept", "+", O_APPEND);
        put("plain", "changed, and longer\n", 0);
        CHECK_EQ(pwrite(fd, "tail", 4, 40000), 4);
        CHECK(unlink("gone") == 0);
        CHECK(rename("name", "other") == 0);
        CHECK(mkdir("folder", 0755) == 0);
        put("folder/inside", "x", 0);
        put("made", "x", 0);
        CHECK(chmod("plain", 0644) == 0);
        close(closed);
        lseek(twin, 5, SEEK_SET);
        CHECK_EQ(dup2(copy, 99), 99);
        close(copy);
        CHECK_EQ(open("/dev/null", O_WRONLY), closed < copy ? closed : copy);
        printf("must not be seen\n");
        fflush(stdout);
        struct ckpt_region keep = {(void *)&rounds, sizeof rounds};
        ckpt_rollback(0, 7, &keep, 1);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    printf("after %d\n", rounds);
    guest_end();
}
