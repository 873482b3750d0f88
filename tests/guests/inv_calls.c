/* Proves: checkpoints are invisible to blocking calls: each kind of call that can wait
 * sits in a thread of its own and is called again and again with a time limit (or until
 * another thread lets it go) while checkpoints are taken; result, errno and elapsed
 * time must be what they are bare. No EINTR, no early return, no restarted limit.
 *
 * A limit that a stop restarts ends one limit after the last stop. So a watch notes when
 * generations are committed, and a call into which several fell tells: it may be late by as
 * much as the machine is, but not by the time that it had waited before the last stop. Each
 * kind goes on until enough of its calls could tell, and GUEST_CHECKPOINTS (100) were taken.
 * GUEST_NO_ELAPSED=1: killed and resumed, elapsed times mean nothing, results do. */
#include "guest.h"
#include "ckpt.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <pty.h>
#include <semaphore.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <linux/futex.h>

#define LIMIT_MS 400
#define TELLING 4      /* calls of each kind that must tell whether the limit was restarted */
#define PATIENCE_S 100 /* for all of that */

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

/* Stream sockets that gather: one limit for all that is to come. */
static void do_recv_all(void)
{
    static int ends[2];
    char bytes[8];
    if (!ends[0]) {
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
        struct timeval t = {0, LIMIT_MS * 1000};
        CHECK(setsockopt(ends[0], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t) == 0);
    }
    CHECK_EQ(write(ends[1], "abc", 3), 3);
    CHECK_EQ(recv(ends[0], bytes, 8, MSG_WAITALL), 3);
    CHECK(memcmp(bytes, "abc", 3) == 0);
}
static void receive_messages(int sent)
{
    static __thread int ends[2];
    char text[2][8];
    struct iovec at[2] = {{text[0], 8}, {text[1], 8}};
    struct mmsghdr all[2] = {{.msg_hdr = {.msg_iov = at, .msg_iovlen = 1}},
                             {.msg_hdr = {.msg_iov = at + 1, .msg_iovlen = 1}}};
    if (!ends[0]) {
        CHECK(socketpair(AF_UNIX, SOCK_DGRAM, 0, ends) == 0);
        struct timeval t = {0, LIMIT_MS * 1000};
        CHECK(setsockopt(ends[0], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t) == 0);
    }
    if (sent)
        CHECK_EQ(send(ends[1], "x", 1, 0), 1);
    CHECK_EQ(recvmmsg(ends[0], all, 2, 0, NULL), sent ? 1 : -1);
    CHECK(sent || errno == EAGAIN);
}
static void do_recvmmsg(void) { receive_messages(0); }
static void do_recvmmsg_part(void) { receive_messages(1); }
/* Nobody accepts: the queue of connections stays full. */
static void do_connect_unix(void)
{
    static struct sockaddr_un at = {.sun_family = AF_UNIX};
    static int fd;
    if (!fd) {
        int listener = socket(AF_UNIX, SOCK_STREAM, 0), first = socket(AF_UNIX, SOCK_STREAM, 0);
        snprintf(at.sun_path, sizeof at.sun_path, "queue");
        unlink("queue");
        CHECK(bind(listener, (struct sockaddr *)&at, sizeof at) == 0 && listen(listener, 0) == 0);
        CHECK(connect(first, (struct sockaddr *)&at, sizeof at) == 0);
        fd = socket(AF_UNIX, SOCK_STREAM, 0);
        struct timeval t = {0, LIMIT_MS * 1000};
        CHECK(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t) == 0);
    }
    int done = connect(fd, (struct sockaddr *)&at, sizeof at);
    CHECK((done == -1 && errno == EAGAIN) || getenv("GUEST_NO_ELAPSED") != NULL);
}
/* A listener whose queue is full does not answer. */
static void do_connect_tcp(void)
{
    static struct sockaddr_in at;
    static int listener, filler[4];
    if (!listener) {
        socklen_t len = sizeof at;
        listener = socket(AF_INET, SOCK_STREAM, 0);
        at = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        CHECK(bind(listener, (struct sockaddr *)&at, sizeof at) == 0 && listen(listener, 0) == 0);
        CHECK(getsockname(listener, (struct sockaddr *)&at, &len) == 0);
        for (int i = 0; i < 4; i++) {
            filler[i] = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
            connect(filler[i], (struct sockaddr *)&at, sizeof at);
        }
        guest_sleep_ms(50);
    }
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct timeval t = {0, LIMIT_MS * 1000};
    CHECK(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t) == 0);
    /* A recovery leaves room in the queue: connections under way do not come back. */
    int done = connect(fd, (struct sockaddr *)&at, sizeof at);
    CHECK((done == -1 && errno == EINPROGRESS) || getenv("GUEST_NO_ELAPSED") != NULL);
    close(fd);
}
/* Terminals: a limit of its own (VTIME), a line, a number of characters. */
static struct tty {
    int master, slave;
    struct termios mode;
} timed, lined, counted;
static void open_tty(struct tty *tty, int canonical, int min, int time)
{
    CHECK(openpty(&tty->master, &tty->slave, NULL, NULL, NULL) == 0);
    CHECK(tcgetattr(tty->slave, &tty->mode) == 0);
    if (!canonical) {
        cfmakeraw(&tty->mode);
        tty->mode.c_cc[VMIN] = min;
        tty->mode.c_cc[VTIME] = time;
    }
    tty->mode.c_lflag &= ~ECHO; /* what is echoed stays unread, and is refused */
    CHECK(tcsetattr(tty->slave, TCSANOW, &tty->mode) == 0);
}
static void do_tty_time(void)
{
    char byte;
    CHECK_EQ(read(timed.slave, &byte, 1), 0);
}
static void help_line(void) { CHECK(write(lined.master, "hello\n", 6) == 6); }
static void do_tty_line(void)
{
    pthread_t helper;
    char line[16];
    with_help(help_line, &helper);
    CHECK_EQ(read(lined.slave, line, sizeof line), 6);
    CHECK(memcmp(line, "hello\n", 6) == 0);
    guest_join(helper);
}
static void help_rest(void) { CHECK(write(counted.master, "bc", 2) == 2); }
static void do_tty_count(void)
{
    pthread_t helper;
    char line[16];
    CHECK(write(counted.master, "a", 1) == 1);
    with_help(help_rest, &helper);
    CHECK_EQ(read(counted.slave, line, sizeof line), 3);
    CHECK(memcmp(line, "abc", 3) == 0);
    guest_join(helper);
}
static int ofd_held = -1, ofd_fd = -1;
static void help_ofd(void)
{
    struct flock lock = {.l_type = F_UNLCK};
    CHECK(fcntl(ofd_held, F_OFD_SETLK, &lock) == 0);
}
static void do_setlkw(void)
{
    pthread_t helper;
    struct flock lock = {.l_type = F_WRLCK};
    CHECK(fcntl(ofd_held, F_OFD_SETLK, &lock) == 0);
    with_help(help_ofd, &helper);
    CHECK_EQ(fcntl(ofd_fd, F_OFD_SETLKW, &lock), 0);
    guest_join(helper);
    lock.l_type = F_UNLCK;
    CHECK_EQ(fcntl(ofd_fd, F_OFD_SETLK, &lock), 0);
}
static int full_id;
struct large {
    long type;
    char text[4096];
};
static void help_receive(void)
{
    struct large message;
    CHECK_EQ(msgrcv(full_id, &message, sizeof message.text, 0, 0), sizeof message.text);
}
static void do_msgsnd(void)
{
    pthread_t helper;
    struct large message = {.type = 1};
    while (msgsnd(full_id, &message, sizeof message.text, IPC_NOWAIT) == 0)
        ;
    CHECK_EQ(errno, EAGAIN);
    with_help(help_receive, &helper);
    CHECK_EQ(msgsnd(full_id, &message, sizeof message.text, 0), 0);
    guest_join(helper);
}
static void help_fifo(void)
{
    int fd = open("fifo", O_WRONLY);
    CHECK(fd >= 0);
    close(fd);
}
static void do_open_fifo(void)
{
    pthread_t helper;
    char byte;
    with_help(help_fifo, &helper);
    int fd = open("fifo", O_RDONLY);
    CHECK(fd >= 0);
    guest_join(helper);
    CHECK_EQ(read(fd, &byte, 1), 0);
    close(fd);
}
static void do_futex_waitv(void)
{
    struct {
        uint64_t value, address;
        uint32_t flags, reserved;
    } one = {1, 0, 2 /* 32 bits */ | 128 /* private */, 0};
    static uint32_t word = 1;
    one.address = (uintptr_t)&word;
    struct timespec t = deadline(CLOCK_MONOTONIC);
    if (syscall(449 /* futex_waitv */, &one, 1, 0, &t, CLOCK_MONOTONIC) == -1 && errno == ENOSYS)
        do_futex();
    else
        CHECK_EQ(errno, ETIMEDOUT);
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
    CALL(msgrcv), CALL(sem_wait), CALL(pause), CALL(interrupted_sleep), CALL(recv_all), CALL(recvmmsg),
    CALL(recvmmsg_part), CALL(connect_unix), CALL(connect_tcp), CALL(tty_time), CALL(tty_line), CALL(tty_count),
    CALL(setlkw), CALL(msgsnd), CALL(open_fifo), CALL(futex_waitv),
};
enum { CALLS = sizeof calls / sizeof *calls };

