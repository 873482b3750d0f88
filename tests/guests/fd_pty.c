/* Proves: a pseudo-terminal whose both ends are in the process comes back with its modes,
 * its window size and as what /dev/tty-like calls say it is, and bytes still pass through
 * its line discipline in both directions. A master whose slave has been closed is at its end: after a
 * restore it was silent, and who reads from it until the end of a program waited for ever. */
#include "guest.h"
#include <poll.h>
#include <sys/ioctl.h>
#include <termios.h>

int main(void)
{
    guest_begin();
    int master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    CHECK(master >= 0 && grantpt(master) == 0 && unlockpt(master) == 0);
    char name[64];
    CHECK(ptsname_r(master, name, sizeof name) == 0);
    int slave = open(name, O_RDWR | O_NOCTTY);
    CHECK(slave >= 0);
    struct termios modes, now;
    CHECK(tcgetattr(slave, &modes) == 0);
    modes.c_lflag &= ~(ECHO | ISIG);
    modes.c_oflag &= ~OPOST;
    modes.c_cc[VEOL] = '#';
    CHECK(tcsetattr(slave, TCSANOW, &modes) == 0);
    CHECK(tcgetattr(slave, &modes) == 0);
    struct winsize size = {33, 101, 0, 0}, size_now;
    CHECK(ioctl(master, TIOCSWINSZ, &size) == 0);
    int ended = posix_openpt(O_RDWR | O_NOCTTY), fresh = posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK);
    CHECK(ended >= 0 && fresh >= 0 && grantpt(ended) == 0 && unlockpt(ended) == 0);
    CHECK(ptsname_r(ended, name, sizeof name) == 0 && close(open(name, O_RDWR | O_NOCTTY)) == 0);
    ROUNDS(round)
    {
        struct pollfd end[2] = {{ended, POLLIN, 0}, {fresh, POLLIN, 0}};
        CHECK_EQ(poll(end, 2, 0), 1);
        CHECK(end[0].revents & POLLHUP);
        CHECK(read(ended, name, 1) == -1 && errno == EIO);
        CHECK(read(fresh, name, 1) == -1 && errno == EAGAIN);
        char text[64], back[64];
        CHECK(isatty(slave));
        CHECK(tcgetattr(slave, &now) == 0);
        CHECK(now.c_lflag == modes.c_lflag && now.c_oflag == modes.c_oflag && now.c_iflag == modes.c_iflag &&
              now.c_cflag == modes.c_cflag && memcmp(now.c_cc, modes.c_cc, sizeof now.c_cc) == 0);
        CHECK(ioctl(slave, TIOCGWINSZ, &size_now) == 0 && size_now.ws_row == 33 && size_now.ws_col == 101);
        int n = snprintf(text, sizeof text, "line %ld\n", round);
        CHECK_EQ(write(master, text, n), n);
        CHECK_EQ(read(slave, back, sizeof back), n);
        CHECK(memcmp(text, back, n) == 0);
        CHECK_EQ(write(slave, text, n), n);
        CHECK_EQ(read(master, back, sizeof back), n);
        CHECK(memcmp(text, back, n) == 0);
    }
    printf("pty ok\n");
    guest_end();
}
