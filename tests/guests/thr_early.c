/* Proves: threads that a library started before main (and before libckpt.so's own
 * constructor) are restored like all others: there are exactly as many as before, and
 * their counts go on from where they were. */
#include "guest.h"
#include <dirent.h>

extern long early_count(int k) __attribute__((weak));

static int tasks(void)
{
    DIR *dir = opendir("/proc/self/task");
    CHECK(dir != NULL);
    int n = 0;
    for (struct dirent *e; (e = readdir(dir)) != NULL;)
        n += e->d_name[0] != '.';
    closedir(dir);
    return n;
}

int main(void)
{
    guest_begin();
    CHECK(early_count != NULL);
    int bare = tasks();
    long before[2] = {0, 0};
    ROUNDS(round)
    {
        for (int k = 0; k < 2; k++) {
            long now = early_count(k);
            CHECK(now >= before[k]);
            before[k] = now;
        }
        CHECK(abs(tasks() - bare) <= 1); /* the clock's thread comes with the first one */
    }
    for (int k = 0; k < 2; k++)
        CHECK(early_count(k) > 1000);
    printf("early threads ok\n");
    guest_end();
}
