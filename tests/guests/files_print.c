/* Proves: output by stdio is complete and in order whatever the shell does with the file.
 *   files_print         standard output in blocks, standard error by lines
 *   files_print both    the same lines to both in turn, each at once
 *   files_print silent  between rounds standard output is /dev/null, itself a duplicate */
#include "guest.h"

/* As programs silence a library. */
static void silence(int *saved)
{
    fflush(stdout);
    int nothing = open("/dev/null", O_WRONLY);
    *saved = dup(1);
    CHECK(nothing >= 0 && *saved >= 0 && dup2(nothing, 1) == 1);
    close(nothing);
}

static void speak(int *saved)
{
    if (*saved >= 0)
        CHECK(dup2(*saved, 1) == 1 && close(*saved) == 0);
    *saved = -1;
}

int main(int argc, char **argv)
{
    int silent = argc > 1 && strcmp(argv[1], "silent") == 0, saved = -1;
    guest_begin();
    int both = argc > 1 && strcmp(argv[1], "both") == 0, errors = 2;
    struct stat out, err;
    if (both) {
        setvbuf(stdout, NULL, _IOLBF, 0);
        /* In the undisturbed run they are two files: there all goes to the first. */
        CHECK(fstat(1, &out) == 0 && fstat(2, &err) == 0);
        errors = out.st_dev == err.st_dev && out.st_ino == err.st_ino ? 2 : 1;
    }
    ROUNDS(round)
    {
        speak(&saved);
        for (int k = 0; k < 12; k++) {
            printf("out %ld.%d %016llx\n", round, k, (unsigned long long)guest_mix(round * 16 + k));
            dprintf(errors, "err %ld.%d\n", round, k);
        }
        if (silent)
            silence(&saved);
    }
    speak(&saved);
    printf("print ok\n");
    guest_end();
}
