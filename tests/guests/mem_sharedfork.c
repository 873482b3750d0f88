/* Proves: shared anonymous memory is still shared after a restore: a child forked
 * afterwards and its parent see each other's writes; private memory is not shared. */
#include "guest.h"
#include <sys/wait.h>

int main(void)
{
    guest_begin();
    const int rw = PROT_READ | PROT_WRITE;
    volatile long *shared = guest_map(8192, rw, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    volatile long *own = guest_map(8192, rw, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ROUNDS(round)
    {
        CHECK_EQ(shared[0], round);
        CHECK_EQ(own[0], round);
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            shared[0]++;
            own[0] += 1000;
            _exit(17);
        }
        int status;
        CHECK_EQ(waitpid(child, &status, 0), child);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 17);
        CHECK_EQ(own[0], round);
        own[0]++;
    }
    printf("shared anonymous ok\n");
    guest_end();
}
