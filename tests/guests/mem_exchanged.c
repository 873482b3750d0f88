/* Proves: a range that forks do not pass on (MADV_DONTFORK) keeps its contents and its flag when it
 * changes places with one that is as large and looks the same, all the time, and a new mapping does
 * not get the flag of the one that was in its place.
 *
 * The flags that a checkpoint had read ahead of its stop were taken for those of whatever was at the
 * same place at the stop: a forked writer left such a range out, and it came back as the file's, or
 * the writer died and there was no checkpoint. */
#include "guest.h"

#define K 4096ul
#define PAGES 6
#define LEN (PAGES * K)

static int has_flag(const void *at, const char *flag, int again)
{
    char line[512], want[40];
    int found = 0, result = -1;
    FILE *smaps = fopen("/proc/self/smaps", "r");
    CHECK(smaps);
    snprintf(want, sizeof want, "%lx-", (unsigned long)at);
    while (result < 0 && fgets(line, sizeof line, smaps)) {
        if (strncmp(line, want, strlen(want)) == 0)
            found = 1;
        else if (found && strncmp(line, "VmFlags:", 8) == 0)
            result = strstr(line, flag) != NULL;
    }
    fclose(smaps);
    /* A restart amid the reading: the list is another one, and the place in it means nothing. */
    return result < 0 && again ? has_flag(at, flag, again - 1) : result;
}

static void move(unsigned char *from, unsigned char *to)
{
    CHECK(mremap(from, LEN, LEN, MREMAP_MAYMOVE | MREMAP_FIXED, to) == (void *)to);
}

int main(void)
{
    guest_begin();
    /* Islands: neighbours would become one mapping. */
    unsigned char *island = guest_map(9 * LEN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char *a = island + LEN, *b = island + 3 * LEN, *spare = island + 5 * LEN, *fresh = island + 7 * LEN;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    int fd = memfd_create("exchanged", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, LEN) == 0);
    CHECK(mmap(a, LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, 0) == (void *)a);
    CHECK(mmap(b, LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, 0) == (void *)b);
    CHECK(madvise(a, LEN, MADV_DONTFORK) == 0);
    uint64_t in_a = 1, in_b = 2;
    guest_fill(a, LEN, in_a);
    guest_fill(b, LEN, in_b);
    unsigned char *kept = a; /* where the range with the flag is */
    ROUNDS(round)
    {
        for (int k = 0; k < 100; k++) {
            move(a, spare);
            move(b, a);
            move(spare, b);
            CHECK(mmap(spare, LEN, PROT_NONE, flags, -1, 0) == (void *)spare);
            uint64_t was = in_a;
            in_a = in_b, in_b = was;
            kept = kept == a ? b : a;
            CHECK(guest_holds(a, LEN, in_a) && guest_holds(b, LEN, in_b));
            if (k % 25 == 0) {
                in_a += 2, in_b += 2;
                guest_fill(a, LEN, in_a);
                guest_fill(b, LEN, in_b);
            }
        }
        CHECK_EQ(has_flag(kept, " dc", 3), 1);
        CHECK_EQ(has_flag(kept == a ? b : a, " dc", 3), 0);
        CHECK(mmap(fresh, LEN, PROT_READ | PROT_WRITE, flags, -1, 0) == (void *)fresh);
        memset(fresh, 1, K);
        CHECK_EQ(has_flag(fresh, " dc", 3), 0);
        if (round % 2 == 0) {
            CHECK(madvise(fresh, LEN, MADV_DONTFORK) == 0);
            guest_sleep_ms(3);
            CHECK_EQ(has_flag(fresh, " dc", 3), 1);
        }
    }
    printf("exchanged\n");
    guest_end();
}
