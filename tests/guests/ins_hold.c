/* Proves: while ckpt_hold is in force (it nests) no checkpoint is taken; a word outside of
 * the image (a file written by plain calls) and a word in memory are changed under hold
 * and so never differ after a restore, though the process is killed at any instant. */
#include "ckpt.h"
#include "guest.h"

int main(void)
{
    guest_begin();
    for (long round = 0; round < guest_rounds() / 5; round++, guest_sleep_ms(10))
    {
        ckpt_hold();
        ckpt_hold();
        guest_note("held");
        guest_sleep_ms(20);
        CHECK(ckpt_release() == 0 || errno == ENOSYS);
        guest_sleep_ms(20);
        guest_note("released");
        CHECK(ckpt_release() == 0 || errno == ENOSYS);
    }
    printf("hold ok\n");
    guest_end();
}
