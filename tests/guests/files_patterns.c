/* Proves: files agree with memory after a resume, whichever way they are modified. In each
 * round the guest compares its files with what it remembers of them, and modifies them.
 *   files_patterns PATTERN      one of the functions below */
#include "guest.h"
#include <dirent.h>
#include <sys/xattr.h>

static void put(int fd, const void *data, size_t len)
{
    CHECK_EQ(write(fd, data, len), len);
}

static long size_of(const char *path)
{
    struct stat st;
    if (stat(path, &st) != 0)
        return -1;
    return st.st_size;
}

static size_t record(char *line, size_t room, long round, int part)
{
    uint64_t mark = guest_mix(round * 16 + part);
    int pad = mark % 60;
    int n = snprintf(line, room, "%ld.%d %016llx %.*s\n", round, part, (unsigned long long)mark, pad,
                     "............................................................");
    return n;
}

/* Appends to a file that stays open. */
static long appended;
static void append_held(long round)
{
    static int fd = -1;
    char line[128];
    if (fd < 0)
        CHECK((fd = open("held", O_WRONLY | O_CREAT | O_APPEND, 0644)) >= 0);
    CHECK_EQ(size_of("held"), appended);
    for (int part = 0; part < 4; part++) {
        size_t n = record(line, sizeof line, round, part);
        put(fd, line, n);
        appended += n;
    }
}

/* The same without O_APPEND: the position counts. */
static void append_position(long round)
{
    static int fd = -1;
    char line[128];
    if (fd < 0)
        CHECK((fd = open("position", O_RDWR | O_CREAT | O_TRUNC, 0644)) >= 0);
    CHECK_EQ(size_of("position"), appended);
    CHECK_EQ(lseek(fd, 0, SEEK_CUR), appended);
    for (int part = 0; part < 4; part++) {
        size_t n = record(line, sizeof line, round, part);
        put(fd, line, n);
        appended += n;
    }
}

/* Opens the log for each record, as loggers do. */
static void append_reopened(long round)
{
    char line[128];
    for (int part = 0; part < 4; part++) {
        long size = size_of("log");
        CHECK_EQ(size < 0 ? 0 : size, appended);
        int fd = open("log", O_WRONLY | O_CREAT | O_APPEND, 0644);
        CHECK(fd >= 0);
        size_t n = record(line, sizeof line, round, part);
        put(fd, line, n);
        appended += n;
        CHECK(close(fd) == 0);
    }
}

/* Overwrites slots of a file, across block borders. */
enum { SLOTS = 300, SLOT = 1000 };
static long versions[SLOTS];
static void in_place(long round)
{
    static int fd = -1;
    static char slot[SLOT], is[SLOT];
    if (fd < 0) {
        CHECK((fd = open("slots", O_RDWR | O_CREAT, 0644)) >= 0);
        for (int k = 0; k < SLOTS; k++) {
            guest_fill(slot, SLOT, k);
            CHECK_EQ(pwrite(fd, slot, SLOT, (off_t)k * SLOT), SLOT);
        }
    }
    for (int part = 0; part < 6; part++) {
        int k = guest_mix(round * 16 + part) % SLOTS;
        CHECK_EQ(pread(fd, is, SLOT, (off_t)k * SLOT), SLOT);
        if (!guest_holds(is, SLOT, versions[k] * SLOTS + k))
            FAIL("round %ld: slot %d is not of version %ld", round, k, versions[k]);
        versions[k]++;
        guest_fill(slot, SLOT, versions[k] * SLOTS + k);
        CHECK_EQ(pwrite(fd, slot, SLOT, (off_t)k * SLOT), SLOT);
    }
}

/* Writes a temporary file and renames it over the state. */
static void rename_over(long round)
{
    char line[128], is[128];
    if (round > 0) {
        size_t n = record(line, sizeof line, round - 1, 0);
        CHECK_EQ(guest_slurp("state", is, sizeof is), n);
        CHECK(memcmp(line, is, n) == 0);
        CHECK_EQ(size_of("state.tmp"), -1);
    }
    int fd = open("state.tmp", O_WRONLY | O_CREAT | O_EXCL, 0644);
    CHECK(fd >= 0);
    size_t n = record(line, sizeof line, round, 0);
    put(fd, line, n);
    CHECK(close(fd) == 0);
    CHECK(rename("state.tmp", "state") == 0);
}

