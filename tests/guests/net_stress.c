/* Many threads do everything at once through libc: stdio, fork, vfork, posix_spawn, system, popen, clone,
 * thread creation, cancellation, siglongjmp out of calls, coroutines; with a 1 kHz timer. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

extern char **environ;
static volatile int stop;
static long count[9];
static int bad;
static __thread sigjmp_buf jump;
static __thread volatile int armed;
static pthread_t jumper;
static volatile int jumper_ready;

#define BAD(...) (__atomic_add_fetch(&bad, 1, __ATOMIC_SEQ_CST), fprintf(stderr, "BAD " __VA_ARGS__))

static int wait_for(pid_t pid)
{
	int status;
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return -1;
	return status;
}

static void *stdio_thread(void *arg)
{
	char name[64];
	unsigned seed = (long)arg;
	snprintf(name, sizeof name, "stress.%d.%ld", getpid(), (long)arg);
	while (!stop) {
		FILE *f = fopen(name, "w");
		int lines = rand_r(&seed) % 500, x, seen = 0;
		if (!f) {
			BAD("fopen %d\n", errno);
			continue;
		}
		for (int i = 0; i < lines; i++)
			if (fprintf(f, "%d\n", i) < 0)
				BAD("fprintf\n");
		if (fclose(f))
			BAD("fclose %d\n", errno);
		f = fopen(name, "r");
		while (fscanf(f, "%d", &x) == 1)
			if (x != seen++)
				BAD("contents\n");
		if (seen != lines)
			BAD("lines %d of %d\n", seen, lines);
		fclose(f);
		remove(name);
		count[0]++;
	}
	return 0;
}

static void *process_thread(void *arg)
{
	char *argv[] = {"true", 0};
	while (!stop) {
		pid_t p = fork();
		if (p == 0) {
			int fd = open("/dev/null", O_WRONLY);
			write(fd, "x", 1);
			_exit(33);
		}
		if (wait_for(p) != 33 << 8)
			BAD("fork\n");
		if (!(p = vfork())) {
			execl("/bin/true", "true", (char *)0);
			_exit(1);
		}
		if (wait_for(p))
			BAD("vfork and exec\n");
		if (!(p = vfork()))
			_exit(3);
		if (wait_for(p) != 3 << 8)
			BAD("vfork\n");
		if (posix_spawn(&p, "/bin/true", 0, 0, argv, environ) || wait_for(p))
			BAD("posix_spawn\n");
		if (++count[1] % 8 == 0 && system("exit 5") != 5 << 8)
			BAD("system\n");
	}
	return arg;
}

static int clone_child(void *fd)
{
	write(*(int *)fd, "x", 1);
	return 9;
}

static void *clone_thread(void *arg)
{
	int fd = open("/dev/null", O_WRONLY);
	char *stack = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	while (!stop) {
		if (wait_for(clone(clone_child, stack + 65536, CLONE_VM | CLONE_VFORK | SIGCHLD, &fd)) != 9 << 8)
			BAD("clone as vfork\n");
		if (wait_for(clone(clone_child, stack + 65536, SIGCHLD, &fd)) != 9 << 8)
			BAD("clone\n");
		struct clone_args args = {.exit_signal = SIGCHLD};
		pid_t p = syscall(SYS_clone3, &args, sizeof args);
		if (p == 0)
			syscall(SYS_exit, 4);
		if (p > 0 && wait_for(p) != 4 << 8)
			BAD("clone3\n");
		count[2]++;
	}
	return arg;
}

static void *small(void *arg)
{
	int fd = open("/dev/null", O_WRONLY);
	write(fd, "x", 1);
	close(fd);
	return arg;
}

static void *thread_thread(void *arg)
{
	while (!stop) {
		pthread_t t;
		void *result;
		pthread_attr_t attributes;
		if (!pthread_create(&t, 0, small, arg) && (pthread_join(t, &result) || result != arg))
			BAD("join\n");
		pthread_attr_init(&attributes);
		pthread_attr_setstacksize(&attributes, 20480);
		if (!pthread_create(&t, &attributes, small, 0))
			pthread_join(t, 0);
		pthread_attr_destroy(&attributes);
		count[3]++;
	}
	return 0;
}

static void *blocked(void *arg)
{
	int ends[2];
	char c;
	struct timespec second = {1, 0};
	pipe(ends);
	struct pollfd f = {ends[0], POLLIN, 0};
	pthread_cleanup_push((void (*)(void *))close, (void *)(long)ends[0]);
	pthread_cleanup_push((void (*)(void *))close, (void *)(long)ends[1]);
	switch ((long)arg % 3) {
	case 0: while (read(ends[0], &c, 1) < 0); break;
	case 1: while (poll(&f, 1, 1000) < 0); break;
	case 2: while (nanosleep(&second, 0) < 0); break;
	}
	pthread_cleanup_pop(1);
	pthread_cleanup_pop(1);
	return 0;
}

static void *cancel_thread(void *arg)
{
	unsigned seed = 5;
	while (!stop) {
		pthread_t t;
		void *result;
		long kind = rand_r(&seed) % 60;
		pthread_create(&t, 0, blocked, (void *)kind);
		if (kind % 2)
			usleep(rand_r(&seed) % 300);
		pthread_cancel(t);
		pthread_join(t, &result);
		if (result != PTHREAD_CANCELED && kind % 3 == 0)
			BAD("cancel\n");
		count[4]++;
	}
	return arg;
}

static void on_signal(int signal)
{
	int saved = errno;
	if (signal == SIGUSR2 && armed) {
		armed = 0;
		siglongjmp(jump, 1);
	}
	int fd = open("/dev/null", O_WRONLY);
	if (fd >= 0) {
		write(fd, "x", 1);
		close(fd);
	}
	errno = saved;
}

static void *jump_thread(void *arg)
{
	int ends[2];
	char c;
	sigset_t set;
	struct timespec five = {5, 0};
	pipe(ends);
	jumper = pthread_self();
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	jumper_ready = 1;
	while (!stop) {
		if (!sigsetjmp(jump, 1)) {
			armed = 1;
			pthread_sigmask(SIG_UNBLOCK, &set, 0);
			if (count[5] & 1)
				read(ends[0], &c, 1);
			else
				nanosleep(&five, 0);
			armed = 0;
		} else {
			count[5]++;
		}
	}
	return arg;
}

static void *kick_thread(void *arg)
{
	while (!jumper_ready)
		usleep(10);
	while (!stop) {
		pthread_kill(jumper, SIGUSR2);
		usleep(200);
	}
	return arg;
}

static ucontext_t here, there;

static void coroutine(void)
{
	for (;;) {
		getppid();
		swapcontext(&there, &here);
	}
}

static void *coroutine_thread(void *arg)
{
	static char stack[65536];
	getcontext(&there);
	there.uc_stack.ss_sp = stack;
	there.uc_stack.ss_size = sizeof stack;
	there.uc_link = &here;
	makecontext(&there, coroutine, 0);
	while (!stop) {
		swapcontext(&here, &there);
		count[6]++;
	}
	return arg;
}

int main(int argc, char **argv)
{
	int seconds = argc > 1 ? atoi(argv[1]) : 2;
	struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART | SA_ONSTACK};
	sigaction(SIGALRM, &action, 0);
	action.sa_flags = 0;
	sigaction(SIGUSR2, &action, 0);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	pthread_sigmask(SIG_BLOCK, &set, 0);
	struct itimerval tick = {{0, 1000}, {0, 1000}};
	setitimer(ITIMER_REAL, &tick, 0);
	void *(*bodies[])(void *) = {stdio_thread, stdio_thread, process_thread, clone_thread, thread_thread,
				     cancel_thread, jump_thread, kick_thread, coroutine_thread};
	enum { N = sizeof bodies / sizeof *bodies };
	pthread_t threads[N];
	for (long i = 0; i < N; i++)
		pthread_create(&threads[i], 0, bodies[i], (void *)i);
	struct timespec began, now;
	clock_gettime(CLOCK_MONOTONIC, &began);
	do {
		usleep(10000);
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while (now.tv_sec - began.tv_sec < seconds);
	stop = 1;
	tick.it_value.tv_usec = tick.it_interval.tv_usec = 0;
	setitimer(ITIMER_REAL, &tick, 0);
	pthread_kill(jumper, SIGUSR2);
	for (int i = 0; i < N; i++)
		pthread_join(threads[i], 0);
	printf("stress: stdio %ld process %ld clone %ld thread %ld cancel %ld jump %ld coroutine %ld, %d bad\n", count[0],
	       count[1], count[2], count[3], count[4], count[5], count[6], bad);
	return bad != 0;
}
