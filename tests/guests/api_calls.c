/* Proves the calls of ckpt.h other than the checkpoint itself: critical sections of several
 * threads, handlers of events (order, thread, arguments, no checkpoint inside), generation
 * numbers, error texts. After a recovery the handlers of the restore have run, once, in the
 * thread that had called. Bare every call fails with ENOSYS and no handler runs. */
#include "ckpt.h"
#include "guest.h"

static int bare;
static char calls[64];
static pthread_t caller;

static void handler(int event, void *arg)
{
    size_t n = strlen(calls);
    CHECK(n < sizeof calls - 1 && pthread_equal(pthread_self(), caller));
    CHECK_EQ(ckpt_checkpoint(0), -1);
    CHECK_EQ(errno, EBUSY);
    calls[n] = *(char *)arg + (event == CKPT_BEFORE ? 0 : event == CKPT_AFTER ? 1 : 2);
    if (event == CKPT_RESTORED)
        guest_note("restored");
}

static void *holds(void *arg)
{
    CHECK_EQ(ckpt_hold(), bare ? -1 : 0);
    return arg;
}

static void *releases(void *arg)
{
    CHECK_EQ(ckpt_release(), bare ? -1 : 0);
    return arg;
}

static void in_thread(void *(*function)(void *))
{
    pthread_t thread;
    CHECK(!pthread_create(&thread, NULL, function, NULL) && !pthread_join(thread, NULL));
}

static void refuses(int error)
{
    CHECK_EQ(ckpt_checkpoint(0), -1);
    CHECK_EQ(errno, bare ? ENOSYS : error);
}

int main(void)
{
    guest_begin();
    bare = ckpt_ready() == -1 && errno == ENOSYS;
    caller = pthread_self();
    CHECK_EQ(ckpt_generation(), bare ? -1 : 0);
    CHECK(strstr(ckpt_strerror(ENOSYS), "not loaded") && strcmp(ckpt_strerror(EBUSY), ""));
    CHECK(bare || strstr(ckpt_strerror(EBUSY), "ckpt_hold"));
    CHECK(!ckpt_argument(0) && !ckpt_argument(-1));

    /* Sections are the process's: three threads, and others to end them. */
    for (int k = 0; k < 3; k++)
        in_thread(holds), refuses(EBUSY);
    for (int k = 0; k < 3; k++)
        refuses(EBUSY), in_thread(releases);
    CHECK_EQ(ckpt_release(), -1);
    CHECK_EQ(errno, bare ? ENOSYS : EINVAL);

    CHECK_EQ(ckpt_on(7, handler, NULL), -1);
    CHECK_EQ(errno, bare ? ENOSYS : EINVAL);
    static char args[] = "ae";
    for (char *arg = args; *arg; arg++)
        for (int event = CKPT_BEFORE; event <= CKPT_RESTORED; event++)
            CHECK_EQ(ckpt_on(event, handler, arg), bare ? -1 : 0);
    int result = ckpt_checkpoint(5);
    CHECK_EQ(ckpt_heartbeat(), bare ? -1 : 0);
    if (bare) {
        CHECK(result == -1 && !*calls);
    } else if (result == 0) {
        CHECK(!strcmp(calls, "eabf") && ckpt_generation() == 1);
        guest_note("taken");
        for (;;)
            guest_sleep_ms(50), ckpt_heartbeat();
    } else {
        CHECK(!strcmp(calls, "eacg") && ckpt_generation() == 1);
    }
    printf("calls ok\n");
    guest_end();
}
