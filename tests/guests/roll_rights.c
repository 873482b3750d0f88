/* A rollback of a program that has given up what it cannot get back: "tasks", the limit on threads
 * when some have ended; "locked", the limit on locked memory when some was unlocked; "privileges",
 * PR_SET_NO_NEW_PRIVS. Who may raise the limits goes back; anybody else (argv[2] "other": as another
 * user) is told and goes on. It died (threads), went on with memory that was not locked, or without
 * the privileges. */
#include "guest.h"

#include "ckpt.h"
#include <sys/prctl.h>
#include <sys/resource.h>

#define THREADS 5
static volatile int enough, running;

static void *sleeper(void *arg)
{
    __atomic_add_fetch(&running, 1, __ATOMIC_SEQ_CST);
    while (!enough)
        usleep(2000);
    return arg;
}

/* Begins again as nobody in particular. */
static void become(char **argv)
{
    const char *store = getenv("CKPT_DIR");
    if (geteuid() != 0)
        return;
    CHECK(mkdir(store, 0777) == 0 || errno == EEXIST);
    CHECK(chmod(store, 0777) == 0);
    unsetenv("GUEST_LOG");
    CHECK(setresgid(65534, 65534, 65534) == 0 && setresuid(65534, 65534, 65534) == 0);
    execv("/proc/self/exe", argv);
    FAIL("execv: errno %d", errno);
}

static void lower(int resource)
{
    struct rlimit none = {0, 0};
    CHECK(setrlimit(resource, &none) == 0);
}

static long locked_kib(void)
{
    static char text[8192];
    CHECK(guest_slurp("/proc/self/status", text, sizeof text) > 0);
    return atol(strstr(text, "VmLck:") + 6);
}

int main(int argc, char **argv)
{
    CHECK(argc >= 2);
    guest_begin();
    if (argc > 2)
        become(argv);
    int root = geteuid() == 0;
    char what = argv[1][0];
    pthread_t threads[THREADS];
    for (int k = 0; k < THREADS; k++)
        threads[k] = guest_thread(sleeper, NULL);
    while (running < THREADS)
        usleep(1000);
    char *memory = guest_map(65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (what == 'l')
        CHECK(mlock(memory, 65536) == 0);
    volatile int here = 0;
    int result = ckpt_checkpoint(1);
    CHECK_EQ(result, here);
    if (result == 0) {
        if (what == 't') {
            enough = 1;
            for (int k = 0; k < THREADS; k++)
                guest_join(threads[k]);
            lower(RLIMIT_NPROC);
        } else if (what == 'l') {
            CHECK(munlock(memory, 65536) == 0);
            lower(RLIMIT_MEMLOCK);
        } else
            CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
        int errno_wanted = what == 'p' ? EPERM : EIO;
        here = 1;
        struct ckpt_region keep = {(void *)&here, sizeof here};
        CHECK_EQ(ckpt_rollback(1, 1, &keep, 1), -1);
        CHECK_EQ(errno, errno_wanted);
        CHECK(!root || what == 'p');
        CHECK_EQ(here, 1);
        if (what == 't')
            _exit(printf("rights ok\n") < 0 || fflush(stdout) ? 1 : GUEST_END);
        enough = 1;
    } else {
        CHECK(root && what != 'p');
        CHECK_EQ(running, THREADS);
        CHECK_EQ(locked_kib(), what == 'l' ? 64 : 0);
        enough = 1;
    }
    for (int k = 0; k < THREADS; k++)
        guest_join(threads[k]);
    printf("rights ok\n");
    guest_end();
}
