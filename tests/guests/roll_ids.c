/* A thread that comes back when its old id is somebody else's by now: it gets another one. What
 * the library keeps by the old id (the stack that its signal frames lie on, with
 * CKPT_TRACKER=mprotect) must stay its own: a second thread without a stack took it for a dead
 * one's, and at the next stop the two lay upon each other. */
#include "guest.h"

#include "ckpt.h"
#include <sys/prctl.h>
#include <sys/wait.h>

static volatile int phase, stop;
static volatile long steps[2];
static volatile int id;
static pthread_t worker_thread;

/* Works on its own stack until told to stop. */
static void work(int k, int until)
{
    volatile long here[64];
    pthread_t self = pthread_self();
    for (long n = 1; until ? phase < until : !stop; n++) {
        for (int i = 0; i < 64; i++)
            here[i] = n * 64 + i + k;
        usleep(200);
        for (int i = 0; i < 64; i++)
            CHECK_EQ(here[i], n * 64 + i + k);
        CHECK(pthread_equal(self, pthread_self()));
        steps[k]++;
    }
}

static void *worker(void *arg)
{
    id = gettid();
    work(0, 0);
    return arg;
}

/* A process that is not a child of ours, with the id that the worker had. */
static void take_id(void)
{
    pid_t ours = getpid(), wanted = id;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        uint64_t args[11] = {0};
        args[4] = SIGCHLD;
        args[8] = (uint64_t)&wanted;
        args[9] = 1;
        for (int tries = 0;; tries++) {
            long got = syscall(SYS_clone3, args, 80);
            if (got == 0) {
                syscall(SYS_close_range, 0, ~0u, 0);
                while (kill(ours, 0) == 0)
                    usleep(20000);
                _exit(0);
            }
            if (got > 0)
                _exit(0);
            /* The joined thread may not be quite gone. */
            if (errno != EEXIST || tries > 5000)
                _exit(errno == EPERM ? 2 : 1);
            usleep(1000);
        }
    }
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    /* Where ids cannot be chosen the restored threads all have others. */
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 2)
        CHECK_EQ(status, 0);
}

static void *roller(void *arg)
{
    /* At the first the others get their stacks. */
    CHECK_EQ(ckpt_checkpoint(1), 0);
    int back = ckpt_checkpoint(2);
    if (back == 0) {
        stop = 1;
        CHECK_EQ(pthread_join(worker_thread, NULL), 0);
        take_id();
        ckpt_rollback(2, 1, NULL, 0);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    CHECK_EQ(back, 1);
    phase = 1;
    work(1, 2);
    return arg;
}

static void await_steps(void)
{
    long before[2] = {steps[0], steps[1]};
    for (int k = 0; k < 2; k++)
        for (int tries = 0; steps[k] < before[k] + 20; tries++) {
            CHECK(tries < 20000);
            usleep(1000);
        }
}

int main(void)
{
    guest_begin();
    pthread_t thread;
    CHECK_EQ(pthread_create(&worker_thread, NULL, worker, NULL), 0);
    while (steps[0] == 0)
        usleep(1000);
    CHECK_EQ(pthread_create(&thread, NULL, roller, NULL), 0);
    while (phase == 0)
        usleep(1000);
    for (int round = 0; round < 5; round++) {
        await_steps();
        CHECK_EQ(ckpt_checkpoint(3), 0);
    }
    await_steps();
    phase = 2;
    stop = 1;
    CHECK_EQ(pthread_join(thread, NULL), 0);
    CHECK_EQ(pthread_join(worker_thread, NULL), 0);
    printf("ids ok\n");
    guest_end();
}
