/* Start-up cost of a program (median of N runs) and cost per call; for scripts, not for tests.
 * net_bench start N [NAME=VALUE...] program args...   |   net_bench calls */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static int order(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return x < y ? -1 : x > y;
}

static int start(int runs, char **words)
{
	char *environment[32] = {0};
	double *took = malloc(runs * sizeof *took);
	int n = 0;
	while (*words && strchr(*words, '=') && n < 31)
		environment[n++] = *words++;
	for (int i = 0; i < runs; i++) {
		double began = now_ns();
		pid_t p = vfork();
		if (!p) {
			execve(words[0], words, environment);
			_exit(127);
		}
		int status;
		waitpid(p, &status, 0);
		took[i] = (now_ns() - began) / 1e3;
	}
	qsort(took, runs, sizeof *took, order);
	printf("median %.0f us, fastest %.0f us\n", took[runs / 2], took[0]);
	return 0;
}

#define BEST(name, rounds, call)                                   \
	do {                                                       \
		double best = 1e9;                                 \
		for (int r = 0; r < 9; r++) {                      \
			double began = now_ns();                   \
			for (int i = 0; i < rounds; i++) {         \
				call;                              \
			}                                          \
			double took = (now_ns() - began) / rounds; \
			if (took < best)                           \
				best = took;                       \
		}                                                  \
		printf("%s %.1f ns  ", name, best);                \
	} while (0)

int main(int argc, char **argv)
{
	if (argc > 3 && !strcmp(argv[1], "start"))
		return start(atoi(argv[2]), argv + 3);
	char b = 1;
	int fd = open("/dev/null", O_WRONLY);
	struct timespec none = {0, 0};
	BEST("write", 50000, write(fd, &b, 1));
	BEST("getppid", 50000, getppid());
	BEST("lseek", 50000, lseek(fd, 0, SEEK_CUR));
	BEST("nanosleep(0)", 20000, nanosleep(&none, 0));
	BEST("open+close", 20000, close(open("/dev/null", O_WRONLY)));
	puts("");
	return 0;
}
