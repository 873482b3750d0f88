/* Proves: pipes, FIFOs and unix socket pairs (stream, datagram, sequenced packets) come
 * back with the bytes in flight, the borders of messages, O_NONBLOCK, the pipe's size,
 * a half-closed direction and blocked readers; each round moves the queue by one. */
#include "guest.h"
#include <sys/ioctl.h>
#include <sys/socket.h>

enum { BACKLOG = 5 };
struct queue {
    int in, out, borders;
    const char *name;
};

static size_t length_of(long n) { return 1 + guest_mix(n) % 3000; }

static void put(struct queue *q, long n)
{
    unsigned char message[4096];
    size_t len = length_of(n);
    for (size_t i = 0; i < len; i++)
        message[i] = guest_mix(n * 4096 + i);
    ssize_t got = write(q->in, message, len);
    if (got != (ssize_t)len)
        FAIL("%s: write gave %zd (errno %d)", q->name, got, errno);
}

static void take(struct queue *q, long n)
{
    unsigned char message[8192];
    size_t len = length_of(n);
    ssize_t got = read(q->out, message, q->borders ? sizeof message : len);
    if (got != (ssize_t)len)
        FAIL("%s: message %ld has %zd bytes, not %zu (errno %d)", q->name, n, got, len, errno);
    for (size_t i = 0; i < len; i++)
        if (message[i] != (unsigned char)guest_mix(n * 4096 + i))
            FAIL("%s: message %ld is wrong at %zu", q->name, n, i);
}

static int quiet[2];
static void *blocked(void *argument)
{
    char byte;
    ssize_t n = read(quiet[0], &byte, 1);
    if (n != 1 || byte != 'Q')
        FAIL("the blocked reader got %zd (errno %d)", n, errno);
    return argument;
}

int main(void)
{
    guest_begin();
    struct queue queue[8];
    int n = 0, fd[2];
    CHECK(pipe2(fd, O_CLOEXEC) == 0);
    queue[n++] = (struct queue){fd[1], fd[0], 0, "pipe"};
    CHECK(pipe2(fd, O_NONBLOCK) == 0 && fcntl(fd[0], F_SETPIPE_SZ, 1 << 17) == 1 << 17);
    queue[n++] = (struct queue){fd[1], fd[0], 0, "large pipe"};
    int large = fd[0];
    CHECK(pipe2(fd, O_DIRECT) == 0);
    queue[n++] = (struct queue){fd[1], fd[0], 1, "packet pipe"};
    if (mkfifo("fifo", 0600) != 0)
        CHECK_EQ(errno, EEXIST);
    int fifo = open("fifo", O_RDWR);
    CHECK(fifo >= 0);
    queue[n++] = (struct queue){fifo, fifo, 0, "fifo"};
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd) == 0);
    queue[n++] = (struct queue){fd[1], fd[0], 0, "stream pair"};
    queue[n++] = (struct queue){fd[0], fd[1], 0, "stream pair, other way"};
    CHECK(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, fd) == 0);
    queue[n++] = (struct queue){fd[1], fd[0], 1, "datagram pair"};
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, fd) == 0);
    queue[n++] = (struct queue){fd[1], fd[0], 1, "packet pair"};
    for (int i = 0; i < n; i++)
        for (long m = 0; m < BACKLOG; m++)
            put(&queue[i], m);

    int half[2], ended[2], closed[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, half) == 0 && write(half[1], "last words", 10) == 10);
    CHECK(shutdown(half[1], SHUT_WR) == 0);
    CHECK(pipe(ended) == 0 && write(ended[1], "rest", 4) == 4 && close(ended[1]) == 0);
    CHECK(pipe(closed) == 0 && close(closed[0]) == 0);
    signal(SIGPIPE, SIG_IGN);
    CHECK(pipe(quiet) == 0);
    pthread_t waits = guest_thread(blocked, NULL);

    ROUNDS(round)
    {
        for (int i = 0; i < n; i++) {
            put(&queue[i], round + BACKLOG);
            take(&queue[i], round);
        }
        int bytes = 0;
        CHECK(ioctl(half[0], FIONREAD, &bytes) == 0);
        CHECK_EQ(bytes, 10);
        CHECK(ioctl(ended[0], FIONREAD, &bytes) == 0);
        CHECK_EQ(bytes, 4);
        CHECK(write(closed[1], "x", 1) == -1 && errno == EPIPE);
        CHECK_EQ(fcntl(large, F_GETPIPE_SZ), 1 << 17);
        CHECK(fcntl(large, F_GETFL) & O_NONBLOCK);
        CHECK(fcntl(queue[2].in, F_GETFL) & O_DIRECT);
        CHECK_EQ(fcntl(queue[0].in, F_GETFD), FD_CLOEXEC);
        int type;
        socklen_t len = sizeof type;
        CHECK(getsockopt(queue[7].in, SOL_SOCKET, SO_TYPE, &type, &len) == 0 && type == SOCK_SEQPACKET);
    }
    for (int i = 0; i < n; i++)
        for (long m = 0; m < BACKLOG; m++)
            take(&queue[i], guest_rounds() + m);
    char rest[32];
    CHECK_EQ(read(large, rest, 1), -1);
    CHECK_EQ(errno, EAGAIN);
    CHECK(read(half[0], rest, sizeof rest) == 10 && memcmp(rest, "last words", 10) == 0);
    CHECK_EQ(read(half[0], rest, sizeof rest), 0);
    CHECK(write(half[0], "reply", 5) == 5 && read(half[1], rest, sizeof rest) == 5);
    CHECK(read(ended[0], rest, sizeof rest) == 4 && read(ended[0], rest, sizeof rest) == 0);
    CHECK(write(quiet[1], "Q", 1) == 1);
    guest_join(waits);
    printf("pipes ok: %d\n", n);
    guest_end();
}
