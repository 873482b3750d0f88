/* Proves: a program that closes all descriptors it can think of goes on being tracked, and comes
 * back. Every few rounds it does so in another way: close_range to the end, the same with
 * CLOSE_RANGE_CLOEXEC and with CLOSE_RANGE_UNSHARE (in a program of one thread, where that unshares
 * nothing), closefrom, a loop over all numbers. What it had open it opens again, writes to it and
 * compares; a large arena, of which few pages change, shows whether generations stay increments. */
#include "guest.h"
#include <sys/resource.h>

#define PAGE 4096ul
#define PAGES 8192
#define CLOEXEC_ONLY 4u
#define UNSHARED 2u

static uint64_t model[PAGES];

static void close_all(int way)
{
    struct rlimit limit;
    switch (way) {
    case 0:
        CHECK(syscall(SYS_close_range, 3, ~0u, 0) == 0);
        break;
    case 1:
        CHECK(syscall(SYS_close_range, 3, ~0u, CLOEXEC_ONLY) == 0);
        break;
    case 2:
        CHECK(close_range(3, ~0u, UNSHARED) == 0);
        break;
    case 3:
        closefrom(3);
        break;
    default:
        CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
        for (long fd = 3, end = limit.rlim_cur > 65536 ? 65536 : limit.rlim_cur; fd < end; fd++)
            close(fd);
        /* Where descriptors of a library would be. */
        for (int fd = 1000000; fd < 1000100; fd++)
            close(fd);
    }
}

int main(void)
{
    guest_begin();
    unsigned char *arena = guest_map(PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (long i = 0; i < PAGES; i++)
        memcpy(arena + i * PAGE, &(uint64_t){model[i] = guest_mix(i) | 1}, 8);
    uint64_t dice = 5;
    long lines = 0;
    int fd = open("lines", O_RDWR | O_CREAT | O_EXCL, 0600);
    CHECK(fd >= 0);
    ROUNDS(round)
    {
        for (int n = 0; n < 20; n++) {
            dice = guest_mix(dice);
            long i = dice % PAGES;
            uint64_t *at = (uint64_t *)(arena + i * PAGE);
            CHECK_EQ(*at, model[i]);
            *at = model[i] = dice | 1;
        }
        if (round % 3 == 2) {
            int way = round / 3 % 5;
            close_all(way);
            if (way == 1)
                CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC && close(fd) == 0);
            CHECK(fcntl(fd, F_GETFD) == -1 && errno == EBADF);
            fd = open("lines", O_RDWR);
            CHECK_EQ(fd, 3);
        }
        char line[17], before[17];
        snprintf(line, sizeof line, "%015lx\n", (long)(dice >> 4));
        CHECK_EQ(pwrite(fd, line, 16, lines * 16), 16);
        CHECK_EQ(pread(fd, before, 16, lines * 16), 16);
        CHECK(memcmp(line, before, 16) == 0);
        struct stat st;
        lines++;
        CHECK(fstat(fd, &st) == 0);
        CHECK_EQ(st.st_size, lines * 16);
    }
    for (long i = 0; i < PAGES; i++)
        CHECK_EQ(*(uint64_t *)(arena + i * PAGE), model[i]);
    printf("closed %lx %ld\n", (long)dice, lines);
    guest_end();
}
