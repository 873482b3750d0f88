/*
 * A program with memory, for scripts/bench-dirty: takes commands on standard input and answers each
 * with one line.
 *
 *   dirty MIB THREADS
 *
 *   ping                    -> pong
 *   touch PERCENT           one word in that share of the pages, at random -> nanoseconds a page
 *   read                    all pages                                      -> nanoseconds in all
 *   write                   one word in every page                         -> nanoseconds in all
 *   gap                     the longest gap that a spinning thread saw since the last "gap", in ns
 *   serve SECONDS PERCENT   requests of about 20 us, each writes to a page of the first PERCENT of memory
 *                           -> requests, median, 99th percentile and longest latency in ns
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL

static unsigned char *memory;
static unsigned long pages;
static volatile uint64_t longest;
static volatile int watching;

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000UL + t.tv_nsec;
}

static uint64_t state = 88172645463325252UL;

static uint64_t next(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static void *watch(void *unused)
{
	uint64_t last = now();
	for (;;) {
		if (!watching) {
			usleep(1000);
			last = now();
			continue;
		}
		uint64_t at = now();
		if (at - last > longest)
			longest = at - last;
		last = at;
	}
	return unused;
}

static void *idle(void *unused)
{
	for (;;)
		pause();
	return unused;
}

static int by_value(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return (x > y) - (x < y);
}

static void serve(double seconds, double percent)
{
	static uint32_t times[4000000];
	unsigned long span = pages * percent / 100, n = 0;
	uint64_t begin = now(), end = begin + seconds * 1e9, at = begin;
	if (span == 0)
		span = 1;
	while (at < end && n < sizeof times / sizeof *times) {
		unsigned char *page = memory + next() % span * PAGE;
		uint64_t sum = 0;
		for (int k = 0; k < 12000; k++)
			sum = sum * 31 + k;
		*(volatile uint64_t *)page = sum + n;
		uint64_t done = now();
		times[n++] = done - at;
		at = done;
	}
	qsort(times, n, sizeof *times, by_value);
	printf("%lu %u %u %u\n", n, times[n / 2], times[n * 99 / 100], times[n - 1]);
}

int main(int argc, char **argv)
{
	char line[200];
	pthread_t thread;
	pthread_attr_t small;
	if (argc != 3)
		return 2;
	pages = strtoul(argv[1], 0, 10) * 256;
	memory = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return 1;
	/* Small pages, as a heap that grew bit by bit has. */
	madvise(memory, pages * PAGE, MADV_NOHUGEPAGE);
	for (unsigned long k = 0; k < pages; k++)
		for (unsigned long j = 0; j < PAGE; j += 64)
			*(uint64_t *)(memory + k * PAGE + j) = next();
	pthread_create(&thread, 0, watch, 0);
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 65536);
	for (int k = atoi(argv[2]); k > 0; k--)
		if (pthread_create(&thread, &small, idle, 0))
			return 1;
	setvbuf(stdout, 0, _IOLBF, 0);
	printf("ready\n");
	while (fgets(line, sizeof line, stdin)) {
		double x = 0, y = 0;
		uint64_t begin = now();
		if (!strncmp(line, "ping", 4)) {
			printf("pong\n");
		} else if (sscanf(line, "touch %lf", &x) == 1) {
			unsigned long n = pages * x / 100;
			if (x >= 100)
				for (unsigned long k = 0; k < pages; k++)
					*(volatile uint64_t *)(memory + k * PAGE) = begin + k;
			else
				for (unsigned long k = 0; k < n; k++)
					*(volatile uint64_t *)(memory + next() % pages * PAGE) = begin + k;
			printf("%.1f\n", (double)(now() - begin) / (n ? n : 1));
		} else if (!strncmp(line, "read", 4)) {
			uint64_t sum = 0;
			for (unsigned long k = 0; k < pages; k++)
				sum += *(volatile uint64_t *)(memory + k * PAGE + 64);
			printf("%lu %lx\n", now() - begin, sum);
		} else if (!strncmp(line, "write", 5)) {
			for (unsigned long k = 0; k < pages; k++)
				*(volatile uint64_t *)(memory + k * PAGE) = k;
			printf("%lu\n", now() - begin);
		} else if (!strncmp(line, "watch", 5)) {
			longest = 0;
			watching = 1;
			printf("ok\n");
		} else if (!strncmp(line, "gap", 3)) {
			watching = 0;
			printf("%lu\n", longest);
		} else if (sscanf(line, "serve %lf %lf", &x, &y) == 2) {
			serve(x, y);
		} else {
			printf("what?\n");
		}
	}
	return 0;
}
