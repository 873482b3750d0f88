/* Proves: several threads call ckpt_checkpoint at once, while others are born and end and the
 * clock runs too: every call is answered, with 0, or with the return value in one thread after
 * each recovery by an inserted checkpoint; never with an error. Its own memory holds. */
#include "ckpt.h"
#include "guest.h"

enum { CALLERS = 4 };
static long returns;

static void *caller(void *argument)
{
    unsigned char mine[512];
    long rounds = guest_rounds() / 10;
    for (long round = 0; round < rounds; round++) {
        guest_fill(mine, sizeof mine, (long)argument + round);
        int result = ckpt_checkpoint((long)argument);
        if (result > 0)
            __atomic_add_fetch(&returns, 1, __ATOMIC_SEQ_CST);
        else if (result < 0 && errno != ENOSYS)
            FAIL("ckpt_checkpoint: errno %d", errno);
        CHECK(guest_holds(mine, sizeof mine, (long)argument + round));
        guest_sleep_ms(20);
    }
    return NULL;
}

static int stop;
static void *nothing(void *argument) { return argument; }
static void *parent(void *argument)
{
    while (!__atomic_load_n(&stop, __ATOMIC_SEQ_CST)) {
        guest_join(guest_thread(nothing, NULL));
        guest_sleep_ms(1);
    }
    return argument;
}

int main(void)
{
    guest_begin();
    pthread_t callers[CALLERS], births = guest_thread(parent, NULL);
    for (long i = 0; i < CALLERS; i++)
        callers[i] = guest_thread(caller, (void *)i);
    for (long i = 0; i < CALLERS; i++)
        guest_join(callers[i]);
    __atomic_store_n(&stop, 1, __ATOMIC_SEQ_CST);
    guest_join(births);
    printf("threads ok\n");
    guest_end();
}
