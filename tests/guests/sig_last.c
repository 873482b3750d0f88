/* Proves: the highest signal, which the library uses too, is handled before the call that sends it returns, whatever
 * stops come just then: sent to the process and to the thread, with a value and without. */
#include "guest.h"

static volatile sig_atomic_t handled, value;

static void on_signal(int sig, siginfo_t *info, void *context)
{
    CHECK(sig == SIGRTMAX && context != NULL);
    value = info->si_code == SI_QUEUE ? info->si_value.sival_int : -1;
    handled++;
}

static double now_ms(void)
{
    struct timespec now;
    CHECK(clock_gettime(CLOCK_MONOTONIC, &now) == 0);
    return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

int main(void)
{
    guest_begin();
    struct sigaction act = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO};
    CHECK(sigaction(SIGRTMAX, &act, NULL) == 0);
    int sent = 0;
    for (long round = 0; round < guest_rounds(); round++) {
        double begun = now_ms();
        while (now_ms() - begun < 10) {
            int expected = -1, before = handled;
            switch (++sent % 3) {
            case 0: {
                union sigval with = {.sival_int = expected = sent};
                CHECK(sigqueue(getpid(), SIGRTMAX, with) == 0);
                break;
            }
            case 1:
                CHECK(kill(getpid(), SIGRTMAX) == 0);
                break;
            default:
                CHECK(raise(SIGRTMAX) == 0);
            }
            if (handled - before != 1 || value != expected)
                FAIL("signal %d: handled %d times, value %d, not %d", sent, (int)(handled - before), (int)value, expected);
        }
    }
    printf("each was handled in time\n");
    guest_end();
}
