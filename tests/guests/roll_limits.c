/* A rollback of a program that has used up its limits, or lowered them since the checkpoint.
 *
 * Out of memory, argv[1] "space" or "data": the program takes memory until there is none, and
 * goes back; several times. "numbers", "files": the limit is lowered below what the checkpoint
 * has, hard; who may raise it (CAP_SYS_RESOURCE) goes back, anybody else is told (EIO) and goes
 * on, with the limits that he had. "soft": only lowered so that it can be raised again.
 *
 * argv[2] "bare": without that right, as an ordinary user. */
#include "guest.h"

#include "ckpt.h"
#include <dirent.h>
#include <linux/capability.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#define LARGE 40
static const rlim_t MIB = 1 << 20;

/* Gives up CAP_SYS_RESOURCE, and begins again without it. */
static void give_up(char **argv)
{
    if (getenv("ROLL_BARE") || prctl(PR_CAPBSET_DROP, CAP_SYS_RESOURCE) != 0)
        return;
    setenv("ROLL_BARE", "1", 1);
    execv("/proc/self/exe", argv);
    FAIL("execv: errno %d", errno);
}

static int may_raise(void)
{
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct caps[2];
    CHECK(syscall(SYS_capget, &head, caps) == 0);
    return (caps[0].effective & (1u << CAP_SYS_RESOURCE)) != 0;
}

static struct rlimit get(int resource)
{
    struct rlimit limit;
    CHECK(getrlimit(resource, &limit) == 0);
    return limit;
}

static void set(int resource, rlim_t soft, rlim_t hard)
{
    struct rlimit limit = {soft, hard};
    CHECK(setrlimit(resource, &limit) == 0);
}

/* Numbers 0 to 2 of the helper's table lead nowhere: nothing that is written there by mistake
 * gets into the store. */
static void helper_is_tidy(void)
{
    DIR *dir = opendir("/proc/self/task");
    CHECK(dir != NULL);
    int found = 0;
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
        char path[300], text[64] = "";
        snprintf(path, sizeof path, "/proc/self/task/%s/comm", entry->d_name);
        if (entry->d_name[0] == '.' || guest_slurp(path, text, sizeof text) <= 0)
            continue;
        if (strcmp(text, "ckpt-helper\n") != 0)
            continue;
        found++;
        for (int fd = 0; fd < 3; fd++) {
            snprintf(path, sizeof path, "/proc/self/task/%s/fd/%d", entry->d_name, fd);
            memset(text, 0, sizeof text);
            CHECK(readlink(path, text, sizeof text - 1) > 0);
            if (strcmp(text, "/") != 0)
                FAIL("the helper's descriptor %d is %s", fd, text);
        }
    }
    closedir(dir);
    CHECK_EQ(found, 1);
}

/* Bytes: a field of /proc/self/status. */
static rlim_t size_of(const char *key)
{
    char text[8192];
    CHECK(guest_slurp("/proc/self/status", text, sizeof text) > 0);
    char *at = strstr(text, key);
    CHECK(at != NULL);
    return (rlim_t)atol(at + strlen(key)) * 1024;
}

static void out_of_memory(int resource)
{
    CHECK(ckpt_checkpoint(0) == 0);
    rlim_t most = size_of(resource == RLIMIT_AS ? "VmSize:" : "VmData:") + 100 * MIB;
    set(resource, most, most);
    volatile int times = ckpt_checkpoint(1);
    CHECK(times >= 0);
    struct rlimit limit = get(resource);
    CHECK_EQ(limit.rlim_cur, most);
    CHECK_EQ(limit.rlim_max, most);
    helper_is_tidy();
    if (times < 3) {
        char *got;
        long taken = 0;
        while ((got = malloc(times == 1 ? 100000 : 1000000)) != NULL) {
            memset(got, 1, 1000);
            taken++;
        }
        while (malloc(16) != NULL)
            ;
        if (taken < 50)
            FAIL("only %ld taken", taken);
        ckpt_rollback(1, times + 1, NULL, 0);
        FAIL("ckpt_rollback out of memory: errno %d", errno);
    }
}

static void lowered(int resource, rlim_t soft, rlim_t hard)
{
    char *large = malloc(LARGE * MIB);
    CHECK(large != NULL);
    memset(large, 1, LARGE * MIB);
    for (int fd = 10; fd < 30; fd++)
        CHECK_EQ(dup2(0, fd), fd);
    CHECK_EQ(dup2(0, 90), 90);
    struct rlimit before = get(resource);
    volatile int back = ckpt_checkpoint(1);
    CHECK(back == 0 || back == 1);
    if (!back) {
        close(90);
        memset(large, 2, LARGE * MIB);
        if (hard == RLIM_INFINITY)
            hard = before.rlim_max;
        set(resource, soft, hard);
        int can = may_raise() || hard == before.rlim_max;
        errno = 0;
        int result = ckpt_rollback(1, 1, NULL, 0);
        if (can)
            FAIL("ckpt_rollback: %d, errno %d", result, errno);
        CHECK_EQ(result, -1);
        CHECK_EQ(errno, EIO);
        struct rlimit now = get(resource);
        CHECK_EQ(now.rlim_cur, soft);
        CHECK_EQ(now.rlim_max, hard);
        CHECK_EQ(large[LARGE * MIB / 2], 2);
        return;
    }
    CHECK(fcntl(90, F_GETFD) >= 0);
    CHECK_EQ(large[LARGE * MIB / 2], 1);
    struct rlimit now = get(resource);
    CHECK_EQ(now.rlim_cur, before.rlim_cur);
    CHECK_EQ(now.rlim_max, before.rlim_max);
}

int main(int argc, char **argv)
{
    CHECK(argc >= 2);
    if (argc > 2)
        give_up(argv);
    guest_begin();
    const char *what = argv[1];
    if (strcmp(what, "space") == 0)
        out_of_memory(RLIMIT_AS);
    else if (strcmp(what, "data") == 0)
        out_of_memory(RLIMIT_DATA);
    else if (strcmp(what, "less") == 0)
        lowered(RLIMIT_AS, 60 * MIB, 60 * MIB);
    else if (strcmp(what, "numbers") == 0)
        lowered(RLIMIT_NOFILE, 50, 50);
    else if (strcmp(what, "files") == 0) {
        /* Afterwards nothing can be written to a file, this neither. */
        printf("limits ok\n");
        fflush(stdout);
        lowered(RLIMIT_FSIZE, 0, 0);
        guest_end();
    } else {
        lowered(RLIMIT_FSIZE, 0, RLIM_INFINITY);
        lowered(RLIMIT_AS, 60 * MIB, RLIM_INFINITY);
        lowered(RLIMIT_DATA, MIB, RLIM_INFINITY);
        lowered(RLIMIT_NOFILE, 50, RLIM_INFINITY);
        lowered(RLIMIT_NOFILE, 5, RLIM_INFINITY);
    }
    printf("limits ok\n");
    guest_end();
}
