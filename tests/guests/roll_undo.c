/* Does as many steps as `control` says, each of which changes memory and files in every way,
 * and says by `now` (excluded) at which step it is. Less than 0: ends.
 *
 * Both are symbolic links whose target is the number: others replace them all the time, and a
 * checkpoint must not come while such a file is open here. It could not be gone back to: what
 * was open is another file by then, and such a rollback is refused. */
#include "guest.h"

enum { WORDS = 1 << 15, BLOCK = 4096, BLOCKS = 16 };

static int *words;
static int step;

static int wanted(void)
{
    char text[32] = "";
    return readlink("control", text, sizeof text - 1) < 0 ? 0 : atoi(text);
}

static void say(void)
{
    char text[32];
    snprintf(text, sizeof text, "%d", step);
    /* Excluded, so not what it was where a checkpoint came in between: it is said again. */
    unlink("now.new");
    if (symlink(text, "now.new") == 0)
        rename("now.new", "now");
}

static void put(const char *path, int flags, const void *bytes, size_t n, off_t at)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC | flags, 0644);
    CHECK(fd >= 0);
    CHECK_EQ(flags & O_APPEND ? write(fd, bytes, n) : pwrite(fd, bytes, n, at), n);
    close(fd);
}

static void next(void)
{
    char a[64], b[64], block[BLOCK];
    step++;
    for (int k = 0; k < WORDS; k++)
        words[k] = step;
    memset(block, 'a' + step % 26, sizeof block);
    snprintf(a, sizeof a, "tree/new%d", step);
    put(a, O_EXCL, block, 100 + step, 0);
    put("tree/log", O_APPEND, a, strlen(a), 0);
    put("tree/data", 0, block, sizeof block, (off_t)(step % BLOCKS) * BLOCK);
    put("tree/cut", 0, block, sizeof block, 0);
    CHECK(truncate("tree/cut", step * 377 % 5000) == 0);
    CHECK(chmod("tree/data", step % 2 ? 0600 : 0644) == 0);
    snprintf(a, sizeof a, "tree/moved%d", step - 1);
    snprintf(b, sizeof b, "tree/moved%d", step);
    if (step == 1)
        put(a, O_EXCL, "moved", 5, 0);
    CHECK(rename(a, b) == 0);
    put(b, O_APPEND, "+", 1, 0);
    snprintf(a, sizeof a, "tree/dir%d", step);
    CHECK(mkdir(a, 0755) == 0);
    snprintf(b, sizeof b, "tree/dir%d/in", step);
    put(b, O_EXCL, block, 10, 0);
    if (step > 1) {
        snprintf(b, sizeof b, "tree/dir%d/in", step - 1);
        CHECK(unlink(b) == 0);
        snprintf(b, sizeof b, "tree/dir%d", step - 1);
        CHECK(rmdir(b) == 0);
    }
    if (step > 2) {
        snprintf(b, sizeof b, "tree/new%d", step - 2);
        CHECK(unlink(b) == 0);
    }
    printf("step %d\n", step);
    fflush(stdout);
}

int main(void)
{
    guest_begin();
    words = calloc(WORDS, sizeof *words);
    CHECK(words && mkdir("tree", 0755) == 0);
    guest_note("ready");
    int aim;
    while ((aim = wanted()) >= 0) {
        while (step < aim)
            next();
        for (int k = 0; k < WORDS; k++)
            CHECK_EQ(words[k], step);
        say();
        guest_sleep_ms(3);
    }
    guest_end();
}
