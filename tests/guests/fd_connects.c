/* Proves: a connection to a listening socket of the process itself is made once, whatever the stop
 * finds: before the call, amid it, or when the connection is there and the call is not over.
 *
 * In the last case the call was made again after a restart, and failed with EISCONN. */
#include "guest.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

static void *connections(void *argument)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof at;
    const struct linger at_once = {1, 0};
    int listening = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(listening >= 0 && bind(listening, (struct sockaddr *)&at, len) == 0 && listen(listening, 8) == 0);
    CHECK(getsockname(listening, (struct sockaddr *)&at, &len) == 0);
    for (long turn = 0, turns = guest_rounds() * 120; turn < turns; turn++) {
        int from = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        CHECK(from >= 0 && setsockopt(from, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once) == 0);
        if (turn % 2) {
            const struct timeval limit = {20, 0};
            CHECK(setsockopt(from, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) == 0);
        }
        CHECK(connect(from, (struct sockaddr *)&at, sizeof at) == 0);
        int to = accept4(listening, NULL, NULL, SOCK_CLOEXEC);
        CHECK(to >= 0);
        long sent = turn, got = -1;
        CHECK_EQ(send(from, &sent, sizeof sent, 0), sizeof sent);
        CHECK_EQ(recv(to, &got, sizeof got, MSG_WAITALL), sizeof got);
        CHECK_EQ(got, turn);
        close(from);
        close(to);
    }
    close(listening);
    return argument;
}

int main(void)
{
    guest_begin();
    pthread_t threads[3];
    for (int t = 0; t < 3; t++)
        threads[t] = guest_thread(connections, NULL);
    for (int t = 0; t < 3; t++)
        guest_join(threads[t]);
    printf("all connected\n");
    guest_end();
}
