/*
 * Calls that modify files in less usual ways: RWF_NOAPPEND, names made by bind, attributes by
 * setxattrat, files opened by handle and cut off, fallocate's ioctl requests, mappings that grow,
 * whiteouts, what the kernel changes along with a call (capabilities, set-user-ID, inherited access lists), and
 * calls on attributes that fail. As in files_routes.c: `setup` makes the files, `go` makes them, takes a checkpoint,
 * modifies and dies by SIGKILL; resumed, it ends with 73. What a file system or this user cannot do is left
 * out. `aio` and `uring`: made after the checkpoint.
 */
#define _GNU_SOURCE
#include "ckpt.h"
#include <fcntl.h>
#include <linux/falloc.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/xattr.h>
#include <unistd.h>

#pragma GCC diagnostic ignored "-Wunused-result"

#define TRY(x) try(__LINE__, #x, (long)(x))

static void try(int line, const char *what, long result)
{
    if (result == -1)
        fprintf(stderr, "%d: %s: %m\n", line, what);
}

enum { SIZE = 40000, FILES = 24 };
static char content[SIZE];

static const char *file(int n)
{
    static char names[8][16];
    static int next;
    char *name = names[next++ % 8];
    snprintf(name, 16, "f%02d", n);
    return name;
}

/* A capability set of version 2: cap_net_bind_service. */
static const unsigned char capability[20] = {1, 0, 0, 2, 0, 4};

struct entry {
    uint16_t tag, permissions;
    uint32_t id;
};
struct list {
    uint32_t version;
    struct entry entries[5];
};
static const struct list access_list = {
    2, {{1, 7, ~0u}, {2, 7, 1}, {4, 5, ~0u}, {0x10, 7, ~0u}, {0x20, 0, ~0u}}};

static void setup(void)
{
    memset(content, 'B', SIZE);
    for (int i = 0; i < FILES; i++) {
        int fd = open(file(i), O_RDWR | O_CREAT | O_TRUNC, 0644);
        if (write(fd, content, SIZE) != SIZE)
            exit(1);
        fsetxattr(fd, "user.ckpt", "old", 3, 0);
        if (i >= 8 && i <= 10)
            fsetxattr(fd, "security.capability", capability, sizeof capability, 0);
        if (i == 11)
            fchmod(fd, 04755);
        close(fd);
    }
    mkdir("handed", 0755), mkdir("handed/down", 0755), symlink("f00", "link"), mkfifo("fifo", 0644);
    setxattr("handed", "system.posix_acl_default", &access_list, sizeof access_list, 0);
    const struct timespec times[2] = {{1000000000, 5}, {1000000000, 7}};
    for (int i = 0; i < FILES; i++)
        utimensat(AT_FDCWD, file(i), times, 0);
    utimensat(AT_FDCWD, "link", times, AT_SYMLINK_NOFOLLOW), utimensat(AT_FDCWD, "fifo", times, 0);
    utimensat(AT_FDCWD, "handed/down", times, 0), utimensat(AT_FDCWD, "handed", times, 0);
    utimensat(AT_FDCWD, ".", times, 0);
}

static void at_offset(int fd)
{
    struct iovec two[2] = {{"zz", 2}, {"yy", 2}};
    TRY(syscall(SYS_pwritev2, fd, two, 2, 100, 0, 0x20));
    TRY(write(fd, "appended", 8));
    TRY(syscall(SYS_pwritev2, fd, two, 2, 9000, 0, 0x20));
}

static void names(void)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = "sock"};
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    TRY(bind(s, (struct sockaddr *)&name, offsetof(struct sockaddr_un, sun_path) + 4));
    TRY(rmdir("handed/down"));
}

/* What is left of a file by a whiteout is an inode that nobody has made by name: moved on, changed,
 * exchanged with another. */
