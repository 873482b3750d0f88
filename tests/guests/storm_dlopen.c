/* Proves: no deadlock with the loader's lock: threads open, use and close libraries as
 * fast as they can while others look up symbols and throw through dl_iterate_phdr. */
#include "guest.h"
#include <dlfcn.h>
#include <link.h>

static int object(struct dl_phdr_info *info, size_t size, void *count)
{
    (void)info, (void)size;
    ++*(int *)count;
    return 0;
}
static void *storm(void *argument)
{
    const char *path = getenv("GUEST_PLUGIN");
    CHECK(path != NULL);
    for (long i = 0, n = guest_rounds() * 60; i < n; i++) {
        void *library = dlopen(argument ? "libm.so.6" : path, i % 2 ? RTLD_NOW : RTLD_LAZY);
        CHECK(library != NULL);
        CHECK(dlsym(library, argument ? "sin" : "plugin_count") != NULL);
        int objects = 0;
        dl_iterate_phdr(object, &objects);
        CHECK(objects >= 3);
        CHECK(dlclose(library) == 0);
    }
    return NULL;
}

int main(void)
{
    guest_begin();
    pthread_t threads[3];
    for (long i = 0; i < 3; i++)
        threads[i] = guest_thread(storm, (void *)(i % 2));
    for (int i = 0; i < 3; i++)
        guest_join(threads[i]);
    printf("dlopen storm ok\n");
    guest_end();
}
