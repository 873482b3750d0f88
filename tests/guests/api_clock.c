/* With an argument: none but this call is made. Proves: after a recovery to a checkpoint of the clock the handlers of CKPT_RESTORED run
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

static void call(const char *name)
{
    if (!strcmp(name, "exclude"))
        ckpt_exclude("/no/such/file");
    else if (!strcmp(name, "include"))
        ckpt_include("/no/such/file");
    else if (!strcmp(name, "redirect"))
        ckpt_redirect("/no/such/file", "/no/such/file");
    else if (!strcmp(name, "rollback"))
        CHECK_EQ(ckpt_rollback(4711, 1, NULL, 0), -1);
    else
        FAIL("%s", name);
}

int main(int argc, char **argv)
{
    guest_begin();
    pthread_t threads[3];
    for (int event = CKPT_BEFORE; event <= CKPT_RESTORED; event++)
        ckpt_on(event, handler, NULL);
    for (int k = 0; k < 3 && argc < 2; k++)
        CHECK(!pthread_create(&threads[k], NULL, beats, NULL));
    for (long round = 0; round < guest_rounds(); round++) {
        /* At most one handler for each life: more would be noted below. */
        guest_sleep_ms(10);
        if (argc > 1) {
            call(argv[1]);
            continue;
        }
        ckpt_hold();
        ckpt_release();
    }
    fprintf(stderr, "%ld handlers\n", owed);
    printf("clock ok\n");
    guest_end();
}
