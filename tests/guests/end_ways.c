/* Ends in the way that its argument names, once it has worked for a while: the test looks at
 * what is left in the store, and at the status that the starter ends with. */
#include "guest.h"

static void *last_thread(void *argument)
{
    guest_sleep_ms(50);
    return argument;
}

int main(int argc, char **argv)
{
    guest_begin();
    CHECK(argc == 2);
    ROUNDS(round) CHECK(getppid() > 0);
    const char *way = argv[1];
    int is(const char *name) { return strcmp(way, name) == 0; }
    if (is("return"))
        return 0;
    if (is("exit"))
        exit(0);
    if (is("_exit"))
        _exit(0);
    if (is("quick_exit"))
        quick_exit(0);
    if (is("exit_group"))
        syscall(SYS_exit_group, 0);
    if (is("last_thread")) {
        guest_thread(last_thread, NULL);
        pthread_exit(NULL);
    }
    if (is("exec"))
        execl("/bin/true", "true", NULL);
    if (is("exec_false"))
        execl("/bin/false", "false", NULL);
    if (is("three"))
        exit(3);
    if (is("term"))
        raise(SIGTERM);
    if (is("abort"))
        abort();
    FAIL("no such end: %s", way);
}
