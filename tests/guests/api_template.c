/* A template: reads from `in` and `data`, writes to `out`, all in its directory, behind the
 * checkpoint. Its own life ends at the checkpoint. */
#include "guest.h"

#include "ckpt.h"

int main(void)
{
    int in = open("in", O_RDONLY), data = open("data", O_RDONLY);
    int out = open("out", O_WRONLY | O_CREAT | O_TRUNC, 0640);
    CHECK(in >= 0 && data >= 0 && out >= 0);
    CHECK(write(out, "head", 4) == 4);
    int result = ckpt_checkpoint(1);
    CHECK(result >= 0);
    if (result == 0)
        return 3;
    char text[64];
    ssize_t n = read(in, text, sizeof text);
    CHECK(n > 0 && write(1, text, n) == n && write(out, text, n) == n);
    return 0;
}