/* When generations were committed, as far as the watch saw. */
enum { SEEN = 1 << 16 };
static double committed[SEEN];
static _Atomic int seen;
static _Atomic int over;
static void *watch(void *unused)
{
    long last = ckpt_generation();
    while (!over) {
        long now = ckpt_generation();
        if (now != last && seen < SEEN) {
            committed[seen] = guest_now();
            seen++;
        }
        last = now;
        usleep(500);
    }
    return unused;
}

/* How long the call had waited when it was last stopped, at least, in ms; 0 if too few
 * generations fell into it to say. Between two commits there is a stop. */
static double last_stop(double start)
{
    double end = start + LIMIT_MS / 1e3, found[2] = {0, 0};
    for (int i = seen - 1; i >= 0 && committed[i] > start; i--)
        if (committed[i] < end) {
            if (found[0] != 0) {
                found[1] = committed[i];
                break;
            }
            found[0] = committed[i];
        }
    return found[1] == 0 ? 0 : (found[1] - start) * 1000;
}

static void *caller(void *argument)
{
    struct call *call = argument;
    const char *wanted = getenv("GUEST_CHECKPOINTS");
    int loose = getenv("GUEST_NO_ELAPSED") != NULL, judged = !loose && wanted != NULL && ckpt_generation() >= 0;
    int telling = 0, restarted = 0;
    double begun = guest_now();
    for (long i = 0, n = guest_rounds() * 10 / LIMIT_MS + 1;
         i < n || (judged && (telling < TELLING || ckpt_generation() < atol(wanted))); i++) {
        double start = guest_now();
        errno = 0;
        call->run();
        double ms = (guest_now() - start) * 1000, waited = last_stop(start);
        if (!loose && ms < LIMIT_MS - 3)
            FAIL("%s took %.1f ms, not %d", call->name, ms, LIMIT_MS);
        if (waited > LIMIT_MS / 4) {
            telling++;
            restarted += ms > LIMIT_MS + waited - 5;
        }
        if (judged && start - begun > PATIENCE_S)
            FAIL("%s: %d calls of %ld tell, %ld checkpoints", call->name, telling, i, ckpt_generation());
    }
    /* A machine that is late once in a while is no restart; a restart is one each time. */
    if (judged && restarted > telling / 4)
        FAIL("%s: %d of %d limits were restarted", call->name, restarted, telling);
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
    full_id = msgget(IPC_PRIVATE, 0600);
    CHECK(full_id >= 0);
    ofd_fd = open("lock", O_RDWR | O_CREAT, 0600);
    ofd_held = open("lock", O_RDWR);
    CHECK(ofd_fd >= 0 && ofd_held >= 0);
    CHECK(mkfifo("fifo", 0600) == 0);
    open_tty(&timed, 0, 0, LIMIT_MS / 100);
    open_tty(&lined, 1, 0, 0);
    open_tty(&counted, 0, 3, 0);
    pthread_t watcher = guest_thread(watch, NULL), thread[CALLS];
    for (int i = 0; i < CALLS; i++)
        thread[i] = guest_thread(caller, &calls[i]);
    for (int i = 0; i < CALLS; i++)
        guest_join(thread[i]);
    over = 1;
    guest_join(watcher);
    msgctl(full_id, IPC_RMID, NULL);
    semctl(sem_id, 0, IPC_RMID);
    msgctl(msg_id, IPC_RMID, NULL);
    printf("calls ok: %d kinds\n", (int)CALLS);
    guest_end();
}
