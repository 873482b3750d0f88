/* Says whether the system runs it in secure mode (set-uid), whether the library was loaded into
 * it all the same, and how many threads it has: in secure mode the library does nothing. */
#define _GNU_SOURCE
#include <dirent.h>
#include <link.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <unistd.h>

static int look(struct dl_phdr_info *info, size_t size, void *found)
{
    (void)size;
    *(int *)found |= info->dlpi_name && strstr(info->dlpi_name, "libmemusage") != NULL;
    return 0;
}

int main(void)
{
    int loaded = 0, threads = 0;
    dl_iterate_phdr(look, &loaded);
    usleep(300000); /* time for a checkpoint */
    DIR *tasks = opendir("/proc/self/task");
    while (tasks && readdir(tasks))
        threads++;
    printf("secure %lu loaded %d threads %d\n", getauxval(AT_SECURE), loaded, threads - 2);
    return 0;
}
