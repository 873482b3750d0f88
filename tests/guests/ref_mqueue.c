/* Proves: with an open POSIX message queue (another kind of descriptor than the library
 * rebuilds) a checkpoint is refused, never taken without it; when it is closed checkpoints
 * succeed. */
#include "guest.h"
#include <mqueue.h>

int main(void)
{
    guest_begin();
    char name[64];
    struct mq_attr attr = {.mq_maxmsg = 4, .mq_msgsize = 64};
    snprintf(name, sizeof name, "/guest-ref-%d", getpid());
    mqd_t queue = mq_open(name, O_RDWR | O_CREAT, 0600, &attr);
    if (queue == -1) {
        fprintf(stderr, "no message queues for this user (errno %d): not tested\n", errno);
        guest_note("no reason");
    } else {
        CHECK(mq_unlink(name) == 0);
        guest_note("reason there");
    }
    char text[64];
    for (long i = 0; i < guest_rounds() / 2; i++) {
        if (queue != -1) {
            CHECK(mq_send(queue, "message", 8, 0) == 0);
            CHECK_EQ(mq_receive(queue, text, sizeof text, NULL), 8);
        }
        guest_sleep_ms(10);
    }
    guest_note("reason goes");
    if (queue != -1)
        CHECK(mq_close(queue) == 0);
    guest_note("reason gone");
    ROUNDS(round) CHECK(round >= 0);
    printf("message queue ok\n");
    guest_end();
}
