/* Proves: with a kernel AIO context (its ring is a mapping of the kernel's) a checkpoint is
 * refused and the program runs on; when it is destroyed checkpoints succeed. */
#include "guest.h"
#include <linux/aio_abi.h>

int main(void)
{
    guest_begin();
    aio_context_t context = 0;
    CHECK(syscall(SYS_io_setup, 16, &context) == 0);
    guest_note("reason there");
    int file = open("aio.dat", O_RDWR | O_CREAT, 0600);
    char data[512] = "aio";
    for (long i = 0; i < guest_rounds() / 2; i++) {
        struct iocb one = {.aio_fildes = file, .aio_lio_opcode = IOCB_CMD_PWRITE, .aio_buf = (uintptr_t)data, .aio_nbytes = sizeof data};
        struct iocb *list = &one;
        struct io_event event;
        CHECK_EQ(syscall(SYS_io_submit, context, 1, &list), 1);
        CHECK_EQ(syscall(SYS_io_getevents, context, 1, 1, &event, NULL), 1);
        CHECK_EQ(event.res, 512);
        guest_sleep_ms(10);
    }
    guest_note("reason goes");
    CHECK(syscall(SYS_io_destroy, context) == 0);
    guest_note("reason gone");
    ROUNDS(round) CHECK(pread(file, data, sizeof data, 0) == 512);
    printf("aio ok\n");
    guest_end();
}
