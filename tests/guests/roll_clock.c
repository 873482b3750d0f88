/* Proves: rollbacks in a process whose clock goes on over a reboot: the clock, which a protected
 * variable remembers, goes on over them too, and waits end at their times. */
#include "guest.h"

#include "ckpt.h"

enum { TIMES = 10 };

static struct kept {
    long rounds;
    double last;
} kept;

static void wait_a_moment(void)
{
    struct timespec t;
    CHECK(clock_gettime(CLOCK_MONOTONIC, &t) == 0);
    t.tv_nsec += 60000000;
    if (t.tv_nsec >= 1000000000) {
        t.tv_sec++;
        t.tv_nsec -= 1000000000;
    }
    double before = guest_now();
    CHECK_EQ(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL), 0);
    double now = guest_now();
    if (before < kept.last || (kept.last != 0 && before > kept.last + 100))
        FAIL("the clock went from %.6f to %.6f, round %ld", kept.last, before, kept.rounds);
    CHECK(now >= t.tv_sec + t.tv_nsec / 1e9 && now < before + 100);
    kept.last = now;
}

int main(void)
{
    guest_begin();
    int result = ckpt_checkpoint(5);
    CHECK(result >= 0);
    for (int k = 0; k < 6; k++)
        wait_a_moment();
    if (++kept.rounds <= TIMES) {
        struct ckpt_region region = {&kept, sizeof kept};
        int refused;
        do {
            refused = ckpt_rollback(5, (int)kept.rounds, &region, 1);
            guest_sleep_ms(5);
        } while (refused == -1 && errno == EAGAIN);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    printf("%d rollbacks\n", TIMES);
    guest_end();
}
