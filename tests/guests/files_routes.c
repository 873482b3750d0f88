/*
 * Every way to modify a file, a name or an attribute, by every route: libc's functions, their
 * checked forms, syscall(2), stdio. `setup` makes the files and ends; `go` makes the same files,
 * takes a checkpoint, modifies all of them and dies by SIGKILL; resumed, it ends with 73.
 * What a file system cannot do is left out (one line on standard error).
 */
#define _GNU_SOURCE
#define _FORTIFY_SOURCE 2
#include "ckpt.h"
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>
#include <utime.h>

#pragma GCC diagnostic ignored "-Wunused-result"
#pragma GCC diagnostic ignored "-Wnonnull"

#define TRY(x) try(__LINE__, #x, (long)(x))
#define RAW(name, ...) syscall(SYS_##name, __VA_ARGS__)

static void try(int line, const char *what, long result)
{
    if (result == -1)
        fprintf(stderr, "%d: %s: %m\n", line, what);
}

enum { SIZE = 20000, FILES = 90 };
static char content[SIZE];
static volatile int rdwr = O_RDWR, cut = O_WRONLY | O_TRUNC; /* not known to the compiler */

static const char *file(int n)
{
    static char names[8][16];
    static int next;
    char *name = names[next++ % 8];
    snprintf(name, 16, "f%02d", n);
    return name;
}

static int get(int n)
{
    int fd = open(file(n), rdwr); /* __open_2 */
    if (fd < 0)
        perror(file(n));
    return fd;
}

static void setup(void)
{
    memset(content, 'B', SIZE);
    for (int i = 0; i < FILES; i++) {
        int fd = open(file(i), O_WRONLY | O_CREAT | O_TRUNC, 0644);
        TRY(write(fd, content, SIZE - i));
        close(fd);
    }
    for (int i = 0; i < 9; i++) {
        char name[8];
        snprintf(name, 8, "d%d", i);
        TRY(mkdir(name, 0755));
    }
    int fd = creat("d0/in", 0600);
    close(fd);
    TRY(symlink("hole", "dangling"));
    TRY(symlink("dangling", "twice"));
    TRY(symlink("f80", "s0"));
    TRY(symlink("f81", "s1"));
    TRY(link("f82", "hard"));
    struct timespec times[2] = {{1000000000, 0}, {1000000001, 5}};
    DIR *dir = opendir(".");
    for (struct dirent *e; (e = readdir(dir));)
        if (strncmp(e->d_name, "std", 3) && strcmp(e->d_name, ".."))
            utimensat(AT_FDCWD, e->d_name, times, AT_SYMLINK_NOFOLLOW);
    closedir(dir);
    utimensat(AT_FDCWD, "d0/in", times, 0);
    utimensat(AT_FDCWD, ".", times, 0);
}

