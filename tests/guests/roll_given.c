/* Takes a checkpoint and dies; started again with other standard descriptors, it goes back to
 * it from inside: it goes on with those of this start. */
#include "guest.h"

#include "ckpt.h"

int main(void)
{
    dprintf(1, "begin\n");
    int back = ckpt_checkpoint(1);
    if (back == 0) {
        dprintf(1, "0\n");
        raise(SIGKILL);
    }
    char line[16] = "";
    for (int n = 0; n < 15 && read(0, line + n, 1) == 1 && line[n] != '\n'; n++) {
    }
    line[strcspn(line, "\n")] = 0;
    dprintf(1, "%d reads %s\n", back, line);
    if (back == 1) {
        ckpt_rollback(1, 5, NULL, 0);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    dprintf(1, "end\n");
    return GUEST_END;
}
