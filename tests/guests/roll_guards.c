/* Guard regions (MADV_GUARD_INSTALL, Linux 6.13): they hold nothing, cannot be read, and look
 * like pages. At a checkpoint there are some where pages were, and some where none ever was;
 * they are there again after a rollback and after a recovery (argument `die`), others are not.
 * Second argument `raw`: they are made by a system call that is not libc's. */
#include "guest.h"

#include "ckpt.h"

enum { PAGE = 4096, PAGES = 64, INSTALL = 102, REMOVE = 103 };

static unsigned char *data;
static int ends[2];
static volatile int rounds;
static int raw;

/* Guarded at the first checkpoint: 8-11 (full before), 40-41 (never touched); at the second one
 * 20-21 as well, and 8-9 not any more. */
static int is_guarded(int page, int second)
{
    if (page == 8 || page == 9)
        return !second;
    if (page == 20 || page == 21)
        return second;
    return page == 10 || page == 11 || page == 40 || page == 41;
}

static void guard(int page, int pages, int advice)
{
    unsigned char *at = data + page * PAGE;
    size_t len = (size_t)pages * PAGE;
    if (!raw) {
        CHECK(madvise(at, len, advice) == 0);
        return;
    }
    long result = SYS_madvise;
    __asm__ volatile("syscall"
                     : "+a"(result)
                     : "D"(at), "S"(len), "d"((long)advice)
                     : "rcx", "r11", "memory");
    CHECK_EQ(result, 0);
}

static void verify(int second)
{
    for (int page = 0; page < PAGES; page++) {
        ssize_t n = write(ends[1], data + page * PAGE, 1);
        if ((n == 1) == is_guarded(page, second) || (n < 0 && errno != EFAULT))
            FAIL("round %d, page %d: %zd, errno %d", rounds, page, n, errno);
        char byte;
        if (n == 1)
            CHECK_EQ(read(ends[0], &byte, 1), 1);
        if (n == 1 && page < 32 && !(second && (page == 8 || page == 9)))
            CHECK_EQ(data[page * PAGE + 100], page + 1);
        else if (n == 1)
            CHECK_EQ(data[page * PAGE + 100], 0);
    }
}

int main(int argc, char **argv)
{
    guest_begin();
    int die = argc > 1 && strcmp(argv[1], "die") == 0;
    raw = argc > 2 && strcmp(argv[2], "raw") == 0;
    CHECK(pipe(ends) == 0);
    data = guest_map(PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int page = 0; page < 32; page++)
        memset(data + page * PAGE, page + 1, PAGE);
    guard(8, 4, INSTALL);
    guard(40, 2, INSTALL);
    int result = ckpt_checkpoint(1);
    if (result < 0)
        FAIL("ckpt_checkpoint: errno %d", errno);
    verify(0);
    if (rounds++ < 2) {
        struct ckpt_region keep = {(void *)&rounds, sizeof rounds};
        guard(8, 4, REMOVE);
        guard(40, 2, REMOVE);
        guard(2, 3, INSTALL);
        data[9 * PAGE] = 1;
        data[40 * PAGE] = 1;
        ckpt_rollback(1, 1, &keep, 1);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    guard(8, 2, REMOVE);
    guard(20, 2, INSTALL);
    result = ckpt_checkpoint(2);
    if (result < 0)
        FAIL("the second ckpt_checkpoint: errno %d", errno);
    verify(1);
    if (result == 0 && die)
        kill(getpid(), SIGKILL);
    printf("guards ok\n");
    guest_end();
}
