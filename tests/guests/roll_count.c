/* Rollback, the main path (FIG. 8A, steps 800-850): ckpt_checkpoint(1) returns 0 when it
 * is taken; ckpt_rollback(1, value) comes back there with the value; memory is as it was,
 * protected memory (global, heap, stack) keeps what it holds. Argument: how often. */
#include "guest.h"

#include "ckpt.h"

static volatile long global_kept, global_lost;

int main(int argc, char **argv)
{
    guest_begin();
    long times = argc > 1 ? atol(argv[1]) : 3;
    volatile long stack_kept = 0, stack_lost = 0;
    volatile long *heap = malloc(2 * sizeof(long));
    unsigned char *block = malloc(1 << 20);
    heap[0] = heap[1] = 0;
    guest_fill(block, 1 << 20, 1);
    pid_t pid = getpid();
    int result = ckpt_checkpoint(1);
    if (result < 0)
        FAIL("ckpt_checkpoint: errno %d", errno);
    if (result > 0)
        CHECK_EQ(result, 100 + stack_kept);
    CHECK_EQ(result == 0, stack_kept == 0);
    CHECK_EQ(stack_kept, global_kept);
    CHECK_EQ(stack_kept, heap[0]);
    CHECK(guest_holds(block, 1 << 20, 1));
    CHECK_EQ(global_lost + stack_lost + heap[1], 0);
    CHECK_EQ(getpid(), pid);
    if (stack_kept < times) {
        global_kept++, stack_kept++, heap[0]++;
        global_lost = stack_lost = heap[1] = 5;
        guest_fill(block, 1 << 20, 2 + stack_kept);
        struct ckpt_region keep[] = {
            {(void *)&global_kept, sizeof global_kept},
            {(void *)&stack_kept, sizeof stack_kept},
            {(void *)&heap[0], sizeof heap[0]},
        };
        ckpt_rollback(1, 100 + stack_kept, keep, 3);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    printf("%ld times\n", stack_kept);
    guest_end();
}
