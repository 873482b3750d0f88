/*
 * Ways to reach a file that are not its plain path, one a run: links, `..`, /proc, directories
 * that are gone, roots of openat2, the border of what is excluded (ex/). `setup` makes the files
 * and ends; a case's name makes the same files, takes a checkpoint, modifies them by that way and
 * dies by SIGKILL; resumed, it ends with 73.
 */
#define _GNU_SOURCE
#include "ckpt.h"
#include "guest.h"
#include <linux/openat2.h>

enum { SIZE = 9000 };

static void make(const char *name)
{
    static char content[SIZE];
    memset(content, 'B', SIZE);
    int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    CHECK(fd >= 0);
    CHECK_EQ(write(fd, content, SIZE), SIZE);
    close(fd);
}

static void setup(void)
{
    const char *dirs[] = {"d", "d2", "ex", "r"};
    for (int i = 0; i < 4; i++)
        CHECK(mkdir(dirs[i], 0755) == 0);
    const char *files[] = {"f", "g", "d/f", "d/g", "d2/f", "ex/have", "r/real", "f (deleted)", "a\\012b", "c\nd", "mem"};
    for (int i = 0; i < 11; i++)
        make(files[i]);
    CHECK(link("g", "second") == 0);
    CHECK(symlink("d", "old") == 0);
    CHECK(symlink("nowhere", "gone") == 0);
    CHECK(symlink("/real", "r/l") == 0);
    CHECK(symlink("/made", "r/m") == 0);
}

/* Overwrites the beginning, and cuts off the end. */
static void modify(const char *name)
{
    int fd = open(name, O_RDWR);
    CHECK(fd >= 0);
    CHECK_EQ(write(fd, "ZZZZ", 4), 4);
    CHECK(ftruncate(fd, 5000) == 0);
    close(fd);
}

static void empty(const char *name)
{
    int fd = open(name, O_WRONLY | O_TRUNC);
    CHECK(fd >= 0);
    close(fd);
}

/* A program that makes and removes one name again and again, as sqlite does with its journal. */
static void again_and_again(const char *name)
{
    for (int i = 0; i < 3; i++) {
        int fd = open(name, O_RDWR | O_CREAT, 0640);
        struct stat st;
        CHECK(fd >= 0 && fstat(fd, &st) == 0);
        CHECK(st.st_size == 0 && st.st_nlink == 1 && (st.st_mode & 0777) == 0640);
        CHECK((fcntl(fd, F_GETFL) & (O_ACCMODE | O_EXCL | O_CREAT)) == O_RDWR);
        CHECK_EQ(write(fd, "x", 1), 1);
        close(fd);
        CHECK(unlink(name) == 0);
    }
}

static void fails(const char *name, int flags, int with)
{
    int fd = open(name, flags | O_CREAT, 0640);
    CHECK(fd == -1);
    CHECK_EQ(errno, with);
}

