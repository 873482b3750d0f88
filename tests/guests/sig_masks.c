/* Proves: each thread's signal mask comes back, also one that blocks everything, and the
 * program never sees a signal of ours: threads block all signals, wait for all of them
 * with sigwaitinfo and through a signalfd, sit in sigsuspend, and only what the program
 * itself sent arrives. The masks that the program reads are the ones it set. */
#include "guest.h"
#include <sys/signalfd.h>
#include <poll.h>

enum { THREADS = 4 };
static pthread_t thread[THREADS];
static long arrived[THREADS];
static int stop;
static sigset_t all;
static volatile sig_atomic_t suspended;
static void on_signal(int sig) { suspended += sig == SIGUSR2; }

static void same(const sigset_t *want)
{
    sigset_t now;
    CHECK_EQ(pthread_sigmask(SIG_SETMASK, NULL, &now), 0);
    for (int sig = 1; sig <= 64; sig++)
        if ((sig < 32 || sig >= SIGRTMIN) && sig != SIGKILL && sig != SIGSTOP &&
            sigismember(want, sig) != sigismember(&now, sig))
            FAIL("mask differs at %d", sig);
}

static void *waits(void *argument) /* thread 0: sigwaitinfo of everything */
{
    pthread_sigmask(SIG_BLOCK, &all, NULL);
    while (!__atomic_load_n(&stop, __ATOMIC_SEQ_CST)) {
        siginfo_t info;
        struct timespec limit = {0, 50000000};
        int sig = sigtimedwait(&all, &info, &limit);
        if (sig < 0) {
            CHECK_EQ(errno, EAGAIN);
            continue;
        }
        if (sig != SIGUSR1)
            FAIL("sigtimedwait saw signal %d, code %d", sig, info.si_code);
        __atomic_add_fetch(&arrived[0], 1, __ATOMIC_SEQ_CST);
        same(&all);
    }
    return argument;
}
static void *reads(void *argument) /* thread 1: a signalfd of everything */
{
    pthread_sigmask(SIG_BLOCK, &all, NULL);
    int fd = signalfd(-1, &all, SFD_CLOEXEC);
    CHECK(fd >= 0);
    while (!__atomic_load_n(&stop, __ATOMIC_SEQ_CST)) {
        struct pollfd poll_fd = {fd, POLLIN, 0};
        int ready = poll(&poll_fd, 1, 50);
        CHECK(ready >= 0);
        if (!ready)
            continue;
        struct signalfd_siginfo info;
        CHECK_EQ(read(fd, &info, sizeof info), sizeof info);
        if (info.ssi_signo != SIGUSR1)
            FAIL("signalfd saw signal %u, code %d", info.ssi_signo, info.ssi_code);
        __atomic_add_fetch(&arrived[1], 1, __ATOMIC_SEQ_CST);
    }
    return argument;
}
static void *suspends(void *argument) /* thread 2: sigsuspend with only SIGUSR2 open */
{
    pthread_sigmask(SIG_BLOCK, &all, NULL);
    sigset_t open = all;
    sigdelset(&open, SIGUSR2);
    while (!__atomic_load_n(&stop, __ATOMIC_SEQ_CST)) {
        int before = suspended;
        CHECK(sigsuspend(&open) == -1 && errno == EINTR);
        CHECK(suspended > before); /* it came back for a signal of the program's */
        same(&all);
        __atomic_add_fetch(&arrived[2], 1, __ATOMIC_SEQ_CST);
    }
    return argument;
}
static void *computes(void *argument) /* thread 3: everything blocked, never in the kernel */
{
    pthread_sigmask(SIG_BLOCK, &all, NULL);
    volatile uint64_t x = 0;
    while (!__atomic_load_n(&stop, __ATOMIC_SEQ_CST)) {
        for (int i = 0; i < 2000000; i++)
            x = guest_mix(x);
        same(&all);
        guest_sleep_ms(5);
    }
    return argument;
}

int main(void)
{
    guest_begin();
    sigfillset(&all);
    struct sigaction act = {.sa_handler = on_signal};
    CHECK(sigaction(SIGUSR1, &act, NULL) == 0 && sigaction(SIGUSR2, &act, NULL) == 0);
    sigset_t mine;
    sigemptyset(&mine);
    sigaddset(&mine, SIGUSR1);
    sigaddset(&mine, SIGUSR2);
    sigaddset(&mine, SIGRTMAX);
    sigaddset(&mine, SIGRTMIN + 3);
    CHECK_EQ(pthread_sigmask(SIG_BLOCK, &mine, NULL), 0);
    void *(*body[THREADS])(void *) = {waits, reads, suspends, computes};
    for (int i = 0; i < THREADS; i++)
        thread[i] = guest_thread(body[i], NULL);
    long sent = 0;
    ROUNDS(round)
    {
        same(&mine);
        if (round % 3 == 0) {
            /* Standard signals coalesce: the next one only after the last was seen. */
            long wait = 0;
            for (int i = 0; i < 3; i++)
                while (__atomic_load_n(&arrived[i], __ATOMIC_SEQ_CST) < sent) {
                    guest_sleep_ms(1);
                    if (++wait > 20000)
                        FAIL("signal %ld did not arrive in thread %d", sent, i);
                }
            sent++;
            CHECK_EQ(pthread_kill(thread[0], SIGUSR1), 0);
            CHECK_EQ(pthread_kill(thread[1], SIGUSR1), 0);
            CHECK_EQ(pthread_kill(thread[2], SIGUSR2), 0);
        }
    }
    for (int i = 0; i < 3; i++)
        while (__atomic_load_n(&arrived[i], __ATOMIC_SEQ_CST) < sent)
            guest_sleep_ms(1);
    __atomic_store_n(&stop, 1, __ATOMIC_SEQ_CST);
    CHECK_EQ(pthread_kill(thread[2], SIGUSR2), 0);
    for (int i = 0; i < THREADS; i++)
        guest_join(thread[i]);
    CHECK_EQ(arrived[0], sent);
    CHECK_EQ(arrived[1], sent);
    printf("masks ok\n");
    guest_end();
}
