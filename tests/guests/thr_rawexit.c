/* Proves: threads that leave by a plain exit(2), not by exit_group. The first thread ends
 * early, the others one by one; the last one's end is the process's end. Which status
 * counts, the first thread's or the last one's, the kernel decides (the last one's since
 * Linux 5.17): here both give the same. */
#include "guest.h"

static int status = GUEST_END;

static void *work(void *argument)
{
    pid_t pid = getpid(), tid = gettid();
    ROUNDS(round)
    {
        CHECK_EQ(getpid(), pid);
        CHECK_EQ(gettid(), tid);
    }
    if (argument) {
        printf("raw exit ok\n");
        fflush(stdout);
    }
    syscall(SYS_exit, status);
    return NULL;
}

int main(int argc, char **argv)
{
    guest_begin();
    if (argc > 1)
        status = atoi(argv[1]);
    guest_thread(work, NULL);
    guest_thread(work, (void *)1L);
    guest_sleep_ms(30);
    syscall(SYS_exit, status);
}