/* Then the name stands for something else. */
static void made_again(void)
{
    umask(0);
    again_and_again("j");
    int fd = open("j", O_WRONLY | O_CREAT, 0640);
    CHECK_EQ(write(fd, "yyyy", 4), 4);
    close(fd);
    fails("j", O_WRONLY | O_EXCL, EEXIST);
    CHECK((fd = open("j", O_RDWR | O_CREAT | O_TRUNC, 0600)) >= 0);
    struct stat st;
    CHECK(fstat(fd, &st) == 0 && st.st_size == 0 && (st.st_mode & 0777) == 0640);
    close(fd);
    CHECK(unlink("j") == 0);

    again_and_again("j");
    CHECK(symlink("nowhere", "j") == 0);
    fails("j", O_RDWR | O_NOFOLLOW, ELOOP);
    again_and_again("k");
    CHECK((fd = open("j", O_RDWR | O_CREAT, 0640)) >= 0);
    CHECK(access("nowhere", F_OK) == 0);
    close(fd);
    CHECK(unlink("j") == 0);

    again_and_again("j");
    CHECK(symlink("f", "j") == 0);
    CHECK((fd = open("j", O_RDWR | O_CREAT | O_TRUNC, 0640)) >= 0);
    close(fd);
    CHECK(stat("f", &st) == 0 && st.st_size == 0);
    CHECK(unlink("j") == 0);

    again_and_again("j");
    CHECK(mkdir("j", 0755) == 0);
    fails("j", O_RDWR, EISDIR);
    again_and_again("k");
    CHECK((fd = open("j/in", O_RDWR | O_CREAT, 0640)) >= 0);
    close(fd);
    CHECK(unlink("j/in") == 0 && rmdir("j") == 0);

    again_and_again("j");
    CHECK(mkfifo("j", 0600) == 0);
    CHECK((fd = open("j", O_RDWR | O_CREAT, 0640)) >= 0);
    CHECK(fstat(fd, &st) == 0 && S_ISFIFO(st.st_mode));
    close(fd);
    CHECK(unlink("j") == 0);

    again_and_again("j");
    CHECK((fd = open("g", O_RDWR | O_CREAT, 0640)) >= 0);
    CHECK_EQ(write(fd, "ZZZZ", 4), 4);
    close(fd);
    again_and_again("j");
    fails("no/such", O_RDWR, ENOENT);
    fails("f/j", O_RDWR, ENOTDIR);
    fails("j/", O_RDWR, EISDIR);
    fails("", O_RDWR, ENOENT);
    fails((const char *)8, O_RDWR, EFAULT);
    CHECK(rename("d/g", "j") == 0);
    CHECK((fd = open("j", O_RDWR | O_CREAT, 0640)) >= 0);
    CHECK_EQ(pwrite(fd, "ZZZZ", 4, 6000), 4);
    close(fd);
}

static int in_root(int dir, const char *path, int flags)
{
    struct open_how how = {.flags = flags, .mode = flags & O_CREAT ? 0644 : 0, .resolve = RESOLVE_IN_ROOT};
    int fd = syscall(SYS_openat2, dir, path, &how, sizeof how);
    CHECK(fd >= 0);
    return fd;
}

/* A path through a descriptor. */
static const char *through(const char *base, int fd, const char *rest)
{
    static char path[64];
    snprintf(path, sizeof path, "%s/%d%s", base, fd, rest);
    return path;
}

static int given(const char *name, int argc, char **argv)
{
    return argc > 1 && strcmp(argv[1], name) == 0;
}

#define CASE(name) else if (given(name, argc, argv))
#define OK(call) CHECK((call) == 0)

