/* Proves: the robust lists come back: a thread that held robust mutexes (plain and
 * priority-inheriting) across checkpoints and then ends leaves EOWNERDEAD, and the
 * mutexes can be made consistent. Peers lose the list's registration. */
#include "guest.h"

static pthread_mutex_t mutex[2];
static int held, may_end;

static void *owner(void *argument)
{
    for (int i = 0; i < 2; i++)
        CHECK_EQ(pthread_mutex_lock(&mutex[i]), 0);
    __atomic_store_n(&held, 1, __ATOMIC_SEQ_CST);
    while (!__atomic_load_n(&may_end, __ATOMIC_SEQ_CST))
        guest_sleep_ms(5);
    return argument; /* without unlocking */
}

int main(void)
{
    guest_begin();
    for (int i = 0; i < 2; i++) {
        pthread_mutexattr_t attr;
        pthread_mutexattr_init(&attr);
        pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
        if (i == 1)
            pthread_mutexattr_setprotocol(&attr, PTHREAD_PRIO_INHERIT);
        CHECK_EQ(pthread_mutex_init(&mutex[i], &attr), 0);
    }
    for (int episode = 0; episode < 4; episode++) {
        held = may_end = 0;
        pthread_t thread = guest_thread(owner, NULL);
        while (!__atomic_load_n(&held, __ATOMIC_SEQ_CST))
            guest_sleep_ms(1);
        for (long round = 0; round < guest_rounds() / 4; round++) {
            CHECK_EQ(pthread_mutex_trylock(&mutex[round % 2]), EBUSY);
            void *head;
            size_t len;
            CHECK(syscall(SYS_get_robust_list, 0, &head, &len) == 0 && head != NULL);
            guest_sleep_ms(10);
        }
        __atomic_store_n(&may_end, 1, __ATOMIC_SEQ_CST);
        for (int i = 0; i < 2; i++) {
            CHECK_EQ(pthread_mutex_lock(&mutex[i]), EOWNERDEAD);
            CHECK_EQ(pthread_mutex_consistent(&mutex[i]), 0);
            CHECK_EQ(pthread_mutex_unlock(&mutex[i]), 0);
        }
        guest_join(thread);
    }
    printf("robust ok\n");
    guest_end();
}
