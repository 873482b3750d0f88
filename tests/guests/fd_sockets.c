/* Proves: listening sockets (TCP on IPv4 and IPv6, unix by path and abstract), bound UDP
 * and unix datagram sockets with options come back and take new connections; a TCP and a
 * unix connection whose both ends are in the process goes on, bytes in flight included. */
#include "guest.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/un.h>

static int listener(struct sockaddr *at, socklen_t len)
{
    int fd = socket(at->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    CHECK(fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0);
    CHECK(bind(fd, at, len) == 0 && listen(fd, 17) == 0);
    return fd;
}

static int connect_to(int listening)
{
    struct sockaddr_storage at;
    socklen_t len = sizeof at;
    CHECK(getsockname(listening, (struct sockaddr *)&at, &len) == 0);
    int fd = socket(at.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(fd >= 0);
    CHECK(connect(fd, (struct sockaddr *)&at, len) == 0);
    return fd;
}

static void talk(int from, int to, long n)
{
    long got = -1;
    CHECK_EQ(send(from, &n, sizeof n, 0), sizeof n);
    CHECK_EQ(recv(to, &got, sizeof got, MSG_WAITALL), sizeof got);
    CHECK_EQ(got, n);
}

int main(void)
{
    guest_begin();
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    struct sockaddr_un path = {.sun_family = AF_UNIX}, abstract = {.sun_family = AF_UNIX};
    snprintf(path.sun_path, sizeof path.sun_path, "listening");
    int name = snprintf(abstract.sun_path + 1, sizeof abstract.sun_path - 1, "guest-%d-%ld", getpid(), (long)time(NULL));
    unlink("listening");
    int listening[4], n = 0;
    listening[n++] = listener((struct sockaddr *)&v4, sizeof v4);
    listening[n++] = listener((struct sockaddr *)&path, sizeof path);
    listening[n++] = listener((struct sockaddr *)&abstract, sizeof(sa_family_t) + 1 + name);
    int probe = socket(AF_INET6, SOCK_STREAM, 0);
    if (probe >= 0 && bind(probe, (struct sockaddr *)&v6, sizeof v6) == 0)
        listening[n++] = listener((struct sockaddr *)&v6, sizeof v6);
    else
        fprintf(stderr, "no IPv6 on this machine: not tested\n");
    if (probe >= 0)
        close(probe);
    struct sockaddr_storage name_of[4], now;
    socklen_t len[4], l;
    int client[4], server[4];
    for (int i = 0; i < n; i++) {
        len[i] = sizeof name_of[i];
        CHECK(getsockname(listening[i], (struct sockaddr *)&name_of[i], &len[i]) == 0);
        client[i] = connect_to(listening[i]);
        server[i] = accept4(listening[i], NULL, NULL, SOCK_CLOEXEC);
        CHECK(server[i] >= 0);
        long ahead = -1; /* one message always in flight */
        CHECK_EQ(send(client[i], &ahead, sizeof ahead, 0), sizeof ahead);
    }
    int one = 1, size = 70000;
    CHECK(setsockopt(client[0], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) == 0);
    int udp = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    CHECK(udp >= 0 && setsockopt(udp, SOL_SOCKET, SO_RCVBUF, &size, sizeof size) == 0);
    CHECK(setsockopt(udp, SOL_SOCKET, SO_BROADCAST, &one, sizeof one) == 0);
    CHECK(bind(udp, (struct sockaddr *)&v4, sizeof v4) == 0);
    struct sockaddr_in udp_at;
    l = sizeof udp_at;
    CHECK(getsockname(udp, (struct sockaddr *)&udp_at, &l) == 0);
    int plain = socket(AF_INET, SOCK_STREAM, 0); /* neither bound nor connected */
    CHECK(plain >= 0);

    ROUNDS(round)
    {
        for (int i = 0; i < n; i++) {
            l = sizeof now;
            CHECK(getsockname(listening[i], (struct sockaddr *)&now, &l) == 0);
            CHECK(l == len[i] && memcmp(&now, &name_of[i], l) == 0);
            long got;
            CHECK_EQ(send(client[i], &round, sizeof round, 0), sizeof round);
            CHECK_EQ(recv(server[i], &got, sizeof got, MSG_WAITALL), sizeof got);
            CHECK_EQ(got, round - 1);
            talk(server[i], client[i], round * 3);
            if (round % 10 == 0) { /* a new connection through the listener */
                int a = connect_to(listening[i]), b = accept(listening[i], NULL, NULL);
                CHECK(b >= 0);
                talk(a, b, round);
                talk(b, a, round + 1);
                close(a);
                close(b);
            }
            int on = 0;
            l = sizeof on;
            CHECK(getsockopt(listening[i], SOL_SOCKET, SO_ACCEPTCONN, &on, &l) == 0 && on == 1);
        }
        int value = 0;
        l = sizeof value;
        CHECK(getsockopt(client[0], IPPROTO_TCP, TCP_NODELAY, &value, &l) == 0 && value);
        l = sizeof value;
        CHECK(getsockopt(udp, SOL_SOCKET, SO_RCVBUF, &value, &l) == 0);
        CHECK_EQ(value, 140000);
        CHECK(getsockopt(udp, SOL_SOCKET, SO_BROADCAST, &value, &l) == 0 && value);
        CHECK_EQ(sendto(udp, &round, sizeof round, 0, (struct sockaddr *)&udp_at, sizeof udp_at), sizeof round);
        long got = -1;
        CHECK_EQ(recv(udp, &got, sizeof got, 0), sizeof got);
        CHECK_EQ(got, round);
        CHECK(recv(udp, &got, sizeof got, 0) == -1 && errno == EAGAIN);
    }
    for (int i = 0; i < n; i++) {
        long got;
        CHECK_EQ(recv(server[i], &got, sizeof got, MSG_WAITALL), sizeof got);
        CHECK_EQ(got, guest_rounds() - 1);
        CHECK(shutdown(client[i], SHUT_WR) == 0);
        CHECK_EQ(recv(server[i], &got, 1, 0), 0);
    }
    CHECK(connect(plain, (struct sockaddr *)&udp_at, sizeof udp_at) == -1 && errno == ECONNREFUSED);
    printf("sockets ok\n");
    guest_end();
}