/* Makes files and removes the oldest; directories and links too. */
static void create_unlink(long round)
{
    char name[64], line[128];
    for (int back = 1; back <= 6 && back <= round; back++) {
        snprintf(name, sizeof name, "f%ld", round - back);
        CHECK_EQ(size_of(name) >= 0, back <= 5);
    }
    snprintf(name, sizeof name, "f%ld", round);
    int fd = open(name, O_WRONLY | O_CREAT | O_EXCL, round % 2 ? 0600 : 0644);
    if (fd < 0)
        FAIL("%s: errno %d", name, errno);
    put(fd, line, record(line, sizeof line, round, 0));
    close(fd);
    if (round >= 5) {
        snprintf(name, sizeof name, "f%ld", round - 5);
        CHECK(unlink(name) == 0);
    }
    snprintf(name, sizeof name, "d%ld", round % 7);
    if (round >= 7)
        CHECK(rmdir(name) == 0);
    CHECK(mkdir(name, 0755) == 0);
    CHECK(unlink("latest") == 0 || round == 0);
    snprintf(name, sizeof name, "f%ld", round);
    CHECK(symlink(name, "latest") == 0);
    CHECK(unlink("hard") == 0 || round == 0);
    CHECK(link(name, "hard") == 0);
}

/* tmp/N -> new/N -> cur/N, the delivery of mail. */
static void maildir(long round)
{
    char from[64], to[64], line[128];
    if (round == 0) {
        CHECK(mkdir("tmp", 0755) == 0);
        CHECK(mkdir("new", 0755) == 0);
        CHECK(mkdir("cur", 0755) == 0);
    }
    snprintf(from, sizeof from, "tmp/%ld", round);
    int fd = open(from, O_WRONLY | O_CREAT | O_EXCL, 0644);
    if (fd < 0)
        FAIL("%s: errno %d", from, errno);
    put(fd, line, record(line, sizeof line, round, 0));
    close(fd);
    snprintf(to, sizeof to, "new/%ld", round);
    if (round % 2) {
        CHECK(rename(from, to) == 0);
    } else {
        CHECK(link(from, to) == 0);
        CHECK(unlink(from) == 0);
    }
    if (round >= 3) {
        snprintf(from, sizeof from, "new/%ld", round - 3);
        snprintf(to, sizeof to, "cur/%ld:2,S", round - 3);
        CHECK_EQ(size_of(to), -1);
        CHECK(rename(from, to) == 0);
    }
}

/* Renames a file while it is open, and goes on writing. */
static void renamed_open(long round)
{
    static int fd = -1;
    char line[128], from[64], to[64];
    snprintf(from, sizeof from, "part%ld", round);
    snprintf(to, sizeof to, "part%ld", round + 1);
    if (fd < 0)
        CHECK((fd = open(from, O_WRONLY | O_CREAT, 0644)) >= 0);
    CHECK_EQ(size_of(from), appended);
    size_t n = record(line, sizeof line, round, 0);
    put(fd, line, n);
    CHECK(rename(from, to) == 0);
    size_t m = record(line, sizeof line, round, 1);
    put(fd, line, m);
    appended += n + m;
}

/* log -> log.1 -> log.2, as log rotation does; the oldest is overwritten. */
static void rotate(long round)
{
    static int fd = -1;
    static long size;
    char line[128];
    if (fd < 0 || round % 10 == 0) {
        if (fd >= 0) {
            close(fd);
            if (round > 10)
                CHECK(rename("log.1", "log.2") == 0);
            CHECK(rename("log", "log.1") == 0);
        }
        CHECK((fd = open("log", O_WRONLY | O_CREAT | O_EXCL | O_APPEND, 0644)) >= 0);
        size = 0;
    }
    CHECK_EQ(size_of("log"), size);
    size_t n = record(line, sizeof line, round, 0);
    put(fd, line, n);
    size += n;
}

