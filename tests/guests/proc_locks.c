/* Proves: file locks (flock, POSIX, open file description) are held again after a restore:
 * a child that tries to take them fails, and the holder is who it was. mlock: the
 * locked amount comes back (mem_lockall: mlockall). */
#include "guest.h"
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/wait.h>

static long locked_kb(void)
{
    static char text[8192];
    CHECK(guest_slurp("/proc/self/status", text, sizeof text) > 0);
    return atol(strstr(text, "VmLck:") + 6);
}

/* In a child: 0 when every lock is held by someone else. */
static int try_all(void)
{
    int fd = open("locked.flock", O_RDWR);
    if (flock(fd, LOCK_SH | LOCK_NB) == 0 || errno != EWOULDBLOCK)
        return 1;
    fd = open("locked.posix", O_RDWR);
    struct flock lock = {.l_type = F_WRLCK, .l_start = 10, .l_len = 10};
    if (fcntl(fd, F_GETLK, &lock) != 0 || lock.l_type != F_WRLCK)
        return 2;
    if (lock.l_start != 10 || lock.l_len != 5)
        return 3;
    lock = (struct flock){.l_type = F_RDLCK, .l_start = 100, .l_len = 1};
    if (fcntl(fd, F_SETLK, &lock) != 0) /* the parent has a read lock here */
        return 4;
    lock = (struct flock){.l_type = F_WRLCK, .l_start = 100, .l_len = 200};
    if (fcntl(fd, F_GETLK, &lock) != 0 || lock.l_type != F_RDLCK || lock.l_start != 100 || lock.l_len != 50)
        return 6; /* and it is one: nobody else can write there */
    fd = open("locked.ofd", O_RDWR);
    lock = (struct flock){.l_type = F_RDLCK, .l_start = 0, .l_len = 0};
    if (fcntl(fd, F_OFD_SETLK, &lock) == 0)
        return 5;
    return 0;
}

int main(void)
{
    guest_begin();
    int a = open("locked.flock", O_RDWR | O_CREAT, 0600), b = open("locked.posix", O_RDWR | O_CREAT, 0600),
        c = open("locked.ofd", O_RDWR | O_CREAT, 0600);
    CHECK(a >= 0 && b >= 0 && c >= 0 && flock(a, LOCK_EX) == 0);
    struct flock lock = {.l_type = F_WRLCK, .l_start = 10, .l_len = 5};
    CHECK(fcntl(b, F_SETLK, &lock) == 0);
    lock = (struct flock){.l_type = F_RDLCK, .l_start = 100, .l_len = 50};
    CHECK(fcntl(b, F_SETLK, &lock) == 0);
    lock = (struct flock){.l_type = F_WRLCK};
    CHECK(fcntl(c, F_OFD_SETLK, &lock) == 0);
    struct rlimit limit;
    CHECK(getrlimit(RLIMIT_MEMLOCK, &limit) == 0);
    void *memory = guest_map(40960, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(limit.rlim_cur >= 40960 && mlock(memory, 40960) == 0);
    void *on_fault = guest_map(8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(mlock2(on_fault, 8192, 1) == 0);
    ROUNDS(round)
    {
        CHECK_EQ(locked_kb(), 48);
        if (round % 5 == 0) {
            pid_t child = fork();
            CHECK(child >= 0);
            if (child == 0)
                _exit(try_all());
            int status;
            CHECK_EQ(waitpid(child, &status, 0), child);
            CHECK_EQ(status, 0);
        }
        CHECK(flock(a, LOCK_EX | LOCK_NB) == 0);
    }
    printf("locks ok\n");
    guest_end();
}
