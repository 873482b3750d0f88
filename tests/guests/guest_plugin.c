/* The library that mem_dlopen.c and storm_dlopen.c open. */
#include <stdlib.h>
static int counter;
static __thread int mine = 5;
static int *heap;
__attribute__((constructor)) static void start(void) { heap = calloc(100, sizeof *heap); }
__attribute__((destructor)) static void stop(void) { free(heap); }
int plugin_count(void)
{
    heap[counter % 100]++;
    mine++;
    return ++counter;
}
int plugin_tls(void) { return mine; }
