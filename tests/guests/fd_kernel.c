/* Proves: descriptors of kernel objects come back at their numbers: memfd with seals and
 * contents, eventfd (counter, semaphore), epoll (level, edge-triggered, one-shot, data
 * words, nested), signalfd, timerfd (see time_timers), inotify with watches (and no
 * unread events: these are refused), a pidfd of the process itself. */
#include "guest.h"
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/signalfd.h>

static int events(int ep, struct epoll_event *into)
{
    int n = epoll_wait(ep, into, 8, 0);
    CHECK(n >= 0);
    return n;
}

int main(void)
{
    guest_begin();
    unsigned char data[8192], back[8192];
    guest_fill(data, sizeof data, 1);
    int sealed = memfd_create("sealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(sealed >= 0 && write(sealed, data, sizeof data) == sizeof data);
    int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;
    CHECK(fcntl(sealed, F_ADD_SEALS, seals) == 0 && lseek(sealed, 100, SEEK_SET) == 100);
    int open_memfd = memfd_create("open", 0);
    CHECK(open_memfd >= 0 && ftruncate(open_memfd, 1 << 20) == 0);

    int counter = eventfd(7, EFD_CLOEXEC | EFD_NONBLOCK), semaphore = eventfd(0, EFD_SEMAPHORE | EFD_NONBLOCK);
    CHECK(counter >= 0 && semaphore >= 0);
    uint64_t many = 1000000, value;
    CHECK(write(semaphore, &many, 8) == 8);

    int level[2], edge[2], once[2];
    CHECK(pipe(level) == 0 && pipe(edge) == 0 && pipe(once) == 0);
    CHECK(write(level[1], "l", 1) == 1 && write(edge[1], "e", 1) == 1 && write(once[1], "o", 1) == 1);
    int ep = epoll_create1(EPOLL_CLOEXEC), outer = epoll_create1(0);
    struct epoll_event ev = {.events = EPOLLIN, .data.u64 = 0x1122334455667788};
    CHECK(epoll_ctl(ep, EPOLL_CTL_ADD, level[0], &ev) == 0);
    ev.events = EPOLLIN | EPOLLET, ev.data.u64 = 2;
    CHECK(epoll_ctl(ep, EPOLL_CTL_ADD, edge[0], &ev) == 0);
    ev.events = EPOLLIN | EPOLLONESHOT, ev.data.u64 = 3;
    CHECK(epoll_ctl(ep, EPOLL_CTL_ADD, once[0], &ev) == 0);
    ev.events = EPOLLIN, ev.data.u64 = 4;
    CHECK(epoll_ctl(outer, EPOLL_CTL_ADD, ep, &ev) == 0);
    struct epoll_event seen[8];
    CHECK_EQ(events(ep, seen), 3); /* the edge and the shot are spent now */

    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    sigaddset(&set, SIGRTMIN + 4);
    CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
    int signals = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    CHECK(signals >= 0);

    mkdir("watched", 0700);
    int notes = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    int unwatched = inotify_add_watch(notes, "/", IN_DELETE_SELF);
    int watch = inotify_add_watch(notes, "watched", IN_CREATE | IN_DELETE);
    CHECK(notes >= 0 && watch > 0 && inotify_rm_watch(notes, unwatched) == 0);
    char skip[4096];
    CHECK(read(notes, skip, sizeof skip) > 0); /* IN_IGNORED of the removed one */

    int self = syscall(SYS_pidfd_open, getpid(), 0);
    CHECK(self >= 0);

    uint64_t counted = 7;
    ROUNDS(round)
    {
        CHECK_EQ(fcntl(sealed, F_GET_SEALS), seals);
        CHECK_EQ(lseek(sealed, 0, SEEK_CUR), 100);
        CHECK(pread(sealed, back, sizeof back, 0) == sizeof back && memcmp(back, data, sizeof back) == 0);
        CHECK(pwrite(sealed, "x", 1, 0) == -1 && errno == EPERM);
        CHECK(pwrite(open_memfd, &round, sizeof round, (round % 256) * 4096) == sizeof round);
        long earlier = -1;
        if (round > 3) {
            CHECK(pread(open_memfd, &earlier, sizeof earlier, ((round - 3) % 256) * 4096) == sizeof earlier);
            CHECK_EQ(earlier, round - 3);
        }

        many = round;
        CHECK(write(counter, &many, 8) == 8);
        counted += round;
        if (round % 10 == 9) {
            CHECK(read(counter, &value, 8) == 8);
            CHECK_EQ(value, counted);
            counted = 0;
        }
        CHECK(read(semaphore, &value, 8) == 8 && value == 1);

        CHECK_EQ(events(ep, seen), 1); /* only the level one: an edge does not come again by a restore */
        CHECK_EQ(seen[0].data.u64, 0x1122334455667788);
        CHECK_EQ(seen[0].events, EPOLLIN);
        CHECK_EQ(events(outer, seen), 1);
        if (round % 7 == 6) {
            CHECK(write(edge[1], "e", 1) == 1);
            int n = events(ep, seen);
            CHECK_EQ(n, 2);
            CHECK(seen[0].data.u64 == 2 || seen[1].data.u64 == 2);
            ev.events = EPOLLIN | EPOLLONESHOT, ev.data.u64 = 3;
            CHECK(epoll_ctl(ep, EPOLL_CTL_MOD, once[0], &ev) == 0);
            CHECK_EQ(events(ep, seen), 2);
        }

        struct signalfd_siginfo info;
        CHECK(read(signals, &info, sizeof info) == -1 && errno == EAGAIN);
        union sigval v = {.sival_int = round};
        CHECK(sigqueue(getpid(), SIGRTMIN + 4, v) == 0);
        CHECK_EQ(read(signals, &info, sizeof info), sizeof info);
        CHECK(info.ssi_signo == (unsigned)SIGRTMIN + 4 && info.ssi_int == round);

        char name[64], note[4096];
        snprintf(name, sizeof name, "watched/%ld", round);
        unlink(name); /* left over from a life that was killed */
        while (read(notes, note, sizeof note) > 0)
            ;
        int made = open(name, O_CREAT | O_WRONLY, 0600);
        CHECK(made >= 0 && close(made) == 0);
        CHECK(unlink(name) == 0);
        ssize_t got = read(notes, note, sizeof note);
        if (got <= 0)
            FAIL("the watch does not see a file being made (errno %d)", errno);
        struct inotify_event first;
        memcpy(&first, note, sizeof first);
        CHECK_EQ(first.wd, watch);
        CHECK_EQ(first.mask, IN_CREATE);

        CHECK(syscall(SYS_pidfd_send_signal, self, SIGUSR2, NULL, 0) == 0);
        CHECK_EQ(read(signals, &info, sizeof info), sizeof info);
        CHECK_EQ(info.ssi_signo, SIGUSR2);
        struct pollfd alive = {self, POLLIN, 0};
        CHECK_EQ(poll(&alive, 1, 0), 0);
    }
    printf("kernel objects ok\n");
    guest_end();
}
