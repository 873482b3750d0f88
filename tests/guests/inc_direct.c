/* Proves: memory that the kernel writes some time after it has looked the page up, or
 * through its protection, is in every generation: `direct` (reads with O_DIRECT), `vm`
 * (process_vm_writev on itself), `mem` (pwrite to /proc/self/mem). */
#include "guest.h"
#include <sys/uio.h>

#define PAGE 4096
enum { PAGES = 1024, SOURCES = 96, A_ROUND = 150 };

static unsigned char *memory, *source;
static int expected[PAGES];

static void direct(int page, int from)
{
    static int fd = -1;
    if (fd < 0) {
        CHECK((fd = open("data.bin", O_RDWR | O_CREAT | O_TRUNC, 0600)) >= 0);
        CHECK_EQ(write(fd, source, SOURCES * PAGE), SOURCES * PAGE);
        CHECK_EQ(fsync(fd), 0);
        CHECK_EQ(close(fd), 0);
        CHECK((fd = open("data.bin", O_RDONLY | O_DIRECT)) >= 0);
    }
    CHECK_EQ(pread(fd, memory + page * PAGE, PAGE, (off_t)from * PAGE), PAGE);
}

static void vm(int page, int from)
{
    struct iovec local = {source + from * PAGE, PAGE}, remote = {memory + page * PAGE, PAGE};
    CHECK_EQ(process_vm_writev(getpid(), &local, 1, &remote, 1, 0), PAGE);
}

static void mem(int page, int from)
{
    int fd = open("/proc/self/mem", O_WRONLY);
    CHECK(fd >= 0);
    CHECK_EQ(pwrite(fd, source + from * PAGE, PAGE, (off_t)(uintptr_t)(memory + page * PAGE)), PAGE);
    CHECK_EQ(close(fd), 0);
}

int main(int count, char **args)
{
    CHECK_EQ(count, 2);
    void (*fill)(int, int) = !strcmp(args[1], "direct") ? direct : !strcmp(args[1], "vm") ? vm : mem;
    guest_begin();
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    source = mmap(NULL, SOURCES * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    CHECK(memory != MAP_FAILED && source != MAP_FAILED);
    for (int i = 0; i < SOURCES * PAGE; i++)
        source[i] = (unsigned char)(i / PAGE + 1 + i % PAGE * 7);
    uint64_t filled = 0;
    ROUNDS(round)
    {
        for (int i = 0; i < A_ROUND; i++) {
            uint64_t random = guest_mix(filled++);
            int page = (int)(random % PAGES), from = (int)(random / PAGES % SOURCES);
            fill(page, from);
            expected[page] = from + 1;
        }
        for (int page = 0; page < PAGES; page++)
            if (expected[page])
                CHECK_EQ(memcmp(memory + page * PAGE, source + (expected[page] - 1) * PAGE, PAGE), 0);
            else
                CHECK_EQ(memory[page * PAGE], 0);
    }
    printf("%s ok\n", args[1]);
    guest_end();
}
