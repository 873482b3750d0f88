/* Proves: no deadlock and no loss when threads are born and end all the time:
 * several threads create and join (and detach) others in a storm. */
#include "guest.h"

static long born;
static void *child(void *argument)
{
    /* By itself: pthread_detach by another thread, just while this one ends (glibc bug 19951),
     * looks at the descriptor once more when a new thread may have it already, and frees
     * that one's; a join then had the result of another thread in a bare run too. */
    if ((long)argument % 8 == 0)
        CHECK_EQ(pthread_detach(pthread_self()), 0);
    __atomic_add_fetch(&born, 1, __ATOMIC_SEQ_CST);
    return argument;
}
static void *storm(void *argument)
{
    for (long i = 0, n = guest_rounds() * 80; i < n; i++) {
        void *result;
        pthread_t thread = guest_thread(child, (void *)i);
        if (i % 8 == 0)
            continue;
        CHECK_EQ(pthread_join(thread, &result), 0);
        CHECK_EQ((long)result, i);
    }
    return argument;
}

int main(void)
{
    guest_begin();
    pthread_t threads[3];
    for (int i = 0; i < 3; i++)
        threads[i] = guest_thread(storm, NULL);
    for (int i = 0; i < 3; i++)
        guest_join(threads[i]);
    while (__atomic_load_n(&born, __ATOMIC_SEQ_CST) < 3 * guest_rounds() * 80)
        guest_sleep_ms(1);
    printf("thread storm ok\n");
    guest_end();
}