/* Written anew each time, by O_TRUNC or ftruncate; shorter or longer than before. */
static void truncated(long round)
{
    static int fd = -1;
    static char block[20000];
    static long size, sparse;
    if (fd < 0)
        CHECK((fd = open("whole", O_RDWR | O_CREAT, 0644)) >= 0);
    long is = size_of("again");
    CHECK_EQ(is < 0 ? 0 : is, size);
    CHECK_EQ(size_of("whole"), sparse);
    size = 8 + guest_mix(round) % (sizeof block - 8);
    guest_fill(block, size, round);
    int again = open("again", O_WRONLY | O_CREAT | O_TRUNC, 0644);
    CHECK(again >= 0);
    put(again, block, size);
    close(again);
    sparse = guest_mix(round + 1000000) % 100000;
    CHECK(ftruncate(fd, sparse) == 0);
    CHECK_EQ(pwrite(fd, block, 100, sparse), 100);
    sparse += 100;
}

/* Modes, times and extended attributes. */
static void attributes(long round)
{
    struct stat st;
    char value[32];
    static int user_xattrs = 1;
    if (round == 0)
        CHECK(close(open("file", O_WRONLY | O_CREAT, 0600)) == 0);
    CHECK(stat("file", &st) == 0);
    if (round > 0) {
        CHECK_EQ(st.st_mode & 07777, 0600 | ((round - 1) & 077));
        CHECK_EQ(st.st_mtim.tv_sec, 1000000000 + round - 1);
        ssize_t n = user_xattrs ? getxattr("file", "user.round", value, sizeof value - 1) : 0;
        if (user_xattrs && n > 0) {
            value[n] = 0;
            CHECK_EQ(atol(value), round - 1);
        }
    }
    CHECK(chmod("file", 0600 | (round & 077)) == 0);
    int n = snprintf(value, sizeof value, "%ld", round);
    if (user_xattrs && setxattr("file", "user.round", value, n, 0) != 0)
        user_xattrs = 0;
    struct timespec times[2] = {{1000000000 + round, 0}, {1000000000 + round, 0}};
    CHECK(utimensat(AT_FDCWD, "file", times, 0) == 0);
}

/* Results by fprintf, flushed when stdio pleases. */
static void results(long round)
{
    static FILE *out;
    if (!out)
        CHECK((out = fopen("results.txt", "w")) != NULL);
    for (int part = 0; part < 20; part++)
        fprintf(out, "%ld.%d %016llx\n", round, part, (unsigned long long)guest_mix(round * 32 + part));
    if (round % 7 == 0)
        fflush(out);
    CHECK(!ferror(out));
}

/* Records of a file updated with r+. */
static void records(long round)
{
    static FILE *file;
    struct {
        long number, version, sum;
        char pad[104];
    } is;
    if (!file) {
        CHECK((file = fopen("records.db", "w+")) != NULL);
        for (int k = 0; k < SLOTS; k++) {
            memset(&is, 0, sizeof is);
            is.number = k;
            CHECK_EQ(fwrite(&is, sizeof is, 1, file), 1);
        }
        fclose(file);
        CHECK((file = fopen("records.db", "r+")) != NULL);
    }
    for (int part = 0; part < 10; part++) {
        int k = guest_mix(round * 16 + part) % SLOTS;
        CHECK(fseek(file, (long)k * sizeof is, SEEK_SET) == 0);
        CHECK_EQ(fread(&is, sizeof is, 1, file), 1);
        CHECK_EQ(is.number, k);
        CHECK_EQ(is.version, versions[k]);
        is.version = ++versions[k];
        is.sum += round;
        CHECK(fseek(file, (long)k * sizeof is, SEEK_SET) == 0);
        CHECK_EQ(fwrite(&is, sizeof is, 1, file), 1);
    }
    if (round % 3 == 0)
        CHECK(fflush(file) == 0);
}

