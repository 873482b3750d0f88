/* Proves: children, however they are made (fork, fork and exec, vfork, posix_spawn, system, popen),
 * do their work with the library asleep: they live longer than the interval, end with the right
 * status, and no checkpoint is taken of them (the test looks at the store); between
 * them the parent is checkpointed. */
#include "guest.h"
#include <spawn.h>
#include <sys/wait.h>

extern char **environ;
static char *self;

static int reap(pid_t child)
{
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static int one(long kind)
{
    char *argv[] = {self, "child", NULL}, command[4200];
    pid_t child;
    snprintf(command, sizeof command, "'%s' child", self);
    switch (kind % 6) {
    case 0:
        child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            guest_sleep_ms(150);
            _exit(42);
        }
        return reap(child);
    case 1:
        child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            execv(self, argv);
            _exit(99);
        }
        return reap(child);
    case 2:
        child = vfork();
        CHECK(child >= 0);
        if (child == 0) {
            execv(self, argv);
            _exit(99);
        }
        return reap(child);
    case 3:
        CHECK_EQ(posix_spawn(&child, self, NULL, NULL, argv, environ), 0);
        return reap(child);
    case 4: {
        int status = system(command);
        CHECK(WIFEXITED(status));
        return WEXITSTATUS(status);
    }
    default: {
        char text[64] = "";
        FILE *from = popen(command, "r");
        CHECK(from && fgets(text, sizeof text, from) && strcmp(text, "the child\n") == 0);
        return WEXITSTATUS(pclose(from));
    }
    }
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "child") == 0) {
        guest_sleep_ms(150);
        if (write(1, "the child\n", 10) != 10)
            return 98;
        return 42;
    }
    guest_begin();
    char path[4096];
    ssize_t len = readlink("/proc/self/exe", path, sizeof path - 1);
    CHECK(len > 0);
    path[len] = 0;
    self = path;
    fflush(stdout);
    long rounds = guest_rounds() / 20;
    for (long i = 0; i < (rounds < 6 ? 6 : rounds); i++) {
        CHECK_EQ(one(i), 42);
        guest_sleep_ms(100);
    }
    printf("children ok\n");
    guest_end();
}
