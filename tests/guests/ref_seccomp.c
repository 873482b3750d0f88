/* Proves: under a seccomp filter (which cannot be taken off) every checkpoint is refused
 * and the program runs to its end. */
#include "guest.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>

int main(void)
{
    guest_begin();
    guest_note("reason there");
    struct sock_filter allow_all[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog program = {1, allow_all};
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
    ROUNDS(round) CHECK_EQ(prctl(PR_GET_SECCOMP), 2);
    guest_note("reason goes");
    printf("seccomp ok\n");
    guest_end();
}
