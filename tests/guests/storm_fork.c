/* Proves: no deadlock and no harm when children are forked in a storm, by fork, vfork +
 * exec, posix_spawn and system, from two threads, while checkpoints are asked for; the
 * children themselves run with the library asleep. */
#include "guest.h"
#include <spawn.h>
#include <sys/wait.h>

extern char **environ;
static char *const argv_true[] = {"true", NULL};

/* Alone in a function: a vfork child runs in its parent's frame. */
__attribute__((noinline)) static pid_t by_vfork(void)
{
    pid_t child = vfork();
    if (child == 0) {
        execv("/bin/true", argv_true);
        _exit(127);
    }
    return child;
}

static void *storm(void *argument)
{
    for (long i = 0, n = guest_rounds() / 4; i < n; i++) {
        int status = -1;
        pid_t child = -1;
        switch ((i + (long)argument) % 4) {
        case 0:
            child = fork();
            if (child == 0) {
                void *p = malloc(100000); /* the child can allocate and print */
                _exit(p ? 0 : 1);
            }
            break;
        case 1:
            child = by_vfork();
            break;
        case 2:
            CHECK_EQ(posix_spawnp(&child, "true", NULL, NULL, argv_true, environ), 0);
            break;
        default:
            CHECK_EQ(system("exit 0"), 0);
            status = 0;
        }
        if (status) {
            CHECK(child > 0);
            CHECK_EQ(waitpid(child, &status, 0), child);
            CHECK_EQ(status, 0);
        }
        guest_sleep_ms(15);
    }
    return NULL;
}

int main(void)
{
    guest_begin();
    pthread_t thread = guest_thread(storm, (void *)1L);
    storm((void *)0L);
    guest_join(thread);
    CHECK(wait(NULL) == -1 && errno == ECHILD);
    printf("fork storm ok\n");
    guest_end();
}
