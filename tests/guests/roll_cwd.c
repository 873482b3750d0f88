/* The working directory of the checkpoint, moved away by another process, with another one at
 * its name or none: EIO, nothing is touched. Moved back it is no obstacle. */
#include "guest.h"

#include "ckpt.h"
#include <sys/wait.h>

static volatile long global = 1;

static void other(const char *command)
{
    CHECK_EQ(system(command), 0);
}

static void refused(void)
{
    char here[4096];
    global = 2;
    errno = 0;
    CHECK_EQ(ckpt_rollback(1, 1, NULL, 0), -1);
    CHECK_EQ(errno, EIO);
    CHECK_EQ(global, 2);
    CHECK(getcwd(here, sizeof here) != NULL);
    CHECK(strcmp(here, "/") == 0);
}

int main(void)
{
    guest_begin();
    char top[3000], command[12000], here[4096];
    CHECK(getcwd(top, sizeof top) != NULL);
    CHECK(mkdir("w", 0755) == 0 && chdir("w") == 0);
    int back = ckpt_checkpoint(1);
    if (back == 0) {
        CHECK_EQ(chdir("/"), 0);
        snprintf(command, sizeof command, "mv '%s/w' '%s/aside'", top, top);
        other(command);
        refused();
        snprintf(command, sizeof command, "mkdir '%s/w'", top);
        other(command);
        refused();
        snprintf(command, sizeof command, "rmdir '%s/w'; mv '%s/aside' '%s/w'", top, top, top);
        other(command);
        ckpt_rollback(1, 3, NULL, 0);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    CHECK_EQ(back, 3);
    CHECK_EQ(global, 1);
    CHECK(getcwd(here, sizeof here) != NULL);
    CHECK(strcmp(here + strlen(here) - 2, "/w") == 0);
    printf("cwd ok\n");
    guest_end();
}
