/* Many rollbacks in a row (arguments: how many, threads, MiB touched): resident memory, mappings and descriptors do not
 * grow, nothing is lost. The checkpoint is a clean state, what comes after it leaks. */
#include "guest.h"

#include "ckpt.h"
#include <dirent.h>

static volatile long done;
static volatile double first[3];

static long count(const char *path)
{
    long n = 0;
    DIR *dir = opendir(path);
    CHECK(dir != NULL);
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

static long lines(const char *path)
{
    static char text[1 << 20];
    long n = 0, len = guest_slurp(path, text, sizeof text);
    for (long k = 0; k < len; k++)
        n += text[k] == '\n';
    return n;
}

static long resident(void)
{
    char text[4096];
    long size, pages;
    CHECK(guest_slurp("/proc/self/statm", text, sizeof text) > 0);
    CHECK_EQ(sscanf(text, "%ld %ld", &size, &pages), 2);
    return pages;
}

static void *idle(void *arg)
{
    for (;;)
        guest_sleep_ms(1000);
    return arg;
}

int main(int argc, char **argv)
{
    guest_begin();
    long times = argc > 1 ? atol(argv[1]) : 1000;
    long threads = argc > 2 ? atol(argv[2]) : 0;
    size_t len = (argc > 3 ? atol(argv[3]) : 4) << 20;
    unsigned char *data = guest_map(len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    guest_fill(data, len, 1);
    for (long k = 0; k < threads; k++)
        guest_thread(idle, NULL);
    guest_sleep_ms(10);
    static volatile double begun, clean[3];
    int result = ckpt_checkpoint(2);
    if (result < 0)
        FAIL("ckpt_checkpoint: errno %d", errno);
    CHECK_EQ(result, done);
    CHECK(guest_holds(data, len, 1));
    double now[3] = {resident(), lines("/proc/self/maps"), count("/proc/self/fd")};
    if (done == 20)
        for (int k = 0; k < 3; k++)
            clean[k] = now[k];
    if (done >= 20) {
        if (now[0] > clean[0] * 1.01 + 16 || now[1] > clean[1] + 2 || now[2] != clean[2])
            FAIL("after %ld: %g pages, %g mappings, %g descriptors; after 20 it was %g, %g, %g", done,
                 now[0], now[1], now[2], clean[0], clean[1], clean[2]);
    }
    if (begun == 0)
        begun = guest_now();
    if (done < times) {
        done++;
        char *leak = malloc(100000);
        memset(leak, (int)done, 100000);
        CHECK(open("/dev/null", O_RDONLY) >= 0);
        guest_map(65536, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(data, 0, len / 100);
        struct ckpt_region keep[] = {
            {(void *)&done, sizeof done},
            {(void *)&begun, sizeof begun},
            {(void *)clean, sizeof clean},
        };
        ckpt_rollback(2, (int)done, keep, 3);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    fprintf(stderr, "%ld rollbacks in %.3f s\n", done, guest_now() - begun);
    printf("%ld rollbacks\n", done);
    guest_end();
}
