/* Proves: checkpoints are invisible to blocking calls: each kind of call that can wait
 * sits in a thread of its own and is called again and again with a time limit (or until
 * another thread lets it go) while checkpoints are taken; result, errno and elapsed
 * time must be what they are bare. No EINTR, no early return, no restarted limit.
 * GUEST_NO_ELAPSED=1: killed and resumed, elapsed times mean nothing, results do. */
#include "guest.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <semaphore.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <linux/futex.h>

#define LIMIT_MS 150
#define LATE_MS 1500 /* a loaded machine is late; a restarted limit would be later still over 100 checkpoints */

static int never[2], stream[2], epoll_fd, udp, tcp, sem_id, msg_id;
static const struct timespec limit = {0, LIMIT_MS * 1000000L};

static struct timespec deadline(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    t.tv_nsec += LIMIT_MS * 1000000L;
    t.tv_sec += t.tv_nsec / 1000000000;
    t.tv_nsec %= 1000000000;
    return t;
}

/* Each: one call that ends by its limit; returns what it must return bare. */
static void do_poll(void) { CHECK_EQ(poll(&(struct pollfd){never[0], POLLIN, 0}, 1, LIMIT_MS), 0); }
static void do_poll_none(void) { CHECK_EQ(poll(NULL, 0, LIMIT_MS), 0); }
static void do_ppoll(void)
{
    sigset_t none;
    sigemptyset(&none);
    CHECK_EQ(ppoll(&(struct pollfd){never[0], POLLIN, 0}, 1, &limit, &none), 0);
}
static void do_select(void)
{
    fd_set set;
    FD_ZERO(&set);
    FD_SET(never[0], &set);
    struct timeval t = {0, LIMIT_MS * 1000};
    CHECK_EQ(select(never[0] + 1, &set, NULL, NULL, &t), 0);
    CHECK(t.tv_sec == 0 && t.tv_usec == 0); /* Linux writes the rest back: nothing is left */
}
static void do_pselect(void)
{
    fd_set set;
    FD_ZERO(&set);
    FD_SET(never[0], &set);
    sigset_t all;
    sigfillset(&all);
    CHECK_EQ(pselect(never[0] + 1, &set, NULL, NULL, &limit, &all), 0);
}
static void do_epoll_wait(void)
{
    struct epoll_event e;
    CHECK_EQ(epoll_wait(epoll_fd, &e, 1, LIMIT_MS), 0);
}
static void do_epoll_pwait(void)
{
    struct epoll_event e;
    sigset_t all;
    sigfillset(&all);
    CHECK_EQ(epoll_pwait(epoll_fd, &e, 1, LIMIT_MS, &all), 0);
}
static void do_epoll_pwait2(void)
{
    struct epoll_event e;
    int n = syscall(441 /* epoll_pwait2 */, epoll_fd, &e, 1, &limit, NULL, 8);
    if (n == -1 && errno == ENOSYS)
        n = epoll_wait(epoll_fd, &e, 1, LIMIT_MS);
    CHECK_EQ(n, 0);
}
static void do_nanosleep(void)
{
    struct timespec rest = {9, 9};
    CHECK_EQ(nanosleep(&limit, &rest), 0);
    CHECK(rest.tv_sec == 9 && rest.tv_nsec == 9);
}
static void do_clock_nanosleep(void) { CHECK_EQ(clock_nanosleep(CLOCK_REALTIME, 0, &limit, NULL), 0); }
static void do_clock_nanosleep_abs(void)
{
    struct timespec t = deadline(CLOCK_MONOTONIC);
    CHECK_EQ(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL), 0);
}
static void do_usleep(void) { CHECK_EQ(usleep(LIMIT_MS * 1000), 0); }
static void do_sigtimedwait(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    CHECK(sigtimedwait(&set, NULL, &limit) == -1 && errno == EAGAIN);
}
static void do_sem_timedwait(void)
{
    sem_t s;
    sem_init(&s, 0, 0);
    struct timespec t = deadline(CLOCK_REALTIME);
    CHECK_EQ(sem_timedwait(&s, &t), -1);
    CHECK_EQ(errno, ETIMEDOUT);
}
static void do_cond_timedwait(void)
{
    pthread_mutex_t m = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t c = PTHREAD_COND_INITIALIZER;
    struct timespec t = deadline(CLOCK_REALTIME);
    pthread_mutex_lock(&m);
    CHECK_EQ(pthread_cond_timedwait(&c, &m, &t), ETIMEDOUT);
    pthread_mutex_unlock(&m);
}
static void do_mutex_timedlock(void)
{
    static pthread_mutex_t m = PTHREAD_MUTEX_INITIALIZER;
    static int once;
    if (!once++)
        pthread_mutex_lock(&m);
    struct timespec t = deadline(CLOCK_REALTIME);
    CHECK_EQ(pthread_mutex_timedlock(&m, &t), ETIMEDOUT);
}
static void do_futex(void)
{
    int word = 1;
    CHECK(syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 1, &limit, NULL, 0) == -1 && errno == ETIMEDOUT);
}
static void do_futex_bitset(void)
{
    int word = 1;
    struct timespec t = deadline(CLOCK_MONOTONIC);
    CHECK(syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, 1, &t, NULL, 0xff) == -1 && errno == ETIMEDOUT);
}
static void do_recv_timeout(void)
{
    char byte;
    CHECK(recv(stream[0], &byte, 1, 0) == -1);
    CHECK_EQ(errno, EAGAIN);
}
static void do_recvmsg_timeout(void)
{
    char byte;
    struct iovec io = {&byte, 1};
    struct msghdr message = {.msg_iov = &io, .msg_iovlen = 1};
    CHECK(recvmsg(udp, &message, 0) == -1);
    CHECK_EQ(errno, EAGAIN);
}
static void do_accept_timeout(void)
{
    CHECK(accept(tcp, NULL, NULL) == -1);
    CHECK_EQ(errno, EAGAIN);
}
static void do_send_timeout(void)
{
    static int full[2];
    static char data[4096];
    if (!full[0]) {
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, full) == 0);
        struct timeval t = {0, LIMIT_MS * 1000};
        CHECK(setsockopt(full[0], SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t) == 0);
        while (send(full[0], data, sizeof data, MSG_DONTWAIT) > 0)
            ;
    }
    /* Only after a recovery may there be room: what was in flight is packed anew. */
    while (send(full[0], data, sizeof data, 0) > 0)
        CHECK(getenv("GUEST_NO_ELAPSED") != NULL);
    CHECK_EQ(errno, EAGAIN);
}
static void do_semtimedop(void)
{
    struct sembuf down = {0, -1, 0};
    CHECK(semtimedop(sem_id, &down, 1, &limit) == -1);
    CHECK_EQ(errno, EAGAIN);
}
static void do_timerfd(void)
{
    static int fd = -1;
    uint64_t n;
    if (fd < 0)
        fd = timerfd_create(CLOCK_MONOTONIC, 0);
    struct itimerspec t = {{0, 0}, limit};
    CHECK(timerfd_settime(fd, 0, &t, NULL) == 0);
    CHECK_EQ(read(fd, &n, sizeof n), sizeof n);
    CHECK_EQ(n, 1);
}
/* Calls without a limit, let go by a helper after the limit. */
static void *let_go(void *argument)
{
    poll(NULL, 0, LIMIT_MS);
    (*(void (**)(void))argument)();
    return NULL;
}
static void with_help(void (*help)(void), pthread_t *helper)
{
    static __thread void (*kept)(void);
    kept = help;
    *helper = guest_thread(let_go, &kept);
}
static int pipe_fd[2], event_fd, flock_fd, lock_held = -1;
static void help_pipe(void) { CHECK(write(pipe_fd[1], "x", 1) == 1); }
static void do_read_pipe(void)
{
    pthread_t helper;
    char byte;
    with_help(help_pipe, &helper);
    CHECK_EQ(read(pipe_fd[0], &byte, 1), 1);
    guest_join(helper);
}
static void help_event(void)
{
    uint64_t one = 1;
    CHECK(write(event_fd, &one, 8) == 8);
}
static void do_read_eventfd(void)
{
    pthread_t helper;
    uint64_t n;
    with_help(help_event, &helper);
    CHECK_EQ(read(event_fd, &n, 8), 8);
    guest_join(helper);
}
static void help_flock(void) { CHECK(flock(lock_held, LOCK_UN) == 0); }
static void do_flock(void)
{
    pthread_t helper;
    CHECK(flock(lock_held, LOCK_EX) == 0);
    with_help(help_flock, &helper);
    CHECK_EQ(flock(flock_fd, LOCK_EX), 0);
    guest_join(helper);
    CHECK_EQ(flock(flock_fd, LOCK_UN), 0);
}
static void help_message(void)
{
    struct {
        long type;
        char text[8];
    } message = {3, "hello"};
    CHECK(msgsnd(msg_id, &message, 8, 0) == 0);
}
static void do_msgrcv(void)
{
    pthread_t helper;
    struct {
        long type;
        char text[8];
    } message;
    with_help(help_message, &helper);
    CHECK_EQ(msgrcv(msg_id, &message, 8, 0, 0), 8);
    guest_join(helper);
}
static sem_t plain;
static void help_sem(void) { sem_post(&plain); }
static void do_sem_wait(void)
{
    pthread_t helper;
    with_help(help_sem, &helper);
    CHECK_EQ(sem_wait(&plain), 0);
    guest_join(helper);
}
static pthread_t pauser;
static volatile sig_atomic_t usr1;
static void on_usr1(int sig) { usr1 = sig; }
static void help_pause(void) { CHECK_EQ(pthread_kill(pauser, SIGUSR1), 0); }
static void do_pause(void)
{
    pthread_t helper;
    pauser = pthread_self();
    usr1 = 0;
    with_help(help_pause, &helper);
    CHECK(pause() == -1 && errno == EINTR); /* the program's own signal does interrupt */
    CHECK_EQ(usr1, SIGUSR1);
    guest_join(helper);
}
/* The program's own signal ends a sleep, and the rest of it is reported. */
static pthread_t sleeper;
static void help_sleep(void) { CHECK_EQ(pthread_kill(sleeper, SIGUSR1), 0); }
static void do_interrupted_sleep(void)
{
    pthread_t helper;
    struct timespec rest = {0, 0}, twice = {0, 2 * LIMIT_MS * 1000000L};
    sleeper = pthread_self();
    with_help(help_sleep, &helper);
    if (nanosleep(&twice, &rest) == -1) { /* a helper that is very late lets it end by itself */
        CHECK_EQ(errno, EINTR);
        CHECK(rest.tv_nsec > 0 && rest.tv_nsec <= twice.tv_nsec - LIMIT_MS * 900000L);
    }
    guest_join(helper);
}

