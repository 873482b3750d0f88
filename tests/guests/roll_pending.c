/* Rollback and pending signals, standard ones and queued real-time ones with values, of the
 * process and of one thread: those of the checkpoint are pending again, in order and not
 * twice, whether they were taken since or not; those that the program has sent itself since
 * are undone; one that somebody else has sent since stays. */
#include "guest.h"

#include "ckpt.h"
#include <sys/wait.h>

#define QUEUED (SIGRTMIN + 1)
#define OWN (SIGRTMIN + 2)
#define LATER (SIGRTMIN + 3)
#define OUTSIDE (SIGRTMIN + 4)
enum { MANY = 12 };

static struct kept {
    int rounds;
    pid_t sender;
} kept;

static int take(int signo, int *value)
{
    sigset_t one;
    siginfo_t info;
    struct timespec none = {0, 0};
    sigemptyset(&one);
    sigaddset(&one, signo);
    int got = sigtimedwait(&one, &info, &none);
    if (got < 0) {
        CHECK_EQ(errno, EAGAIN);
        return 0;
    }
    CHECK_EQ(got, signo);
    *value = info.si_value.sival_int;
    if (signo == OUTSIDE) {
        CHECK_EQ(info.si_code, SI_QUEUE);
        CHECK_EQ(info.si_pid, kept.sender);
    } else
        CHECK_EQ(info.si_pid, getpid());
    return 1;
}

static int is_pending(int signo)
{
    sigset_t pending;
    CHECK(sigpending(&pending) == 0);
    return sigismember(&pending, signo);
}

/* Not a child by the time of the checkpoint; sends a signal for each byte. */
static int start_sender(pid_t to)
{
    int ask[2], tell[2];
    CHECK(pipe(ask) == 0 && pipe(tell) == 0);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        if (fork() > 0)
            _exit(0);
        setsid();
        close(ask[1]);
        pid_t own = getpid();
        CHECK_EQ(write(tell[1], &own, sizeof own), sizeof own);
        close(tell[1]);
        close(tell[0]);
        char value;
        alarm(100);
        while (read(ask[0], &value, 1) == 1) {
            union sigval v = {.sival_int = value};
            if (sigqueue(to, OUTSIDE, v) != 0)
                _exit(1);
        }
        _exit(0);
    }
    close(ask[0]);
    close(tell[1]);
    CHECK_EQ(read(tell[0], &kept.sender, sizeof kept.sender), sizeof kept.sender);
    close(tell[0]);
    CHECK_EQ(waitpid(pid, NULL, 0), pid);
    return ask[1];
}

int main(void)
{
    guest_begin();
    sigset_t all;
    sigfillset(&all);
    CHECK(sigprocmask(SIG_SETMASK, &all, NULL) == 0);
    int ask = start_sender(getpid());
    CHECK(kill(getpid(), SIGUSR1) == 0);
    for (int k = 0; k < MANY; k++) {
        union sigval value = {.sival_int = 100 + k};
        CHECK(sigqueue(getpid(), QUEUED, value) == 0);
        value.sival_int = 200 + k;
        CHECK_EQ(pthread_sigqueue(pthread_self(), OWN, value), 0);
    }
    CHECK_EQ(pthread_kill(pthread_self(), SIGWINCH), 0);

    int result = ckpt_checkpoint(3);
    if (result < 0)
        FAIL("ckpt_checkpoint: errno %d", errno);
    CHECK_EQ(result, kept.rounds);
    int value;
    CHECK(!is_pending(SIGUSR2) && !take(LATER, &value));
    if (kept.rounds > 0) {
        CHECK_EQ(take(OUTSIDE, &value), 1);
        CHECK_EQ(value, kept.rounds);
    }
    CHECK_EQ(take(OUTSIDE, &value), 0);
    CHECK_EQ(is_pending(SIGUSR1), 1);
    if (!is_pending(SIGWINCH))
        FAIL("SIGWINCH is lost after rollback %d", kept.rounds);
    /* None, some or all of them are taken before the next rollback. */
    int some = kept.rounds == 1 ? 0 : kept.rounds == 2 ? MANY / 2 : MANY;
    for (int k = 0; k < some; k++) {
        CHECK_EQ(take(QUEUED, &value), 1);
        CHECK_EQ(value, 100 + k);
        CHECK_EQ(take(OWN, &value), 1);
        CHECK_EQ(value, 200 + k);
    }
    if (some == MANY) {
        CHECK(!take(QUEUED, &value) && !take(OWN, &value));
        CHECK(take(SIGUSR1, &value) && !take(SIGUSR1, &value));
        CHECK(take(SIGWINCH, &value) && !take(SIGWINCH, &value));
    }
    if (kept.rounds < 4) {
        kept.rounds++;
        for (int k = 0; k < 3; k++) {
            union sigval later = {.sival_int = 900 + k};
            CHECK(sigqueue(getpid(), LATER, later) == 0);
            CHECK(sigqueue(getpid(), QUEUED, later) == 0);
        }
        CHECK(kill(getpid(), SIGUSR2) == 0);
        char from_outside = (char)kept.rounds;
        CHECK_EQ(write(ask, &from_outside, 1), 1);
        while (!is_pending(OUTSIDE))
            guest_sleep_ms(1);
        struct ckpt_region keep = {&kept, sizeof kept};
        ckpt_rollback(3, kept.rounds, &keep, 1);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    printf("%d times\n", kept.rounds);
    guest_end();
}
