/* Bypass of a long initialisation (WO 97/00476 FIG. 11).
 *
 * Parses a large file into a table, then answers the questions of an input file (a key on
 * each line) on standard output. The parsing is done once:
 *
 *     lookup DATA INPUT template      parse, checkpoint, end: the template for
 *         ckpt restore --template JOB --redirect INPUT=OTHER -- LABEL
 *     lookup DATA INPUT...            several inputs in one process, by rollback
 */
#include "ckpt.h"
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

struct entry {
    char key[24];
    double value;
    struct entry *next;
};

static struct entry **slots;
static uint64_t nslots, nentries;

static uint64_t hash(const char *key)
{
    uint64_t h = 14695981039346656037u;
    while (*key)
        h = (h ^ (unsigned char)*key++) * 1099511628211u;
    return h;
}

static void parse(const char *path)
{
    FILE *file = fopen(path, "r");
    if (!file)
        perror(path), exit(2);
    nslots = 1 << 20;
    slots = calloc(nslots, sizeof *slots);
    struct entry entry = {0};
    while (fscanf(file, "%23s %lf", entry.key, &entry.value) == 2) {
        struct entry **slot = &slots[hash(entry.key) % nslots];
        entry.next = *slot;
        *slot = malloc(sizeof entry);
        **slot = entry;
        nentries++;
    }
    fclose(file);
}

/* Plain reads: what stdio has read ahead would be in the checkpoint. */
static int next_key(int in, char *key, size_t size)
{
    size_t n = 0;
    char c;
    while (read(in, &c, 1) == 1 && c != '\n')
        if (n + 1 < size)
            key[n++] = c;
    key[n] = 0;
    return n > 0;
}

static void seed(int event, void *arg)
{
    unsigned fresh;
    (void)event, (void)arg;
    if (getrandom(&fresh, sizeof fresh, 0) == sizeof fresh)
        srandom(fresh);
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    int template = argc == 4 && !strcmp(argv[3], "template");
    fprintf(stderr, "parsing\n");
    parse(argv[1]);
    srandom(1);
    ckpt_on(CKPT_RESTORED, seed, NULL);
    ckpt_exclude("*");
    int in = open(argv[2], O_RDONLY);
    if (in < 0)
        perror(argv[2]), exit(2);
    ckpt_ready();
    int turn = ckpt_checkpoint(0);
    if (turn < 0)
        turn = 0;
    if (template && turn == 0)
        return 0;
    const char *label = ckpt_argument(0);
    printf("%s %ld of %lu:", label ? label : argv[2 + turn], random() % 1000000, nentries);
    char key[24];
    double sum = 0;
    while (next_key(in, key, sizeof key))
        for (struct entry *e = slots[hash(key) % nslots]; e; e = e->next)
            if (!strcmp(e->key, key))
                sum += e->value;
    printf(" %.3f\n", sum);
    fflush(stdout);
    if (!template && 3 + turn < argc) {
        ckpt_redirect(argv[2], argv[3 + turn]);
        ckpt_rollback(0, turn + 1, NULL, 0);
        perror("rollback");
        return 1;
    }
    return 0;
}