int main(int argc, char **argv)
{
    char path[4200], cwd[4096];
    setup();
    if (given("setup", argc, argv))
        return 0;
    CHECK(getcwd(cwd, sizeof cwd));
    int f = open("f", O_RDWR), g = open("g", O_RDWR), d = open("d", O_RDONLY), r = open("r", O_RDONLY);
    int odd[] = {open("a\\012b", O_RDWR), open("c\nd", O_RDWR)};
    char *maps[2] = {NULL}, *views[2] = {NULL};
    if (given("odd-mapped", argc, argv))
        for (int i = 0; i < 2; i++)
            CHECK((maps[i] = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, odd[i], 0)) != MAP_FAILED);
    if (argc > 1 && strncmp(argv[1], "view", 4) == 0) {
        int called = open("f (deleted)", O_RDWR);
        CHECK((views[0] = mmap(NULL, SIZE, PROT_READ, MAP_SHARED, f, 0)) != MAP_FAILED);
        CHECK((views[1] = mmap(NULL, SIZE, PROT_READ, MAP_SHARED, called, 0)) != MAP_FAILED);
        close(called);
    }
    if (given("excluded-cwd", argc, argv))
        OK(chdir("ex"));
    if (given("mapped-twin", argc, argv)) {
        /* What is stored through the mapping is seen in "second". */
        CHECK((maps[0] = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, g, 0)) != MAP_FAILED);
        close(g);
        OK(unlink("g"));
        if (ckpt_checkpoint(0) != -1) {
            CHECK(geteuid() != 0);
            NOT_TESTED("only root is told what other names a mapped file has");
        }
        return 74;
    }
    if (ckpt_checkpoint(0) > 0)
        return 73;
    if (0) {
    }
    CASE("excluded-cwd")
    {
        empty("../f");
        OK(unlink("../g"));
        OK(rename("../d", "../dd"));
        make("../made");
    }
    CASE("excluded-link")
    {
        OK(symlink("../f", "ex/l"));
        OK(truncate("ex/l", 5));
        OK(symlink("../d", "ex/dir"));
        OK(unlink("ex/dir/f"));
        OK(chmod("ex/../g", 0600));
    }
    CASE("proc-cwd")
    {
        empty("/proc/self/cwd/f");
        OK(unlink("/proc/self/cwd/g"));
        make("/proc/self/cwd/new");
        snprintf(path, sizeof path, "/proc/self/root%s/d/f", cwd);
        OK(truncate(path, 5));
        snprintf(path, sizeof path, "/dev/..%s/d2/f", cwd);
        OK(unlink(path));
    }
    CASE("proc-directory")
    {
        OK(truncate(through("/proc/self/fd", d, "/f"), 5));
        make(through("/proc/self/fd", d, "/new"));
        OK(unlink(through("/dev/fd", d, "/g")));
        OK(mkdir(through("/dev/fd", d, "/m"), 0755));
    }
    CASE("proc-removed")
    {
        OK(unlink("f"));
        OK(truncate(through("/proc/self/fd", f, ""), 0));
        OK(chmod(through("/proc/self/fd", f, ""), 0600));
    }
    CASE("proc-removed-cut")
    {
        OK(unlink("f"));
        empty(through("/proc/self/fd", f, ""));
        CHECK_EQ(write(f, "new", 3), 3);
    }
    CASE("proc-other-name")
    {
        OK(unlink("g"));
        make("g");
        OK(chmod(through("/proc/self/fd", g, ""), 0600));
        OK(truncate(through("/proc/self/fd", g, ""), 50));
    }
    CASE("proc-linked-again")
    {
        OK(unlink("f"));
        OK(linkat(AT_FDCWD, through("/proc/self/fd", f, ""), AT_FDCWD, "f", AT_SYMLINK_FOLLOW));
        CHECK_EQ(write(f, "ZZZZ", 4), 4);
        OK(ftruncate(f, 99));
    }
    CASE("link-turned")
    {
        OK(symlink("d", "cur"));
        OK(truncate("cur/g", 5));
        OK(unlink("cur/f"));
        make("cur/new");
        OK(symlink("d2", "tmp"));
        OK(rename("tmp", "cur"));
        OK(truncate("cur/f", 6));
        make("cur/new");
        OK(unlink("cur"));
    }
    CASE("old-link-turned")
    {
        OK(truncate("old/f", 5));
        make("old/new");
        OK(unlink("old"));
        OK(symlink("d2", "old"));
        OK(chmod("old/f", 0600));
        make("old/new");
    }
    CASE("directory-gone")
    {
        OK(mkdir("b", 0755));
        OK(truncate("b/../f", 5));
        OK(unlink("b/../g"));
        OK(chdir("b"));
        OK(rmdir("../b"));
        empty("../second");
        OK(chmod("../f", 0600));
    }
    CASE("moved-out-and-written")
    {
        OK(rename("f", "ex/f"));
        modify("ex/f");
        OK(rename("ex/f", "ex/f.1"));
        OK(chmod("ex/f.1", 0600));
    }
    CASE("moved-out-and-removed")
    {
        OK(rename("f", "ex/f"));
        modify("ex/f");
        OK(rename("d/f", "ex/f"));
        OK(unlink("ex/f"));
    }
    CASE("linked-out-and-written")
    {
        OK(link("f", "ex/f"));
        modify("ex/f");
        OK(truncate("ex/f", 5));
        OK(unlink("f"));
    }
    CASE("moved-in")
    {
        OK(rename("ex/have", "g"));
        modify("g");
        make("ex/new");
        OK(rename("ex/new", "d/f"));
        OK(rename("ex", "ex2"));
    }
    CASE("made-again")
    {
        made_again();
    }
    CASE("exchanged")
    {
        OK(syscall(SYS_renameat2, AT_FDCWD, "f", AT_FDCWD, "ex/have", 2 /* RENAME_EXCHANGE */));
        modify("f");
        modify("ex/have");
    }
    CASE("root")
    {
        in_root(r, "m", O_CREAT | O_WRONLY);
        in_root(r, "/../new", O_CREAT | O_WRONLY);
        in_root(r, "l", O_TRUNC | O_WRONLY);
        in_root(r, "../../real", O_TRUNC | O_WRONLY);
    }
    CASE("odd-names")
    {
        modify("f (deleted)");
        OK(chmod("f (deleted)", 0600));
        OK(rename("f (deleted)", "h"));
    }
    CASE("called-mem")
    {
        empty("mem");
    }
    CASE("odd-mapped")
    {
        maps[0][1] = maps[1][1] = 'Z';
    }
    CASE("view-removed")
    {
        OK(unlink("f"));
        OK(mprotect(views[0], SIZE, PROT_READ | PROT_WRITE));
        views[0][5] = views[0][8999] = 'Z';
    }
    CASE("view-called-so")
    {
        OK(mprotect(views[1], SIZE, PROT_READ | PROT_WRITE));
        views[1][5] = views[1][8999] = 'Z';
    }
    CASE("view-moved-out")
    {
        OK(rename("f", "ex/f"));
        OK(mprotect(views[0], SIZE, PROT_READ | PROT_WRITE));
        views[0][5] = views[0][8999] = 'Z';
    }
    CASE("slash")
    {
        /* The kernel refuses these names, which are there. */
        OK(symlink("nowhere", "new"));
        CHECK(mkdir("gone/", 0755) == -1 && errno == EEXIST);
        CHECK(symlink("x", "gone/") == -1 && mknod("gone/", S_IFIFO | 0600, 0) == -1 && link("f", "gone/") == -1);
    }
    CASE("here")
    {
        OK(chdir("d"));
        OK(syscall(452 /* fchmodat2 */, AT_FDCWD, "", 0700, AT_EMPTY_PATH));
    }
    CASE("rule-later")
    {
        OK(rename("f", "ex/f"));
        OK(ckpt_exclude("/not/there/*"));
        modify("ex/f");
        OK(chmod("ex/f", 0600));
    }
    CASE("rule-half-way")
    {
        CHECK_EQ(pwrite(f, "ZZZZ", 4, 0), 4);
        snprintf(path, sizeof path, "%s/f", cwd);
        OK(ckpt_exclude(path));
        CHECK_EQ(pwrite(f, "ZZZZ", 4, 8500), 4);
        empty("f");
    }
    CASE("excluded-left")
    {
        modify("ex/have");
        modify("f");
    }
    CASE("born-moved-out")
    {
        OK(mkdir("born", 0755));
        OK(rename("f", "born/f"));
        OK(rename("born", "ex/born"));
        modify("ex/born/f");
    }
    CASE("archived")
    {
        OK(rename("f", "ex/f"));
        CHECK(ckpt_checkpoint(0) == 0);
        modify("ex/f");
    }
    CASE("touched-moved-out")
    {
        make("d/new");
        OK(rename("d", "ex/d"));
        modify("ex/d/f");
    }
    CASE("inside-moved-out")
    {
        OK(mkdir("born", 0755));
        OK(rename("d", "born/d"));
        OK(rename("born", "ex/born"));
        modify("ex/born/d/f");
    }
    CASE("contents-excluded")
    {
        OK(rename("d2", "out"));
        modify("out/f");
    }
    CASE("directory-moved-out")
    {
        OK(rename("d", "ex/d"));
        modify("ex/d/f");
    }
    else FAIL("no such case");
    kill(getpid(), SIGKILL);
}
