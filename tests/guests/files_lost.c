/* Has files that others remove and move while it runs, or while it is killed: which ones say its
 * arguments. Compares in every round what they hold with what it knows. */
#include "guest.h"

enum { LEN = 3 * 4096 };

static int is_asked(int argc, char **argv, const char *what)
{
    for (int k = 1; k < argc; k++)
        if (strcmp(argv[k], what) == 0)
            return 1;
    return 0;
}

static void mapped(long round, const char *name)
{
    static unsigned char *at;
    static long versions[LEN / 4096];
    if (!at) {
        int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0640);
        CHECK(fd >= 0);
        CHECK(ftruncate(fd, LEN) == 0);
        at = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        CHECK(at != MAP_FAILED);
        close(fd);
    }
    int k = round % (LEN / 4096);
    long was;
    memcpy(&was, at + k * 4096 + 10, sizeof was);
    CHECK_EQ(was, versions[k]);
    versions[k] = round + 1;
    memcpy(at + k * 4096 + 10, &versions[k], sizeof was);
}

/* Written over from end to end in every round, by the same descriptor. */
static void whole(long round)
{
    static int fd = -1;
    char line[200], was[200];
    if (fd < 0) {
        fd = open("whole", O_RDWR | O_CREAT | O_TRUNC, 0600);
        CHECK(fd >= 0);
    } else {
        memset(line, 'a' + (round - 1) % 26, sizeof line);
        CHECK_EQ(pread(fd, was, sizeof was, 0), sizeof was);
        CHECK(memcmp(line, was, sizeof was) == 0);
    }
    memset(line, 'a' + round % 26, sizeof line);
    CHECK_EQ(pwrite(fd, line, sizeof line, 0), sizeof line);
}

/* Appended to; opened anew when a file "reopen" is there. */
static void appended(long round)
{
    static int fd = -1;
    char line[32];
    if (fd >= 0 && access("reopen", F_OK) == 0) {
        close(fd);
        fd = -1;
    }
    if (fd < 0)
        fd = open("log", O_WRONLY | O_CREAT | O_APPEND, 0644);
    CHECK(fd >= 0);
    int n = snprintf(line, sizeof line, "%ld\n", round);
    CHECK_EQ(write(fd, line, n), n);
}

/* Written at the beginning, read in every round. */
static void still(void)
{
    static int fd = -1;
    char is[8];
    if (fd < 0) {
        fd = open("still", O_RDWR | O_CREAT | O_TRUNC, 0644);
        CHECK(fd >= 0);
        CHECK_EQ(write(fd, "as it is", 8), 8);
    }
    CHECK_EQ(pread(fd, is, 8, 0), 8);
    CHECK(memcmp(is, "as it is", 8) == 0);
}

int main(int argc, char **argv)
{
    guest_begin();
    char line[32];
    CHECK(mkdir("d", 0750) == 0);
    ROUNDS(round)
    {
        if (is_asked(argc, argv, "mapped"))
            mapped(round, "d/mapped");
        if (is_asked(argc, argv, "whole"))
            whole(round);
        if (is_asked(argc, argv, "log"))
            appended(round);
        if (is_asked(argc, argv, "still"))
            still();
        int n = snprintf(line, sizeof line, "%ld\n", round);
        CHECK_EQ(write(1, line, n), n);
    }
    guest_end();
}
