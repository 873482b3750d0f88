/* A protected region of more than the library's own heap has room for, which is a small part of
 * a limited address space. */
#include "guest.h"

#include "ckpt.h"
#include <sys/resource.h>

int main(int argc, char **argv)
{
    if (argc < 2) {
        struct rlimit limit = {2ul << 30, 2ul << 30};
        CHECK(setrlimit(RLIMIT_AS, &limit) == 0);
        execl(argv[0], argv[0], "limited", NULL);
        FAIL("execl: %s", strerror(errno));
    }
    guest_begin();
    size_t len = 250ul << 20;
    unsigned char *large = guest_map(len, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    volatile int turn = 0;
    int result = ckpt_checkpoint(1);
    if (result == 0) {
        CHECK_EQ(turn, 0);
        large[0] = 1, large[len / 2] = 2, large[len - 1] = 3;
        struct ckpt_region keep[] = {{large, len}};
        ckpt_rollback(1, 1, keep, 1);
        FAIL("ckpt_rollback: %s", ckpt_strerror(errno));
    }
    CHECK_EQ(result, 1);
    CHECK_EQ(large[0], 1);
    CHECK_EQ(large[len / 2], 2);
    CHECK_EQ(large[len - 1], 3);
    CHECK_EQ(large[len / 2 + 4096], 0);
    printf("large ok\n");
    guest_end();
}
