/* Rollback of what belongs to mappings, threads and the process, and was changed since: an area
 * that grows down (grown, its lower part unmapped, or all of it) and can grow again, CPUs, memory
 * to come that is locked, capabilities kept, the time stamp counter. Comes back three times. */
#include "guest.h"

#include "ckpt.h"

#include <sched.h>
#include <sys/prctl.h>

#define TOP ((char *)0x210000000000)
#define PAGES 20

static cpu_set_t all;
static volatile int times, over;

static void *other(void *unused)
{
    cpu_set_t now;
    while (!over) {
        int tsc;
        CHECK(sched_getaffinity(0, sizeof now, &now) == 0);
        CHECK(CPU_EQUAL(&now, &all) && prctl(PR_GET_TSC, &tsc) == 0 && tsc == PR_TSC_ENABLE);
        CHECK_EQ(prctl(PR_GET_KEEPCAPS), 0);
        guest_sleep_ms(5);
    }
    return unused;
}

static long locked(void)
{
    static char text[8192];
    CHECK(guest_slurp("/proc/self/status", text, sizeof text) > 0);
    return atol(strstr(text, "VmLck:") + 6);
}

/* Where memory must not become executable there is no way back, and nothing has happened. */
static int forbidden(void)
{
    CHECK_EQ(ckpt_checkpoint(1), 0);
    if (prctl(65 /* PR_SET_MDWE */, 1, 0, 0, 0) != 0)
        fprintf(stderr, "*** NOT TESTED: no PR_SET_MDWE (errno %d)\n", errno);
    else {
        CHECK_EQ(ckpt_rollback(1, 0, NULL, 0), -1);
        CHECK_EQ(errno, EIO);
        CHECK_EQ(ckpt_checkpoint(2), 0);
    }
    printf("no way back\n");
    guest_end();
    return 0;
}

int main(int argc, char **argv)
{
    guest_begin();
    if (argc > 1 && strcmp(argv[1], "mdwe") == 0)
        return forbidden();
    CHECK(sched_getaffinity(0, sizeof all, &all) == 0);
    pthread_t thread = guest_thread(other, NULL);
    char *area = mmap(TOP - 2 * 4096, 2 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED, -1, 0);
    CHECK(area == TOP - 2 * 4096);
    for (int page = 1; page <= PAGES; page++)
        memset(TOP - page * 4096, page, 4096);
    int result = ckpt_checkpoint(1);
    CHECK(result >= 0 && (result > 0) == (times > 0));
    /* As it was ... */
    cpu_set_t now;
    int tsc;
    CHECK(sched_getaffinity(0, sizeof now, &now) == 0 && CPU_EQUAL(&now, &all));
    CHECK(prctl(PR_GET_TSC, &tsc) == 0 && tsc == PR_TSC_ENABLE);
    CHECK_EQ(prctl(PR_GET_KEEPCAPS), 0);
    for (int page = 1; page <= PAGES; page++)
        CHECK(TOP[-page * 4096] == page && TOP[-page * 4096 + 4095] == page);
    long before = locked();
    CHECK_EQ(before, 0);
    char *fresh = guest_map(65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK_EQ(locked(), before);
    CHECK(munmap(fresh, 65536) == 0);
    /* ... and it can grow, to nothing but zeros. */
    for (int page = PAGES + 1; page <= 2 * PAGES; page++) {
        CHECK(guest_is_zero(TOP - page * 4096, 4096));
        memset(TOP - page * 4096, 77, 4096);
    }
    if (times < 3) {
        if (times == 1)
            CHECK(munmap(TOP - 2 * PAGES * 4096, (PAGES + 10) * 4096) == 0);
        if (times == 2)
            CHECK(munmap(TOP - 2 * PAGES * 4096, 2 * PAGES * 4096) == 0);
        CPU_ZERO(&now);
        int cpu = CPU_SETSIZE - 1;
        while (!CPU_ISSET(cpu, &all))
            cpu--;
        CPU_SET(cpu, &now);
        CHECK(sched_setaffinity(0, sizeof now, &now) == 0);
        CHECK(prctl(PR_SET_KEEPCAPS, 1) == 0);
        CHECK(mlockall(MCL_FUTURE) == 0);
        CHECK(prctl(PR_SET_TSC, PR_TSC_SIGSEGV) == 0);
        times++;
        struct ckpt_region keep = {(void *)&times, sizeof times};
        ckpt_rollback(1, 0, &keep, 1);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    over = 1;
    guest_join(thread);
    printf("back 3 times\n");
    guest_end();
}
