/* Proves: POSIX record locks are held after a restore on files that are mapped too: making
 * the mappings again opens and closes the file, and closing any descriptor of a file
 * drops every lock of the process on it. They have to be taken once more after that. */
#include "guest.h"
#include <sys/wait.h>

enum { FILES = 3 };

static const char *const names[FILES] = {"map.private", "map.shared", "map.both"};

/* In a child: 0 when another process holds exactly the lock that main() took. */
static int held(const char *name)
{
    int fd = open(name, O_RDWR);
    struct flock lock = {.l_type = F_WRLCK};
    if (fd < 0 || fcntl(fd, F_GETLK, &lock) != 0)
        return 1;
    if (lock.l_type != F_WRLCK || lock.l_start != 100 || lock.l_len != 200)
        return 2;
    lock = (struct flock){.l_type = F_WRLCK, .l_start = 250, .l_len = 1};
    return fcntl(fd, F_SETLK, &lock) == 0 ? 3 : 0;
}

int main(void)
{
    guest_begin();
    int fds[FILES];
    char *maps[FILES];
    for (int k = 0; k < FILES; k++) {
        fds[k] = open(names[k], O_RDWR | O_CREAT, 0600);
        CHECK(fds[k] >= 0 && ftruncate(fds[k], 8192) == 0);
        int flags = k == 0 ? MAP_PRIVATE : MAP_SHARED;
        maps[k] = guest_map(8192, PROT_READ | PROT_WRITE, flags, fds[k], 0);
        if (k == 2)
            maps[k] = guest_map(8192, PROT_READ | PROT_WRITE, MAP_PRIVATE, fds[k], 0);
        struct flock lock = {.l_type = F_WRLCK, .l_start = 100, .l_len = 200};
        CHECK(fcntl(fds[k], F_SETLK, &lock) == 0);
    }
    ROUNDS(round)
    {
        for (int k = 0; k < FILES; k++)
            maps[k][round % 4096] = (char)round;
        if (round % 5 == 0) {
            int k = round / 5 % FILES, status;
            pid_t child = fork();
            CHECK(child >= 0);
            if (child == 0)
                _exit(held(names[k]));
            CHECK_EQ(waitpid(child, &status, 0), child);
            CHECK_EQ(status, 0);
        }
    }
    printf("locks on mapped files ok\n");
    guest_end();
}
