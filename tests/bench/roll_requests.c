/* Requests that are each done from the same state: a loop in which the process goes back after every so many requests,
 * beside the same loop that never does. Arguments: requests, thousands of steps of work in each, pages of the
 * 16 MiB state that each writes, go back after so many (0: never). Prints us a request. */
#include "../guests/guest.h"

#include "ckpt.h"

#define STATE (16ul << 20)

static struct {
    double begun;
    uint64_t sum;
    long done;
} kept;

static void request(unsigned char *state, long number, long steps, long pages)
{
    uint64_t x = guest_mix(number + 1);
    for (long k = 0; k < pages; k++) {
        x = guest_mix(x);
        state[x % STATE]++;
    }
    for (long k = 0; k < steps; k++) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        if (k % 64 == 0)
            x += state[x % STATE];
    }
    kept.sum += x;
    kept.done++;
}

int main(int argc, char **argv)
{
    CHECK(argc == 5);
    long requests = atol(argv[1]), steps = atol(argv[2]) * 1000, pages = atol(argv[3]), every = atol(argv[4]);
    unsigned char *state = guest_map(STATE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    guest_fill(state, STATE, 1);
    if (every) {
        int back = ckpt_checkpoint(1);
        CHECK(back >= 0);
    }
    if (kept.begun == 0)
        kept.begun = guest_now();
    while (kept.done < requests) {
        request(state, kept.done, steps, pages);
        if (every && kept.done < requests && kept.done % every == 0) {
            struct ckpt_region keep = {&kept, sizeof kept};
            ckpt_rollback(1, 1, &keep, 1);
            FAIL("ckpt_rollback: errno %d", errno);
        }
    }
    CHECK(kept.sum != 0);
    printf("%.1f\n", (guest_now() - kept.begun) / requests * 1e6);
    return 0;
}
