/* FIG. 8A and 8B, the tests that the user answers, each with both branches in one process (argument):
 *   table  815 "modify the persistent checkpoint table?" No: every file goes back (825). Yes, a name, a
 *          pattern, an exception from one, all ("*"): 820, these files keep what they have.
 *   open   865 "modify the open file table?" No: the same file behind the descriptor, at the position of
 *          the checkpoint (875). Yes: 870, others, by several entries, the last one counts; each counts
 *          for one rollback; an output that is not there is made.
 *   mode   830 and 850 "rollback, and protected variables valid?" Yes: 835, 855 their bytes stay. No,
 *          without any; not valid: nothing happens; in a recovery (the process is killed): none. */
#include "guest.h"

#include "ckpt.h"

static volatile int turn; /* protected, where anything is */
static volatile long variable = 1;

static void put(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    CHECK(fd >= 0);
    CHECK_EQ(write(fd, text, strlen(text)), strlen(text));
    close(fd);
}

static void holds(const char *path, const char *text)
{
    char now[64] = "";
    long len = guest_slurp(path, now, sizeof now);
    if (strcmp(now, text) != 0)
        FAIL("turn %d: %s holds '%s' (%ld), not '%s'", turn, path, now, len, text);
}

static void back(int value)
{
    turn++;
    struct ckpt_region keep = {(void *)&turn, sizeof turn};
    ckpt_rollback(1, value, &keep, 1);
    FAIL("turn %d: ckpt_rollback: errno %d", turn, errno);
}

static const char *absolute(const char *name)
{
    static char path[8192];
    CHECK(getcwd(path, 4096) != NULL);
    return strcat(strcat(path, "/"), name);
}

static void table(void)
{
    put("one", "1");
    put("two", "2");
    put("three", "3");
    int result = ckpt_checkpoint(1);
    CHECK_EQ(result, turn);
    switch (turn) {
    case 0:
    case 1: /* No: all of them are back. */
        holds("one", "1"), holds("two", "2"), holds("three", "3");
        break;
    case 2: /* One name. */
        holds("one", "changed"), holds("two", "2"), holds("three", "3");
        CHECK(access("four", F_OK) != 0);
        break;
    case 3: /* A pattern (both t...) but one of them. */
        holds("one", "changed"), holds("two", "changed"), holds("three", "3");
        break;
    case 4: /* All: only memory goes back. */
        holds("one", "again"), holds("two", "again"), holds("three", "again"), holds("four", "new");
        return;
    }
    const char *text = turn == 3 ? "again" : "changed";
    put("one", text), put("two", text), put("three", text), put("four", "new");
    if (turn == 1)
        CHECK(ckpt_exclude(absolute("one")) == 0);
    if (turn == 2) {
        CHECK(ckpt_exclude(absolute("o*")) == 0);
        CHECK(ckpt_exclude(absolute("t*")) == 0);
        CHECK(ckpt_include(absolute("three")) == 0);
    }
    if (turn == 3)
        CHECK(ckpt_exclude("*") == 0);
    back(turn + 1);
}

static void has(int fd, const char *text)
{
    char now[16] = "";
    CHECK(read(fd, now, sizeof now - 1) >= 0);
    if (strcmp(now, text) != 0)
        FAIL("turn %d: descriptor %d gives '%s', not '%s'", turn, fd, now, text);
}

static void open_files(void)
{
    put("in", "-first input");
    put("in2", "-second");
    put("in3", "-third");
    put("in4", "-fourth");
    int in = open("in", O_RDONLY | O_CLOEXEC);
    char c;
    CHECK_EQ(read(in, &c, 1), 1);
    int twin = dup(in), out = open("out", O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    CHECK(in >= 0 && twin >= 0 && out >= 0);
    int result = ckpt_checkpoint(1);
    CHECK_EQ(result, turn);
    const char *inputs[] = {"first input", "first input", "third", "second", "first input"};
    has(twin, inputs[turn]);
    has(in, ""); /* one description, as before */
    CHECK_EQ(fcntl(in, F_GETFD), FD_CLOEXEC);
    CHECK_EQ(fcntl(twin, F_GETFD), 0);
    if (turn == 4)
        return;
    CHECK_EQ(write(out, "x", 1), 1);
    if (turn == 3)
        holds("out3", "x"), holds("out", "");
    if (turn == 1) { /* Relative, absolute; the last one counts. */
        CHECK(ckpt_redirect(absolute("in"), "in4") == 0);
        CHECK(ckpt_redirect("in", "in2") == 0);
        CHECK(ckpt_redirect("in", absolute("in3")) == 0);
        close(in);
    }
    if (turn == 2) {
        CHECK(ckpt_redirect("in", "in2") == 0);
        CHECK(ckpt_redirect("out", "out3") == 0);
        CHECK(ckpt_exclude(absolute("out3")) == 0);
    }
    back(turn + 1);
}

static void mode(void)
{
    guest_note("life");
    int result = ckpt_checkpoint(1);
    CHECK(result >= 0);
    if (result == 9) { /* No: a recovery. */
        CHECK_EQ(variable, 1);
        CHECK_EQ(turn, 0);
        return;
    }
    CHECK_EQ(result, turn == 2 ? 1 : turn); /* 1 where none is given */
    if (turn == 1)
        CHECK_EQ(variable, 2);
    if (turn == 2)
        CHECK_EQ(variable, 1);
    if (turn == 0) { /* Yes; but first, not valid: nothing has happened. */
        variable = 2;
        struct ckpt_region keep[] = {{(void *)&turn, sizeof turn}, {(void *)&variable, sizeof variable}, {NULL, 4}};
        CHECK_EQ(ckpt_rollback(1, 5, keep, 3), -1);
        CHECK_EQ(errno, EFAULT);
        CHECK_EQ(variable, 2);
        turn = 1;
        ckpt_rollback(1, 1, keep, 2);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    variable = 3;
    if (turn == 1)
        back(0);
    kill(getpid(), SIGKILL);
}

int main(int argc, char **argv)
{
    guest_begin();
    CHECK(argc == 2);
    switch (argv[1][0]) {
    case 't':
        table();
        break;
    case 'o':
        open_files();
        break;
    case 'm':
        mode();
        break;
    }
    printf("%s ok\n", argv[1]);
    guest_end();
}
