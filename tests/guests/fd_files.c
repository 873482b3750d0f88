/* Proves: descriptors of the file system come back at their numbers with position,
 * flags (O_APPEND, O_NONBLOCK, close-on-exec), shared offsets (dup), separate offsets
 * (two opens), directories in mid-read, unlinked files and O_TMPFILE with contents,
 * descriptors of /dev/null, /dev/zero, /dev/full, /proc/self/stat, O_PATH, high numbers,
 * and closed numbers stay closed. */
#include "guest.h"
#include <dirent.h>
#include <sys/resource.h>

static int flags_of(int fd) { return fcntl(fd, F_GETFL) & ~0100000; } /* the kernel's O_LARGEFILE */

int main(void)
{
    guest_begin();
    char data[20000];
    guest_fill(data, sizeof data, 1);
    int file = open("plain.dat", O_RDWR | O_CREAT, 0640);
    CHECK(file >= 0 && pwrite(file, data, sizeof data, 0) == sizeof data);
    int again = open("plain.dat", O_RDONLY | O_CLOEXEC);
    int shared = dup(file), high = fcntl(file, F_DUPFD_CLOEXEC, 700);
    int append = open("log.dat", O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600);
    CHECK(append >= 0 && write(append, data, 1000) == 1000);
    CHECK(lseek(append, 10, SEEK_SET) == 10);
    int gone = open("gone.dat", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (gone < 0 && errno == EEXIST) /* we were stopped between open and unlink */
        gone = open("gone.dat", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    CHECK(gone >= 0 && unlink("gone.dat") == 0 && write(gone, data, 15000) == 15000);
    int hollow = open("hollow.dat", O_RDWR | O_CREAT, 0600);
    CHECK(hollow >= 0 && unlink("hollow.dat") == 0 && pwrite(hollow, data, 4096, 1 << 30) == 4096);
    int temporary = open(".", O_RDWR | O_TMPFILE, 0600);
    if (temporary < 0)
        temporary = dup(gone); /* this file system has none */
    else
        CHECK(write(temporary, data, 15000) == 15000);
    int null = open("/dev/null", O_RDWR), zero = open("/dev/zero", O_RDONLY), full = open("/dev/full", O_WRONLY | O_NONBLOCK);
    int proc = open("/proc/self/status", O_RDONLY);
    int path = open("plain.dat", O_PATH | O_CLOEXEC);
    int direction = open(".", O_RDONLY | O_DIRECTORY);
    CHECK(null >= 0 && zero >= 0 && full >= 0 && proc >= 0 && path >= 0 && direction >= 0);
    mkdir("listed", 0700);
    for (int i = 0; i < 300; i++) {
        char name[64];
        snprintf(name, sizeof name, "listed/a-somewhat-long-file-name-%d", i);
        int made = open(name, O_CREAT | O_WRONLY, 0600);
        CHECK(made >= 0);
        close(made);
    }
    DIR *dir = opendir("listed");
    CHECK(dir != NULL);
    char seen[300] = {0};
    long listed = 0, position = 0;
    int closed = dup(null);
    close(closed);
    ROUNDS(round)
    {
        /* One more of the directory's entries each round, none twice, none left out. */
        for (int n = 0; n < (int)(301 / (guest_rounds() - 1)) + 1; n++) {
            struct dirent *entry = readdir(dir);
            if (entry && entry->d_name[0] != '.') {
                int i = atoi(strrchr(entry->d_name, '-') + 1);
                CHECK_EQ(seen[i]++, 0);
                listed++;
            }
        }
        CHECK_EQ(lseek(file, 0, SEEK_CUR), position);
        CHECK_EQ(lseek(shared, 0, SEEK_CUR), position);
        CHECK_EQ(lseek(high, 0, SEEK_CUR), position);
        CHECK_EQ(lseek(again, 0, SEEK_CUR), round % 100);
        char piece[56];
        int from = round % 3 == 0 ? file : round % 3 == 1 ? shared : high;
        CHECK_EQ(read(from, piece, sizeof piece), sizeof piece);
        CHECK(memcmp(piece, data + position, sizeof piece) == 0);
        position += sizeof piece;
        if (position > 19000)
            position = lseek(file, 0, SEEK_SET);
        CHECK(lseek(again, (round + 1) % 100, SEEK_SET) >= 0);
        CHECK_EQ(flags_of(file), O_RDWR);
        CHECK_EQ(flags_of(append), O_WRONLY | O_APPEND);
        CHECK_EQ(flags_of(full), O_WRONLY | O_NONBLOCK);
        CHECK_EQ(fcntl(file, F_GETFD), 0);
        CHECK_EQ(fcntl(again, F_GETFD), FD_CLOEXEC);
        CHECK_EQ(fcntl(high, F_GETFD), FD_CLOEXEC);
        CHECK_EQ(high, 700);
        CHECK(fcntl(closed, F_GETFD) == -1 && errno == EBADF);
        char back[15000];
        CHECK_EQ(pread(gone, back, sizeof back, 0), sizeof back);
        CHECK(memcmp(back, data, sizeof back) == 0);
        CHECK_EQ(lseek(gone, 0, SEEK_CUR), 15000);
        struct stat st;
        CHECK(fstat(gone, &st) == 0 && st.st_nlink == 0 && st.st_size == 15000);
        CHECK(fstat(hollow, &st) == 0 && st.st_size == (1 << 30) + 4096 && st.st_blocks < 1000);
        CHECK_EQ(pread(hollow, back, 4096, 1 << 30), 4096);
        CHECK(memcmp(back, data, 4096) == 0);
        CHECK_EQ(pread(temporary, back, sizeof back, 0), sizeof back);
        CHECK(memcmp(back, data, sizeof back) == 0);
        CHECK(fstat(path, &st) == 0 && S_ISREG(st.st_mode) && read(path, back, 1) == -1 && errno == EBADF);
        CHECK_EQ(flags_of(path) & O_PATH, O_PATH);
        CHECK(fstat(null, &st) == 0 && S_ISCHR(st.st_mode) && write(null, "x", 1) == 1 && read(null, back, 1) == 0);
        CHECK(read(zero, back, 8) == 8 && back[7] == 0 && write(full, "x", 1) == -1 && errno == ENOSPC);
        CHECK(faccessat(direction, "plain.dat", R_OK, 0) == 0);
        CHECK_EQ(lseek(proc, 0, SEEK_SET), 0);
        CHECK(read(proc, back, 100) > 50 && memcmp(back, "Name:", 5) == 0);
    }
    struct dirent *entry;
    while ((entry = readdir(dir)))
        if (entry->d_name[0] != '.')
            listed++;
    CHECK_EQ(listed, 300);
    CHECK(write(append, "end", 3) == 3 && lseek(append, 0, SEEK_CUR) >= 1003);
    printf("files ok\n");
    guest_end();
}
