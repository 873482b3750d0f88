/* Proves: no deadlock with stdio's locks and no line lost or printed twice: threads print
 * to one stream in memory in a storm, and this program compares its lines, which name their
 * thread and number. One of the threads prints to standard output too, a file or a pipe whose
 * buffered rest is in the image, while the others take its lock and empty its buffer: those lines
 * have a fixed order, and the test compares them. */
#include "guest.h"

static FILE *memory;
static void *storm(void *argument)
{
    for (long i = 0, n = guest_rounds() * 1500; i < n; i++) {
        char text[64];
        snprintf(text, sizeof text, "%ld %ld %.3f", (long)argument, i, i / 7.0);
        fprintf(memory, "%s\n", text);
        if (argument == NULL && i % 10 == 0)
            printf("line %ld %.3f\n", i, i / 7.0);
        if (i % 100 == 0) {
            fflush(memory);
            if (argument != NULL)
                fflush(stdout);
        }
    }
    return NULL;
}

int main(void)
{
    guest_begin();
    char *text = NULL;
    size_t size = 0;
    memory = open_memstream(&text, &size);
    CHECK(memory != NULL);
    pthread_t threads[4];
    for (long i = 0; i < 4; i++)
        threads[i] = guest_thread(storm, (void *)i);
    for (int i = 0; i < 4; i++)
        guest_join(threads[i]);
    CHECK(fclose(memory) == 0);
    long lines = 0, next[4] = {0};
    for (char *line = text; *line; lines++) {
        /* Not by sscanf, which would measure the rest of the text for every line. */
        long thread = strtol(line, &line, 10), i = strtol(line, &line, 10);
        double value = strtod(line, &line);
        CHECK(*line++ == '\n' && thread >= 0 && thread < 4);
        CHECK(value > i / 7.0 - 0.001 && value < i / 7.0 + 0.001);
        CHECK_EQ(i, next[thread]++);
    }
    CHECK_EQ(lines, 4 * guest_rounds() * 1500);
    printf("printf storm ok\n");
    guest_end();
}
