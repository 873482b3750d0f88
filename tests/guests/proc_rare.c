/* Proves: what few programs ask of the kernel comes back: registrations of membarrier (without them the barrier fails,
 * and user-space RCU ends the program), the I/O priority and the times of SCHED_DEADLINE of each thread. */
#include "guest.h"
#include <linux/membarrier.h>

#define BEST_EFFORT_6 ((2 << 13) | 6)
#define IDLE_IO (3 << 13)

struct attributes {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
};

static volatile int over;

static void holds(long priority, const struct attributes *wanted)
{
    CHECK_EQ(syscall(SYS_ioprio_get, 1, 0), priority);
    struct attributes now = {0};
    CHECK(syscall(SYS_sched_getattr, 0, &now, sizeof now, 0) == 0);
    CHECK_EQ(now.policy, wanted->policy);
    CHECK_EQ(now.runtime, wanted->runtime);
    CHECK_EQ(now.deadline, wanted->deadline);
    CHECK_EQ(now.period, wanted->period);
}

static void *other(void *unused)
{
    CHECK(syscall(SYS_ioprio_set, 1, 0, IDLE_IO) == 0);
    struct attributes wanted = {sizeof wanted, 6, 0, 0, 0, 3000000, 20000000, 40000000};
    if (syscall(SYS_sched_setattr, 0, &wanted, 0) != 0)
        NOT_TESTED("SCHED_DEADLINE is not permitted");
    CHECK(syscall(SYS_sched_getattr, 0, &wanted, sizeof wanted, 0) == 0);
    while (!over) {
        holds(IDLE_IO, &wanted);
        guest_sleep_ms(10);
    }
    return unused;
}

static void barrier(int registration, int command)
{
    if (syscall(SYS_membarrier, command, 0, 0) != 0)
        FAIL("membarrier %d (registered by %d): errno %d", command, registration, errno);
}

int main(void)
{
    guest_begin();
    int supported = syscall(SYS_membarrier, MEMBARRIER_CMD_QUERY, 0, 0);
    const int pairs[][2] = {
        {MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, MEMBARRIER_CMD_PRIVATE_EXPEDITED},
        {MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE, MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE},
        {1 << 8, 1 << 7}, /* ..._RSEQ */
    };
    if (supported < 0)
        supported = 0;
    for (int i = 0; i < 3; i++)
        if (supported & pairs[i][0])
            CHECK(syscall(SYS_membarrier, pairs[i][0], 0, 0) == 0);
        else
            NOT_TESTED("a command of membarrier");
    CHECK(syscall(SYS_ioprio_set, 1, 0, BEST_EFFORT_6) == 0);
    struct attributes wanted = {0};
    CHECK(syscall(SYS_sched_getattr, 0, &wanted, sizeof wanted, 0) == 0);
    pthread_t thread = guest_thread(other, NULL);
    ROUNDS(round)
    {
        for (int i = 0; i < 3; i++)
            if (supported & pairs[i][0])
                barrier(pairs[i][0], pairs[i][1]);
        holds(BEST_EFFORT_6, &wanted);
    }
    over = 1;
    guest_join(thread);
    printf("rare ok\n");
    guest_end();
}
