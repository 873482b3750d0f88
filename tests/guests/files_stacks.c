/*
 * Modifies files on small stacks: `co` a coroutine's of 16 KiB, `alt` a signal handler's of as
 * much, `thread` that of a thread of PTHREAD_STACK_MIN, `aio` those of aio_write. Takes a
 * checkpoint, modifies them, looks whether the memory beside the stack is what it was, and dies by
 * SIGKILL; resumed, it finds the files as they were and ends with 73.
 */
#include "ckpt.h"
#include "guest.h"
#include <aio.h>
#include <limits.h>
#include <ucontext.h>

enum { STACK = 16384, SIDE = 65536, SIZE = 20000 };
/* A stack that is used up goes on into what lies below it. */
static struct {
    unsigned char before[SIDE], stack[STACK];
} area __attribute__((aligned(4096)));
static const char *const names[] = {"f", "g", "h", "i", "j"};
static int held;
static ucontext_t here, there;

static void content(const char *name, char *into)
{
    memset(into, name[0], SIZE);
}

static void make(void)
{
    static char bytes[SIZE];
    for (int i = 0; i < 5; i++) {
        content(names[i], bytes);
        int fd = open(names[i], O_WRONLY | O_CREAT | O_TRUNC, 0644);
        CHECK_EQ(write(fd, bytes, SIZE), SIZE);
        close(fd);
    }
    CHECK(mkdir("empty", 0755) == 0);
}

static void verify(void)
{
    static char wanted[SIZE], got[SIZE + 1];
    for (int i = 0; i < 5; i++) {
        content(names[i], wanted);
        int fd = open(names[i], O_RDONLY);
        CHECK(fd >= 0);
        CHECK_EQ(read(fd, got, sizeof got), SIZE);
        CHECK(memcmp(wanted, got, SIZE) == 0);
        struct stat now;
        CHECK(fstat(fd, &now) == 0);
        CHECK_EQ(now.st_mode & 07777, 0644);
        close(fd);
    }
    CHECK(access("new", F_OK) == -1 && access("dir", F_OK) == -1 && access("empty", F_OK) == 0);
}

static void modify(void)
{
    int fd = open("new", O_WRONLY | O_CREAT, 0600);
    CHECK(write(fd, "x", 1) == 1 && close(fd) == 0);
    CHECK(pwrite(held, "here", 4, 5000) == 4 && ftruncate(held, 9000) == 0);
    CHECK(mkdir("dir", 0755) == 0 && rename("g", "dir/g") == 0 && link("h", "dir/h") == 0);
    CHECK(unlink("h") == 0 && chmod("i", 0600) == 0 && truncate("dir/../j", 5) == 0 && rmdir("empty") == 0);
    fd = open("./dir/../j", O_WRONLY | O_TRUNC);
    CHECK(fd >= 0 && close(fd) == 0);
}

static void *in_thread(void *nothing)
{
    modify();
    return nothing;
}

static void handler(int signal)
{
    (void)signal;
    modify();
}

static void asynchronously(void)
{
    struct aiocb one = {.aio_fildes = held, .aio_buf = "here", .aio_nbytes = 4, .aio_offset = 5000};
    CHECK(aio_write(&one) == 0);
    while (aio_error(&one) == EINPROGRESS)
        usleep(1000);
    CHECK_EQ(aio_return(&one), 4);
}

int main(int argc, char **argv)
{
    const char *where = argc > 1 ? argv[1] : "";
    make();
    held = open("f", O_RDWR);
    memset(area.before, 0xaa, SIDE);
    if (ckpt_checkpoint(0) > 0) {
        verify();
        return 73;
    }
    if (strcmp(where, "co") == 0) {
        CHECK(getcontext(&there) == 0);
        there.uc_stack = (stack_t){.ss_sp = area.stack, .ss_size = STACK};
        there.uc_link = &here;
        makecontext(&there, modify, 0);
        CHECK(swapcontext(&here, &there) == 0);
    } else if (strcmp(where, "alt") == 0) {
        stack_t alternate = {.ss_sp = area.stack, .ss_size = STACK};
        struct sigaction action = {.sa_handler = handler, .sa_flags = SA_ONSTACK};
        CHECK(sigaltstack(&alternate, NULL) == 0 && sigaction(SIGUSR1, &action, NULL) == 0);
        CHECK(raise(SIGUSR1) == 0);
    } else if (strcmp(where, "thread") == 0) {
        pthread_attr_t small;
        pthread_t thread;
        CHECK(pthread_attr_init(&small) == 0 && pthread_attr_setstacksize(&small, PTHREAD_STACK_MIN) == 0);
        CHECK(pthread_create(&thread, &small, in_thread, NULL) == 0 && pthread_join(thread, NULL) == 0);
    } else
        asynchronously();
    int touched = 0;
    for (int i = SIDE - 1; i >= 0; i--)
        if (area.before[i] != 0xaa)
            touched = SIDE - i;
    CHECK_EQ(touched, 0);
    kill(getpid(), SIGKILL);
}
