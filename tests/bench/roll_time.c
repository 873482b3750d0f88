/* How long a rollback takes: from the call of ckpt_rollback to the return of ckpt_checkpoint.
 * Arguments: MiB, permille dirtied before each, how often. Prints median and worst in us;
 * the median of touching the dirtied part again is apart (its pages come from the image). */
#include "../guests/guest.h"

#include "ckpt.h"

static struct {
    double at, took[1000], touch[1000];
    long n;
} kept;

static int ascending(const void *a, const void *b)
{
    return (*(double *)a > *(double *)b) - (*(double *)a < *(double *)b);
}

int main(int argc, char **argv)
{
    size_t len = (argc > 1 ? atol(argv[1]) : 100) << 20;
    long permille = argc > 2 ? atol(argv[2]) : 10, times = argc > 3 ? atol(argv[3]) : 50;
    volatile unsigned char *data =
        guest_map(len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    guest_fill((void *)data, len, 1);
    int result = ckpt_checkpoint(1);
    double now = guest_now();
    CHECK(result >= 0);
    if (result > 0)
        kept.took[kept.n++] = now - kept.at;
    size_t step = 4096 * 1000 / (permille ? permille : 1);
    for (size_t at = 0; permille && at < len; at += step)
        data[at]++;
    if (kept.n)
        kept.touch[kept.n - 1] = guest_now() - now;
    if (kept.n < times && kept.n < 1000) {
        struct ckpt_region keep = {&kept, sizeof kept};
        kept.at = guest_now();
        ckpt_rollback(1, 1, &keep, 1);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    qsort(kept.took, kept.n, sizeof(double), ascending);
    qsort(kept.touch, kept.n, sizeof(double), ascending);
    printf("%zu MiB, %ld permille: best %.0f us, median %.0f us, worst %.0f us; then touching them %.0f us\n",
           len >> 20, permille, kept.took[0] * 1e6, kept.took[kept.n / 2] * 1e6, kept.took[kept.n - 1] * 1e6,
           kept.touch[kept.n / 2] * 1e6);
    return 0;
}