static void contents(int append, FILE *stream)
{
    int fd, n = 10, pipes[2];
    struct iovec v[2] = {{"ab", 2}, {"cd", 2}};
    off_t from = 0, to = 8000;
    TRY(write(append, "more", 4));
    fprintf(stream, "printed %d\n", 7);
    fflush(stream);
    fd = get(n++), TRY(pwrite(fd, "zz", 2, 5000)), TRY(pwrite(fd, "q", 1, 30000)), close(fd);
    fd = get(n++), TRY(RAW(pwrite64, fd, "zz", 2, 4095)), close(fd);
    fd = get(n++), lseek(fd, 100, SEEK_SET), TRY(writev(fd, v, 2)), close(fd);
    fd = get(n++), TRY(RAW(writev, fd, v, 2)), close(fd);
    fd = get(n++), TRY(pwritev(fd, v, 2, 4094)), close(fd);
    fd = get(n++), TRY(pwritev2(fd, v, 2, 9000, 0)), close(fd);
    fd = get(n++), TRY(pwritev2(fd, v, 2, 0, RWF_APPEND)), close(fd);
    fd = get(n++), TRY(pwritev2(fd, v, 2, -1, 0)), close(fd);
    fd = get(n++), TRY(RAW(write, fd, "raw", 3)), close(fd);
    fd = get(n++), TRY(ftruncate(fd, 777)), TRY(ftruncate(fd, 40000)), close(fd);
    TRY(truncate(file(n++), 10));
    TRY(RAW(truncate, file(n++), 0));
    fd = open(file(n++), cut), TRY(write(fd, "short", 5)), close(fd);
    fd = creat(file(n++), 0600), TRY(write(fd, "short", 5)), close(fd);
    fd = RAW(openat, AT_FDCWD, file(n++), O_RDONLY | O_TRUNC), close(fd);
    fd = RAW(open, file(n++), O_WRONLY | O_TRUNC), close(fd);
    unsigned long long how[3] = {O_WRONLY | O_TRUNC, 0, 0};
    fd = RAW(openat2, AT_FDCWD, file(n++), how, sizeof how), close(fd);
    fd = get(n++), TRY(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4000, 5000)), close(fd);
    fd = get(n++), TRY(fallocate(fd, FALLOC_FL_ZERO_RANGE, 4000, 50000)), close(fd);
    fd = get(n++), TRY(fallocate(fd, FALLOC_FL_COLLAPSE_RANGE, 4096, 4096)), close(fd);
    fd = get(n++), TRY(fallocate(fd, FALLOC_FL_INSERT_RANGE, 4096, 4096)), close(fd);
    fd = get(n++), TRY(posix_fallocate(fd, 0, 50000)), close(fd);
    int in = open(file(0), O_RDONLY);
    fd = get(n++), lseek(fd, 50, SEEK_SET), TRY(sendfile(fd, in, 0, 3000)), TRY(write(fd, "x", 1)), close(fd);
    fd = get(n++), TRY(copy_file_range(in, &from, fd, &to, 5000, 0)), TRY(ftruncate(fd, 19000)), close(fd);
    TRY(pipe(pipes)), TRY(write(pipes[1], "PIPEDATA", 8)), to = 4;
    fd = get(n++), TRY(splice(pipes[0], 0, fd, &to, 8, 0)), close(fd);
    fd = get(n++), TRY(dup2(fd, 200)), close(fd), TRY(write(200, "dup", 3)), close(200);
    fd = open(file(n++), O_WRONLY | O_APPEND), TRY(write(fd, "a", 1)), TRY(pwrite(fd, "b", 1, 0)), close(fd);
    /* Forward of the old end, then back into it. */
    fd = get(n++), lseek(fd, 0, SEEK_END);
    for (int i = 0; i < 9; i++)
        TRY(write(fd, "append", 6));
    lseek(fd, 10, SEEK_SET), TRY(write(fd, "back", 4)), close(fd);
    FILE *f = fopen(file(n++), "r+");
    fseek(f, 12000, SEEK_SET), fputs("hello", f), fclose(f);
    f = fopen(file(n++), "a"), fputs("hello", f), fclose(f);
    f = fopen(file(n++), "w"), fputs("hello", f), fclose(f);
    f = freopen(file(n++), "a+", fopen("/dev/null", "r")), fputs("hello", f), fclose(f);
    f = fdopen(get(n++), "w"), fwrite("hello", 1, 5, f), fclose(f);
    f = fopen(file(n++), "w"), setvbuf(f, 0, _IONBF, 0), dprintf(fileno(f), "%d", 5), fclose(f);
    close(in), close(pipes[0]), close(pipes[1]);
    if (n > 55)
        abort();
}

static void attributes(void)
{
    int n = 55, fd;
    struct utimbuf old = {1, 2};
    struct timeval tv[2] = {{5, 6}, {7, 8}};
    struct timespec ts[2] = {{5, 6}, {7, 8}};
    TRY(chmod(file(n++), 0600));
    fd = get(n++), TRY(fchmod(fd, 0611)), close(fd);
    TRY(fchmodat(AT_FDCWD, file(n++), 0622, 0));
    TRY(RAW(fchmodat, AT_FDCWD, file(n++), 0622));
    if (!geteuid()) {
        TRY(chown(file(n++), 1, 1));
        fd = get(n++), TRY(fchown(fd, 1, -1)), close(fd);
        TRY(lchown("s1", 1, 1));
        TRY(fchownat(AT_FDCWD, file(n++), -1, 1, 0));
    }
    n = 63;
    TRY(utime(file(n++), &old));
    TRY(utimes(file(n++), tv));
    TRY(utimensat(AT_FDCWD, file(n++), ts, 0));
    fd = get(n++), TRY(futimens(fd, ts)), close(fd);
    TRY(futimesat(AT_FDCWD, file(n++), tv));
    TRY(RAW(utimes, file(n++), tv));
    TRY(setxattr(file(n++), "user.ckpt", "b", 1, 0));
    fd = get(n++), TRY(fsetxattr(fd, "user.ckpt", "b", 1, 0)), close(fd);
    TRY(chmod("d8", 0700));
}

