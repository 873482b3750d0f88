/* Proves: whom the kernel signals when a descriptor is ready (F_SETOWN, F_SETOWN_EX, F_SETSIG,
 * O_ASYNC) is who it was: the process, a thread of it, its process group. A thread was nobody's
 * owner any more, so that a program that waits for its signal waited for ever; and in the second life of an
 * ordinary user's program no owner came back, since the kernel's id of the life before was taken for the program's. */
#include "guest.h"
#include <sys/socket.h>

#define PATIENCE_MS 5000

static volatile long of_process, of_thread;
static volatile pid_t told, thread_id;
static volatile int over;

static void on_io(int sig)
{
    (void)sig;
    of_process++;
}

static void on_data(int sig)
{
    (void)sig;
    told = gettid();
    of_thread++;
}

static void *owner(void *unused)
{
    thread_id = gettid();
    while (!over)
        guest_sleep_ms(5);
    return unused;
}

static void arrives(int from, int to, volatile long *count, const char *what)
{
    long before = *count;
    char byte;
    CHECK(write(from, "x", 1) == 1);
    for (int ms = 0; ms < PATIENCE_MS && *count == before; ms++)
        guest_sleep_ms(1);
    if (*count == before)
        FAIL("no signal for %s: owner %d of pid %d", what, fcntl(to, F_GETOWN), getpid());
    CHECK(read(to, &byte, 1) == 1);
}

int main(void)
{
    guest_begin();
    struct sigaction act = {.sa_handler = on_io, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGIO, &act, NULL) == 0);
    act.sa_handler = on_data;
    CHECK(sigaction(SIGRTMIN + 3, &act, NULL) == 0);
    pthread_t thread = guest_thread(owner, NULL);
    while (!thread_id)
        guest_sleep_ms(1);
    int own[2], other[2], group[2], later[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, own) == 0 && pipe(other) == 0 && pipe(group) == 0 && pipe(later) == 0);
    /* Not asynchronous yet. */
    CHECK(fcntl(later[0], F_SETOWN, getpid()) == 0 && fcntl(later[0], F_SETSIG, SIGRTMIN + 3) == 0);
    CHECK(fcntl(own[0], F_SETOWN, getpid()) == 0 && fcntl(own[0], F_SETFL, O_ASYNC | O_NONBLOCK) == 0);
    struct f_owner_ex ex = {F_OWNER_TID, thread_id}, now;
    CHECK(fcntl(other[0], F_SETOWN_EX, &ex) == 0 && fcntl(other[0], F_SETSIG, SIGRTMIN + 3) == 0);
    CHECK(fcntl(other[0], F_SETFL, O_ASYNC | O_NONBLOCK) == 0);
    CHECK(fcntl(group[0], F_SETOWN, -getpgrp()) == 0 && fcntl(group[0], F_SETFL, O_ASYNC) == 0);
    ROUNDS(round)
    {
        arrives(own[1], own[0], &of_process, "the process");
        CHECK_EQ(fcntl(own[0], F_GETOWN), getpid());
        arrives(other[1], other[0], &of_thread, "the thread");
        CHECK_EQ(told, thread_id);
        CHECK(fcntl(other[0], F_GETOWN_EX, &now) == 0 && now.type == F_OWNER_TID);
        CHECK_EQ(now.pid, thread_id);
        CHECK(fcntl(group[0], F_GETOWN_EX, &now) == 0 && now.type == F_OWNER_PGRP);
        CHECK_EQ(now.pid, getpgrp());
        CHECK_EQ(fcntl(later[0], F_GETOWN), getpid());
        CHECK_EQ(fcntl(later[0], F_GETSIG), SIGRTMIN + 3);
    }
    over = 1;
    guest_join(thread);
    printf("owners ok\n");
    guest_end();
}
