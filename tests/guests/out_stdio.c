/* Proves: what stdio still holds at a checkpoint is written exactly once: lines of odd
 * length are printed with full buffering all through the run (the test compares them
 * with an undisturbed run's; standard output is a file), and standard input, a file read
 * through a buffer, goes on where it was. */
#include "guest.h"

int main(void)
{
    guest_begin();
    char line[256];
    long lines = 0;
    ROUNDS(round)
    {
        printf("%ld:%0*lx\n", round, (int)(round % 97), (unsigned long)guest_mix(round));
        if (fgets(line, sizeof line, stdin)) {
            CHECK_EQ(atol(line), lines);
            lines++;
        }
        if (round % 31 == 30)
            fflush(stdout);
    }
    printf("stdio ok: %ld\n", lines);
    guest_end();
}
