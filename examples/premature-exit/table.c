/* Bypass of a premature exit (WO 97/00476 FIG. 10).
 *
 * Builds a large table block by block. When there is no memory for the next block, the
 * program does not lose what it has: it takes a checkpoint before it exits. Started again
 * under a larger limit it comes back behind that checkpoint and goes on.
 *
 *     table BLOCKS          (4 MiB each)
 */
#include "ckpt.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK (4u << 20)

static uint64_t *new_block(long index)
{
    uint64_t *block;
    while (!(block = malloc(BLOCK))) {
        fprintf(stderr, "no memory for block %ld\n", index);
        if (ckpt_checkpoint(1) <= 0)
            exit(1);
        /* Here begins the recovery code: the process is a new one, its limits too. */
        fprintf(stderr, "back, to try block %ld again\n", index);
    }
    return block;
}

int main(int argc, char **argv)
{
    long blocks = argc > 1 ? atol(argv[1]) : 64;
    uint64_t **table = malloc(blocks * sizeof *table);
    uint64_t state = 88172645463325252u, sum = 0;
    fprintf(stderr, "begun\n");
    for (long i = 0; i < blocks; i++) {
        table[i] = new_block(i);
        for (size_t k = 0; k < BLOCK / 8; k++) {
            state ^= state << 13, state ^= state >> 7, state ^= state << 17;
            table[i][k] = state;
        }
    }
    for (long i = 0; i < blocks; i++)
        for (size_t k = 0; k < BLOCK / 8; k++)
            sum = sum * 31 + table[i][k];
    printf("%ld blocks, sum %016llx\n", blocks, (unsigned long long)sum);
    return 0;
}
