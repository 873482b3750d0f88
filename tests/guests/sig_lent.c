/* Proves: a child that runs in our memory, on our thread's block (vfork, posix_spawn, clone with
 * CLONE_VM), and changes its own signal mask does not change ours: with the highest signal open or
 * blocked here and the other way round there, in two threads. */
#include "guest.h"
#include <sched.h>
#include <spawn.h>
#include <sys/wait.h>

extern char **environ;
static _Thread_local volatile sig_atomic_t arrived;
static void on_signal(int sig) { arrived += sig == SIGRTMAX; }

static sigset_t highest;
static int is_blocked(void)
{
    sigset_t now;
    CHECK_EQ(pthread_sigmask(SIG_SETMASK, NULL, &now), 0);
    return sigismember(&now, SIGRTMAX);
}

/* The child: the other way round than here. */
static void turn(int blocked)
{
    CHECK_EQ(is_blocked(), blocked);
    CHECK_EQ(sigprocmask(blocked ? SIG_UNBLOCK : SIG_BLOCK, &highest, NULL), 0);
    CHECK_EQ(is_blocked(), !blocked);
}
static int cloned(void *blocked)
{
    turn(*(int *)blocked);
    _exit(7);
}

static void ends_with(pid_t child, int status)
{
    int got;
    CHECK(child > 0);
    while (waitpid(child, &got, __WALL) < 0)
        CHECK_EQ(errno, EINTR);
    CHECK(WIFEXITED(got));
    CHECK_EQ(WEXITSTATUS(got), status);
}

static void child(int way, int blocked)
{
    static _Thread_local char stack[65536] __attribute__((aligned(64)));
    pid_t pid;
    if (way == 0) {
        pid = vfork();
        if (pid == 0) {
            turn(blocked);
            _exit(7);
        }
    } else if (way == 1 || way == 2) {
        int flags = CLONE_VM | SIGCHLD | (way == 1 ? CLONE_VFORK : 0);
        pid = clone(cloned, stack + sizeof stack, flags, &blocked);
    } else {
        /* What a command begins with: what it is given, or what we have. */
        int given = way == 3;
        posix_spawnattr_t attributes;
        sigset_t mask;
        sigemptyset(&mask);
        if (!blocked)
            sigaddset(&mask, SIGRTMAX);
        char *command[] = {"awk", "/^SigBlk:/ { exit substr($2, 1, 1) == \"8\" ? 10 : 11 }", "/proc/self/status", NULL};
        CHECK_EQ(posix_spawnattr_init(&attributes), 0);
        CHECK_EQ(posix_spawnattr_setflags(&attributes, given ? POSIX_SPAWN_SETSIGMASK : 0), 0);
        CHECK_EQ(posix_spawnattr_setsigmask(&attributes, &mask), 0);
        CHECK_EQ(posix_spawnp(&pid, "awk", NULL, &attributes, command, environ), 0);
        posix_spawnattr_destroy(&attributes);
        ends_with(pid, (given ? !blocked : blocked) ? 10 : 11);
        return;
    }
    ends_with(pid, 7);
}

static void *work(void *argument)
{
    ROUNDS(round)
    {
        int blocked = round & 1, way = round / 2 % 5;
        CHECK_EQ(pthread_sigmask(blocked ? SIG_BLOCK : SIG_UNBLOCK, &highest, NULL), 0);
        child(way, blocked);
        CHECK_EQ(is_blocked(), blocked);
        int before = arrived;
        CHECK_EQ(pthread_kill(pthread_self(), SIGRTMAX), 0);
        if (blocked) {
            guest_sleep_ms(1);
            CHECK_EQ(arrived, before);
            /* Again, now that a mask was changed after the child. */
            child(way, blocked);
            CHECK_EQ(arrived, before);
            CHECK_EQ(pthread_sigmask(SIG_UNBLOCK, &highest, NULL), 0);
        }
        CHECK_EQ(arrived, before + 1);
    }
    return argument;
}

int main(void)
{
    guest_begin();
    sigemptyset(&highest);
    sigaddset(&highest, SIGRTMAX);
    struct sigaction act = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    CHECK_EQ(sigaction(SIGRTMAX, &act, NULL), 0);
    pthread_t thread = guest_thread(work, NULL);
    work(NULL);
    guest_join(thread);
    printf("lent ok\n");
    guest_end();
}
