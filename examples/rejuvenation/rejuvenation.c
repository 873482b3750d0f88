/* Memory rejuvenation (WO 97/00476 FIG. 12).
 *
 * A server loop that leaks. Every so many requests it goes back to the clean state before
 * its loop, with the number of the next request as the return value; its answers stay
 * written, since files are excluded.
 *
 *     rejuvenation REQUESTS EVERY
 */
#include "ckpt.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Serves one request, and loses 64 KiB over it. */
static unsigned long serve(long index)
{
    unsigned char *leaked = malloc(64 << 10);
    if (!leaked)
        abort();
    memset(leaked, (int)index, 64 << 10);
    unsigned long sum = index;
    for (size_t k = 0; k < 64 << 10; k++)
        sum += leaked[k];
    return sum;
}

static long resident_kib(void)
{
    FILE *status = fopen("/proc/self/status", "r");
    char line[256];
    long kib = 0;
    while (status && fgets(line, sizeof line, status))
        if (sscanf(line, "VmRSS: %ld", &kib) == 1)
            break;
    if (status)
        fclose(status);
    return kib;
}

static long most;

int main(int argc, char **argv)
{
    long requests = argc > 1 ? atol(argv[1]) : 1000;
    long every = argc > 2 ? atol(argv[2]) : 100;
    setvbuf(stdout, NULL, _IOLBF, 0);
    ckpt_exclude("*");
    int next = ckpt_checkpoint(0);
    if (next < 0)
        next = 0;
    for (long begin = next; next < requests;) {
        printf("%d %lu\n", next, serve(next));
        next++;
        if (next - begin == every) {
            long now = resident_kib();
            most = now > most ? now : most;
            struct ckpt_region keep = {&most, sizeof most};
            /* Only without the library does this come back, and the leak stays. */
            ckpt_rollback(0, next, &keep, 1);
        }
    }
    long now = resident_kib();
    fprintf(stderr, "most resident %ld KiB\n", now > most ? now : most);
    return 0;
}
