/* Proves: a library opened at run time comes back with its variables, its TLS and
 * its code, and dlopen, dlsym and dlclose go on working. $GUEST_PLUGIN is the library. */
#include "guest.h"
#include <dlfcn.h>
#include <math.h>

typedef int plugin_fn(void);

static plugin_fn *count, *tls;
static long calls_in_thread;
static void *other(void *argument)
{
    for (long i = 0; i < guest_rounds(); i++, guest_sleep_ms(10)) {
        CHECK(tls() >= 5);
        calls_in_thread++;
    }
    return argument;
}

int main(void)
{
    guest_begin();
    const char *path = getenv("GUEST_PLUGIN");
    CHECK(path != NULL);
    void *library = dlopen(path, RTLD_NOW);
    if (!library)
        FAIL("dlopen: %s", dlerror());
    count = (plugin_fn *)dlsym(library, "plugin_count");
    tls = (plugin_fn *)dlsym(library, "plugin_tls");
    CHECK(count && tls);
    pthread_t thread = guest_thread(other, NULL);
    ROUNDS(round)
    {
        CHECK_EQ(count(), round + 1);
        CHECK_EQ(tls(), 6 + round);
        void *math = dlopen("libm.so.6", RTLD_NOW);
        CHECK(math != NULL);
        double (*cosine)(double) = (double (*)(double))dlsym(math, "cos");
        CHECK(cosine && cosine(0.0) == 1.0);
        CHECK(dlclose(math) == 0);
        void *again = dlopen(path, RTLD_NOW);
        CHECK(again == library && dlclose(again) == 0);
    }
    guest_join(thread);
    CHECK_EQ(calls_in_thread, guest_rounds());
    CHECK(dlclose(library) == 0);
    CHECK(dlopen(path, RTLD_NOW | RTLD_NOLOAD) == NULL);
    printf("dlopen ok\n");
    guest_end();
}
