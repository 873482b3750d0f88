/* Goes back by its own call, once; then waits for `ckpt undo`, which takes it into the call
 * again: that fails with ECANCELED. The argument: so many threads. */
#include "guest.h"

#include "ckpt.h"
#include <errno.h>
#include <pthread.h>

static int calls;

static void *waiting(void *unused)
{
    for (;;)
        guest_sleep_ms(1);
    return unused;
}

int main(int argc, char **argv)
{
    guest_begin();
    for (int k = argc > 1 ? atoi(argv[1]) : 1; k > 1; k--) {
        pthread_t thread;
        CHECK_EQ(pthread_create(&thread, NULL, waiting, NULL), 0);
    }
    int result = ckpt_checkpoint(7);
    CHECK(result >= 0);
    if (result > 0) {
        CHECK_EQ(result, 5);
        CHECK_EQ(calls, 0);
        CHECK(access("made", F_OK) < 0);
        guest_note("back");
        for (;;)
            guest_sleep_ms(1);
    }
    int fd = open("made", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    CHECK(fd >= 0 && write(fd, "x", 1) == 1);
    close(fd);
    calls = 1;
    CHECK_EQ(ckpt_rollback(7, 5, NULL, 0), -1);
    CHECK_EQ(errno, ECANCELED);
    CHECK_EQ(calls, 1);
    CHECK_EQ(access("made", F_OK), 0);
    printf("undone\n");
    guest_end();
}
