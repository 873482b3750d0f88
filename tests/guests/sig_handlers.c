/* Proves: the handlers, flags and masks of all 64 signals come back, SIGUSR1/2 and all
 * real-time signals up to SIGRTMAX are the program's: each one is installed with
 * different flags, raised every round, and runs on the right stack, with the right
 * siginfo, once. */
#include "guest.h"
#include <ucontext.h>

static volatile sig_atomic_t hits[65];
static volatile sig_atomic_t value[65];
static unsigned char *alternate;
#define ALTERNATE_SIZE 65536

static void plain(int sig) { hits[sig]++; }
static void with_info(int sig, siginfo_t *info, void *context)
{
    unsigned char here;
    hits[sig]++;
    value[sig] = info->si_value.sival_int;
    if (info->si_signo != sig || info->si_pid != getpid() || info->si_code != SI_QUEUE)
        FAIL("siginfo of %d: signo %d pid %d code %d", sig, info->si_signo, info->si_pid, info->si_code);
    int on_alternate = &here >= alternate && &here < alternate + ALTERNATE_SIZE;
    if (on_alternate != (sig % 3 == 0))
        FAIL("signal %d runs on the wrong stack", sig);
    CHECK(context != NULL);
}

static int usable(int sig)
{
    return sig != SIGKILL && sig != SIGSTOP && (sig < 32 || sig >= SIGRTMIN);
}

int main(void)
{
    guest_begin();
    alternate = guest_map(ALTERNATE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stack_t stack = {.ss_sp = alternate, .ss_size = ALTERNATE_SIZE};
    CHECK(sigaltstack(&stack, NULL) == 0);
    struct sigaction want[65], now;
    memset(want, 0, sizeof want);
    for (int sig = 1; sig <= 64; sig++) {
        if (!usable(sig))
            continue;
        want[sig].sa_flags = SA_RESTART;
        sigemptyset(&want[sig].sa_mask);
        sigaddset(&want[sig].sa_mask, sig % 31 + 1);
        sigaddset(&want[sig].sa_mask, SIGRTMAX);
        if (sig == SIGPIPE || sig == SIGTTOU) {
            want[sig].sa_handler = SIG_IGN;
        } else if (sig % 4 == 1) {
            want[sig].sa_handler = plain;
            if (sig % 8 == 1)
                want[sig].sa_flags |= SA_NODEFER;
        } else {
            want[sig].sa_sigaction = with_info;
            want[sig].sa_flags |= SA_SIGINFO | (sig % 3 == 0 ? SA_ONSTACK : 0);
        }
        CHECK(sigaction(sig, &want[sig], NULL) == 0);
    }
    ROUNDS(round)
    {
        for (int sig = 1; sig <= 64; sig++) {
            if (!usable(sig))
                continue;
            CHECK(sigaction(sig, NULL, &now) == 0);
            if (now.sa_handler != want[sig].sa_handler || (now.sa_flags | 0x4000000) != (want[sig].sa_flags | 0x4000000))
                FAIL("signal %d: handler %p flags %x, not %p %x", sig, (void *)now.sa_handler, now.sa_flags,
                     (void *)want[sig].sa_handler, want[sig].sa_flags);
            for (int other = 1; other <= 64; other++)
                if (usable(other) && sigismember(&now.sa_mask, other) != sigismember(&want[sig].sa_mask, other))
                    FAIL("signal %d: mask differs at %d", sig, other);
            int before = hits[sig];
            if (want[sig].sa_flags & SA_SIGINFO) {
                union sigval v = {.sival_int = round * 64 + sig};
                CHECK(sigqueue(getpid(), sig, v) == 0);
                if (value[sig] != round * 64 + sig) {
                    sigset_t waiting, blocked;
                    CHECK(sigpending(&waiting) == 0 && sigprocmask(SIG_SETMASK, NULL, &blocked) == 0);
                    FAIL("signal %d of round %ld: value %d, %d handled, pending %d, blocked %d", sig, round, value[sig],
                         hits[sig] - before, sigismember(&waiting, sig), sigismember(&blocked, sig));
                }
            } else
                CHECK(raise(sig) == 0);
            CHECK_EQ(hits[sig] - before, now.sa_handler != SIG_IGN);
        }
    }
    printf("handlers ok\n");
    guest_end();
}
