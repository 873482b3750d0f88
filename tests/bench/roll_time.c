/* How long a rollback takes: from the call of ckpt_rollback to the return of ckpt_checkpoint.
 * Arguments: MiB, permille dirtied before each, how often, files of 64 KiB in the working directory in
 * which 4 KiB are written over before each (each is undone). Prints median and worst in us;
 * the median of touching the dirtied part again is apart (its pages come from the image). */
#include "../guests/guest.h"

#include "ckpt.h"

static struct {
    double at, took[1000], touch[1000];
    long n;
} kept;

#define MOST_FILES 64
static int files[MOST_FILES];

static void make_files(long n)
{
    static char block[65536];
    for (long k = 0; k < n; k++) {
        char name[32];
        snprintf(name, sizeof name, "roll-file-%ld", k);
        files[k] = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
        CHECK(files[k] >= 0);
        CHECK_EQ(write(files[k], block, sizeof block), sizeof block);
    }
}

static void write_files(long n)
{
    char block[4096];
    memset(block, 'x', sizeof block);
    for (long k = 0; k < n; k++)
        CHECK_EQ(pwrite(files[k], block, sizeof block, 8192), sizeof block);
}

static int ascending(const void *a, const void *b)
{
    return (*(double *)a > *(double *)b) - (*(double *)a < *(double *)b);
}

int main(int argc, char **argv)
{
    size_t len = (argc > 1 ? atol(argv[1]) : 100) << 20;
    long permille = argc > 2 ? atol(argv[2]) : 10, times = argc > 3 ? atol(argv[3]) : 50;
    long nfiles = argc > 4 ? atol(argv[4]) : 0;
    CHECK(nfiles <= MOST_FILES);
    make_files(nfiles);
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
        write_files(nfiles);
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
