/* Proves: a program with a SIGSEGV handler of its own (a garbage collector's write
 * barrier) goes on working: faults on its protected pages reach its handler with the
 * right address, on its alternate stack, and no fault of ours does. */
#include "guest.h"

#define PAGES 64
static unsigned char *heap;
static volatile long faults, expected;
static int slow;
static void barrier(int sig, siginfo_t *info, void *context)
{
    (void)sig, (void)context;
    unsigned char *at = info->si_addr;
    if (at < heap || at >= heap + PAGES * 4096)
        FAIL("a fault at %p, outside of the heap", (void *)at);
    faults++;
    for (volatile long wait = 0; slow && faults < 200 && wait < 2000000;)
        wait++; /* the first checkpoint finds it here */
    if (mprotect((void *)((uintptr_t)at & ~4095ul), 4096, PROT_READ | PROT_WRITE) != 0)
        FAIL("mprotect in the handler");
}

int main(int argc, char **argv)
{
    slow = argc > 1 && strcmp(argv[1], "slow") == 0;
    guest_begin();
    stack_t stack = {.ss_sp = malloc(65536), .ss_size = 65536};
    CHECK(sigaltstack(&stack, NULL) == 0);
    struct sigaction act = {.sa_sigaction = barrier, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    CHECK(sigaction(SIGSEGV, &act, NULL) == 0);
    heap = guest_map(PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char model[PAGES] = {0};
    ROUNDS(round)
    {
        CHECK(mprotect(heap, PAGES * 4096, PROT_READ) == 0); /* a new cycle of the collector */
        for (int n = 0; n < 10; n++) {
            int i = (guest_mix(round) + n * 5) % PAGES;
            int first = 1;
            for (int before = 0; before < n; before++)
                first &= (int)((guest_mix(round) + before * 5) % PAGES) != i;
            heap[i * 4096 + round % 4096]++; /* faults the first time in a cycle */
            expected += first;
            model[i]++;
            CHECK_EQ(faults, expected);
        }
    }
    long sum = 0, want = 0;
    for (int i = 0; i < PAGES; i++) {
        for (int j = 0; j < 4096; j++)
            sum += heap[i * 4096 + j];
        want += model[i];
    }
    CHECK_EQ(sum & 0xff, want & 0xff);
    printf("segv ok: %ld faults\n", faults);
    guest_end();
}
