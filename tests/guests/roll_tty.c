/* Rollback and terminals: modes and window size are those of the checkpoint again, on a
 * terminal that stayed open, and on one that was closed since. */
#include "guest.h"

#include "ckpt.h"
#include <sys/ioctl.h>
#include <termios.h>

static volatile int rounds;

static int same(const struct termios *a, const struct termios *b)
{
    return a->c_lflag == b->c_lflag && a->c_oflag == b->c_oflag && a->c_iflag == b->c_iflag &&
           a->c_cflag == b->c_cflag && memcmp(a->c_cc, b->c_cc, sizeof a->c_cc) == 0;
}

int main(void)
{
    guest_begin();
    int master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    CHECK(master >= 0 && grantpt(master) == 0 && unlockpt(master) == 0);
    char name[64];
    CHECK(ptsname_r(master, name, sizeof name) == 0);
    int slave = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
    CHECK(slave >= 0);
    struct termios modes, now;
    CHECK(tcgetattr(slave, &modes) == 0);
    modes.c_lflag &= ~(ECHO | ISIG);
    modes.c_oflag &= ~OPOST;
    modes.c_cc[VEOL] = '#';
    CHECK(tcsetattr(slave, TCSANOW, &modes) == 0 && tcgetattr(slave, &modes) == 0);
    struct winsize size = {33, 101, 0, 0}, size_now;
    CHECK(ioctl(master, TIOCSWINSZ, &size) == 0);

    int result = ckpt_checkpoint(1);
    if (result < 0)
        FAIL("ckpt_checkpoint: errno %d", errno);
    CHECK_EQ(result, rounds);
    CHECK(isatty(slave) && tcgetattr(slave, &now) == 0);
    if (!same(&now, &modes))
        FAIL("after rollback %d the modes are others (lflag %x, not %x)", rounds, now.c_lflag,
             modes.c_lflag);
    CHECK(ioctl(slave, TIOCGWINSZ, &size_now) == 0);
    CHECK_EQ(size_now.ws_row, 33);
    CHECK_EQ(size_now.ws_col, 101);
    char back[64];
    CHECK_EQ(write(master, "line\n", 5), 5);
    CHECK_EQ(read(slave, back, sizeof back), 5);
    CHECK_EQ(write(slave, "answer\n", 7), 7);
    CHECK_EQ(read(master, back, sizeof back), 7);
    if (rounds < 3) {
        rounds++;
        struct termios raw = modes;
        cfmakeraw(&raw);
        raw.c_cc[VMIN] = 5;
        raw.c_lflag |= ECHO;
        CHECK(tcsetattr(slave, TCSANOW, &raw) == 0);
        struct winsize other = {10, 20, 0, 0};
        CHECK(ioctl(slave, TIOCSWINSZ, &other) == 0);
        if (rounds == 2)
            close(slave);
        if (rounds == 3) {
            close(slave);
            close(master);
        }
        struct ckpt_region keep = {(void *)&rounds, sizeof rounds};
        ckpt_rollback(1, rounds, &keep, 1);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    printf("%d times\n", rounds);
    guest_end();
}
