/* Proves: a private mapping of a file without a name (memfd, unlinked) is the file's again: what is
 * given back with MADV_DONTNEED shows what is in the file, what is written to the file is seen
 * through pages that were not modified, and only through those. Against a model, several lives.
 *
 * After a restart such a mapping was memory of its own: MADV_DONTNEED gave zeros, and the file's
 * later contents were never seen. */
#include "guest.h"

#define K 4096ul
#define PAGES 40
#define FILES 2
#define MAPS 3

static struct {
    int fd;
    unsigned char *shared;
    uint64_t holds[PAGES];
} file[FILES];

/* A private mapping of all of a file; `own`: pages that were modified, and what they hold. */
static struct {
    int file;
    unsigned char *at;
    char modified[PAGES];
    uint64_t own[PAGES];
} map[MAPS * FILES];

/* Mapped before the descriptor was closed: there is nobody to write to it. */
static unsigned char *closed;

static uint64_t dice = 7;
static uint64_t roll(uint64_t below) { return (dice = guest_mix(dice)) % below; }

/* 0 stands for zeros. */
static void fill(unsigned char *at, uint64_t seed)
{
    seed ? guest_fill(at, K, seed) : memset(at, 0, K);
}

static void look(int m, int page)
{
    uint64_t seed = map[m].modified[page] ? map[m].own[page] : file[map[m].file].holds[page];
    unsigned char *at = map[m].at + page * K;
    if (!(seed ? guest_holds(at, K, seed) : guest_is_zero(at, K)))
        FAIL("mapping %d page %d is not what it should be (modified: %d)", m, page, map[m].modified[page]);
}

static void modify(int m, int page, uint64_t seed)
{
    fill(map[m].at + page * K, seed);
    map[m].modified[page] = 1;
    map[m].own[page] = seed;
}

/* The file through a descriptor of another number, sometimes another open file description. */
static void open_again(int f)
{
    char path[64];
    int fd = dup(file[f].fd);
    CHECK(fd >= 0);
    if (roll(2)) {
        close(fd);
        snprintf(path, sizeof path, "/proc/self/fd/%d", file[f].fd);
        CHECK((fd = open(path, O_RDWR | O_CLOEXEC)) >= 0);
    }
    CHECK(close(file[f].fd) == 0);
    file[f].fd = fd;
}

static void step(void)
{
    int m = roll(MAPS * FILES), f = map[m].file, page = roll(PAGES), n = 1 + roll(6);
    unsigned char bytes[K], *at = map[m].at + page * K;
    uint64_t seed = 1 + roll(1u << 30);
    if (page + n > PAGES)
        n = PAGES - page;
    switch (roll(11)) {
    case 0:
    case 1:
        modify(m, page, seed);
        break;
    case 2:
        modify(m, page, 0);
        break;
    case 3: /* the same as in the file, but the program's own from now on */
        modify(m, page, map[m].modified[page] ? map[m].own[page] : file[f].holds[page]);
        break;
    case 4:
    case 5:
        if (roll(3)) {
            fill(bytes, seed);
            CHECK_EQ(pwrite(file[f].fd, bytes, K, page * K), K);
        } else {
            fill(file[f].shared + page * K, seed);
        }
        file[f].holds[page] = seed;
        break;
    case 6:
    case 7:
        CHECK(madvise(at, n * K, MADV_DONTNEED) == 0);
        memset(map[m].modified + page, 0, n);
        break;
    case 8: /* read only for a while */
        CHECK(mprotect(at, n * K, PROT_READ) == 0);
        guest_sleep_ms(roll(3));
        look(m, page);
        CHECK(mprotect(at, n * K, PROT_READ | PROT_WRITE) == 0);
        break;
    case 9: {
        if (roll(2)) {
            open_again(f);
            break;
        }
        unsigned char *to = guest_map(PAGES * K, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        /* mprotect may have left several mappings, which do not move as one. */
        if (mremap(map[m].at, PAGES * K, PAGES * K, MREMAP_MAYMOVE | MREMAP_FIXED, to) == (void *)to)
            map[m].at = to;
        break;
    }
    default:
        for (int k = 0; k < 4; k++)
            look(roll(MAPS * FILES), roll(PAGES));
    }
}

int main(void)
{
    guest_begin();
    file[0].fd = memfd_create("guest", MFD_CLOEXEC);
    file[1].fd = open("gone.dat", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    CHECK(file[0].fd >= 0 && file[1].fd >= 0 && unlink("gone.dat") == 0);
    for (int f = 0; f < FILES; f++) {
        unsigned char bytes[K];
        for (int page = 0; page < PAGES; page++) {
            fill(bytes, file[f].holds[page] = 1 + page + f * 1000);
            CHECK_EQ(pwrite(file[f].fd, bytes, K, page * K), K);
        }
        file[f].shared = guest_map(PAGES * K, PROT_READ | PROT_WRITE, MAP_SHARED, file[f].fd, 0);
    }
    for (int m = 0; m < MAPS * FILES; m++) {
        map[m].file = m % FILES;
        map[m].at = guest_map(PAGES * K, PROT_READ | PROT_WRITE, MAP_PRIVATE, file[m % FILES].fd, 0);
    }
    /* A forked writer does not get it; a page of zeros in it was the file's after a restart. */
    CHECK(madvise(map[0].at, PAGES * K, MADV_DONTFORK) == 0);
    int fd = memfd_create("closed", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, 4 * K) == 0);
    closed = guest_map(4 * K, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    guest_fill(closed, 2 * K, 77);
    CHECK(close(fd) == 0);
    ROUNDS(round)
    {
        for (int k = 0; k < 12; k++)
            step();
        CHECK(guest_holds(closed, 2 * K, 77) && guest_is_zero(closed + 2 * K, 2 * K));
        if (round % 16 == 15)
            for (int m = 0; m < MAPS * FILES; m++)
                for (int page = 0; page < PAGES; page++)
                    look(m, page);
    }
    printf("nameless ok\n");
    guest_end();
}
