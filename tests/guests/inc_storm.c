/* Proves: whatever several threads do to memory in any order comes back. Each has an arena of its
 * own and knows of every page what it is (a hole, anonymous, of a file privately or shared), whose
 * page it shows, what it holds and how it is protected. Steps are drawn from the seed (argument):
 * mmap, munmap, mprotect, mremap of every kind, advice, guard pages, files written, cut and punched,
 * descriptors exchanged, threads, a deep stack, the heap. The arenas have holes that nobody but
 * their thread may fill, as a program knows of its own address space.
 *
 * Found by it: mappings of the library in the program's holes; pages of zeros, over a file that was
 * mapped while a checkpoint looked, that were the file's after a restart; pages lost to a forked
 * writer where memory with MADV_DONTFORK had been moved; descriptors of a hook in the image; an
 * mremap of several mappings that went half way; images that no restore accepts. */
#include "guest.h"
#include <sys/uio.h>
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif
#define ADVICE_POPULATE_READ 22
#define ADVICE_COLLAPSE 25

#define PAGE 4096ul
#define THREADS 4
#define PAGES 1280
#define OBJECTS 10
#define OBJECT_PAGES 96
#define HEAP_PAGES 512
#define WORDS 512
#define LOCALS 2048

enum { HOLE, ANON, PRIVATE, SHARED };
enum { MEMFD, NAMELESS, NAMED, KINDS, ANONYMOUS };
enum { NONE, READ_ONLY, WRITABLE };
static const int prots[] = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE};
static const int anon = MAP_PRIVATE | MAP_ANONYMOUS;

struct page {
    uint8_t kind, prot, modified, guard, object;
    uint16_t number;  /* of the object's pages */
    uint32_t mapping; /* pages that were mapped by one call have the same */
    uint64_t seed;
};

struct object {
    int used, fd, kind;
    long size;
    uint64_t seed[OBJECT_PAGES];
};

struct thread {
    long id, step;
    uint64_t dice, sum;
    unsigned char *base, *scratch;
    struct page page[PAGES];
    struct object object[OBJECTS];
    uint32_t mappings;
    int log;
};

static struct thread all[THREADS] __attribute__((aligned(4096)));
static __thread uint64_t locals[LOCALS];
static unsigned char *heap;
static long heap_pages, steps;
static uint64_t heap_seed[HEAP_PAGES];
static int guards, several;

static uint64_t roll(struct thread *t, uint64_t below)
{
    t->dice = guest_mix(t->dice);
    return (t->dice >> 11) % below;
}

static unsigned char *at_page(struct thread *t, long p) { return t->base + p * PAGE; }

/* 0 stands for zeros. */
static uint64_t word_of(uint64_t seed, uint64_t k)
{
    return seed ? seed * 0x9e3779b97f4a7c15ull + k * seed : 0;
}

static void fill(void *at, uint64_t seed)
{
    for (int k = 0; k < WORDS; k++)
        ((uint64_t *)at)[k] = word_of(seed, k);
}

static int readable(struct thread *t, struct page *v)
{
    if (v->kind == HOLE || v->prot == NONE || v->guard)
        return 0;
    return v->kind == ANON || v->number < t->object[v->object].size;
}

static int writable(struct thread *t, struct page *v)
{
    return readable(t, v) && v->prot == WRITABLE;
}

static void same(struct thread *t, const char *what, long p, const void *at, uint64_t seed)
{
    const uint64_t *word = at;
    for (int k = 0; k < WORDS; k++) {
        if (word[k] == word_of(seed, k))
            continue;
        struct page none = {0}, *v = p >= 0 && p < PAGES ? &t->page[p] : &none;
        FAIL("thread %ld step %ld %s %ld word %d is %lx, seed %lx, all zero: %d; kind %d object %d "
             "(kind %d, descriptor %d) page %d prot %d modified %d",
             t->id, t->step, what, p, k, (long)word[k], (long)seed, guest_is_zero(at, PAGE), v->kind,
             v->object, t->object[v->object].kind, t->object[v->object].fd, v->number, v->prot,
             v->modified);
    }
    t->sum = guest_mix(t->sum ^ word[7] ^ seed);
}

