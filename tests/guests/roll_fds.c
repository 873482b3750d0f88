/* Rollback and descriptors that cannot be made again: a connection to another process, a
 * listener, a pipe and a terminal from outside stay; pipes and sockets of its own get
 * their contents back; numbers, flags, positions, locks as they were. */
#include "guest.h"

#include "ckpt.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>

/* The other end of everything: another process, not a child by the time of the
 * checkpoint. It answers each byte with the next one, and a connection with '!'. */
static pid_t outside(int echo, int read_end, int port_to)
{
    int gone[2];
    CHECK(pipe(gone) == 0);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        if (fork() > 0)
            _exit(0);
        setsid();
        close(gone[0]);
        close(gone[1]);
        for (;;) {
            struct pollfd fds[] = {{echo, POLLIN, 0}, {read_end, POLLIN, 0}};
            unsigned char c;
            if (poll(fds, 2, 20000) <= 0)
                _exit(0);
            if (fds[0].revents) {
                if (read(echo, &c, 1) != 1)
                    _exit(0);
                c++;
                if (write(echo, &c, 1) != 1)
                    _exit(1);
                if (c == 'P' + 1) { /* connect */
                    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = port_to};
                    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
                    int fd = socket(AF_INET, SOCK_STREAM, 0);
                    if (connect(fd, (struct sockaddr *)&to, sizeof to) || write(fd, "!", 1) != 1)
                        _exit(1);
                    close(fd);
                }
            }
            if (fds[1].revents & POLLIN) {
                if (read(read_end, &c, 1) != 1)
                    _exit(0);
            }
        }
    }
    close(gone[0]);
    close(gone[1]);
    CHECK_EQ(waitpid(pid, NULL, 0), pid);
    return pid;
}

static void echo(int fd, unsigned char c)
{
    unsigned char answer;
    CHECK_EQ(write(fd, &c, 1), 1);
    CHECK_EQ(read(fd, &answer, 1), 1);
    CHECK_EQ(answer, c + 1);
}

int main(void)
{
    guest_begin();
    volatile int back = 0;
    int pair[2], out[2], own[2], inner[2];
    struct sockaddr_in any = {.sin_family = AF_INET};
    any.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t len = sizeof any;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(bind(listener, (struct sockaddr *)&any, sizeof any) == 0);
    CHECK(listen(listener, 5) == 0);
    CHECK(getsockname(listener, (struct sockaddr *)&any, &len) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK(pipe(out) == 0);
    outside(pair[1], out[0], any.sin_port);
    close(pair[1]);
    close(out[0]);
    CHECK(pipe(own) == 0 && socketpair(AF_UNIX, SOCK_SEQPACKET, 0, inner) == 0);
    CHECK_EQ(write(own[1], "abc", 3), 3);
    CHECK_EQ(send(inner[0], "packet", 6, 0), 6);
    int event = eventfd(5, EFD_NONBLOCK), timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    int locked = open("locked", O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    CHECK(locked >= 0 && flock(locked, LOCK_EX) == 0);
    int epoll = epoll_create1(0);
    struct epoll_event watch = {.events = EPOLLIN, .data.u64 = 42};
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, own[0], &watch) == 0);
    watch.data.u64 = 43;
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, pair[0], &watch) == 0);
    echo(pair[0], 'a');
    int result = ckpt_checkpoint(4);
    if (result < 0)
        FAIL("ckpt_checkpoint: errno %d", errno);
    CHECK_EQ(result, back);
    char text[16];
    echo(pair[0], 'b'); /* the very same connection */
    echo(pair[0], 'P');
    int answered = accept(listener, NULL, NULL);
    CHECK(answered >= 0);
    CHECK_EQ(read(answered, text, 1), 1);
    CHECK_EQ(text[0], '!');
    close(answered);
    CHECK_EQ(write(out[1], "y", 1), 1);
    struct epoll_event ready[4];
    CHECK_EQ(epoll_wait(epoll, ready, 4, 0), 1);
    CHECK_EQ(ready[0].data.u64, 42);
    CHECK_EQ(read(own[0], text, 2), 2);
    CHECK(memcmp(text, "ab", 2) == 0);
    CHECK_EQ(recv(inner[1], text, sizeof text, 0), 6);
    uint64_t count;
    CHECK_EQ(read(event, &count, 8), 8);
    CHECK_EQ(count, 5);
    int other = open("locked", O_RDWR | O_CLOEXEC);
    CHECK_EQ(flock(other, LOCK_EX | LOCK_NB), -1);
    CHECK_EQ(fcntl(pair[0], F_GETFL) & O_NONBLOCK, 0);
    CHECK_EQ(fcntl(99, F_GETFD), -1);
    if (back < 3) {
        back++;
        int flags = fcntl(pair[0], F_GETFL);
        CHECK(fcntl(pair[0], F_SETFL, flags | O_NONBLOCK) == 0);
        CHECK(flock(locked, LOCK_UN) == 0 && flock(other, LOCK_EX) == 0);
        if (back == 2) {
            /* Moved to another number. */
            CHECK_EQ(dup2(pair[0], 99), 99);
            close(pair[0]);
            CHECK_EQ(dup2(listener, 98), 98);
            close(listener);
            CHECK_EQ(dup2(own[0], 1), 1); /* standard output is elsewhere: */
        }
        close(epoll);
        close(own[1]);
        struct ckpt_region keep = {(void *)&back, sizeof back};
        ckpt_rollback(4, back, &keep, 1);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    (void)timer;
    dprintf(2, "%d times\n", back);
    guest_end();
}
