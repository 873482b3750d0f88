/* Proves: rounding modes (fesetround: x87 control word and MXCSR), exception flags and
 * enabled traps of each thread come back: each of four threads computes in a mode of
 * its own and must get that mode's results. Also long `rep movsb` and `rep scasb`
 * instructions, which a stop interrupts in their middle. */
#include "guest.h"
#include <fenv.h>

static const int modes[4] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
static double want[4][64];
static long double want_long[4][64];

static double divide(volatile double a, volatile double b) { return a / b; }
static long double divide_long(volatile long double a, volatile long double b) { return a / b; }

static void *work(void *argument)
{
    long id = (long)argument;
    CHECK(fesetround(modes[id]) == 0);
    feclearexcept(FE_ALL_EXCEPT);
    if (id == 1)
        feraiseexcept(FE_OVERFLOW);
    if (id == 2)
        feenableexcept(FE_DIVBYZERO);
    for (int i = 0; i < 64; i++) {
        want[id][i] = divide(i + 1, 7) * (id ? -1 : 1);
        want_long[id][i] = divide_long(i + 1, 11);
    }
    for (long round = 0, rounds = guest_rounds(); round < rounds; round++) {
        for (int n = 0; n < 200; n++) {
            int i = n % 64;
            CHECK(divide(i + 1, 7) * (id ? -1 : 1) == want[id][i]);
            CHECK(divide_long(i + 1, 11) == want_long[id][i]);
            CHECK_EQ(fegetround(), modes[id]);
        }
        CHECK_EQ(fetestexcept(FE_OVERFLOW) != 0, id == 1);
        CHECK_EQ(fegetexcept(), id == 2 ? FE_DIVBYZERO : 0);
        guest_sleep_ms(10);
    }
    return NULL;
}

static void *strings(void *argument)
{
#if defined(__x86_64__)
    size_t len = 8 << 20;
    unsigned char *from = malloc(len), *to = malloc(len);
    CHECK(from && to);
    guest_fill(from, len, 5);
    for (long round = 0, rounds = guest_rounds(); round < rounds; round++) {
        memset(to, 0, len);
        unsigned char *src = from, *dst = to;
        size_t count = len;
        __asm__ volatile("rep movsb" : "+S"(src), "+D"(dst), "+c"(count) : : "memory");
        CHECK(count == 0 && dst == to + len && memcmp(from, to, len) == 0);
        guest_sleep_ms(5);
    }
#endif
    return argument;
}

int main(void)
{
    guest_begin();
    pthread_t threads[5];
    for (long i = 1; i < 4; i++)
        threads[i] = guest_thread(work, (void *)i);
    threads[4] = guest_thread(strings, NULL);
    work((void *)0L);
    for (int i = 1; i < 5; i++)
        guest_join(threads[i]);
    CHECK(want[1][0] != want[2][0]);
    printf("rounding ok\n");
    guest_end();
}