static void look(struct thread *t, long p)
{
    struct page *v = &t->page[p];
    if (!readable(t, v))
        return;
    int own = v->kind == ANON || (v->kind == PRIVATE && v->modified);
    same(t, "arena", p, at_page(t, p), own ? v->seed : t->object[v->object].seed[v->number]);
}

static void wrote(struct thread *t, struct page *v, uint64_t seed)
{
    if (v->kind == SHARED)
        t->object[v->object].seed[v->number] = seed;
    else
        v->seed = seed, v->modified = 1;
}

static void put(struct thread *t, long p, uint64_t seed)
{
    fill(at_page(t, p), seed);
    wrote(t, &t->page[p], seed);
}

static void are(struct thread *t, long first, long count, struct page like)
{
    like.mapping = ++t->mappings;
    for (long p = first; p < first + count; p++, like.number++)
        t->page[p] = like;
}

static void are_holes(struct thread *t, long first, long count)
{
    are(t, first, count, (struct page){.kind = HOLE});
}

/* The length of the run of pages at `p`, below `end`, that are mapped. */
static long mapped(struct thread *t, long p, long end)
{
    long n = 0;
    while (p + n < end && t->page[p + n].kind != HOLE)
        n++;
    return n;
}

static struct object *with_descriptor(struct thread *t)
{
    for (;;) {
        struct object *o = &t->object[roll(t, OBJECTS)];
        if (o->used && o->fd >= 0)
            return o;
    }
}

/* A place for an object; without a descriptor and a mapping there is none any more. */
static struct object *free_object(struct thread *t)
{
    for (int k = 0; k < OBJECTS; k++) {
        struct object *o = &t->object[k];
        int mapped = 0;
        for (long p = 0; p < PAGES; p++)
            mapped |= t->page[p].kind > ANON && t->page[p].object == k;
        if (!o->used || (o->fd < 0 && !mapped))
            return o;
    }
    return NULL;
}

static void make(struct thread *t, struct object *o, int kind)
{
    char name[64];
    memset(o, 0, sizeof *o);
    o->used = 1;
    o->kind = kind;
    snprintf(name, sizeof name, "f%ld.%d", t->id, (int)(o - t->object));
    o->fd = kind == MEMFD ? memfd_create(name, MFD_CLOEXEC) : open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    CHECK(o->fd >= 0 && (kind != NAMELESS || unlink(name) == 0));
    o->size = 8 + roll(t, OBJECT_PAGES - 8);
    CHECK(ftruncate(o->fd, o->size * PAGE) == 0);
    for (long i = 0; i < o->size; i += 1 + roll(t, 4)) {
        fill(t->scratch, o->seed[i] = guest_mix(t->dice + i) | 1);
        CHECK_EQ(pwrite(o->fd, t->scratch, PAGE, i * PAGE), (long)PAGE);
    }
}

static void map(struct thread *t, long first, long n, int kind)
{
    int prot = roll(t, 5) == 0 ? roll(t, 3) : WRITABLE, flags = anon, fd = -1;
    struct page like = {.kind = kind, .prot = prot};
    if (kind == ANON) {
        flags |= roll(t, 6) == 0 ? MAP_NORESERVE : n <= 16 && roll(t, 6) == 0 ? MAP_POPULATE : 0;
    } else {
        struct object *o = with_descriptor(t);
        like.object = o - t->object;
        like.number = roll(t, OBJECT_PAGES - n + 1);
        flags = kind == SHARED ? MAP_SHARED : MAP_PRIVATE;
        fd = o->fd;
    }
    unsigned char *at = at_page(t, first);
    CHECK(mmap(at, n * PAGE, prots[prot], flags | MAP_FIXED, fd, like.number * PAGE) == at);
    are(t, first, n, like);
}

