/* Proves: no deadlock and no lost or invented signal in a storm of them: two threads
 * queue real-time signals to a third as quickly as it takes them, while timers fire. */
#include "guest.h"
#include <sys/time.h>

static pthread_t target;
static volatile long got, ticks;
static long sent, total;
static void on_rt(int sig) { (void)sig, __atomic_add_fetch(&got, 1, __ATOMIC_SEQ_CST); }
static void on_tick(int sig) { (void)sig, ticks++; }

static void *sender(void *argument)
{
    for (;;) {
        long n = __atomic_add_fetch(&sent, 1, __ATOMIC_SEQ_CST);
        if (n > total)
            return argument;
        union sigval v = {.sival_int = n};
        int error;
        while ((error = pthread_sigqueue(target, SIGRTMIN + n % 20, v)) == EAGAIN)
            guest_sleep_ms(1);
        CHECK_EQ(error, 0);
        while (n - __atomic_load_n(&got, __ATOMIC_SEQ_CST) > 50)
            sched_yield();
    }
}

int main(void)
{
    guest_begin();
    total = guest_rounds() * 200;
    struct sigaction act = {.sa_handler = on_rt, .sa_flags = SA_RESTART};
    for (int i = 0; i < 20; i++)
        CHECK(sigaction(SIGRTMIN + i, &act, NULL) == 0);
    act.sa_handler = on_tick;
    CHECK(sigaction(SIGALRM, &act, NULL) == 0);
    struct itimerval timer = {{0, 1000}, {0, 1000}};
    CHECK(setitimer(ITIMER_REAL, &timer, NULL) == 0);
    target = pthread_self();
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        threads[i] = guest_thread(sender, NULL);
    volatile uint64_t x = 1;
    while (__atomic_load_n(&got, __ATOMIC_SEQ_CST) < total)
        x = guest_mix(x);
    for (int i = 0; i < 2; i++)
        guest_join(threads[i]);
    guest_sleep_ms(20);
    CHECK_EQ(got, total);
    CHECK(ticks > 10);
    printf("signal storm ok\n");
    guest_end();
}
