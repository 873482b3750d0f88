/* Proves: with an io_uring a checkpoint is refused and the program runs on (a peer's
 * dies); when the ring is closed and unmapped checkpoints succeed. Where the kernel has
 * no io_uring for us the guest says so and does without. */
#include "guest.h"
#include <linux/io_uring.h>

int main(void)
{
    guest_begin();
    struct io_uring_params params = {0};
    int ring = syscall(SYS_io_uring_setup, 8, &params);
    void *sq = MAP_FAILED;
    size_t len = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    if (ring < 0) {
        fprintf(stderr, "no io_uring for this user on this kernel (errno %d): not tested\n", errno);
        guest_note("no reason");
    } else {
        sq = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQ_RING);
        CHECK(sq != MAP_FAILED);
        guest_note("reason there");
    }
    for (long i = 0; i < guest_rounds() / 2; i++) {
        if (ring >= 0)
            CHECK_EQ(syscall(SYS_io_uring_enter, ring, 0, 0, 0, NULL, 0), 0);
        guest_sleep_ms(10);
    }
    guest_note("reason goes");
    if (ring >= 0)
        CHECK(munmap(sq, len) == 0 && close(ring) == 0);
    guest_note("reason gone");
    ROUNDS(round) CHECK(fcntl(ring, F_GETFD) == -1);
    printf("io_uring ok\n");
    guest_end();
}
