/* What a rollback refuses (FIG. 8A, "protected variables valid?" and the rest), each
 * before anything is touched: the program goes on, and a good call works after it. */
#include "guest.h"

#include "ckpt.h"
#include <sys/wait.h>
#include <ucontext.h>

static volatile long global = 1;
static const long constant = 4711;

static void refused(int id, int value, void *at, size_t len, int error)
{
    struct ckpt_region region = {at, len};
    long before = global;
    errno = 0;
    int result = ckpt_rollback(id, value, len ? &region : NULL, len ? 1 : 0);
    CHECK_EQ(result, -1);
    CHECK_EQ(errno, error);
    CHECK_EQ(global, before);
}

static __attribute__((noinline)) int deeper(void)
{
    /* A frame that was not there at the checkpoint. */
    volatile long frame[512];
    frame[0] = 1;
    refused(0, 1, (void *)&frame[0], sizeof(long), EFAULT);
    return (int)frame[0];
}

static __attribute__((noinline)) int shallow(void)
{
    /* One that lies where the library's own frames were, inside ckpt_checkpoint. */
    volatile char frame[64];
    frame[0] = 1;
    refused(5, 1, (void *)frame, sizeof frame, EFAULT);
    return frame[0];
}

/* The same on a stack that nobody knows for one: the rollback wrote over the library's own frames
 * and the program died. */
static ucontext_t outside, inside;

static __attribute__((noinline)) void dead_frame(size_t len)
{
    volatile char *frame = __builtin_alloca(len);
    memset((void *)frame, 0x55, len);
    refused(6, 1, (void *)frame, len, EFAULT);
}

static void coroutine(void)
{
    CHECK_EQ(ckpt_checkpoint(6), 0);
    for (size_t len = 64; len <= 1024; len *= 2)
        dead_frame(len);
}

static void in_a_coroutine(void)
{
    CHECK(getcontext(&inside) == 0);
    inside.uc_stack.ss_size = 1 << 18;
    inside.uc_stack.ss_sp = malloc(inside.uc_stack.ss_size);
    inside.uc_link = &outside;
    makecontext(&inside, coroutine, 0);
    CHECK(swapcontext(&outside, &inside) == 0);
}

static void make(const char *path)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    CHECK(fd >= 0 && write(fd, "text", 4) == 4);
    close(fd);
}

/* Redirections that lead nowhere: the input would be the one that was had already. */
static void redirections(void)
{
    CHECK(ckpt_redirect("misspelt", "input") == 0);
    refused(5, 1, NULL, 0, EINVAL);
    CHECK(ckpt_redirect("misspelt", "misspelt") == 0);
    CHECK(ckpt_redirect("input", "missing") == 0);
    refused(5, 1, NULL, 0, EIO);
    /* Made since: the rollback would remove it. */
    make("made");
    CHECK(ckpt_redirect("input", "made") == 0);
    refused(5, 1, NULL, 0, EIO);
    CHECK(access("made", R_OK) == 0);
    CHECK(ckpt_redirect("input", "input") == 0);
}

int main(void)
{
    guest_begin();
    /* -1 is the latest of any id for a rollback, others never were one. */
    for (int id = -1; id > -7; id -= 5) {
        errno = 0;
        CHECK_EQ(ckpt_checkpoint(id), -1);
        CHECK_EQ(errno, EINVAL);
    }
    make("input");
    int input = open("input", O_RDONLY | O_CLOEXEC);
    CHECK(input >= 0);
    refused(0, 1, NULL, 0, ENOENT);
    unsigned char *page = guest_map(12288, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(mprotect(page + 8192, 4096, PROT_NONE) == 0);
    in_a_coroutine();
    volatile int back = 0;
    int result = ckpt_checkpoint(5);
    if (result == 0)
        CHECK(ckpt_checkpoint(0) == 0 || back);
    if (!back) {
        global = 2;
        unsigned char *late = guest_map(4096, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        refused(3, 1, NULL, 0, ENOENT);
        refused(0, -1, NULL, 0, EINVAL);
        refused(-7, 1, NULL, 0, EINVAL);
        errno = 0;
        CHECK_EQ(ckpt_rollback(0, 1, NULL, 1), -1);
        CHECK_EQ(errno, EINVAL);
        errno = 0;
        CHECK_EQ(ckpt_rollback(0, 1, (void *)8, 1), -1);
        CHECK_EQ(errno, EFAULT);
        refused(0, 1, late, 8, EFAULT);
        refused(0, 1, (void *)&constant, sizeof constant, EFAULT);
        refused(0, 1, page + 8190, 16, EFAULT);
        refused(0, 1, (void *)16, 16, EFAULT);
        refused(0, 1, (void *)&global, (size_t)-1, EFAULT);
        CHECK_EQ(deeper(), 1);
        CHECK_EQ(shallow(), 1);
        redirections();
        CHECK(mprotect(page, 4096, PROT_NONE) == 0);
        refused(0, 1, page, 8, EFAULT);
        CHECK(mprotect(page, 4096, PROT_READ | PROT_WRITE) == 0);
        CHECK(ckpt_hold() == 0);
        refused(0, 1, NULL, 0, EAGAIN);
        CHECK(ckpt_release() == 0);
        int hold[2];
        CHECK(pipe(hold) == 0);
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            char c;
            close(hold[1]);
            _exit(read(hold[0], &c, 1) != 0);
        }
        refused(0, 1, NULL, 0, EAGAIN);
        close(hold[0]);
        close(hold[1]);
        CHECK_EQ(waitpid(child, NULL, 0), child);
        back = 1;
        global = 3;
        struct ckpt_region keep = {(void *)&back, sizeof back};
        ckpt_rollback(5, 0, &keep, 1);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    CHECK_EQ(result, 1);
    CHECK_EQ(global, 1);
    CHECK(access("made", R_OK) != 0);
    printf("errors ok\n");
    guest_end();
}