static void whiteouts(void)
{
    TRY(renameat2(AT_FDCWD, file(20), AT_FDCWD, "away", RENAME_WHITEOUT));
    TRY(lchown(file(20), -1, getgid()));
    TRY(renameat2(AT_FDCWD, file(20), AT_FDCWD, file(21), RENAME_EXCHANGE));
    TRY(lchown(file(21), -1, getgid()));
    TRY(renameat2(AT_FDCWD, file(22), AT_FDCWD, file(23), RENAME_WHITEOUT));
    TRY(unlink(file(22)));
}

static void handles(void)
{
    struct {
        struct file_handle handle;
        char room[128];
    } place = {.handle.handle_bytes = 128};
    int mount, dir = open(".", O_RDONLY);
    if (name_to_handle_at(AT_FDCWD, file(1), &place.handle, &mount, 0))
        return perror("name_to_handle_at");
    int fd = open_by_handle_at(dir, &place.handle, O_RDWR | O_TRUNC);
    TRY(fd), TRY(write(fd, "new", 3)), close(fd), close(dir);
}

static void xattrs(void)
{
    struct {
        uint64_t value;
        uint32_t size, flags;
    } arguments = {(uint64_t)"new", 3, 0};
    TRY(syscall(463, AT_FDCWD, file(2), 0, "user.ckpt", &arguments, sizeof arguments));
    TRY(syscall(466, AT_FDCWD, file(3), 0, "user.ckpt"));
    /* These fail. */
    TRY(lsetxattr("link", "user.ckpt", "x", 1, 0)), TRY(setxattr("fifo", "user.ckpt", "x", 1, 0));
    TRY(setxattr(file(12), "user.ckpt", "x", 1, XATTR_CREATE)), TRY(removexattr(file(12), "user.none"));
}

static void space(void)
{
    struct {
        short type, whence;
        long start, len;
        long rest[3];
    } range = {0, 0, 4096, 8192, {0}};
    const unsigned long requests[] = {0x4030582b, 0x40305839, 0x4030582a};
    for (int i = 0; i < 3; i++) {
        int fd = open(file(4 + i), O_RDWR);
        range.len = i == 2 ? 90000 : 8192;
        TRY(ioctl(fd, requests[i], &range)), close(fd);
    }
    int fd = open(file(7), O_RDWR);
    TRY(fallocate(fd, 0x80, 4096, 8192)), close(fd);
}

static void along(void)
{
    int fd = open(file(8), O_RDWR);
    TRY(write(fd, "x", 1)), close(fd);
    TRY(chown(file(9), 5, 5)), TRY(truncate(file(10), 5));
    fd = open(file(11), O_RDWR);
    TRY(fallocate(fd, FALLOC_FL_KEEP_SIZE, 60000, 4096)), close(fd);
}

static void *map(int n, size_t len)
{
    int fd = open(file(n), O_RDWR);
    void *at = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return at;
}

static void mappings(void *before)
{
    char *at = mremap(before, 4096, 4 * 4096, MREMAP_MAYMOVE);
    memset(at + 8192, 'Z', 4096);
    at = mremap(map(14, 4096), 4096, 4 * 4096, MREMAP_MAYMOVE);
    memset(at + 8192, 'Z', 4096);
    at = map(15, 8192);
    TRY(remap_file_pages(at, 4096, 0, 5, 0));
    memset(at, 'Z', 4096);
}

int main(int argc, char **argv)
{
    setup();
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "setup") || !*what)
        return 0;
    int append = open(file(0), O_RDWR | O_APPEND);
    void *before = map(13, 4096);
    if (ckpt_checkpoint(0) > 0)
        return 73;
    unsigned long context = 0, parameters[15] = {0};
    if (!strcmp(what, "aio"))
        TRY(syscall(SYS_io_setup, 8, &context));
    else if (!strcmp(what, "uring"))
        TRY(syscall(SYS_io_uring_setup, 4, parameters));
    else
        at_offset(append), names(), whiteouts(), handles(), xattrs(), space(), along(), mappings(before);
    kill(getpid(), SIGKILL);
}
