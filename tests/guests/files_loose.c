/* Writes the round's number to `log` (opened each time), to `held` (open throughout) and to standard
 * output, and compares nothing: for tests of what is left out of a recovery. With the argument
 * "exclude" it excludes log by a call, with "include" it takes that back by another. */
#include "ckpt.h"
#include "guest.h"

int main(int argc, char **argv)
{
    guest_begin();
    char line[32];
    if (argc > 1) {
        char glob[4200], cwd[4096];
        int bare = ckpt_hold() == -1;
        CHECK(bare || ckpt_release() == 0);
        CHECK(getcwd(cwd, sizeof cwd));
        snprintf(glob, sizeof glob, "%s/lo?", cwd);
        CHECK_EQ(ckpt_exclude(glob), bare ? -1 : 0);
        snprintf(glob, sizeof glob, "%s/log", cwd);
        if (!strcmp(argv[1], "include"))
            CHECK_EQ(ckpt_include(glob), bare ? -1 : 0);
        CHECK_EQ(ckpt_exclude("relative"), -1);
        CHECK_EQ(errno, bare ? ENOSYS : EINVAL);
    }
    int held = open("held", O_WRONLY | O_CREAT | O_TRUNC, 0644);
    CHECK(held >= 0);
    ROUNDS(round)
    {
        int n = snprintf(line, sizeof line, "%ld\n", round);
        int log = open("log", O_WRONLY | O_CREAT | O_APPEND, 0644);
        CHECK(log >= 0);
        CHECK_EQ(write(log, line, n), n);
        close(log);
        CHECK_EQ(write(held, line, n), n);
        CHECK_EQ(write(1, line, n), n);
    }
    guest_end();
}
