/* Proves: a restored program dies with the process that was started, whatever it has done to
 * its credentials, to its own death signal or by exec, and its own death signal is what it has
 * set (nothing, or SIGUSR2). It runs until it is killed; SIGUSR1 tells it to do its part. */
#include "guest.h"
#include <sys/prctl.h>

static volatile sig_atomic_t asked;

static void on_ask(int signo)
{
    (void)signo;
    asked = 1;
}

int main(int argc, char **argv)
{
    guest_begin();
    CHECK(argc == 2);
    const char *part = argv[1];
    int own = strcmp(part, "sets_its_own") == 0 ? SIGUSR2 : 0, value = -1;
    struct sigaction ask = {.sa_handler = on_ask};
    CHECK(sigaction(SIGUSR1, &ask, NULL) == 0);
    CHECK(signal(SIGUSR2, SIG_IGN) != SIG_ERR);
    CHECK(own == 0 || prctl(PR_SET_PDEATHSIG, own) == 0);
    for (;;) {
        CHECK(prctl(PR_GET_PDEATHSIG, &value) == 0);
        CHECK_EQ(value, own);
        struct timespec pause = {0, 1000000};
        nanosleep(&pause, NULL);
        if (!asked)
            continue;
        asked = 0;
        CHECK(chmod(getenv("GUEST_LOG"), 0666) == 0);
        if (strcmp(part, "drops_privileges") == 0) {
            CHECK(setresgid(65534, 65534, 65534) == 0);
            CHECK(setresuid(65534, 65534, 65534) == 0);
        }
        guest_note("done");
        if (strcmp(part, "executes") == 0) {
            execl("/nonexistent", "nonexistent", NULL);
            CHECK(prctl(PR_GET_PDEATHSIG, &value) == 0 && value == 0);
            execlp("sleep", "sleep", "600", NULL);
            FAIL("exec");
        }
    }
}
