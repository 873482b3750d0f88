/* Proves: limits that the program sets for itself (address space, data, file size, number
 * of processes) do not keep it from being checkpointed, nor do checkpoints make it meet them. */
#include "guest.h"
#include <sys/resource.h>

#define PAGES 4096
#define WORDS 512

static void limit(int resource, rlim_t most)
{
    struct rlimit now;
    CHECK(getrlimit(resource, &now) == 0);
    if (now.rlim_cur == RLIM_INFINITY || now.rlim_cur > most)
        now.rlim_cur = most;
    CHECK(setrlimit(resource, &now) == 0);
}

/* Bytes: a field of /proc/self/status. */
static long size_of(const char *key)
{
    char text[8192];
    CHECK(guest_slurp("/proc/self/status", text, sizeof text) > 0);
    char *at = strstr(text, key);
    CHECK(at != NULL);
    return atol(at + strlen(key)) * 1024;
}

int main(int argc, char **argv)
{
    guest_begin();
    CHECK(argc == 2);
    /* What the library reserves is no part of what a program may have. */
    if (strcmp(argv[1], "small-space") == 0)
        limit(RLIMIT_AS, 120 << 20);
    if (strcmp(argv[1], "small-data") == 0)
        limit(RLIMIT_DATA, 32 << 20);
    int locks = strcmp(argv[1], "locked") == 0;
    struct rlimit lockable;
    CHECK(getrlimit(RLIMIT_MEMLOCK, &lockable) == 0);
    if (locks && geteuid() != 0 && lockable.rlim_cur < 256 << 20) {
        NOT_TESTED("mlockall: RLIMIT_MEMLOCK");
        locks = 0;
    }
    if (locks)
        CHECK(mlockall(MCL_CURRENT | MCL_FUTURE) == 0);
    uint64_t *arena = guest_map(PAGES * WORDS * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t *model = calloc(PAGES, 8);
    for (int p = 0; p < PAGES; p++)
        arena[p * WORDS] = model[p] = p + 1;
    if (strcmp(argv[1], "space") == 0) {
        limit(RLIMIT_AS, size_of("VmSize:") + (8 << 20));
        limit(RLIMIT_DATA, size_of("VmData:") + (8 << 20));
    } else if (strcmp(argv[1], "file") == 0)
        limit(RLIMIT_FSIZE, 1 << 20);
    else if (strcmp(argv[1], "processes") == 0)
        limit(RLIMIT_NPROC, 1);
    uint64_t dice = 1;
    ROUNDS(round)
    {
        for (int n = 0; n < 500; n++) {
            dice = guest_mix(dice);
            int p = dice % PAGES;
            CHECK_EQ(arena[p * WORDS], model[p]);
            arena[p * WORDS] = model[p] = dice;
        }
        if (locks && round % 10 == 0) {
            CHECK(size_of("VmLck:") < 100 << 20);
            CHECK(size_of("VmRSS:") < 150 << 20);
        }
        /* There is still room for what the limit leaves. */
        void *more = guest_map(1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(more, 1, 1 << 20);
        CHECK(munmap(more, 1 << 20) == 0);
    }
    for (int p = 0; p < PAGES; p++)
        CHECK_EQ(arena[p * WORDS], model[p]);
    printf("limits %lx\n", (long)dice);
    guest_end();
}