#define CALL(name) {do_##name, #name}
static struct call {
    void (*run)(void);
    const char *name;
} calls[] = {
    CALL(poll), CALL(poll_none), CALL(ppoll), CALL(select), CALL(pselect), CALL(epoll_wait), CALL(epoll_pwait),
    CALL(epoll_pwait2), CALL(nanosleep), CALL(clock_nanosleep), CALL(clock_nanosleep_abs), CALL(usleep),
    CALL(sigtimedwait), CALL(sem_timedwait), CALL(cond_timedwait), CALL(mutex_timedlock), CALL(futex),
    CALL(futex_bitset), CALL(recv_timeout), CALL(recvmsg_timeout), CALL(accept_timeout), CALL(send_timeout),
    CALL(semtimedop), CALL(timerfd), CALL(read_pipe), CALL(read_eventfd), CALL(flock),
    CALL(msgrcv), CALL(sem_wait), CALL(pause), CALL(interrupted_sleep),
};
enum { CALLS = sizeof calls / sizeof *calls };

static void *caller(void *argument)
{
    struct call *call = argument;
    int loose = getenv("GUEST_NO_ELAPSED") != NULL;
    for (long i = 0, n = guest_rounds() * 10 / LIMIT_MS + 1; i < n; i++) {
        double start = guest_now();
        errno = 0;
        call->run();
        double ms = (guest_now() - start) * 1000;
        if (!loose && (ms < LIMIT_MS - 3 || ms > LIMIT_MS + LATE_MS))
            FAIL("%s took %.1f ms, not %d", call->name, ms, LIMIT_MS);
    }
    return NULL;
}

