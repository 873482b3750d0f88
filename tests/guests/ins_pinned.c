/* Proves: CPUs come back in inserted mode too, where the helper thread is born by the first
 * ckpt_checkpoint, of a thread that had pinned itself: it stays on its CPU, and a thread that
 * has not pinned itself may run on all. */
#include "guest.h"

#include "ckpt.h"

#include <sched.h>

static cpu_set_t all;
static volatile int over;

static void *free_to_go(void *unused)
{
    cpu_set_t now;
    while (!over) {
        CHECK(sched_getaffinity(0, sizeof now, &now) == 0);
        CHECK(CPU_EQUAL(&now, &all));
        guest_sleep_ms(10);
    }
    return unused;
}

int main(void)
{
    guest_begin();
    cpu_set_t one, now;
    CHECK(sched_getaffinity(0, sizeof all, &all) == 0);
    if (CPU_COUNT(&all) == 1)
        fprintf(stderr, "*** NOT TESTED: only one CPU\n");
    pthread_t thread = guest_thread(free_to_go, NULL);
    int cpu = CPU_SETSIZE - 1;
    while (!CPU_ISSET(cpu, &all))
        cpu--;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
    ROUNDS(round)
    {
        CHECK(ckpt_checkpoint(0) >= 0 || errno == ENOSYS);
        CHECK(sched_getaffinity(0, sizeof now, &now) == 0);
        CHECK(CPU_EQUAL(&now, &one));
    }
    over = 1;
    guest_join(thread);
    printf("pinned ok\n");
    guest_end();
}
