/* Rollback against a model: checkpoints under four ids (none of them 0, which is not kept), changes of memory (global, heap,
 * mapped, stack; what is mapped is discarded and mapped anew as well) and of files, and rollbacks with random protected regions, in random
 * order. The model lies in protected memory. Arguments: steps, seed. */
#include "guest.h"

#include "ckpt.h"

#define IDS 4
#define PARTS 4
#define PART 16384
#define MAPPED 2
#define FILES 4
#define ROOM 12288

struct state {
    unsigned char memory[PARTS][PART];
    struct {
        int exists;
        long size;
        unsigned char bytes[ROOM];
    } file[FILES];
};

static struct model {
    uint64_t random;
    long step, steps, taken, rollbacks, kept;
    long at[IDS]; /* when it was taken, 0: never */
    int value;
    struct state now, then[IDS];
} m;

static unsigned char global_part[PART];

static uint64_t below(uint64_t n)
{
    m.random = guest_mix(m.random);
    return m.random % n;
}

static char *name(int file)
{
    static char text[32];
    snprintf(text, sizeof text, "model-%d", file);
    return text;
}

static void verify(unsigned char **parts)
{
    static unsigned char bytes[ROOM + 1];
    for (int k = 0; k < PARTS; k++)
        if (memcmp(parts[k], m.now.memory[k], PART) != 0) {
            int at = 0, wrong = 0;
            while (parts[k][at] == m.now.memory[k][at])
                at++;
            for (int i = 0; i < PART; i++)
                wrong += parts[k][i] != m.now.memory[k][i];
            FAIL("step %ld: part %d of the memory is wrong at %d (%p), %d bytes", m.step, k, at,
                 (void *)(parts[k] + at), wrong);
        }
    for (int k = 0; k < FILES; k++) {
        int fd = open(name(k), O_RDONLY | O_CLOEXEC);
        if ((fd >= 0) != m.now.file[k].exists)
            FAIL("step %ld: file %d %s", m.step, k, fd < 0 ? "is missing" : "is there");
        if (fd < 0)
            continue;
        long n = read(fd, bytes, sizeof bytes);
        if (n != m.now.file[k].size || memcmp(bytes, m.now.file[k].bytes, n) != 0)
            FAIL("step %ld: file %d is wrong: %ld bytes, not %ld", m.step, k, n, m.now.file[k].size);
        close(fd);
    }
    struct stat st;
    CHECK(stat("kept", &st) == 0);
    CHECK_EQ(st.st_size, m.kept);
}

static void change_memory(unsigned char **parts)
{
    int k = below(PARTS);
    size_t at = below(PART), len = 1 + below(below(2) ? 64 : PART);
    if (at + len > PART)
        len = PART - at;
    unsigned char c = below(256);
    if (k == MAPPED && below(4) == 0) {
        /* Pages are discarded, or mapped anew in their old place. */
        at &= ~4095ul;
        len = 4096 * (1 + below((PART - at) / 4096));
        if (below(2))
            CHECK(madvise(parts[k] + at, len, MADV_DONTNEED) == 0);
        else
            CHECK(mmap(parts[k] + at, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
                  parts[k] + at);
        memset(m.now.memory[k] + at, 0, len);
        return;
    }
    memset(parts[k] + at, c, len);
    memset(m.now.memory[k] + at, c, len);
}

static void change_file(void)
{
    int k = below(FILES);
    unsigned char bytes[4096];
    long at = below(ROOM - 4096), len = 1 + below(4096);
    memset(bytes, (int)below(256), len);
    switch (m.now.file[k].exists ? below(5) : 4) {
    case 0:
        CHECK(unlink(name(k)) == 0);
        m.now.file[k].exists = 0;
        break;
    case 1: {
        long size = below(ROOM);
        CHECK(truncate(name(k), size) == 0);
        if (size > m.now.file[k].size)
            memset(m.now.file[k].bytes + m.now.file[k].size, 0, size - m.now.file[k].size);
        m.now.file[k].size = size;
        break;
    }
    case 2: {
        int to = below(FILES);
        char from[32];
        strcpy(from, name(k));
        CHECK(rename(from, name(to)) == 0);
        if (to != k) {
            m.now.file[to] = m.now.file[k];
            m.now.file[k].exists = 0;
        }
        break;
    }
    default: {
        int fd = open(name(k), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
        CHECK(fd >= 0);
        CHECK_EQ(pwrite(fd, bytes, len, at), len);
        close(fd);
        if (!m.now.file[k].exists)
            m.now.file[k].size = 0;
        m.now.file[k].exists = 1;
        if (at > m.now.file[k].size)
            memset(m.now.file[k].bytes + m.now.file[k].size, 0, at - m.now.file[k].size);
        memcpy(m.now.file[k].bytes + at, bytes, len);
        if (at + len > m.now.file[k].size)
            m.now.file[k].size = at + len;
    }
    }
}

static void take(int id)
{
    m.then[id] = m.now;
    m.at[id] = ++m.taken;
    int result = ckpt_checkpoint(id + 1);
    if (result < 0)
        FAIL("step %ld: ckpt_checkpoint: errno %d", m.step, errno);
    CHECK_EQ(result, m.value);
    m.value = 0;
}

static void go_back(unsigned char **parts, int id)
{
    struct ckpt_region keep[9] = {{&m, sizeof m}};
    int n = 1;
    struct state left = m.now;
    m.now = m.then[id];
    while (n < 9 && below(3)) {
        int k = below(PARTS);
        size_t at = below(PART), len = 1 + below(below(2) ? 9000 : 32);
        if (at + len > PART)
            len = PART - at;
        keep[n].addr = parts[k] + at;
        keep[n++].len = len;
        memcpy(m.now.memory[k] + at, left.memory[k] + at, len);
    }
    for (int k = 0; k < IDS; k++)
        if (m.at[k] > m.at[id])
            m.at[k] = 0; /* newer ones are gone */
    m.rollbacks++;
    m.value = 1 + below(1000);
    ckpt_rollback(id + 1, m.value, keep, n);
    FAIL("step %ld: ckpt_rollback: errno %d", m.step, errno);
}

int main(int argc, char **argv)
{
    guest_begin();
    unsigned char stack_part[PART] = {0};
    unsigned char *parts[PARTS] = {global_part, calloc(1, PART), NULL, stack_part};
    parts[MAPPED] = guest_map(PART, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    m.steps = argc > 1 ? atol(argv[1]) : 2000;
    m.random = argc > 2 ? strtoul(argv[2], NULL, 10) : 1;
    char dir[4096], excluded[8192];
    CHECK(getcwd(dir, sizeof dir) != NULL);
    snprintf(excluded, sizeof excluded, "%s/kept", dir);
    CHECK(ckpt_exclude(excluded) == 0);
    for (int k = 0; k < FILES; k++)
        unlink(name(k));
    close(open("kept", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    take(0);
    while (m.step < m.steps) {
        m.step++;
        int what = below(100), id = below(IDS);
        if (what < 45)
            change_memory(parts);
        else if (what < 88)
            change_file();
        else if (what < 90) {
            int fd = open("kept", O_WRONLY | O_APPEND | O_CLOEXEC);
            CHECK(fd >= 0 && write(fd, "+", 1) == 1);
            close(fd);
            m.kept++;
        } else if (what < 95)
            take(id);
        else if (m.at[id])
            go_back(parts, id);
        verify(parts);
    }
    fprintf(stderr, "%ld steps, %ld checkpoints, %ld rollbacks\n", m.step, m.taken, m.rollbacks);
    printf("model ok\n");
    guest_end();
}