int main(void)
{
    guest_begin();
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    CHECK_EQ(pthread_sigmask(SIG_BLOCK, &set, NULL), 0);
    struct sigaction act = {.sa_handler = on_usr1};
    CHECK(sigaction(SIGUSR1, &act, NULL) == 0);
    CHECK(pipe(never) == 0 && pipe(pipe_fd) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, stream) == 0);
    struct timeval t = {0, LIMIT_MS * 1000};
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    udp = socket(AF_INET, SOCK_DGRAM, 0);
    tcp = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(bind(udp, (struct sockaddr *)&at, sizeof at) == 0 && bind(tcp, (struct sockaddr *)&at, sizeof at) == 0);
    CHECK(listen(tcp, 5) == 0);
    int waits[] = {stream[0], udp, tcp};
    for (int i = 0; i < 3; i++)
        CHECK(setsockopt(waits[i], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t) == 0);
    epoll_fd = epoll_create1(0);
    struct epoll_event e = {.events = EPOLLIN};
    CHECK(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, never[0], &e) == 0);
    event_fd = eventfd(0, 0);
    flock_fd = open("flock", O_RDWR | O_CREAT, 0600);
    lock_held = open("flock", O_RDWR);
    CHECK(flock_fd >= 0 && lock_held >= 0);
    sem_init(&plain, 0, 0);
    sem_id = semget(IPC_PRIVATE, 1, 0600);
    msg_id = msgget(IPC_PRIVATE, 0600);
    CHECK(sem_id >= 0 && msg_id >= 0);
    pthread_t thread[CALLS];
    for (int i = 0; i < CALLS; i++)
        thread[i] = guest_thread(caller, &calls[i]);
    for (int i = 0; i < CALLS; i++)
        guest_join(thread[i]);
    semctl(sem_id, 0, IPC_RMID);
    msgctl(msg_id, IPC_RMID, NULL);
    printf("calls ok: %d kinds\n", (int)CALLS);
    guest_end();
}
