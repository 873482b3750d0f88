/* Proves: memory operations on restored memory do what they do on fresh memory:
 * MADV_DONTNEED and MADV_FREE give zeros (never the image's content), mremap moves and
 * grows with content, munmap punches holes, mprotect keeps content, mmap MAP_FIXED
 * replaces. A model says what each page must hold. */
#include "guest.h"

#define PAGES 256
#define PAGE 4096ul

/* 0 = not mapped, 1 = zero page, else the seed of its content. */
static uint64_t model[PAGES];
static unsigned char *arena;

static void verify(int i)
{
    if (model[i] == 1) {
        if (!guest_is_zero(arena + i * PAGE, PAGE))
            FAIL("page %d is not zero", i);
    } else if (model[i] && !guest_holds(arena + i * PAGE, PAGE, model[i]))
        FAIL("page %d does not hold its content", i);
}

int main(void)
{
    guest_begin();
    const int rw = PROT_READ | PROT_WRITE, anon = MAP_PRIVATE | MAP_ANONYMOUS;
    arena = guest_map(PAGES * PAGE, rw, anon, -1, 0);
    for (int i = 0; i < PAGES; i++) {
        model[i] = guest_mix(i) | 2;
        guest_fill(arena + i * PAGE, PAGE, model[i]);
    }
    uint64_t dice = 1;
    ROUNDS(round)
    {
        for (int n = 0; n < 8; n++) {
            dice = guest_mix(dice);
            int first = dice % PAGES, count = 1 + (dice >> 20) % 8;
            if (first + count > PAGES)
                count = PAGES - first;
            unsigned char *at = arena + first * PAGE;
            switch ((dice >> 40) % 7) {
            case 0: /* unmap, later mapped again by case 1 */
                CHECK(munmap(at, count * PAGE) == 0);
                for (int i = first; i < first + count; i++)
                    model[i] = 0;
                break;
            case 1:
                CHECK(mmap(at, count * PAGE, rw, anon | MAP_FIXED, -1, 0) == at);
                for (int i = first; i < first + count; i++)
                    model[i] = 1;
                break;
            case 2:
                for (int i = first; i < first + count; i++)
                    if (model[i]) {
                        CHECK(madvise(arena + i * PAGE, PAGE, MADV_DONTNEED) == 0);
                        model[i] = 1;
                        verify(i);
                    }
                break;
            case 3: /* after MADV_FREE a page is what it was or zero; a write settles it */
                for (int i = first; i < first + count; i++)
                    if (model[i]) {
                        CHECK(madvise(arena + i * PAGE, PAGE, MADV_FREE) == 0);
                        model[i] = guest_mix(dice + i) | 2;
                        guest_fill(arena + i * PAGE, PAGE, model[i]);
                    }
                break;
            case 4: /* move one page away, grow it, and back */
                if (model[first]) {
                    verify(first);
                    unsigned char *there = mremap(at, PAGE, 3 * PAGE, MREMAP_MAYMOVE);
                    CHECK(there != MAP_FAILED);
                    int stayed = there == at;
                    if (model[first] != 1)
                        CHECK(guest_holds(there, PAGE, model[first]));
                    CHECK(guest_is_zero(there + PAGE, 2 * PAGE));
                    memset(there + PAGE, 0x77, 2 * PAGE);
                    CHECK(mremap(there, 3 * PAGE, PAGE, 0) == there);
                    if (!stayed)
                        CHECK(mremap(there, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at) == at);
                    verify(first);
                }
                break;
            case 5:
                for (int i = first; i < first + count; i++)
                    if (model[i]) {
                        CHECK(mprotect(arena + i * PAGE, PAGE, PROT_READ) == 0);
                        verify(i);
                        CHECK(mprotect(arena + i * PAGE, PAGE, rw) == 0);
                    }
                break;
            default:
                for (int i = first; i < first + count; i++)
                    if (model[i]) {
                        verify(i);
                        model[i] = guest_mix(dice + i) | 2;
                        guest_fill(arena + i * PAGE, PAGE, model[i]);
                    }
            }
        }
        for (int i = 0; i < PAGES; i++)
            verify(i);
    }
    printf("memory operations ok\n");
    guest_end();
}