static void map_shared_anonymous(struct thread *t, long first, long n)
{
    struct object *o = free_object(t);
    if (!o)
        return;
    unsigned char *at = at_page(t, first);
    CHECK(mmap(at, n * PAGE, prots[WRITABLE], MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
    memset(o, 0, sizeof *o);
    o->used = 1;
    o->fd = -1;
    o->kind = ANONYMOUS;
    o->size = n;
    are(t, first, n, (struct page){.kind = SHARED, .prot = WRITABLE, .object = o - t->object});
}

static void protect(struct thread *t, long first, long n)
{
    int prot = roll(t, 2) ? WRITABLE : roll(t, 3);
    for (long p = first, run; p < first + n; p += run ? run : 1) {
        run = mapped(t, p, first + n);
        CHECK(run == 0 || mprotect(at_page(t, p), run * PAGE, prots[prot]) == 0);
        for (long k = p; k < p + run; k++)
            t->page[k].prot = prot;
    }
}

static void discard(struct thread *t, long first, long n)
{
    for (long p = first, run; p < first + n; p += run ? run : 1) {
        run = mapped(t, p, first + n);
        CHECK(run == 0 || madvise(at_page(t, p), run * PAGE, MADV_DONTNEED) == 0);
        for (long k = p; k < p + run; k++)
            if (t->page[k].kind != SHARED)
                t->page[k].seed = t->page[k].modified = 0;
    }
}

/* What was mapped by one call, in whatever pieces it is now. */
static void move(struct thread *t, long from, long n)
{
    struct page *v = &t->page[from];
    long m = 1;
    while (several && m < n && v[m].mapping == v->mapping && v[m].prot == v->prot && v[m].kind == v->kind &&
           (v->kind == ANON || v[m].number == v->number + m))
        m++;
    long to = roll(t, PAGES - m + 1);
    if (v->kind == HOLE || (to < from + m && from < to + m))
        return;
    const int flags = MREMAP_MAYMOVE | MREMAP_FIXED;
    if (mremap(at_page(t, from), m * PAGE, m * PAGE, flags, at_page(t, to)) != at_page(t, to))
        FAIL("thread %ld step %ld: %ld pages of kind %d do not move: errno %d", t->id, t->step, m, v->kind, errno);
    memcpy(&t->page[to], v, m * sizeof *v);
    are_holes(t, from, m);
}

static void resize(struct thread *t, uint64_t seed)
{
    long before = 1 + roll(t, 24), after = 1 + roll(t, 48), from = roll(t, PAGES - 128), to;
    do
        to = roll(t, PAGES - 128);
    while (to < from + 64 && from < to + 64);
    unsigned char *old = at_page(t, from), *new = at_page(t, to);
    CHECK(mmap(old, before * PAGE, prots[WRITABLE], anon | MAP_FIXED, -1, 0) == old);
    are(t, from, before, (struct page){.kind = ANON, .prot = WRITABLE});
    for (long k = 0; k < before; k++)
        if (roll(t, 3))
            put(t, from + k, seed + k);
    guest_sleep_ms(roll(t, 30));
    if (mremap(old, before * PAGE, after * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, new) != new)
        FAIL("thread %ld step %ld: %ld pages do not become %ld: errno %d", t->id, t->step, before, after, errno);
    are(t, to, after, (struct page){.kind = ANON, .prot = WRITABLE});
    for (long k = 0; k < before && k < after; k++)
        t->page[to + k].seed = t->page[from + k].seed;
    are_holes(t, from, before);
    for (long k = 0; k < after; k++)
        look(t, to + k);
}

/* A second mapping of a shared page. */
static void again(struct thread *t, long p)
{
    long to = roll(t, PAGES);
    if (t->page[p].kind != SHARED || to == p)
        return;
    unsigned char *new = at_page(t, to);
    CHECK(mremap(at_page(t, p), 0, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, new) == new);
    struct page like = t->page[p];
    are(t, to, 1, like);
}

static void read_into(struct thread *t, long first, long n)
{
    struct object *o = with_descriptor(t);
    struct iovec parts[8];
    long pages[8], m = 0, from = o->size ? (long)roll(t, o->size) : 0;
    for (long p = first; p < first + n && m < 8 && from + m < o->size; p++) {
        struct page *v = &t->page[p];
        if (!writable(t, v) || (v->kind != ANON && &t->object[v->object] == o))
            continue;
        pages[m] = p;
        parts[m++] = (struct iovec){at_page(t, p), PAGE};
    }
    if (m == 0)
        return;
    CHECK_EQ(preadv(o->fd, parts, m, from * PAGE), m * (long)PAGE);
    for (long k = 0; k < m; k++)
        wrote(t, &t->page[pages[k]], o->seed[from + k]);
    for (long k = 0; k < m; k++)
        look(t, pages[k]);
}

static void write_file(struct thread *t, uint64_t seed)
{
    struct object *o = with_descriptor(t);
    if (o->size == 0)
        return;
    long k = roll(t, o->size);
    fill(t->scratch, o->seed[k] = seed);
    CHECK_EQ(pwrite(o->fd, t->scratch, PAGE, k * PAGE), (long)PAGE);
}

static void cut(struct thread *t)
{
    struct object *o = with_descriptor(t);
    long size = roll(t, OBJECT_PAGES + 1);
    CHECK(ftruncate(o->fd, size * PAGE) == 0);
    for (long k = size; k < OBJECT_PAGES; k++)
        o->seed[k] = 0;
    /* Private copies behind the end go as well. */
    for (long p = 0; p < PAGES; p++) {
        struct page *v = &t->page[p];
        if (v->kind == PRIVATE && &t->object[v->object] == o && v->number >= size)
            v->seed = v->modified = 0;
    }
    o->size = size;
}

static void punch(struct thread *t, long p)
{
    struct page *v = &t->page[p];
    if (v->kind == SHARED && writable(t, v)) {
        if (madvise(at_page(t, p), PAGE, MADV_REMOVE) != 0)
            FAIL("thread %ld step %ld: MADV_REMOVE: errno %d", t->id, t->step, errno);
        t->object[v->object].seed[v->number] = 0;
        return;
    }
    struct object *o = with_descriptor(t);
    if (o->size == 0)
        return;
    long k = roll(t, o->size), n = 1 + roll(t, 8);
    n = k + n > o->size ? o->size - k : n;
    CHECK(fallocate(o->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, k * PAGE, n * PAGE) == 0);
    memset(o->seed + k, 0, n * sizeof *o->seed);
}

static void advise(struct thread *t, long first, long n)
{
    static const int advice[] = {
        MADV_HUGEPAGE,  MADV_NOHUGEPAGE, MADV_DONTFORK,  MADV_DOFORK, MADV_WIPEONFORK,      MADV_KEEPONFORK,
        MADV_COLD,      MADV_PAGEOUT,    MADV_SEQUENTIAL, MADV_RANDOM, ADVICE_POPULATE_READ, ADVICE_COLLAPSE,
        MADV_WILLNEED,  MADV_MERGEABLE,  MADV_DONTDUMP,   MADV_NORMAL,
    };
    /* Holes, shared mappings, kernels: it may fail, in part or whole. */
    madvise(at_page(t, first), n * PAGE, advice[roll(t, sizeof advice / sizeof *advice)]);
}

static void guard(struct thread *t, long first, long n)
{
    int on = roll(t, 2);
    for (long p = first; guards && p < first + n && p < first + 16; p++) {
        struct page *v = &t->page[p];
        if (v->kind != ANON || (!on && !v->guard))
            continue;
        CHECK(madvise(at_page(t, p), PAGE, on ? MADV_GUARD_INSTALL : MADV_GUARD_REMOVE) == 0);
        v->guard = on;
        v->seed = 0;
    }
}

static void other_descriptor(struct thread *t)
{
    struct object *o = with_descriptor(t);
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", o->fd);
    int fd = roll(t, 2) ? dup(o->fd) : open(path, O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0 && close(o->fd) == 0);
    o->fd = fd;
}

/* Its descriptor is closed; shared mappings of it may be left, private ones are not. */
static void other_object(struct thread *t)
{
    struct object *o = with_descriptor(t), *next;
    int kind = o->kind;
    if (kind == NAMED)
        return;
    for (int last = PRIVATE; last <= SHARED; last++) {
        for (long p = 0; p < PAGES; p++)
            if (t->page[p].kind > ANON && t->page[p].kind <= last && &t->object[t->page[p].object] == o) {
                CHECK(munmap(at_page(t, p), PAGE) == 0);
                are_holes(t, p, 1);
            }
        if (o->fd >= 0)
            CHECK(close(o->fd) == 0);
        o->fd = -1;
        if ((next = free_object(t)))
            break;
    }
    make(t, next, kind);
}

struct job {
    struct thread *t;
    long first, n;
    uint64_t seed;
};

static void *write_for(void *argument)
{
    struct job *job = argument;
    for (long p = job->first; p < job->first + job->n; p++)
        if (writable(job->t, &job->t->page[p]))
            put(job->t, p, job->seed + p);
    for (int k = 0; k < LOCALS; k += 100) {
        CHECK_EQ(locals[k], 0);
        locals[k] = job->seed;
    }
    return NULL;
}

static uint64_t deep(int depth, uint64_t seed)
{
    volatile uint64_t local[600];
    for (int k = 0; k < 600; k += 37)
        local[k] = seed + k;
    if (depth == 0)
        guest_sleep_ms(1);
    uint64_t sum = depth ? deep(depth - 1, guest_mix(seed)) : seed;
    for (int k = 0; k < 600; k += 37)
        CHECK_EQ(local[k], seed + k);
    return sum + local[37];
}

static void resize_heap(struct thread *t, uint64_t seed)
{
    long wanted = roll(t, HEAP_PAGES);
    CHECK(brk(heap + wanted * PAGE) == 0);
    for (long i = heap_pages; i < wanted; i++)
        heap_seed[i] = 0;
    heap_pages = wanted;
    for (long i = roll(t, 20); i < wanted; i += 1 + roll(t, 40))
        fill(heap + i * PAGE, heap_seed[i] = (seed + i) | 1);
}

static void draw(struct thread *t, long first, long n, uint64_t seed)
{
    long some = n < OBJECT_PAGES ? n : OBJECT_PAGES;
    struct job job = {t, first, n < 32 ? n : 32, seed};
    switch (roll(t, 38)) {
    case 0 ... 1: return map(t, first, n, ANON);
    case 2 ... 3: return map(t, first, some, PRIVATE);
    case 4 ... 5: return map(t, first, some, SHARED);
    case 6: return map_shared_anonymous(t, first, some);
    case 7: CHECK(munmap(at_page(t, first), n * PAGE) == 0); return are_holes(t, first, n);
    case 8 ... 10: return protect(t, first, n);
    case 11 ... 13: return discard(t, first, n);
    case 14 ... 16: return move(t, first, n);
    case 17: return resize(t, seed);
    case 18: return again(t, first);
    case 19 ... 20: return read_into(t, first, n);
    case 21 ... 22: return write_file(t, roll(t, 5) ? seed : 0);
    case 23: return cut(t);
    case 24 ... 25: return punch(t, first);
    case 26 ... 27: return advise(t, first, n);
    case 28: return guard(t, first, n);
    case 29: return guest_join(guest_thread(write_for, &job));
    case 30: t->sum ^= deep(2 + roll(t, 14), seed); return;
    case 31: return t->id == 0 ? resize_heap(t, seed) : (void)0;
    case 32: return other_descriptor(t);
    case 33: return other_object(t);
    }
    for (long p = first, zero = roll(t, 6) == 0; p < first + n; p++)
        if (writable(t, &t->page[p]) && (t->page[p].kind == SHARED || roll(t, 4)))
            put(t, p, zero ? 0 : seed + p);
}

static void look_at_all(struct thread *t)
{
    char line[80];
    for (long p = 0; p < PAGES; p++)
        look(t, p);
    for (struct object *o = t->object; o < t->object + OBJECTS; o++) {
        struct stat st;
        if (!o->used || o->fd < 0)
            continue;
        CHECK(fstat(o->fd, &st) == 0);
        CHECK_EQ(st.st_size, o->size * (long)PAGE);
        for (long k = 0; k < o->size; k++) {
            CHECK_EQ(pread(o->fd, t->scratch, PAGE, k * PAGE), (long)PAGE);
            same(t, "file", -1 - k, t->scratch, o->seed[k]);
        }
    }
    for (long i = 0; t->id == 0 && i < heap_pages; i++)
        same(t, "heap", -1 - i, heap + i * PAGE, heap_seed[i]);
    int len = snprintf(line, sizeof line, "%ld %ld %lx\n", t->id, t->step, (long)t->sum);
    CHECK_EQ(write(t->log, line, len), len);
}

static void *run(void *argument)
{
    struct thread *t = argument;
    for (t->step = 0; t->step < steps; t->step++) {
        long most = roll(t, 12) == 0 ? 512 : roll(t, 4) == 0 ? 96 : 16;
        long n = 1 + roll(t, most), first = roll(t, PAGES - n + 1);
        draw(t, first, n, guest_mix(t->dice) | 1);
        for (long p = first; p < first + n; p++)
            look(t, p);
        for (int k = 0; k < 24; k++)
            look(t, roll(t, PAGES));
        for (int k = 0; k < LOCALS; k += 64) {
            CHECK_EQ(locals[k], t->step ? t->step - 1 + k : 0);
            locals[k] = t->step + k;
        }
        if (t->step % 50 == 49)
            look_at_all(t);
        if (t->step % 4 == 0)
            guest_sleep_ms(1);
    }
    look_at_all(t);
    return NULL;
}

static void set_up(struct thread *t, long id, uint64_t seed)
{
    char name[32];
    t->id = id;
    t->dice = guest_mix(seed * 1000 + id);
    snprintf(name, sizeof name, "log%ld", id);
    t->log = open(name, O_WRONLY | O_CREAT | O_APPEND, 0600);
    CHECK(t->log >= 0);
    t->scratch = guest_map(PAGE, prots[WRITABLE], anon, -1, 0);
    /* With memory of its own on both sides, and at a huge page's border. */
    unsigned char *room = guest_map((PAGES + 1024) * PAGE, PROT_NONE, anon, -1, 0);
    t->base = (unsigned char *)(((uintptr_t)room / (512 * PAGE) + 1) * 512 * PAGE);
    CHECK(mmap(t->base, PAGES * PAGE, prots[WRITABLE], anon | MAP_FIXED, -1, 0) == t->base);
    are(t, 0, PAGES, (struct page){.kind = ANON, .prot = WRITABLE});
    for (int k = 0; k < 5; k++)
        make(t, &t->object[k], k % KINDS);
}

int main(int argc, char **argv)
{
    guest_begin();
    uint64_t seed = argc > 1 ? atol(argv[1]) : 1;
    steps = guest_rounds() * 8;
    unsigned char *pages = guest_map(4 * PAGE, prots[WRITABLE], anon, -1, 0);
    guards = madvise(pages, PAGE, MADV_GUARD_INSTALL) == 0;
    /* What was one mapping may be several to the kernel; before Linux 6.17 they do not move as one. */
    CHECK(mprotect(pages + PAGE, PAGE, PROT_READ) == 0);
    void *to = pages + 2 * PAGE;
    several = mremap(pages, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to;
    munmap(pages, 4 * PAGE);
    for (long id = 0; id < THREADS; id++)
        set_up(&all[id], id, seed);
    /* malloc has what it needs of the heap; what follows is the guest's. */
    setvbuf(stdout, NULL, _IONBF, 0);
    void *volatile first = malloc(100);
    free(first);
    heap = (unsigned char *)(((uintptr_t)sbrk(0) / PAGE + 64) * PAGE);
    CHECK(brk(heap) == 0);
    pthread_t threads[THREADS];
    for (long id = 1; id < THREADS; id++)
        threads[id] = guest_thread(run, &all[id]);
    run(&all[0]);
    for (long id = 1; id < THREADS; id++)
        guest_join(threads[id]);
    for (long id = 0; id < THREADS; id++)
        printf("%ld %lx\n", id, (long)all[id].sum);
    guest_end();
}
