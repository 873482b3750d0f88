/* Writes the round's number to `log` (opened each time), to `held` (open throughout) and to standard
 * output, and compares nothing: for tests of what is left out of a recovery. */
#include "guest.h"

int main(void)
{
    guest_begin();
    char line[32];
    int held = open("held", O_WRONLY | O_CREAT | O_TRUNC, 0644);
    CHECK(held >= 0);
    ROUNDS(round)
    {
        int n = snprintf(line, sizeof line, "%ld\n", round);
        int log = open("log", O_WRONLY | O_CREAT | O_APPEND, 0644);
        CHECK(log >= 0);
        CHECK_EQ(write(log, line, n), n);
        close(log);
        CHECK_EQ(write(held, line, n), n);
        CHECK_EQ(write(1, line, n), n);
    }
    guest_end();
}
