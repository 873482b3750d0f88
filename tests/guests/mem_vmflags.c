/* Proves: what madvise, mlock and mmap flags left on a mapping comes back: the
 * VmFlags line of smaps (hg, nh, dc, dd, wf, sr, rr, lo, nr, mg, gd) is the same in every
 * round, memory under huge pages keeps its content, and what grows down grows on. */
#include "guest.h"

#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif
#define LEN (4ul << 20)

static char smaps[1 << 20];

/* The flags of the mapping at `start` that a program controls, in smaps' order. */
static void flags_of(void *start, char *into, size_t room)
{
    char key[40];
    CHECK(guest_slurp("/proc/self/smaps", smaps, sizeof smaps) > 0);
    snprintf(key, sizeof key, "%lx-", (unsigned long)start);
    char *line = smaps;
    if (strncmp(line, key, strlen(key)) != 0) {
        char with_newline[48];
        snprintf(with_newline, sizeof with_newline, "\n%s", key);
        line = strstr(smaps, with_newline);
        if (!line)
            FAIL("no mapping begins at %p", start);
    }
    char *flags = strstr(line, "VmFlags:");
    CHECK(flags != NULL);
    char *end = strchr(flags, '\n');
    *end = 0;
    into[0] = 0;
    for (char *word = strtok(flags + 8, " "); word; word = strtok(NULL, " "))
        /* sd (soft-dirty), ac (accounted), uw (userfaultfd) are the kernel's or a tracker's business. */
        if (!strstr("sd ac uw um", word) && strlen(into) + 4 < room)
            strcat(strcat(into, word), " ");
}

int main(void)
{
    guest_begin();
    static const struct {
        int advice;
        const char *name;
    } kinds[] = {
        {MADV_HUGEPAGE, "hugepage"}, {MADV_NOHUGEPAGE, "nohugepage"}, {MADV_DONTFORK, "dontfork"},
        {MADV_DONTDUMP, "dontdump"}, {MADV_WIPEONFORK, "wipeonfork"}, {MADV_SEQUENTIAL, "sequential"},
        {MADV_RANDOM, "random"},     {MADV_MERGEABLE, "mergeable"},   {-1, "noreserve"},
        {-2, "plain"},               {-4, "locked"},                {-3, "growsdown"},
    };
    enum { N = sizeof kinds / sizeof *kinds };
    unsigned char *at[N];
    char first[N][128], now[128];
    unsigned char *huge = NULL;
    for (int i = 0; i < N; i++) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS;
        if (kinds[i].advice == -1)
            flags |= MAP_NORESERVE;
        if (kinds[i].advice == -3) {
            /* Far from everything: there is room below. */
            at[i] = (void *)0x210000000000;
            flags |= MAP_GROWSDOWN;
            CHECK(mmap(at[i], LEN, PROT_READ | PROT_WRITE, flags | MAP_FIXED, -1, 0) == at[i]);
            guest_fill(at[i], 65536, i);
            continue;
        }
        /* A page of nothing on both sides keeps neighbours from merging. */
        unsigned char *room = guest_map(3 * LEN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        at[i] = (void *)(((uintptr_t)room + LEN) & ~(LEN - 1));
        if (at[i] < room + 4096)
            at[i] += LEN;
        CHECK(mmap(at[i], LEN, PROT_READ | PROT_WRITE, flags | MAP_FIXED, -1, 0) == at[i]);
        if (kinds[i].advice == -4 && mlock(at[i], LEN) != 0)
            fprintf(stderr, "*** NOT TESTED: so much cannot be locked (errno %d)\n", errno);
        if (kinds[i].advice >= 0 && madvise(at[i], LEN, kinds[i].advice) != 0)
            FAIL("madvise %s: errno %d", kinds[i].name, errno);
        guest_fill(at[i], kinds[i].advice == MADV_HUGEPAGE ? LEN : 65536, i);
        if (kinds[i].advice == MADV_HUGEPAGE)
            huge = at[i];
    }
    for (int i = 0; i < N; i++)
        flags_of(at[i], first[i], sizeof first[i]);
    unsigned char *low = at[N - 1];
    ROUNDS(round)
    {
        for (int i = 0; i < N; i++) {
            if (round % 5 == 0) {
                flags_of(i == N - 1 ? low : at[i], now, sizeof now);
                if (strcmp(now, first[i]) != 0)
                    FAIL("%s: VmFlags \"%s\", were \"%s\"", kinds[i].name, now, first[i]);
            }
            CHECK(guest_holds(at[i], 65536, i));
        }
        low -= 4096;
        CHECK(guest_is_zero(low, 4096)); /* grows */
        guest_fill(low, 4096, (uintptr_t)low);
        for (unsigned char *page = low; page < at[N - 1]; page += 4096)
            CHECK(guest_holds(page, 4096, (uintptr_t)page));
        size_t probe = guest_mix(round) % (LEN / 4096) * 4096;
        unsigned char copy[8];
        uint64_t want = guest_mix(probe + 0);
        memcpy(copy, huge + probe, 8);
        CHECK(memcmp(copy, &want, 8) == 0);
    }
    printf("vmflags ok\n");
    guest_end();
}
