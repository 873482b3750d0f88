/* Proves: whatever is done to the memory map between two increments, every page comes back:
 * written, zeroed, discarded (by the page and by whole page tables), unmapped and mapped
 * anew, moved, exchanged, protected; the heap grows and shrinks; a private mapping of a file
 * shows the file again where it was discarded. All of it is verified in every round. */
#include "guest.h"

#define PAGE 4096ul
#define TABLE 512
#define PAGES (4 * TABLE)
#define FILE_PAGES 64

enum { HOLE, ZERO, FIRST_SEED };
/* What each page of the arena is: a hole, zero, or the seed of its content. */
static uint64_t model[PAGES];
static unsigned char *arena;
static uint64_t file_model[FILE_PAGES];
static unsigned char *file;
static uint64_t heap_model[256];
static unsigned char *heap;
static long heap_pages;

static void put(unsigned char *at, uint64_t seed)
{
    uint64_t words[4];
    for (int k = 0; k < 4; k++)
        words[k] = guest_mix(seed + k);
    memset(at, 0, PAGE);
    memcpy(at, words, 16);
    memcpy(at + PAGE - 16, words + 2, 16);
}

static void verify(const char *what, long page, const unsigned char *at, uint64_t seed)
{
    static unsigned char wanted[PAGE];
    if (seed == HOLE)
        return;
    if (seed == ZERO)
        memset(wanted, 0, PAGE);
    else
        put(wanted, seed);
    if (memcmp(wanted, at, PAGE) != 0)
        FAIL("%s page %ld is not %s (%02x %02x)", what, page,
             seed == ZERO ? "zero" : "what was written", at[0], at[8]);
}

static uint64_t of_file(long page) { return guest_mix(page + 1000) | 2; }

static void change_arena(uint64_t dice)
{
    const int rw = PROT_READ | PROT_WRITE, anon = MAP_PRIVATE | MAP_ANONYMOUS;
    long first = dice % PAGES, count = 1 + (dice >> 20) % 32;
    if ((dice >> 30) % 16 == 0) { /* whole page tables */
        first = first / TABLE * TABLE;
        count = TABLE;
    }
    if (first + count > PAGES)
        count = PAGES - first;
    unsigned char *at = arena + first * PAGE;
    int whole = 1;
    for (long i = first; i < first + count; i++)
        whole &= model[i] != HOLE;
    switch ((dice >> 40) % 10) {
    case 0:
        CHECK(munmap(at, count * PAGE) == 0);
        for (long i = first; i < first + count; i++)
            model[i] = HOLE;
        break;
    case 1:
    case 2:
        CHECK(mmap(at, count * PAGE, rw, anon | MAP_FIXED, -1, 0) == at);
        for (long i = first; i < first + count; i++)
            model[i] = ZERO;
        break;
    case 3:
        if (whole) {
            CHECK(madvise(at, count * PAGE, MADV_DONTNEED) == 0);
            for (long i = first; i < first + count; i++)
                model[i] = ZERO;
        }
        break;
    case 4:
        for (long i = first; i < first + count; i++)
            if (model[i] != HOLE) {
                memset(arena + i * PAGE, 0, PAGE);
                model[i] = ZERO;
            }
        break;
    case 5: /* exchanged, page by page over a third place, with the far end */
        for (long i = first; count <= 32 && i < first + count; i++) {
            long other = PAGES - 1 - i;
            if (model[i] == HOLE || model[other] == HOLE || i == other)
                continue;
            unsigned char *here = arena + i * PAGE, *far = arena + other * PAGE;
            unsigned char *spare = guest_map(PAGE, PROT_NONE, anon, -1, 0);
            const int move = MREMAP_MAYMOVE | MREMAP_FIXED;
            CHECK(mremap(here, PAGE, PAGE, move, spare) == spare);
            CHECK(mremap(far, PAGE, PAGE, move, here) == here);
            CHECK(mremap(spare, PAGE, PAGE, move, far) == far);
            uint64_t seed = model[i];
            model[i] = model[other];
            model[other] = seed;
        }
        break;
    case 6:
        if (whole) {
            CHECK(mprotect(at, count * PAGE, PROT_NONE) == 0);
            CHECK(mprotect(at, count * PAGE, rw) == 0);
        }
        break;
    default:
        for (long i = first; i < first + count; i++)
            if (model[i] != HOLE) {
                model[i] = guest_mix(dice + i) | FIRST_SEED;
                put(arena + i * PAGE, model[i]);
            }
    }
}

static void change_file(uint64_t dice)
{
    long page = dice % FILE_PAGES;
    unsigned char *at = file + page * PAGE;
    switch ((dice >> 40) % 4) {
    case 0:
        CHECK(madvise(at, PAGE, MADV_DONTNEED) == 0);
        file_model[page] = of_file(page);
        break;
    case 1:
        memset(at, 0, PAGE);
        file_model[page] = ZERO;
        break;
    default:
        file_model[page] = guest_mix(dice) | FIRST_SEED;
        put(at, file_model[page]);
    }
}

static void change_heap(uint64_t dice)
{
    long wanted = dice % 256;
    CHECK(brk(heap + wanted * PAGE) == 0);
    for (long i = heap_pages; i < wanted; i++)
        heap_model[i] = ZERO;
    heap_pages = wanted;
    for (long i = (dice >> 20) % 16; i < wanted; i += 16) {
        heap_model[i] = guest_mix(dice + i) | FIRST_SEED;
        put(heap + i * PAGE, heap_model[i]);
    }
}

int main(void)
{
    guest_begin();
    const int rw = PROT_READ | PROT_WRITE;
    arena = guest_map(PAGES * PAGE + TABLE * PAGE, rw, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    arena = (unsigned char *)(((uintptr_t)arena + TABLE * PAGE - 1) / (TABLE * PAGE) * TABLE * PAGE);
    for (long i = 0; i < PAGES; i++)
        model[i] = ZERO;
    int fd = open("content", O_RDWR | O_CREAT | O_EXCL, 0600);
    CHECK(fd >= 0);
    for (long i = 0; i < FILE_PAGES; i++) {
        unsigned char page[PAGE];
        file_model[i] = of_file(i);
        put(page, file_model[i]);
        CHECK_EQ(write(fd, page, PAGE), (long)PAGE);
    }
    file = guest_map(FILE_PAGES * PAGE, rw, MAP_PRIVATE, fd, 0);
    close(fd);
    /* malloc must not take the heap: it has its own from here on. */
    setvbuf(stdout, NULL, _IONBF, 0);
    heap = (unsigned char *)(((uintptr_t)sbrk(0) + PAGE - 1) / PAGE * PAGE);
    uint64_t dice = 1;
    ROUNDS(round)
    {
        for (int n = 0; n < 6; n++) {
            dice = guest_mix(dice);
            change_arena(dice);
        }
        dice = guest_mix(dice);
        change_file(dice);
        if (round % 4 == 0)
            change_heap(dice);
        for (long i = 0; i < PAGES; i++)
            verify("arena", i, arena + i * PAGE, model[i]);
        for (long i = 0; i < FILE_PAGES; i++)
            verify("file", i, file + i * PAGE, file_model[i]);
        for (long i = 0; i < heap_pages; i++)
            verify("heap", i, heap + i * PAGE, heap_model[i]);
    }
    printf("model %lx\n", (long)dice);
    guest_end();
}
