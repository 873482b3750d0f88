/* Proves: a handler in progress comes back in its middle: handlers nested three deep on
 * an alternate stack work for the length of the run, return through their frames to an
 * interrupted computation with live registers, and one leaves by siglongjmp. */
#include "guest.h"
#include <setjmp.h>

static volatile sig_atomic_t depth, finished, jumped;
static sigjmp_buf out;
static long rounds;
static volatile uint64_t kept[3];

static void handler(int sig)
{
    volatile unsigned char frame[4096];
    int level = depth++;
    stack_t now;
    guest_fill((void *)frame, sizeof frame, level);
    CHECK(sigaltstack(NULL, &now) == 0 && (now.ss_flags & SS_ONSTACK));
    if (level < 2)
        CHECK(raise(sig + 1) == 0);
    for (long i = 0; i < rounds / 4; i++) {
        guest_sleep_ms(10);
        CHECK(guest_holds((void *)frame, sizeof frame, level));
        sigset_t mask;
        sigprocmask(SIG_SETMASK, NULL, &mask);
        CHECK(sigismember(&mask, sig) == 1);
    }
    kept[level] = guest_mix(level + frame[9]);
    depth--;
    finished++;
}

static void jumper(int sig)
{
    for (long i = 0; i < rounds / 8; i++)
        guest_sleep_ms(10);
    jumped = sig;
    siglongjmp(out, sig);
}

int main(void)
{
    guest_begin();
    rounds = guest_rounds();
    stack_t stack = {.ss_sp = malloc(1 << 18), .ss_size = 1 << 18};
    CHECK(stack.ss_sp && sigaltstack(&stack, NULL) == 0);
    struct sigaction act = {.sa_handler = handler, .sa_flags = SA_ONSTACK};
    for (int i = 0; i < 3; i++)
        CHECK(sigaction(SIGRTMIN + 2 + i, &act, NULL) == 0);
    act.sa_handler = jumper;
    CHECK(sigaction(SIGUSR2, &act, NULL) == 0);
    /* A timer interrupts a computation whose registers must survive the handlers. */
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 2};
    timer_t timer;
    struct itimerspec soon = {.it_value.tv_nsec = 20000000};
    CHECK(timer_create(CLOCK_MONOTONIC, &event, &timer) == 0 && timer_settime(timer, 0, &soon, NULL) == 0);
    register uint64_t a = 1, b = 2, c = 3;
    double d = 1.5;
    while (finished < 3) {
        a = guest_mix(a);
        b = guest_mix(b ^ 7);
        c++;
        d = d * 1.0000001;
        CHECK(d > 1.4);
        if (d > 3)
            d = 1.5;
    }
    uint64_t check_a = 1;
    for (uint64_t i = 3; i < c; i++)
        check_a = guest_mix(check_a);
    CHECK(a == check_a && b != 2);
    CHECK_EQ(depth, 0);
    CHECK(kept[0] && kept[1] && kept[2]);
    if (sigsetjmp(out, 1) == 0) {
        raise(SIGUSR2);
        FAIL("the jump was lost");
    }
    CHECK_EQ(jumped, SIGUSR2);
    sigset_t mask;
    sigprocmask(SIG_SETMASK, NULL, &mask);
    CHECK(!sigismember(&mask, SIGUSR2));
    for (long i = 0; i < rounds / 8; i++)
        guest_sleep_ms(10);
    printf("in handler ok\n");
    guest_end();
}
