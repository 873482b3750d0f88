/* Files without a name (unlinked, memfd) that are mapped shared and writable, and open: by a lower
 * number to read only, or to read only at all. It is killed behind its checkpoint; then it comes
 * back there, and goes back, three times. */
#include "guest.h"

#include "ckpt.h"

#define FILES 4
static char *map[FILES];
static int reader[FILES], writer[FILES];

static void make(int k)
{
    int file = -1;
    if (k % 2)
        file = memfd_create("readers", MFD_CLOEXEC);
    else {
        file = open("nameless", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        CHECK(file >= 0 && unlink("nameless") == 0);
    }
    CHECK(file >= 0 && ftruncate(file, 8192) == 0);
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    writer[k] = fcntl(file, F_DUPFD_CLOEXEC, 100);
    CHECK(writer[k] >= 100);
    close(file);
    snprintf(path, sizeof path, "/proc/self/fd/%d", writer[k]);
    reader[k] = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(reader[k] >= 0 && reader[k] < 100);
    map[k] = guest_map(8192, PROT_READ | PROT_WRITE, MAP_SHARED, writer[k], 0);
    map[k][0] = map[k][5000] = 'a';
    if (k >= 2) {
        close(writer[k]);
        writer[k] = -1;
    }
}

int main(void)
{
    guest_begin();
    for (int k = 0; k < FILES; k++)
        make(k);
    int result = ckpt_checkpoint(1);
    if (result == 0)
        kill(getpid(), SIGKILL);
    for (int k = 0; k < FILES; k++) {
        char c;
        CHECK(map[k][0] == 'a' && map[k][5000] == 'a');
        map[k][5000] = 'b';
        CHECK_EQ(pread(reader[k], &c, 1, 5000), 1);
        CHECK_EQ(c, 'b');
        CHECK(pwrite(reader[k], "x", 1, 1) < 0);
        if (writer[k] >= 0) {
            CHECK_EQ(pwrite(writer[k], "w", 1, 1), 1);
            CHECK_EQ(map[k][1], 'w');
        }
    }
    if (result < 4) {
        ckpt_rollback(1, result + 1, NULL, 0);
        FAIL("ckpt_rollback: errno %d", errno);
    }
    printf("readers ok\n");
    guest_end();
}
