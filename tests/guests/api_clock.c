/* Proves: after a recovery to a checkpoint of the clock the handlers of CKPT_RESTORED run
 * once, in the first thread that calls the library; those of CKPT_BEFORE and CKPT_AFTER never. */
#include "ckpt.h"
#include "guest.h"

static _Atomic long owed;

static void handler(int event, void *arg)
{
    (void)arg;
    guest_note(event == CKPT_RESTORED ? "restored" : "wrong");
    owed++;
}

static void *beats(void *arg)
{
    for (;;)
        guest_sleep_ms(7), ckpt_heartbeat();
    return arg;
}

int main(void)
{
    guest_begin();
    pthread_t threads[3];
    for (int event = CKPT_BEFORE; event <= CKPT_RESTORED; event++)
        ckpt_on(event, handler, NULL);
    for (int k = 0; k < 3; k++)
        CHECK(!pthread_create(&threads[k], NULL, beats, NULL));
    for (long round = 0; round < guest_rounds(); round++) {
        /* At most one handler for each life: more would be noted below. */
        guest_sleep_ms(10);
        ckpt_hold();
        ckpt_release();
    }
    fprintf(stderr, "%ld handlers\n", owed);
    printf("clock ok\n");
    guest_end();
}
