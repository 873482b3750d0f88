/* Proves: wait() and friends see the program's own children and nothing else: no extra
 * child, no EINTR, right statuses, while checkpoints are asked for (and refused as
 * long as a child lives); ECHILD when there is none; SIGCHLD once for each child. */
#include "guest.h"
#include <sys/wait.h>

static volatile long reaped_signals;
static void on_child(int sig, siginfo_t *info, void *context)
{
    (void)context;
    if (sig != SIGCHLD || info->si_code != CLD_EXITED)
        FAIL("SIGCHLD with code %d", info->si_code);
    reaped_signals++;
}

int main(void)
{
    guest_begin();
    struct sigaction act = {.sa_sigaction = on_child, .sa_flags = SA_SIGINFO | SA_RESTART};
    CHECK(sigaction(SIGCHLD, &act, NULL) == 0);
    ROUNDS(round)
    {
        int status;
        CHECK(waitpid(-1, &status, __WALL | WNOHANG) == -1 && errno == ECHILD);
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            usleep(3000);
            _exit(round % 100);
        }
        switch (round % 3) {
        case 0:
            CHECK_EQ(wait(&status), child);
            break;
        case 1:
            CHECK_EQ(wait4(-1, &status, __WALL, NULL), child);
            break;
        default: {
            siginfo_t info;
            CHECK_EQ(waitid(P_ALL, 0, &info, WEXITED), 0);
            CHECK_EQ(info.si_pid, child);
            status = info.si_status << 8;
        }
        }
        CHECK_EQ(WEXITSTATUS(status), round % 100);
        CHECK_EQ(reaped_signals, round + 1);
        CHECK(wait(&status) == -1 && errno == ECHILD);
    }
    printf("wait ok\n");
    guest_end();
}
