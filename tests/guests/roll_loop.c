/* Goes round until it was rolled back from outside (argument: how often), then says what
 * ckpt_checkpoint had returned. Each round is one more line in the file `rounds`. */
#include "guest.h"

#include "ckpt.h"

int main(int argc, char **argv)
{
    guest_begin();
    int wanted = argc > 1 ? atoi(argv[1]) : 1;
    int own = argc > 2; /* its own checkpoint; else the clock's */
    int values[16], count = 0;
    guest_note("ready");
    /* The values are in a file that is excluded. */
    int fd = open("values", O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    CHECK(fd >= 0);
    int result = own ? ckpt_checkpoint(9) : 0;
    CHECK(result >= 0);
    if (result > 0) {
        CHECK_EQ(lseek(fd, 0, SEEK_END) % sizeof result, 0);
        CHECK_EQ(write(fd, &result, sizeof result), sizeof result);
        guest_note("back");
    }
    ssize_t n = pread(fd, values, sizeof values, 0);
    CHECK(n >= 0);
    count = n / sizeof values[0];
    for (long round = 0; count < wanted; round++) {
        int log = open("rounds", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        CHECK(log >= 0 && write(log, "x", 1) == 1);
        struct stat st;
        CHECK(fstat(log, &st) == 0);
        CHECK_EQ(st.st_size, round + 1);
        close(log);
        guest_sleep_ms(5);
    }
    for (int k = 0; k < count; k++)
        printf("%d ", values[k]);
    printf("\n");
    guest_end();
}
