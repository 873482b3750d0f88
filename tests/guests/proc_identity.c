/* Proves: the process is the same for itself: pid, tids, and what it does with them (kill,
 * tgkill, pthread_kill, sigqueue, getpgid, sched_*, prctl by id), user and group ids,
 * parent only seen to be alive, and its children's parent id is the pid it knows. */
#include "guest.h"
#include <sched.h>
#include <sys/wait.h>

static volatile sig_atomic_t hits;
static void on_signal(int sig, siginfo_t *info, void *context)
{
    (void)context;
    CHECK_EQ(sig, SIGUSR1);
    CHECK_EQ(info->si_pid, getpid());
    hits++;
}
static void *cancelled(void *argument)
{
    for (;;)
        pause();
    return argument;
}
static pid_t other_tid;
static int stop;
static void *other(void *argument)
{
    pid_t mine = gettid();
    __atomic_store_n(&other_tid, mine, __ATOMIC_SEQ_CST);
    while (!__atomic_load_n(&stop, __ATOMIC_SEQ_CST)) {
        CHECK_EQ(gettid(), mine);
        CHECK_EQ(syscall(SYS_gettid), mine);
        guest_sleep_ms(10);
    }
    return argument;
}

int main(void)
{
    guest_begin();
    struct sigaction act = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    CHECK(sigaction(SIGUSR1, &act, NULL) == 0);
    pid_t pid = getpid(), tid = gettid();
    uid_t uid = getuid(), euid = geteuid();
    gid_t gid = getgid(), groups[128], groups_now[128];
    int count = getgroups(128, groups);
    CHECK_EQ(pid, tid);
    pthread_t thread = guest_thread(other, NULL);
    while (!__atomic_load_n(&other_tid, __ATOMIC_SEQ_CST))
        guest_sleep_ms(1);
    ROUNDS(round)
    {
        CHECK_EQ(getpid(), pid);
        CHECK_EQ(syscall(SYS_getpid), pid);
        CHECK_EQ(gettid(), tid);
        CHECK_EQ(syscall(SYS_gettid), tid);
        CHECK(getppid() > 0);
        CHECK(getuid() == uid && geteuid() == euid && getgid() == gid && getegid() == gid);
        CHECK_EQ(getgroups(128, groups_now), count);
        CHECK(memcmp(groups, groups_now, count * sizeof *groups) == 0);
        int before = hits;
        sigset_t set, old;
        CHECK(kill(pid, 0) == 0);
        CHECK(syscall(SYS_tgkill, pid, tid, SIGUSR1) == 0);
        CHECK_EQ(hits, before + 1);
        CHECK(raise(SIGUSR1) == 0);
        CHECK_EQ(hits, before + 2);
        CHECK(syscall(SYS_tgkill, pid, other_tid, 0) == 0);
        CHECK_EQ(pthread_kill(thread, 0), 0);
        CHECK_EQ(pthread_kill(thread, SIGUSR1), 0); /* the sender is ourselves there, too */
        for (int i = 0; i < 1000 && hits < before + 3; i++)
            guest_sleep_ms(1);
        CHECK_EQ(hits, before + 3);
        pthread_t short_lived = guest_thread(cancelled, NULL);
        CHECK_EQ(pthread_cancel(short_lived), 0);
        void *end;
        CHECK(pthread_join(short_lived, &end) == 0 && end == PTHREAD_CANCELED);
        siginfo_t info;
        sigset_t waited;
        sigemptyset(&waited);
        sigaddset(&waited, SIGUSR2);
        CHECK_EQ(pthread_sigmask(SIG_BLOCK, &waited, NULL), 0);
        CHECK(raise(SIGUSR2) == 0 && sigwaitinfo(&waited, &info) == SIGUSR2);
        CHECK_EQ(info.si_pid, pid);
        sigemptyset(&set);
        sigaddset(&set, SIGUSR1);
        CHECK_EQ(pthread_sigmask(SIG_BLOCK, &set, &old), 0);
        CHECK(kill(pid, SIGUSR1) == 0);
        CHECK_EQ(pthread_sigmask(SIG_SETMASK, &old, NULL), 0);
        for (int i = 0; i < 1000 && hits < before + 4; i++)
            guest_sleep_ms(1); /* the other thread may take it */
        CHECK_EQ(hits, before + 4);
        CHECK(getpgid(pid) == getpgrp());
        CHECK(getsid(pid) == getsid(0));
        cpu_set_t cpus;
        CHECK(sched_getaffinity(pid, sizeof cpus, &cpus) == 0 && sched_getaffinity(other_tid, sizeof cpus, &cpus) == 0);
        CHECK_EQ(sched_getscheduler(other_tid), SCHED_OTHER);
        if (round % 10 == 0) {
            pid_t child = fork();
            CHECK(child >= 0);
            if (child == 0)
                _exit(getppid() == pid && getpid() != pid && kill(getppid(), 0) == 0 ? 21 : 22);
            int status;
            CHECK_EQ(waitpid(child, &status, 0), child);
            CHECK_EQ(WEXITSTATUS(status), 21);
        }
    }
    __atomic_store_n(&stop, 1, __ATOMIC_SEQ_CST);
    guest_join(thread);
    printf("identity ok\n");
    guest_end();
}
