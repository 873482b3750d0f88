/* The net is installed while other threads are in the very calls that are patched. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

static volatile int stop;
static volatile long turns[4];
static int ends[2];

static void *busy(void *arg)
{
	char b = 0;
	int fd = open("/dev/null", O_RDWR);
	while (!stop) {
		write(fd, &b, 1);
		getppid();
		read(fd, &b, 1);
		lseek(fd, 0, 0);
		turns[(long)arg]++;
	}
	return 0;
}

static void *reader(void *arg)
{
	char b;
	while (read(ends[0], &b, 1) == 1)
		turns[(long)arg]++;
	return 0;
}

static void *sleeper(void *arg)
{
	while (!stop) {
		struct timespec t = {0, 50000};
		nanosleep(&t, 0);
		poll(0, 0, 0);
		turns[(long)arg]++;
	}
	return 0;
}

int main(void)
{
	void (*install)(void) = (void (*)(void))dlsym(RTLD_DEFAULT, "netlib_install");
	if (!install)
		return 2;
	pthread_t threads[4];
	pipe(ends);
	pthread_create(&threads[0], 0, busy, (void *)0);
	pthread_create(&threads[1], 0, busy, (void *)1);
	pthread_create(&threads[2], 0, reader, (void *)2);
	pthread_create(&threads[3], 0, sleeper, (void *)3);
	usleep(20000);
	install();
	for (int i = 0; i < 20; i++) {
		usleep(500);
		write(ends[1], "x", 1);
	}
	usleep(50000);
	stop = 1;
	close(ends[1]);
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], 0);
	printf("late: %ld %ld %ld %ld\n", turns[0], turns[1], turns[2], turns[3]);
	return turns[2] != 20;
}
