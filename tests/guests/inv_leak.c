/* Proves: many checkpoints (GUEST_CHECKPOINTS, default 1000, by ckpt_checkpoint where the
 * library is there) leave memory map, descriptors, threads and resident memory as they
 * were, within 1 %. */
#include "ckpt.h"
#include "guest.h"
#include <dirent.h>

static char text[1 << 20];
static long entries(const char *path)
{
    DIR *dir = opendir(path);
    CHECK(dir != NULL);
    long n = 0;
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}
static long lines_of_maps(void)
{
    long n = 0;
    CHECK(guest_slurp("/proc/self/maps", text, sizeof text) > 0);
    for (char *p = text; *p; p++)
        n += *p == '\n';
    return n;
}
static long resident_kb(void)
{
    CHECK(guest_slurp("/proc/self/status", text, sizeof text) > 0);
    return atol(strstr(text, "VmRSS:") + 6);
}
static long virtual_kb(void)
{
    CHECK(guest_slurp("/proc/self/status", text, sizeof text) > 0);
    return atol(strstr(text, "VmSize:") + 7);
}
/* A merge under way has memory of its own for a moment. */
static long least(long (*size)(void))
{
    long smallest = size();
    for (int i = 0; i < 20; i++) {
        guest_sleep_ms(5);
        long now = size();
        if (now < smallest)
            smallest = now;
    }
    return smallest;
}

static int near(long now, long before) { return labs(now - before) * 100 <= before || labs(now - before) <= 1; }

int main(void)
{
    guest_begin();
    const char *n_text = getenv("GUEST_CHECKPOINTS");
    long n = n_text ? atol(n_text) : 1000, taken = 0;
    unsigned char *memory = guest_map(32 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(memory, 0, 32 << 20); /* resident, and yet no weight in the images */
    long maps = 0, fds = 0, rss = 0, size = 0, threads = 0;
    for (long i = 0; i < n; i++) {
        memory[guest_mix(i) % 4096]++;
        int result = ckpt_checkpoint(0);
        if (result >= 0)
            taken++;
        else if (errno != ENOSYS)
            FAIL("checkpoint %ld: errno %d", i, errno);
        if (i == n / 20) {
            maps = least(lines_of_maps), fds = entries("/proc/self/fd"), rss = least(resident_kb);
            size = least(virtual_kb), threads = entries("/proc/self/task");
        }
    }
    long now = least(lines_of_maps);
    if (!near(now, maps))
        FAIL("%ld mappings, were %ld", now, maps);
    CHECK_EQ(entries("/proc/self/fd"), fds);
    CHECK_EQ(entries("/proc/self/task"), threads);
    /* Less is no leak. */
    if ((now = least(resident_kb)) > rss && !near(now, rss))
        FAIL("%ld KiB resident, were %ld", now, rss);
    if (!near(now = least(virtual_kb), size))
        FAIL("%ld KiB of address space, were %ld", now, size);
    fprintf(stderr, "%ld checkpoints taken, %ld mappings, %ld KiB resident\n", taken, maps, rss);
    printf("leak ok\n");
    guest_end();
}
