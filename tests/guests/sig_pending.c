/* Proves: pending signals come back: standard ones (once), real-time ones queued with
 * values in their order, for the process and for a single thread. They stay pending
 * through the whole run and are taken at its end. */
#include "guest.h"

enum { QUEUED = 20 };
static sigset_t set;
static int taken;

/* glibc's sigtimedwait shows SI_TKILL as SI_USER. */
static void take(int want_sig, int want_value, int want_code)
{
    siginfo_t info;
    struct timespec limit = {10, 0};
    int sig = sigtimedwait(&set, &info, &limit);
    if (sig != want_sig)
        FAIL("took signal %d, not %d (errno %d)", sig, want_sig, errno);
    if (want_code == SI_QUEUE && info.si_value.sival_int != want_value)
        FAIL("signal %d: value %d, not %d", sig, info.si_value.sival_int, want_value);
    CHECK_EQ(info.si_code, want_code);
    CHECK_EQ(info.si_pid, getpid());
    CHECK_EQ(info.si_uid, getuid());
    __atomic_add_fetch(&taken, 1, __ATOMIC_SEQ_CST);
}

static pthread_t other;
static int go;
static void *work(void *argument)
{
    for (int i = 0; i < QUEUED; i++) {
        union sigval v = {.sival_int = 500 + i};
        CHECK_EQ(pthread_sigqueue(pthread_self(), SIGRTMIN + 5, v), 0);
    }
    CHECK_EQ(pthread_kill(pthread_self(), SIGWINCH), 0);
    while (!__atomic_load_n(&go, __ATOMIC_SEQ_CST)) {
        sigset_t pending;
        CHECK(sigpending(&pending) == 0);
        CHECK(sigismember(&pending, SIGWINCH) == 1 && sigismember(&pending, SIGRTMIN + 5) == 1);
        CHECK(sigismember(&pending, SIGUSR1) == 1); /* the process's */
        guest_sleep_ms(10);
    }
    /* The thread's own, standard before real-time. */
    sigset_t all = set;
    sigemptyset(&set);
    sigaddset(&set, SIGWINCH);
    sigaddset(&set, SIGRTMIN + 5);
    take(SIGWINCH, 0, SI_USER);
    for (int i = 0; i < QUEUED; i++)
        take(SIGRTMIN + 5, 500 + i, SI_QUEUE);
    set = all;
    return argument;
}

int main(void)
{
    guest_begin();
    sigemptyset(&set);
    int sigs[] = {SIGUSR1, SIGUSR2, SIGTERM, SIGWINCH, SIGCHLD, SIGRTMIN, SIGRTMIN + 5, SIGRTMAX - 1, SIGRTMAX};
    for (unsigned i = 0; i < sizeof sigs / sizeof *sigs; i++)
        sigaddset(&set, sigs[i]);
    CHECK_EQ(pthread_sigmask(SIG_BLOCK, &set, NULL), 0);
    CHECK(kill(getpid(), SIGUSR1) == 0 && kill(getpid(), SIGUSR1) == 0 && kill(getpid(), SIGTERM) == 0);
    CHECK_EQ(pthread_kill(pthread_self(), SIGUSR2), 0);
    for (int i = 0; i < QUEUED; i++) {
        union sigval v = {.sival_int = i};
        CHECK(sigqueue(getpid(), SIGRTMAX, v) == 0);
        v.sival_int = 100 + i;
        CHECK(sigqueue(getpid(), SIGRTMIN, v) == 0);
        v.sival_int = 200 + i;
        CHECK_EQ(pthread_sigqueue(pthread_self(), SIGRTMAX - 1, v), 0);
    }
    other = guest_thread(work, NULL);
    guest_sleep_ms(50);
    ROUNDS(round)
    {
        sigset_t pending;
        CHECK(sigpending(&pending) == 0);
        for (unsigned i = 0; i < sizeof sigs / sizeof *sigs; i++) {
            int want = sigs[i] != SIGWINCH && sigs[i] != SIGCHLD && sigs[i] != SIGRTMIN + 5;
            if (sigismember(&pending, sigs[i]) != want)
                FAIL("signal %d: pending %d", sigs[i], !want);
        }
    }
    __atomic_store_n(&go, 1, __ATOMIC_SEQ_CST);
    guest_join(other);
    take(SIGUSR2, 0, SI_USER); /* the thread's before the process's */
    for (int i = 0; i < QUEUED; i++)
        take(SIGRTMAX - 1, 200 + i, SI_QUEUE);
    take(SIGUSR1, 0, SI_USER);
    take(SIGTERM, 0, SI_USER);
    for (int i = 0; i < QUEUED; i++)
        take(SIGRTMIN, 100 + i, SI_QUEUE);
    for (int i = 0; i < QUEUED; i++)
        take(SIGRTMAX, i, SI_QUEUE);
    struct timespec none = {0, 0};
    CHECK(sigtimedwait(&set, NULL, &none) == -1 && errno == EAGAIN);
    printf("pending ok: %d\n", taken);
    guest_end();
}
