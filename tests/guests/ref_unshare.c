/* Proves: what needs a process of one thread still works when checkpoints have been taken: the
 * library's own thread is gone before unshare(CLONE_NEWUSER) is made. From then on checkpoints are
 * refused. The note "reason goes" tells the test that it is over. */
#include "guest.h"
#include <sched.h>

int main(void)
{
    guest_begin();
    for (long i = 0; i < guest_rounds() / 2; i++)
        guest_sleep_ms(10);
    guest_note("checkpoints so far");
    if (unshare(CLONE_NEWUSER) != 0) {
        if (errno != EPERM && errno != ENOSPC && errno != ENOSYS)
            FAIL("unshare: errno %d", errno);
        guest_note("no reason");
    } else
        guest_note("reason there");
    ROUNDS(round) CHECK(getppid() >= 0);
    guest_note("reason goes");
    printf("unshare ok\n");
    guest_end();
}
