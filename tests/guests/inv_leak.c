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
            maps = lines_of_maps(), fds = entries("/proc/self/fd"), rss = resident_kb();
            size = virtual_kb(), threads = entries("/proc/self/task");
        }
    }
    if (!near(lines_of_maps(), maps))
        FAIL("%ld mappings, were %ld", lines_of_maps(), maps);
    CHECK_EQ(entries("/proc/self/fd"), fds);
    CHECK_EQ(entries("/proc/self/task"), threads);
    if (!near(resident_kb(), rss))
        FAIL("%ld KiB resident, were %ld", resident_kb(), rss);
    if (!near(virtual_kb(), size))
        FAIL("%ld KiB of address space, were %ld", virtual_kb(), size);
    fprintf(stderr, "%ld checkpoints taken, %ld mappings, %ld KiB resident\n", taken, maps, rss);
    printf("leak ok\n");
    guest_end();
}
