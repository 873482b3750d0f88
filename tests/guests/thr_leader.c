/* Proves: a process whose first thread has ended by pthread_exit comes back and ends
 * with the status that another thread gives. */
#include "guest.h"

static pthread_t first;
static void *work(void *argument)
{
    guest_sleep_ms(50);
    CHECK_EQ(pthread_join(first, NULL), 0); /* the leader can be joined */
    pid_t pid = getpid(), tid = gettid();
    CHECK(pid != tid);
    ROUNDS(round)
    {
        CHECK_EQ(getpid(), pid);
        CHECK_EQ(gettid(), tid);
    }
    printf("leader ok\n");
    guest_end();
    return argument;
}

static void *idle(void *argument)
{
    pause();
    return argument;
}

int main(void)
{
    guest_begin();
    first = pthread_self();
    guest_thread(work, NULL);
    guest_thread(idle, NULL);
    pthread_exit(NULL);
}
