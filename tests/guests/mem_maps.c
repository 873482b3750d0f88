/* Proves: mappings of every kind come back with content, protection and sharing:
 * private and shared anonymous, memfd (shared, private, two views of one), private
 * and shared file mappings (modified and not), beyond the end of the file (SIGBUS),
 * PROT_NONE (SIGSEGV), read-only after writing. */
#include "guest.h"
#include <setjmp.h>

#define K 4096ul

static sigjmp_buf back;
static volatile sig_atomic_t got;
static void on_fault(int sig)
{
    got = sig;
    siglongjmp(back, 1);
}

static int faults(volatile unsigned char *at, int write)
{
    got = 0;
    if (sigsetjmp(back, 1) == 0) {
        if (write)
            *at = 1;
        else
            (void)*at;
    }
    return got;
}

int main(void)
{
    guest_begin();
    struct sigaction act = {.sa_handler = on_fault};
    CHECK(sigaction(SIGSEGV, &act, NULL) == 0 && sigaction(SIGBUS, &act, NULL) == 0);
    const int rw = PROT_READ | PROT_WRITE;

    unsigned char *anon = guest_map(64 * K, rw, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    guest_fill(anon, 64 * K, 1);
    unsigned char *shared = guest_map(64 * K, rw, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    guest_fill(shared, 64 * K, 2);

    int mem = memfd_create("guest", MFD_CLOEXEC);
    CHECK(mem >= 0 && ftruncate(mem, 16 * K) == 0);
    unsigned char *view1 = guest_map(16 * K, rw, MAP_SHARED, mem, 0);
    guest_fill(view1, 16 * K, 3);
    unsigned char *view2 = guest_map(8 * K, rw, MAP_SHARED, mem, 8 * K);
    unsigned char *own_view = guest_map(16 * K, rw, MAP_PRIVATE, mem, 0);
    guest_fill(own_view, 4 * K, 4);

    unsigned char page[4 * K];
    int file = open("mapped.dat", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    CHECK(file >= 0);
    guest_fill(page, sizeof page, 5);
    CHECK_EQ(pwrite(file, page, sizeof page, 0), sizeof page);
    CHECK(ftruncate(file, 4 * K) == 0);
    unsigned char *file_own = guest_map(8 * K, rw, MAP_PRIVATE, file, 0);
    guest_fill(file_own + K, K, 6);
    unsigned char *file_shared = guest_map(4 * K, rw, MAP_SHARED, file, 0);
    unsigned char *file_only = guest_map(2 * K, PROT_READ, MAP_PRIVATE, file, 2 * K);
    close(file); /* the mapping outlives it */

    unsigned char *none = guest_map(16 * K, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char *hidden = guest_map(4 * K, rw, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    guest_fill(hidden, 4 * K, 8);
    CHECK(mprotect(hidden, 4 * K, PROT_NONE) == 0);
    unsigned char *fixed = guest_map(4 * K, rw, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    guest_fill(fixed, 4 * K, 9);
    CHECK(mprotect(fixed, 4 * K, PROT_READ) == 0);
    /* Alternating protections: many small areas of one allocation. */
    unsigned char *comb = guest_map(64 * K, rw, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    guest_fill(comb, 64 * K, 10);
    for (int i = 0; i < 64; i += 2)
        CHECK(mprotect(comb + i * K, K, PROT_READ) == 0);
    unsigned char *zero = guest_map(1024 * K, rw, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    ROUNDS(round)
    {
        CHECK(guest_holds(anon, 63 * K, 1) && guest_holds(shared, 63 * K, 2));
        *(long *)(anon + 63 * K) = round;
        *(long *)(shared + 63 * K) = round;
        CHECK(guest_holds(view1, 15 * K, 3));
        *(volatile long *)(view1 + 15 * K) = round; /* seen through the other view */
        CHECK_EQ(*(volatile long *)(view2 + 7 * K), round);
        long through_fd = -1;
        CHECK_EQ(pread(mem, &through_fd, sizeof through_fd, 15 * K), sizeof through_fd);
        CHECK_EQ(through_fd, round);
        CHECK(guest_holds(own_view, 4 * K, 4));
        CHECK(memcmp(own_view + 4 * K, view1 + 4 * K, 11 * K) == 0);
        CHECK(memcmp(file_own, page, K) == 0 && guest_holds(file_own + K, K, 6));
        CHECK(memcmp(file_own + 2 * K, page + 2 * K, 2 * K) == 0);
        CHECK(memcmp(file_shared, page, 4 * K) == 0);
        CHECK(memcmp(file_only, page + 2 * K, 2 * K) == 0);
        CHECK_EQ(faults(file_own + 5 * K, 0), SIGBUS);
        CHECK_EQ(faults(file_own + 5 * K, 1), SIGBUS);
        CHECK_EQ(faults(file_only, 1), SIGSEGV);
        CHECK_EQ(faults(none + 3 * K, 0), SIGSEGV);
        CHECK_EQ(faults(hidden, 0), SIGSEGV);
        CHECK_EQ(faults(fixed, 1), SIGSEGV);
        CHECK(guest_holds(fixed, 4 * K, 9));
        CHECK(guest_holds(comb, 64 * K, 10));
        CHECK_EQ(faults(comb + (round % 32) * 2 * K, 1), SIGSEGV);
        CHECK_EQ(faults(comb + (round % 32) * 2 * K + K, 0), 0);
        CHECK(guest_is_zero(zero + (round % 1000) * K, K));
    }
    CHECK(mprotect(hidden, 4 * K, PROT_READ) == 0);
    CHECK(guest_holds(hidden, 4 * K, 8));
    CHECK(mprotect(none, 16 * K, rw) == 0);
    CHECK(guest_is_zero(none, 16 * K));
    printf("maps ok\n");
    guest_end();
}
