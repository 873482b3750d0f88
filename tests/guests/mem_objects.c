/* Proves: shared memory and mappings with a second life: one anonymous object mapped
 * twice and split by mprotect, System V memory attached twice, a memfd that is mapped
 * and open with seals, one that is only mapped, deleted files mapped privately and
 * shared (pages never touched included), shared file mappings that may and may not be
 * made writable, ranges kept from children, advice that outlives a discard, huge pages. */
#include "guest.h"
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/wait.h>

#define K 4096ul
#ifndef F_SEAL_SHRINK
#define F_ADD_SEALS 1033
#define F_GET_SEALS 1034
#define F_SEAL_SHRINK 2
#define F_SEAL_GROW 4
#endif

static const int rw = PROT_READ | PROT_WRITE;

static unsigned char *deleted(int flags, uint64_t seed)
{
    static unsigned char page[16 * K];
    int file = open("deleted.dat", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(file >= 0);
    guest_fill(page, sizeof page, seed);
    CHECK_EQ(pwrite(file, page, sizeof page, 0), sizeof page);
    unsigned char *at = guest_map(20 * K, rw, flags, file, 0);
    CHECK(unlink("deleted.dat") == 0);
    close(file);
    return at;
}

static int has_flag(void *start, const char *flag)
{
    static char smaps[1 << 20];
    char key[40];
    CHECK(guest_slurp("/proc/self/smaps", smaps, sizeof smaps) > 0);
    snprintf(key, sizeof key, "%lx-", (unsigned long)start);
    char *line = strstr(smaps, key);
    CHECK(line != NULL);
    char *flags = strstr(line, "VmFlags:"), *end = strchr(flags, '\n');
    *end = 0;
    return strstr(flags, flag) != NULL;
}

int main(void)
{
    guest_begin();
    unsigned char *first = guest_map(64 * K, rw, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    unsigned char *second = mremap(first, 0, 64 * K, MREMAP_MAYMOVE);
    CHECK(second != MAP_FAILED && second != first);
    guest_fill(first, 64 * K, 1);
    CHECK(mprotect(first + 8 * K, 8 * K, PROT_READ) == 0);

    int id = shmget(IPC_PRIVATE, 32 * K, IPC_CREAT | 0600);
    CHECK(id >= 0);
    unsigned char *v1 = shmat(id, NULL, 0), *v2 = shmat(id, NULL, 0);
    CHECK(v1 != (void *)-1 && v2 != (void *)-1 && shmctl(id, IPC_RMID, NULL) == 0);
    guest_fill(v1, 32 * K, 2);

    int sealed = memfd_create("sealed", MFD_CLOEXEC | 2 /* MFD_ALLOW_SEALING */);
    CHECK(sealed >= 0 && ftruncate(sealed, 16 * K) == 0);
    unsigned char *seal = guest_map(16 * K, rw, MAP_SHARED, sealed, 0);
    guest_fill(seal, 16 * K, 3);
    CHECK(fcntl(sealed, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0);
    int gone = memfd_create("gone", MFD_CLOEXEC);
    CHECK(gone >= 0 && ftruncate(gone, 16 * K) == 0);
    unsigned char *lost = guest_map(16 * K, rw, MAP_SHARED, gone, 0);
    guest_fill(lost, 16 * K, 4);
    close(gone);

    unsigned char *own = deleted(MAP_PRIVATE, 5), *common = deleted(MAP_SHARED, 6);
    guest_fill(own + K, K, 7);

    int file = open("shared.dat", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    CHECK(file >= 0 && ftruncate(file, 4 * K) == 0);
    unsigned char *may = guest_map(4 * K, PROT_READ, MAP_SHARED, file, 0);
    int reading = open("shared.dat", O_RDONLY | O_CLOEXEC);
    unsigned char *may_not = guest_map(4 * K, PROT_READ, MAP_SHARED, reading, 0);
    close(file), close(reading);

    unsigned char *kept = guest_map(64 * K, rw, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(madvise(kept, 64 * K, MADV_DONTFORK) == 0);
    guest_fill(kept, 64 * K, 8);

    unsigned char *room = guest_map(96 * K, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char *advised = room + 16 * K;
    CHECK(mmap(advised, 64 * K, rw, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == advised);
    CHECK(madvise(advised, 64 * K, MADV_DONTDUMP) == 0);
    guest_fill(advised, 64 * K, 9);

    unsigned char *huge = mmap(NULL, 4ul << 20, rw, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    if (huge != MAP_FAILED)
        guest_fill(huge, 4ul << 20, 10);
    else
        NOT_TESTED("no huge pages are reserved");

    ROUNDS(round)
    {
        *(volatile long *)(first + 63 * K) = round;
        CHECK_EQ(*(volatile long *)(second + 63 * K), round);
        CHECK(guest_holds(first, 63 * K, 1) && guest_holds(second, 63 * K, 1));
        *(volatile long *)(v2 + 31 * K) = round;
        CHECK_EQ(*(volatile long *)(v1 + 31 * K), round);
        CHECK(guest_holds(v1, 31 * K, 2));
        CHECK(guest_holds(seal, 16 * K, 3));
        CHECK_EQ(fcntl(sealed, F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW);
        CHECK(ftruncate(sealed, 8 * K) == -1 && errno == EPERM);
        CHECK(guest_holds(lost, 16 * K, 4));
        CHECK(guest_holds(own, K, 5) && guest_holds(own + K, K, 7));
        CHECK(guest_holds(common, K, 6));
        CHECK(guest_holds(kept, 64 * K, 8));
        CHECK(has_flag(advised, " dd") && has_flag(advised, " nr") && has_flag(kept, " dc"));
        if (round % 10 == 9) { /* zeros come back, and the advice stays */
            CHECK(madvise(advised, 64 * K, MADV_DONTNEED) == 0);
            CHECK(guest_is_zero(advised, 64 * K));
            guest_fill(advised, 64 * K, 9);
        }
        CHECK(guest_holds(advised, 64 * K, 9));
        if (huge != MAP_FAILED)
            CHECK(guest_holds(huge + round % 1024 * K, K - 8, 10 + round % 1024 * K));
        if (huge != MAP_FAILED) { /* written again and again, after restores too */
            uint64_t *last = (uint64_t *)(huge + (4ul << 20) - 8);
            CHECK(*last == (round ? (uint64_t)round : guest_mix(10 + (4ul << 20) - 8)));
            *last = round + 1;
        }
    }
    /* Pages that nobody has touched since the mapping. */
    static unsigned char rest[16 * K];
    guest_fill(rest, sizeof rest, 5);
    CHECK(memcmp(own + 2 * K, rest + 2 * K, 14 * K) == 0);
    guest_fill(rest, sizeof rest, 6);
    CHECK(memcmp(common, rest, 16 * K) == 0);
    CHECK(mprotect(may, 4 * K, rw) == 0);
    CHECK(mprotect(may_not, 4 * K, rw) == -1 && errno == EACCES);
    CHECK(mprotect(first + 8 * K, 8 * K, rw) == 0);
    printf("objects ok\n");
    guest_end();
}
