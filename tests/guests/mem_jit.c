/* Proves: code made at run time survives (executable pages, one kept from the start
 * and one rewritten each round through a second, writable view). */
#include "guest.h"

#if defined(__x86_64__)
typedef long code_fn(void);

/* mov $imm64,%rax; ret */
static void emit(unsigned char *at, long value)
{
    at[0] = 0x48;
    at[1] = 0xb8;
    memcpy(at + 2, &value, 8);
    at[10] = 0xc3;
}

int main(void)
{
    guest_begin();
    unsigned char *old = guest_map(4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < 100; i++)
        emit(old + i * 16, i * 1234567891011L);
    CHECK(mprotect(old, 4096, PROT_READ | PROT_EXEC) == 0);
    int fd = memfd_create("jit", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, 4096) == 0);
    unsigned char *writable = guest_map(4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    unsigned char *runs = guest_map(4096, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
    close(fd);
    unsigned char *rwx = guest_map(4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ROUNDS(round)
    {
        for (int i = 0; i < 100; i++)
            CHECK_EQ(((code_fn *)(void *)(old + i * 16))(), i * 1234567891011L);
        emit(writable, round * 3);
        CHECK_EQ(((code_fn *)(void *)runs)(), round * 3);
        emit(rwx + round % 200 * 16, round);
        CHECK_EQ(((code_fn *)(void *)(rwx + round % 200 * 16))(), round);
    }
    printf("jit ok\n");
    guest_end();
}
#else
#error "write the code generator of this architecture"
#endif
