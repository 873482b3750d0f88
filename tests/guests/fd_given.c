/* Proves: descriptors that the starter provides are the new start's after a resume, at
 * the position of the checkpoint when they are the same file. One numbered line a round
 * goes to standard output and to descriptor 5 where there is one.
 *   fd_given            lines only
 *   fd_given input      reads a line of standard input each round and repeats it
 *   fd_given terminal   standard output is a terminal, whose modes stay what it set */
#include "guest.h"
#include <termios.h>

static void put(int fd, const char *line)
{
    size_t len = strlen(line);
    CHECK_EQ(write(fd, line, len), len);
}

int main(int argc, char **argv)
{
    guest_begin();
    int input = argc > 1 && strcmp(argv[1], "input") == 0;
    int terminal = argc > 1 && strcmp(argv[1], "terminal") == 0;
    int five = fcntl(5, F_GETFD) >= 0;
    struct termios modes, now;
    if (terminal) {
        CHECK(tcgetattr(1, &modes) == 0);
        modes.c_lflag &= ~(ECHO | ICANON);
        modes.c_oflag &= ~OPOST;
        modes.c_cc[VEOL2] = 'q';
        CHECK(tcsetattr(1, TCSANOW, &modes) == 0);
    }
    char line[256];
    ROUNDS(round)
    {
        snprintf(line, sizeof line, "%ld %llx\n", round, (unsigned long long)guest_mix(round));
        put(1, line);
        if (five)
            put(5, line);
        if (input) {
            memcpy(line, "in ", 3);
            size_t n = 3;
            while (n < sizeof line - 1 && line[n - 1] != '\n')
                CHECK_EQ(read(0, line + n++, 1), 1);
            line[n] = 0;
            put(1, line);
        }
        if (terminal) {
            CHECK(tcgetattr(1, &now) == 0);
            CHECK_EQ(now.c_lflag, modes.c_lflag);
            CHECK_EQ(now.c_oflag, modes.c_oflag);
            CHECK_EQ(now.c_cc[VEOL2], 'q');
        }
    }
    put(1, "given ok\n");
    guest_end();
}
