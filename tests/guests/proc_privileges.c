/* Proves: what the program has forbidden itself, and what can be set again, is so after a
 * restore: memory that becomes executable (PR_SET_MDWE), the time stamp counter (PR_SET_TSC,
 * of one thread), and that capabilities are kept over setuid (PR_SET_KEEPCAPS, of another). */
#include "guest.h"
#include <sys/prctl.h>

#define SET_MDWE 65
#define GET_MDWE 66

static volatile int over;

static int tsc(void)
{
    int value = 0;
    CHECK(prctl(PR_GET_TSC, &value) == 0);
    return value;
}

static void *without_tsc(void *unused)
{
    CHECK(prctl(PR_SET_TSC, PR_TSC_SIGSEGV) == 0);
    while (!over) {
        CHECK_EQ(tsc(), PR_TSC_SIGSEGV);
        CHECK_EQ(prctl(PR_GET_KEEPCAPS), 0);
        guest_sleep_ms(10);
    }
    return unused;
}

static void *with_keepcaps(void *unused)
{
    CHECK(prctl(PR_SET_KEEPCAPS, 1) == 0);
    while (!over) {
        CHECK_EQ(tsc(), PR_TSC_ENABLE);
        CHECK_EQ(prctl(PR_GET_KEEPCAPS), 1);
        guest_sleep_ms(10);
    }
    return unused;
}

int main(void)
{
    guest_begin();
    pthread_t threads[] = {guest_thread(without_tsc, NULL), guest_thread(with_keepcaps, NULL)};
    int mdwe = prctl(SET_MDWE, 1, 0, 0, 0) == 0;
    if (!mdwe)
        fprintf(stderr, "*** NOT TESTED: no PR_SET_MDWE (errno %d)\n", errno);
    ROUNDS(round)
    {
        CHECK_EQ(tsc(), PR_TSC_ENABLE);
        CHECK_EQ(prctl(PR_GET_KEEPCAPS), 0);
        void *code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK((code == MAP_FAILED) == mdwe);
        if (code != MAP_FAILED)
            munmap(code, 4096);
        if (mdwe)
            CHECK_EQ(prctl(GET_MDWE, 0, 0, 0, 0), 1);
    }
    over = 1;
    guest_join(threads[0]);
    guest_join(threads[1]);
    printf("privileges ok\n");
    guest_end();
}
