/* Proves: while a child is alive a checkpoint is refused, both run on, and checkpoints
 * succeed again when it is gone. The notes in $GUEST_LOG tell the test when which holds. */
#include "guest.h"
#include <sys/wait.h>

int main(void)
{
    guest_begin();
    int pipes[2];
    CHECK(pipe(pipes) == 0);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        char byte;
        close(pipes[1]);
        _exit(read(pipes[0], &byte, 1) == 1 ? 5 : 6);
    }
    guest_note("reason there");
    for (long i = 0; i < guest_rounds() / 2; i++)
        guest_sleep_ms(10);
    guest_note("reason goes");
    CHECK(write(pipes[1], "x", 1) == 1);
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 5);
    guest_note("reason gone");
    ROUNDS(round) CHECK(waitpid(-1, &status, WNOHANG) == -1 && errno == ECHILD);
    printf("child ok\n");
    guest_end();
}