/* A database by a shared mapping. */
static void mapped(long round)
{
    static unsigned char *at;
    enum { LEN = 64 * 4096 };
    if (!at) {
        int fd = open("mapped", O_RDWR | O_CREAT, 0644);
        CHECK(fd >= 0);
        CHECK(ftruncate(fd, LEN) == 0);
        at = guest_map(LEN, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
    }
    for (int part = 0; part < 6; part++) {
        int k = guest_mix(round * 16 + part) % 64;
        long version;
        memcpy(&version, at + k * 4096, sizeof version);
        CHECK_EQ(version, versions[k]);
        version = ++versions[k];
        memcpy(at + k * 4096, &version, sizeof version);
        guest_fill(at + k * 4096 + 8, 1024, version);
    }
    if (round % 5 == 0)
        CHECK(msync(at, LEN, MS_SYNC) == 0);
}

/* Standard output with a header that is overwritten at the end of each round. */
static void header(long round)
{
    char line[128];
    if (round == 0)
        put(1, "rounds 00000000\n", 16);
    put(1, line, record(line, sizeof line, round, 0));
    off_t end = lseek(1, 0, SEEK_CUR);
    CHECK(lseek(1, 7, SEEK_SET) == 7);
    snprintf(line, sizeof line, "%08ld", round);
    put(1, line, 8);
    CHECK(lseek(1, end, SEEK_SET) == end);
}

/* Files that have lost their name while they are open: at once (tmpfile), and later. */
static void unlinked(long round)
{
    static FILE *nameless;
    static int fd = -1;
    static long sum, held;
    char line[128], is[128];
    if (!nameless)
        CHECK((nameless = tmpfile()) != NULL);
    CHECK(fseek(nameless, 0, SEEK_SET) == 0);
    if (round > 0) {
        CHECK(fgets(line, sizeof line, nameless) != NULL);
        CHECK_EQ(atol(line), sum);
        CHECK(fseek(nameless, 0, SEEK_SET) == 0);
    }
    sum += round;
    CHECK(fprintf(nameless, "%ld\n", sum) > 0);
    CHECK(fflush(nameless) == 0);
    switch (round % 20) {
    case 0:
        if (fd >= 0)
            close(fd);
        CHECK((fd = open("passing", O_RDWR | O_CREAT | O_EXCL, 0644)) >= 0);
        held = 0;
        break;
    case 10:
        CHECK(unlink("passing") == 0);
        break;
    }
    CHECK_EQ(size_of("passing") >= 0, round % 20 < 10);
    size_t n = record(line, sizeof line, round, 0);
    CHECK_EQ(pwrite(fd, line, n, held), n);
    CHECK_EQ(pread(fd, is, n, held), n);
    CHECK(memcmp(line, is, n) == 0);
    held += n;
    CHECK_EQ(lseek(fd, 0, SEEK_END), held);
}

static const struct {
    const char *name;
    void (*step)(long round);
} patterns[] = {
    {"append_held", append_held},
    {"append_position", append_position},
    {"append_reopened", append_reopened},
    {"in_place", in_place},
    {"rename_over", rename_over},
    {"create_unlink", create_unlink},
    {"maildir", maildir},
    {"renamed_open", renamed_open},
    {"rotate", rotate},
    {"truncated", truncated},
    {"attributes", attributes},
    {"results", results},
    {"records", records},
    {"mapped", mapped},
    {"header", header},
    {"unlinked", unlinked},
};

int main(int argc, char **argv)
{
    guest_begin();
    void (*step)(long) = NULL;
    for (size_t k = 0; argc > 1 && k < sizeof patterns / sizeof *patterns; k++)
        if (strcmp(argv[1], patterns[k].name) == 0)
            step = patterns[k].step;
    CHECK(step != NULL);
    long per_round = argc > 2 ? atol(argv[2]) : 3, number = 0;
    uint64_t sum = 0;
    ROUNDS(round)
    {
        for (long k = 0; k < per_round; k++)
            step(number++);
        sum = guest_mix(sum + number);
    }
    fflush(NULL);
    if (step != header)
        printf("%s %ld %llx\n", argv[1], number, (unsigned long long)sum);
    guest_end();
}
