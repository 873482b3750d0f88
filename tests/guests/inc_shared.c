/* Proves: what is stored of shared memory from one increment to the next is all that has
 * changed, by whatever way it did: through the mapping, through a second mapping of the same
 * object, by calls on a memfd (write, truncation both ways, holes punched), by children that
 * write and end, in SysV memory, in a file without a name; and that objects which come and go
 * are not taken for each other. All of it is verified in every round. */
#include "guest.h"
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/wait.h>

#define PAGE 4096ul
#define PAGES 192

struct object {
    const char *name;
    unsigned char *at, *again; /* two mappings, if it has any */
    int fd;                    /* -1: none */
    long pages;                /* its present size */
    uint64_t model[PAGES];     /* 0: zero */
};

static struct object objects[] = {
    {.name = "anonymous"}, {.name = "memfd"}, {.name = "memfd without mapping"},
    {.name = "SysV"},      {.name = "unlinked"}, {.name = "coming and going"},
};
enum { ANON, MEMFD, LOOSE, SYSV, UNLINKED, FLEETING, COUNT };

static void fill(unsigned char *page, uint64_t seed)
{
    memset(page, 0, PAGE);
    if (seed == 0)
        return;
    for (int k = 0; k < 3; k++) {
        uint64_t word = guest_mix(seed + k);
        memcpy(page + k * 2040, &word, 8);
    }
}

static void verify(struct object *o)
{
    static unsigned char wanted[PAGE], got[PAGE];
    for (long i = 0; i < o->pages; i++) {
        fill(wanted, o->model[i]);
        if (o->at && memcmp(o->at + i * PAGE, wanted, PAGE) != 0)
            FAIL("%s: page %ld is not what was written (%02x)", o->name, i, o->at[i * PAGE]);
        if (o->again && memcmp(o->again + i * PAGE, wanted, PAGE) != 0)
            FAIL("%s: page %ld of the second mapping", o->name, i);
        if (o->fd >= 0) {
            CHECK_EQ(pread(o->fd, got, PAGE, i * PAGE), (long)PAGE);
            if (memcmp(got, wanted, PAGE) != 0)
                FAIL("%s: page %ld is not what can be read", o->name, i);
        }
    }
    if (o->fd >= 0) {
        struct stat st;
        CHECK(fstat(o->fd, &st) == 0);
        CHECK_EQ(st.st_size, o->pages * (long)PAGE);
    }
}

/* One page, in one of the ways there are. */
static void change(struct object *o, uint64_t dice)
{
    if (o->pages == 0)
        return;
    long i = (dice >> 8) % o->pages;
    uint64_t seed = (dice >> 20) % 5 == 0 ? 0 : guest_mix(dice) | 1;
    unsigned char page[PAGE];
    fill(page, seed);
    int way = dice % 4;
    if (way == 0 && o->again)
        memcpy(o->again + i * PAGE, page, PAGE);
    else if (way == 1 && o->fd >= 0)
        CHECK_EQ(pwrite(o->fd, page, PAGE, i * PAGE), (long)PAGE);
    else if (way == 2 && o->at && (dice >> 40) % 60 == 0) { /* no checkpoint while it lives */
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            memcpy(o->at + i * PAGE, page, PAGE);
            _exit(0);
        }
        int status;
        CHECK_EQ(waitpid(child, &status, 0), child);
        CHECK_EQ(status, 0);
    } else if (o->at)
        memcpy(o->at + i * PAGE, page, PAGE);
    else
        CHECK_EQ(pwrite(o->fd, page, PAGE, i * PAGE), (long)PAGE);
    o->model[i] = seed;
}

static void resize(struct object *o, uint64_t dice)
{
    long wanted = (dice >> 8) % PAGES;
    CHECK(ftruncate(o->fd, wanted * PAGE) == 0);
    for (long i = o->pages; i < wanted; i++)
        o->model[i] = 0;
    o->pages = wanted;
}

static void punch(struct object *o, uint64_t dice)
{
    if (o->pages == 0)
        return;
    long first = (dice >> 8) % o->pages, count = 1 + (dice >> 24) % 8;
    if (first + count > o->pages)
        count = o->pages - first;
    if ((dice & 1) && o->at)
        CHECK(madvise(o->at + first * PAGE, count * PAGE, MADV_REMOVE) == 0);
    else
        CHECK(fallocate(o->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, first * PAGE,
                        count * PAGE) == 0);
    for (long i = first; i < first + count; i++)
        o->model[i] = 0;
}

static unsigned char *shared(int fd)
{
    return guest_map(PAGES * PAGE, PROT_READ | PROT_WRITE,
                     MAP_SHARED | (fd < 0 ? MAP_ANONYMOUS : 0), fd, 0);
}

/* Another object of its kind, mostly in the place of the one before, with what that had in
 * some of its pages. */
static void renew(struct object *o, uint64_t dice)
{
    if (o->at)
        CHECK(munmap(o->at, PAGES * PAGE) == 0);
    o->at = shared(-1);
    for (long i = 0; i < PAGES; i++) {
        uint64_t die = guest_mix(dice + i);
        if (die % 3)
            o->model[i] = 0;
        fill(o->at + i * PAGE, o->model[i]);
    }
}

int main(void)
{
    guest_begin();
    for (int k = 0; k < COUNT; k++)
        objects[k].fd = -1, objects[k].pages = PAGES;
    struct object *anon = &objects[ANON], *memfd = &objects[MEMFD];
    anon->at = shared(-1);
    anon->again = mremap(anon->at, 0, PAGES * PAGE, MREMAP_MAYMOVE);
    CHECK(anon->again != MAP_FAILED);
    memfd->fd = memfd_create("mapped", 0);
    CHECK(memfd->fd >= 0 && ftruncate(memfd->fd, PAGES * PAGE) == 0);
    memfd->at = shared(memfd->fd);
    memfd->again = shared(memfd->fd);
    objects[LOOSE].fd = memfd_create("loose", 0);
    CHECK(objects[LOOSE].fd >= 0 && ftruncate(objects[LOOSE].fd, PAGES * PAGE) == 0);
    int id = shmget(IPC_PRIVATE, PAGES * PAGE, IPC_CREAT | 0600);
    CHECK(id >= 0);
    objects[SYSV].at = shmat(id, NULL, 0);
    CHECK(objects[SYSV].at != (void *)-1 && shmctl(id, IPC_RMID, NULL) == 0);
    objects[UNLINKED].fd = open("nameless", O_RDWR | O_CREAT | O_EXCL, 0600);
    CHECK(objects[UNLINKED].fd >= 0 && unlink("nameless") == 0);
    CHECK(ftruncate(objects[UNLINKED].fd, PAGES * PAGE) == 0);
    renew(&objects[FLEETING], 1);
    uint64_t dice = 7;
    ROUNDS(round)
    {
        for (int k = 0; k < COUNT; k++)
            for (int n = 0; n < 5; n++)
                change(&objects[k], dice = guest_mix(dice));
        for (int k = 0; k < COUNT; k++) {
            dice = guest_mix(dice);
            if (objects[k].fd < 0)
                continue;
            if (dice % 8 == 0)
                resize(&objects[k], dice);
            else if (dice % 8 < 3)
                punch(&objects[k], dice);
        }
        if (round % 7 == 0)
            renew(&objects[FLEETING], dice);
        for (int k = 0; k < COUNT; k++)
            verify(&objects[k]);
    }
    printf("shared %lx\n", (long)dice);
    guest_end();
}
