/* Proves: what mlockall has said of memory to come is in force after a restore: a new mapping
 * is locked, or locked when it is touched, or not locked any more after munlockall. */
#include "guest.h"
#include <sys/resource.h>

/* The words "lo" and "lf" of VmFlags of a new mapping. */
static void new_mapping(int *locked, int *on_fault)
{
    static char smaps[1 << 20];
    /* Alone: a neighbour's flags would be told for both. */
    char *room = guest_map(3 * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(mprotect(room + 4096, 4096, PROT_READ) == 0);
    char key[40];
    CHECK(guest_slurp("/proc/self/smaps", smaps, sizeof smaps) > 0);
    snprintf(key, sizeof key, "\n%lx-", (unsigned long)room + 4096);
    char *line = strstr(smaps, key);
    CHECK(line && (line = strstr(line, "VmFlags:")));
    *strchr(line, '\n') = 0;
    *locked = strstr(line, " lo") != NULL;
    *on_fault = strstr(line, " lf") != NULL;
    CHECK(munmap(room, 3 * 4096) == 0);
}

int main(void)
{
    guest_begin();
    static const struct {
        int flags, locked, on_fault;
    } phases[] = {
        {0, 0, 0}, {MCL_FUTURE, 1, 0}, {MCL_FUTURE | MCL_ONFAULT, 1, 1}, {MCL_CURRENT | MCL_ONFAULT, 0, 0}, {-1, 0, 0},
    };
    enum { N = sizeof phases / sizeof *phases };
    for (int phase = 0; phase < N; phase++) {
        int flags = phases[phase].flags;
        if (flags > 0 && mlockall(flags) != 0) {
            /* All that is there may be more than an ordinary user may lock. */
            CHECK(flags & MCL_CURRENT && (errno == ENOMEM || errno == EPERM));
            continue;
        }
        if (flags < 0)
            CHECK(munlockall() == 0);
        for (long round = 0; round < guest_rounds() / N; round++, guest_sleep_ms(10)) {
            int locked, on_fault;
            new_mapping(&locked, &on_fault);
            CHECK_EQ(locked, phases[phase].locked);
            CHECK_EQ(on_fault, phases[phase].on_fault);
        }
    }
    printf("lockall ok\n");
    guest_end();
}
