/* A template that reads the file named: says what it reads and what it was given, and dies
 * unless there is a file `end`. It goes back to the template once. */
#include "guest.h"

#include "ckpt.h"

int main(int argc, char **argv)
{
    CHECK_EQ(argc, 2);
    int in = open(argv[1], O_RDONLY | O_CLOEXEC);
    CHECK(in >= 0);
    int back = ckpt_checkpoint(1);
    CHECK(back >= 0);
    if (back == 0)
        raise(SIGKILL);
    char text[16] = "";
    CHECK(read(in, text, 15) > 0);
    const char *argument = ckpt_argument(0);
    dprintf(1, "%s with %s\n", text, argument ? argument : "nothing");
    if (back == 1)
        ckpt_rollback(1, 2, NULL, 0);
    if (access("end", F_OK) != 0)
        raise(SIGKILL);
    return GUEST_END;
}
