/* Writes to what it was given, or to a file of its own, around checkpoints that it asks for, and is
 * killed or ends behind them; started again it finds itself behind the last one. What it does says
 * its argument:
 *   freopen   fills standard output, leads it elsewhere for good, and goes back twice
 *   given     writes to standard output all the time
 *   ended     appends to `log` and ends with status 3
 *   threads   the same, while another thread still runs
 *   killed    the same, killed */
#include "ckpt.h"
#include "guest.h"

static void die(void)
{
    kill(getpid(), SIGKILL);
    pause();
}

/* What was given, by its name: the program does not have it open any more. */
static void scribble(const char *text, long at)
{
    int fd = open("out", O_RDWR | (at < 0 ? O_APPEND : 0));
    CHECK(fd >= 0);
    if (at >= 0)
        CHECK(lseek(fd, at, SEEK_SET) == at);
    CHECK_EQ(write(fd, text, strlen(text)), strlen(text));
    close(fd);
}

static void led_elsewhere(void)
{
    for (int k = 0; k < 2000; k++)
        printf("first %d\n", k);
    CHECK(freopen("second", "w", stdout) != NULL);
    printf("second\n");
    fflush(stdout);
    int result = ckpt_checkpoint(5);
    CHECK(result >= 0);
    if (result == 0)
        die();
    scribble("more\n", -1);
    printf("back once\n");
    fflush(stdout);
    result = ckpt_checkpoint(6);
    CHECK(result >= 0);
    if (result == 0) {
        scribble("JUNK", 4090);
        scribble("JUNK", 7);
        scribble("junk", -1);
        die();
    }
    printf("back twice\n");
    exit(GUEST_END);
}

static void given(void)
{
    CHECK_EQ(write(1, "a\n", 2), 2);
    int result = ckpt_checkpoint(5);
    CHECK(result >= 0);
    if (result == 0) {
        for (int k = 0; k < 3; k++)
            CHECK_EQ(write(1, "b\n", 2), 2);
        die();
    }
    CHECK_EQ(write(1, "c\n", 2), 2);
    exit(GUEST_END);
}

static void *waits(void *nothing)
{
    pause();
    return nothing;
}

static void ends(int threads, int killed)
{
    int fd = open("log", O_WRONLY | O_CREAT | O_APPEND, 0644);
    CHECK(fd >= 0);
    CHECK_EQ(write(fd, "a\n", 2), 2);
    pthread_t thread;
    if (threads)
        CHECK_EQ(pthread_create(&thread, NULL, waits, NULL), 0);
    int result = ckpt_checkpoint(5);
    CHECK(result >= 0);
    if (result == 0) {
        for (int k = 0; k < 3; k++)
            CHECK_EQ(write(fd, "b\n", 2), 2);
        if (killed)
            die();
        exit(3);
    }
    CHECK_EQ(write(fd, "c\n", 2), 2);
    exit(GUEST_END);
}

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    if (!strcmp(argv[1], "freopen"))
        led_elsewhere();
    if (!strcmp(argv[1], "given"))
        given();
    ends(!strcmp(argv[1], "threads"), !strcmp(argv[1], "killed"));
}
