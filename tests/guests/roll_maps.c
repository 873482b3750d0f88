/* Rollback and the memory map: whatever became of memory since the checkpoint (written,
 * discarded, protected, unmapped, mapped anew at its place, moved, grown, shared with a file), it is what it
 * was. Round after round, so what one rollback leaves is the ground of the next one; in
 * between also newer checkpoints, from which it goes back to the old one. Argument "die": it is
 * killed at its checkpoint, so the rounds run on memory that is mapped from the image. */
#include "guest.h"

#include "ckpt.h"

#define PAGE 4096L
#define PAGES 4096L /* 16 MiB */
#define HOLE 512L
#define ROUNDS_ 80

static struct kept {
    int rounds;
    uint64_t random;
} kept = {0, 99};

static unsigned char *data, *hole, *heap, *file;
static size_t heap_len = 300 * PAGE;

static long below(long n)
{
    kept.random = guest_mix(kept.random);
    return (long)(kept.random % (uint64_t)n);
}

static void verify(void)
{
    if (!guest_holds(data, PAGES * PAGE, 7))
        FAIL("round %d: the memory is wrong", kept.rounds);
    CHECK(guest_is_zero(hole, HOLE * PAGE));
    CHECK(guest_holds(heap, heap_len, 8));
    CHECK(guest_holds(file, 4 * PAGE, 9) && guest_holds(file + 8 * PAGE, 8 * PAGE, 10));
    CHECK((unsigned char *)sbrk(0) == heap + heap_len);
}

/* One change of a random part. */
static void change(void)
{
    long at = below(PAGES - 128), n = 1 + below(below(4) ? 4 : 64);
    unsigned char *p = data + at * PAGE;
    const int rw = PROT_READ | PROT_WRITE, fresh = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    switch (below(14)) {
    case 0:
        /* Parts of it may be gone by now: so much the better. */
        madvise(p, n * PAGE, MADV_DONTNEED);
        break;
    case 1:
        mprotect(p, n * PAGE, PROT_READ);
        break;
    case 2:
        if (mprotect(p, n * PAGE, rw) != 0)
            break;
        memset(p, 1, n * PAGE);
        CHECK(mprotect(p, n * PAGE, PROT_NONE) == 0);
        break;
    case 3:
        CHECK(munmap(p, n * PAGE) == 0);
        break;
    case 4:
        CHECK(mmap(p, n * PAGE, rw, fresh, -1, 0) == p);
        break;
    case 5:
        CHECK(mmap(p, n * PAGE, rw, fresh, -1, 0) == p);
        memset(p, 3, n * PAGE);
        break;
    case 6: {
        CHECK(mmap(p, n * PAGE, rw, fresh, -1, 0) == p);
        unsigned char *to = mremap(p, n * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
                                   data + below(PAGES - 128) * PAGE);
        (void)to; /* the two may overlap: then nothing was done */
        break;
    }
    case 7:
        hole[below(HOLE * PAGE)] = 5;
        break;
    case 8:
        /* Read only: pages of zeros. */
        CHECK(*(volatile unsigned char *)(hole + below(HOLE * PAGE)) != 255);
        break;
    case 9:
        heap[0]++;
        memset(sbrk((1 + below(40)) * PAGE), 1, PAGE);
        break;
    case 10:
        CHECK(brk(heap + heap_len - (1 + below(200)) * PAGE) == 0);
        break;
    case 11:
        CHECK(mmap(file, 16 * PAGE, rw, fresh, -1, 0) == file);
        memset(file, 8, 16 * PAGE);
        break;
    case 12:
        /* The kernel may take them away at any time from here on. */
        madvise(p, n * PAGE, MADV_FREE);
        break;
    default:
        CHECK(mmap(p, n * PAGE, rw, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p);
        memset(p, 9, n * PAGE);
    }
    /* And some plain writes. */
    memset(data + (PAGES - 1) * PAGE + below(PAGE - 8), 1, 8);
    file[9 * PAGE + below(PAGE)]++;
}

int main(int argc, char **argv)
{
    guest_begin();
    int die = argc > 1 && strcmp(argv[1], "die") == 0;
    data = guest_map(PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    guest_fill(data, PAGES * PAGE, 7);
    hole = guest_map(HOLE * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int fd = open("mapped", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    static unsigned char bytes[16 * PAGE];
    guest_fill(bytes, 4 * PAGE, 9);
    guest_fill(bytes + 8 * PAGE, 8 * PAGE, 10);
    CHECK_EQ(write(fd, bytes, sizeof bytes), sizeof bytes);
    file = guest_map(16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    guest_fill(file + 8 * PAGE, PAGE, 10); /* a page of its own */
    close(fd);
    heap = (unsigned char *)(((uintptr_t)sbrk(0) + PAGE - 1) & ~(uintptr_t)(PAGE - 1));
    CHECK(brk(heap + heap_len) == 0);
    guest_fill(heap, heap_len, 8);
    int result = ckpt_checkpoint(1);
    if (result < 0)
        FAIL("ckpt_checkpoint: errno %d", errno);
    if (result == 0 && die)
        kill(getpid(), SIGKILL);
    verify();
    if (kept.rounds < ROUNDS_) {
        kept.rounds++;
        for (long k = below(3) ? below(8) : 0; k > 0; k--)
            change();
        if (below(4) == 0) {
            /* A newer checkpoint in between, and more behind it. */
            int newer = ckpt_checkpoint(2);
            CHECK(newer >= 0);
            if (newer == 0) {
                change();
                if (below(2)) {
                    struct ckpt_region keep = {&kept, sizeof kept};
                    kept.rounds++;
                    ckpt_rollback(2, 1, &keep, 1);
                    FAIL("ckpt_rollback: errno %d", errno);
                }
            }
            change();
        }
        /* Pages that cannot be written, whatever is discarded (Linux 6.13). */
        if (below(6) == 0)
            madvise(data + (PAGES - 60) * PAGE, 4 * PAGE, 102 /* MADV_GUARD_INSTALL */);
        struct ckpt_region keep = {&kept, sizeof kept};
        ckpt_rollback(1, 1, &keep, 1);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    printf("maps ok\n");
    guest_end();
}
