/* Proves: what belongs to the process comes back: working directory, umask, resource
 * limits, environment (as the program has changed it), locale, command line, name,
 * executable, and the prctl state: dumpable, no_new_privs, timer slack, death signal,
 * subreaper, THP switch; personality; rewritten argv (proc_privileges: keep capabilities). */
#include "guest.h"
#include <locale.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>

static char text[65536];

int main(int argc, char **argv)
{
    guest_begin();
    CHECK(argc >= 2);
    mkdir("deeper", 0700);
    CHECK(chdir("deeper") == 0);
    char cwd[4096], cwd_now[4096], exe[4096], exe_now[4096];
    CHECK(getcwd(cwd, sizeof cwd) != NULL);
    ssize_t exe_len = readlink("/proc/self/exe", exe, sizeof exe);
    CHECK(exe_len > 0);
    umask(027);
    struct rlimit limit = {321, 654}, core = {0, 12345}, now;
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    CHECK(setrlimit(RLIMIT_CORE, &core) == 0 || 1);
    CHECK(getrlimit(RLIMIT_CORE, &core) == 0);
    CHECK(setenv("GUEST_OWN", "a value", 1) == 0 && unsetenv("GUEST_TAKE_AWAY") == 0);
    const char *locale = setlocale(LC_ALL, "C.UTF-8");
    CHECK(locale != NULL);
    strcpy(argv[1], "rewritten"); /* what setproctitle does; the test gives a long word */
    long cmdline_len = guest_slurp("/proc/self/cmdline", text, sizeof text);
    static char cmdline[65536];
    memcpy(cmdline, text, cmdline_len + 1);
    CHECK(prctl(PR_SET_NAME, "guest-name") == 0);
    CHECK(prctl(PR_SET_DUMPABLE, 0) == 0);
    CHECK(prctl(PR_SET_DUMPABLE, 1) == 0);
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    CHECK(prctl(PR_SET_TIMERSLACK, 77777L) == 0);
    CHECK(prctl(PR_SET_PDEATHSIG, SIGUSR2) == 0);
    CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
    CHECK(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0);
    int persona = personality(0xffffffff);
    ROUNDS(round)
    {
        CHECK(getcwd(cwd_now, sizeof cwd_now) && strcmp(cwd, cwd_now) == 0);
        int old = umask(027);
        if (old != 027)
            FAIL("umask %o", old);
        CHECK(getrlimit(RLIMIT_NOFILE, &now) == 0 && now.rlim_cur == 321 && now.rlim_max == 654);
        CHECK(getrlimit(RLIMIT_CORE, &now) == 0 && now.rlim_cur == core.rlim_cur && now.rlim_max == core.rlim_max);
        CHECK(strcmp(getenv("GUEST_OWN"), "a value") == 0 && getenv("GUEST_TAKE_AWAY") == NULL);
        CHECK(strcmp(setlocale(LC_ALL, NULL), "C.UTF-8") == 0);
        CHECK(mblen("\xc3\xa4", 2) == 2);
        CHECK_EQ(readlink("/proc/self/exe", exe_now, sizeof exe_now), exe_len);
        CHECK(memcmp(exe, exe_now, exe_len) == 0);
        CHECK_EQ(guest_slurp("/proc/self/cmdline", text, sizeof text), cmdline_len);
        CHECK(memcmp(text, cmdline, cmdline_len) == 0);
        CHECK(guest_slurp("/proc/self/comm", text, sizeof text) > 0 && strcmp(text, "guest-name\n") == 0);
        CHECK_EQ(prctl(PR_GET_DUMPABLE), 1);
        CHECK_EQ(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), 1);
        CHECK_EQ(prctl(PR_GET_TIMERSLACK), 77777);
        int value = 0;
        CHECK(prctl(PR_GET_PDEATHSIG, &value) == 0 && value == SIGUSR2);
        CHECK(prctl(PR_GET_CHILD_SUBREAPER, &value) == 0 && value == 1);
        CHECK_EQ(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0), 1);
        CHECK_EQ(personality(0xffffffff), persona);
        /* The kernel still knows heap and stack by name. */
        CHECK(guest_slurp("/proc/self/maps", text, sizeof text) > 0);
        CHECK(strstr(text, "[stack]") && strstr(text, "[vdso]"));
        time_t clock = time(NULL); /* through the vdso */
        CHECK(clock > 1600000000);
    }
    printf("environment ok\n");
    guest_end();
}
