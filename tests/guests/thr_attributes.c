/* Proves: what the kernel keeps per thread comes back: name, processor affinity, nice
 * value, scheduling policy and priority (real-time ones only where permitted; what was
 * accepted at the start must stay), timer slack, signal mask, alternate stack. */
#include "guest.h"
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>

enum { THREADS = 6 };

struct seen {
    char name[16];
    cpu_set_t cpus;
    int nice, policy, priority, reset;
    long slack;
    sigset_t mask;
    stack_t alternate;
};

static void look(struct seen *seen)
{
    memset(seen, 0, sizeof *seen);
    CHECK(prctl(PR_GET_NAME, seen->name) == 0);
    CHECK(sched_getaffinity(0, sizeof seen->cpus, &seen->cpus) == 0);
    errno = 0;
    seen->nice = getpriority(PRIO_PROCESS, 0);
    CHECK(errno == 0);
    seen->policy = sched_getscheduler(0);
    struct sched_param param;
    CHECK(sched_getparam(0, &param) == 0);
    seen->priority = param.sched_priority;
    seen->slack = prctl(PR_GET_TIMERSLACK);
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &seen->mask) == 0);
    CHECK(sigaltstack(NULL, &seen->alternate) == 0);
}

static void *work(void *argument)
{
    long id = (long)argument;
    char name[16];
    snprintf(name, sizeof name, "guest %ld (%%", id);
    CHECK(prctl(PR_SET_NAME, name) == 0);
    cpu_set_t cpus;
    CHECK(sched_getaffinity(0, sizeof cpus, &cpus) == 0);
    for (int cpu = 0; cpu < CPU_SETSIZE && id % 2; cpu++)
        if (CPU_ISSET(cpu, &cpus)) {
            CPU_ZERO(&cpus);
            CPU_SET(cpu, &cpus);
            CHECK(sched_setaffinity(0, sizeof cpus, &cpus) == 0);
            break;
        }
    struct sched_param none = {0}, one = {1};
    if (id == 1)
        CHECK(sched_setscheduler(0, SCHED_BATCH, &none) == 0);
    if (id == 2)
        CHECK(sched_setscheduler(0, SCHED_IDLE, &none) == 0);
    if (id == 3)
        if (sched_setscheduler(0, SCHED_RR | SCHED_RESET_ON_FORK, &one) != 0)
            NOT_TESTED("real-time policies are not permitted");
    if (id == 4)
        CHECK(setpriority(PRIO_PROCESS, 0, 7) == 0);
    if (id == 5)
        CHECK(prctl(PR_SET_TIMERSLACK, 123456L) == 0);
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR1);
    sigaddset(&mask, SIGRTMIN + id);
    CHECK(pthread_sigmask(SIG_BLOCK, &mask, NULL) == 0);
    if (id != 2) {
        stack_t stack = {.ss_sp = malloc(65536), .ss_size = 65536};
        CHECK(sigaltstack(&stack, NULL) == 0);
    }
    struct seen first, now;
    look(&first);
    for (long round = 0, rounds = guest_rounds(); round < rounds; round++, guest_sleep_ms(10)) {
        look(&now);
        if (strcmp(first.name, now.name) != 0)
            FAIL("name \"%s\", was \"%s\"", now.name, first.name);
        CHECK(CPU_EQUAL(&first.cpus, &now.cpus));
        CHECK_EQ(now.nice, first.nice);
        CHECK_EQ(now.policy, first.policy);
        CHECK_EQ(now.priority, first.priority);
        CHECK_EQ(now.slack, first.slack);
        CHECK(memcmp(&now.mask, &first.mask, 8) == 0);
        CHECK(now.alternate.ss_sp == first.alternate.ss_sp && now.alternate.ss_size == first.alternate.ss_size &&
              now.alternate.ss_flags == first.alternate.ss_flags);
    }
    return NULL;
}

int main(void)
{
    guest_begin();
    pthread_t threads[THREADS];
    for (long i = 1; i < THREADS; i++)
        threads[i] = guest_thread(work, (void *)i);
    work((void *)0L);
    for (int i = 1; i < THREADS; i++)
        guest_join(threads[i]);
    printf("attributes ok\n");
    guest_end();
}