static void names(void)
{
    int fd, here = open(".", O_RDONLY | O_DIRECTORY);
    TRY(rename(file(71), file(72)));
    TRY(renameat(here, file(73), here, "renamed"));
    TRY(renameat2(here, file(74), here, file(75), RENAME_EXCHANGE));
    TRY(renameat2(here, file(76), here, "noreplace", RENAME_NOREPLACE));
    TRY(RAW(rename, file(77), "d1/moved"));
    TRY(unlink(file(78)));
    TRY(unlinkat(here, file(79), 0));
    TRY(unlink("f80")), TRY(unlink("s0"));
    TRY(remove("f81")), TRY(remove("d2"));
    fd = open("hard", O_WRONLY), TRY(write(fd, "by the other name", 17)), close(fd);
    TRY(unlink("f82"));
    TRY(rmdir("d3"));
    TRY(unlinkat(here, "d4/", AT_REMOVEDIR));
    TRY(rename("d0", "d5/deep")), TRY(unlink("d5/deep/in")), TRY(rename("d5", "d6"));
    fd = creat("d6/deep/born", 0644), TRY(write(fd, "x", 1)), close(fd);
    TRY(mkdir("new/", 0755)), TRY(mkdirat(here, "new/er", 0755));
    TRY(symlink("anything", "new/link")), TRY(symlinkat("x", here, "newlink"));
    TRY(link(file(83), "newhard")), TRY(linkat(here, file(84), here, "newhard2", 0));
    TRY(mkfifo("fifo", 0600)), TRY(mknod("node", S_IFREG | 0600, 0));
    fd = open("twice", O_WRONLY | O_CREAT, 0600), TRY(write(fd, "made", 4)), close(fd);
    FILE *f = fopen("newfile", "w");
    fputs("x", f), fclose(f);
    char temporary[] = "tempXXXXXX";
    fd = mkstemp(temporary), TRY(write(fd, "x", 1)), close(fd);
    TRY(chdir("d7"));
    fd = open("../d7/./made", O_WRONLY | O_CREAT, 0600), close(fd);
    TRY(rename("made", "../made")), TRY(rename("../f85", "inside"));
    TRY(chdir(".."));
    fd = open(".", O_TMPFILE | O_RDWR, 0600);
    if (fd >= 0) {
        char path[32];
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        TRY(write(fd, "x", 1));
        TRY(linkat(AT_FDCWD, path, AT_FDCWD, "unnamed", AT_SYMLINK_FOLLOW)), close(fd);
    }
    /* What fails leaves nothing. */
    unlink("not there"), rmdir("d6"), mkdir("d1", 0700), rename("no", "f86"), open("no/no", O_CREAT, 0600);
    unlink((char *)8), RAW(openat, here, 8, O_CREAT | O_TRUNC, 0), link("f87", "f88"), rename("d1", "d1/x");
    /* Nor does it take back what was told of the name before: out of what is left alone, over the border. */
    TRY(unlink("f89"));
    if (rename("/dev/null", "f89") == 0)
        abort();
    close(here);
}

/* Blocks, names and inode numbers that are modified more than once: what is known of them from the
 * first time must not hide what is new the next time. */
static void again(void)
{
    int fd = get(3);
    for (int i = 0; i < 3; i++) {
        TRY(pwrite(fd, "zz", 2, 4095)), TRY(pwrite(fd, "in the last block", 17, 19000));
        TRY(pwrite(fd, content, 4096, 8192)), TRY(pwrite(fd, content, 4096, 10000));
    }
    TRY(pwrite(fd, "over the end", 12, SIZE - 3 - 4)), TRY(pwrite(fd, "behind it", 9, SIZE - 3 + 8)), close(fd);
    fd = get(4);
    for (int i = 0; i < 2; i++)
        for (int block = 0; block < 5; block++)
            TRY(pwrite(fd, content, 2000, block * 4096 + i));
    TRY(pwrite(fd, content, 4096, 4 * 4096)), close(fd);
    fd = get(5);
    for (int i = 0; i < 3; i++)
        lseek(fd, 19000, SEEK_SET), TRY(write(fd, content, 100));
    lseek(fd, SIZE - 5, SEEK_SET), TRY(write(fd, "longer", 6)), close(fd);
    for (int i = 0; i < 40; i++) {
        fd = open("again", O_RDWR | O_CREAT | (i % 3 ? 0 : O_EXCL) | (i % 2 ? O_TRUNC : 0), 0644);
        TRY(write(fd, content, 600)), TRY(fchmod(fd, 0600)), TRY(fchown(fd, geteuid(), getegid()));
        TRY(ftruncate(fd, 50)), TRY(fallocate(fd, 0, 0, 9000)), close(fd);
        fd = open("again", cut), TRY(write(fd, "cut", 3)), close(fd);
        TRY(truncate("again", 2)), TRY(chmod("again", 0640)), TRY(utimes("again", 0));
        if (i % 5 == 4)
            TRY(rename("again", file(6)));
        else if (i % 5 == 3)
            TRY(link("again", "d7/other")), TRY(unlink("again")), TRY(unlink("d7/other"));
        else
            TRY(unlink("again"));
    }
    for (int i = 0; i < 2; i++) {
        TRY(unlink(file(7)));
        TRY(symlink("x", file(7))), TRY(unlink(file(7)));
        TRY(mkdir(file(7), 0700)), TRY(rmdir(file(7)));
        fd = creat(file(7), 0600), TRY(write(fd, "x", 1)), close(fd);
    }
    /* A number that a directory had, in which an old file was for a while. */
    TRY(mkdir("d7/born", 0700)), TRY(rename(file(8), "d7/born/old"));
    TRY(rename("d7/born/old", "moved")), TRY(rmdir("d7/born"));
    fd = creat("d7/born", 0600), TRY(write(fd, "x", 1)), close(fd);
}

int main(int argc, char **argv)
{
    setup();
    if (argc < 2 || strcmp(argv[1], "go"))
        return 0;
    int append = open(file(1), O_WRONLY | O_APPEND);
    FILE *stream = fopen(file(2), "r+");
    if (ckpt_checkpoint(0) > 0)
        return 73;
    contents(append, stream);
    attributes();
    again();
    names();
    kill(getpid(), SIGKILL);
}
