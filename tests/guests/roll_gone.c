/* What a rollback would have to make again and cannot, because somebody else has been at work
 * since the checkpoint: the working directory is gone, a FIFO, a directory that inotify watches,
 * the name of a listener is taken, ckpt_redirect names another kind of file. Each is found before
 * anything is touched: EIO, and the program goes on. With what was in the way gone, it goes back. */
#include "guest.h"

#include "ckpt.h"
#include <netinet/in.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

static volatile long global = 1;

/* In a process that the library is not in: its changes are somebody else's. */
static void outside(const char *command)
{
    char *argv[] = {"sh", "-c", (char *)command, NULL}, *envp[] = {"PATH=/usr/bin:/bin", NULL};
    pid_t child = vfork();
    CHECK(child >= 0);
    if (child == 0) {
        execve("/bin/sh", argv, envp);
        _exit(127);
    }
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
}

static void refused(int id)
{
    global = 2;
    errno = 0;
    CHECK_EQ(ckpt_rollback(id, 1, NULL, 0), -1);
    CHECK_EQ(errno, EIO);
    CHECK_EQ(global, 2);
}

static void goes_back(int id)
{
    ckpt_rollback(id, 1, NULL, 0);
    FAIL("ckpt_rollback(%d): errno %d", id, errno);
}

static void directory(void)
{
    CHECK(mkdir("work", 0755) == 0 && chdir("work") == 0);
    if (ckpt_checkpoint(1) == 0) {
        CHECK(chdir("..") == 0);
        outside("mv work aside");
        refused(1);
        outside("mv aside work");
        goes_back(1);
    }
    CHECK(access("../work", X_OK) == 0 && chdir("..") == 0);
    /* Removed by the program itself it comes back. */
    CHECK(chdir("work") == 0);
    if (ckpt_checkpoint(1) == 0) {
        CHECK(chdir("..") == 0 && rmdir("work") == 0);
        goes_back(1);
    }
    CHECK(chdir("..") == 0 && access("work", X_OK) == 0);
}

static void fifo(void)
{
    CHECK(mkfifo("fifo", 0644) == 0);
    int fd = open("fifo", O_RDWR | O_CLOEXEC);
    CHECK_EQ(write(fd, "x", 1), 1);
    if (ckpt_checkpoint(2) == 0) {
        close(fd);
        outside("mv fifo aside");
        refused(2);
        outside("mv aside fifo");
        goes_back(2);
    }
    char byte = 0;
    CHECK_EQ(read(fd, &byte, 1), 1);
    CHECK_EQ(byte, 'x');
    close(fd);
}

static void watch(void)
{
    CHECK(mkdir("watched", 0755) == 0);
    int fd = inotify_init1(IN_CLOEXEC);
    CHECK_EQ(inotify_add_watch(fd, "watched", IN_CREATE), 1);
    if (ckpt_checkpoint(3) == 0) {
        close(fd);
        outside("mv watched aside");
        refused(3);
        outside("mv aside watched");
        goes_back(3);
    }
    close(fd);
}

static int listener(const void *address, socklen_t len, int family)
{
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    CHECK(fd >= 0);
    CHECK(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0);
    if (bind(fd, address, len) != 0 || listen(fd, 5) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* A child that holds the address until its end of the pipe is closed would be a live child: its
 * own child has the address, and is nobody's. */
static int taken(const void *address, socklen_t len, int family)
{
    int hold[2], ready[2];
    CHECK(pipe(hold) == 0 && pipe(ready) == 0);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        if (fork() == 0) {
            char byte;
            close(hold[1]);
            setsid();
            if (listener(address, len, family) < 0 || write(ready[1], "", 1) != 1)
                _exit(1);
            close(ready[1]);
            _exit(read(hold[0], &byte, 1) != 0);
        }
        _exit(0);
    }
    CHECK_EQ(waitpid(child, NULL, 0), child);
    close(ready[1]);
    char byte;
    CHECK_EQ(read(ready[0], &byte, 1), 1);
    close(ready[0]);
    close(hold[0]);
    return hold[1];
}

static void sockets(void)
{
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof in;
    int fd = listener(&in, sizeof in, AF_INET);
    CHECK(fd >= 0 && getsockname(fd, (void *)&in, &len) == 0);
    volatile int back = ckpt_checkpoint(4);
    if (!back) {
        close(fd);
        int hold = taken(&in, sizeof in, AF_INET);
        refused(4);
        close(hold);
        /* Until the other process has ended. */
        int again;
        while ((again = listener(&in, sizeof in, AF_INET)) < 0)
            guest_sleep_ms(10);
        /* Its own is no obstacle: it is closed first. */
        goes_back(4);
    }
    CHECK(fcntl(fd, F_GETFD) >= 0);
    close(fd);

    struct sockaddr_un un = {.sun_family = AF_UNIX};
    CHECK(getcwd(un.sun_path, sizeof un.sun_path - 8) != NULL);
    strcat(un.sun_path, "/socket");
    fd = listener(&un, sizeof un, AF_UNIX);
    CHECK(fd >= 0);
    back = ckpt_checkpoint(5);
    if (!back) {
        close(fd);
        outside("rm socket; mkdir socket");
        refused(5);
        outside("rmdir socket");
        goes_back(5);
    }
    struct stat st;
    CHECK(stat("socket", &st) == 0 && S_ISSOCK(st.st_mode));
    close(fd);
}

static void redirects(void)
{
    int file = open("input", O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    CHECK_EQ(write(file, "input", 5), 5);
    CHECK(mkfifo("other", 0644) == 0);
    int result = ckpt_checkpoint(6);
    if (result == 0) {
        CHECK(ckpt_redirect("input", "/dev/null") == 0);
        refused(6);
        CHECK(ckpt_redirect("input", "other") == 0);
        refused(6);
        outside("echo another input >new");
        CHECK(ckpt_redirect("input", "new") == 0);
        goes_back(6);
    }
    char text[16] = "";
    CHECK_EQ(pread(file, text, 7, 0), 7);
    CHECK(strcmp(text, "another") == 0);
}

int main(void)
{
    guest_begin();
    directory();
    fifo();
    watch();
    sockets();
    redirects();
    printf("gone ok\n");
    guest_end();
}
