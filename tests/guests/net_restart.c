/* Calls that are hit by stop signals (64) all the time must take exactly as long and return
 * exactly what they would without; calls that a signal of the program ends must still end. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <arpa/inet.h>
#include <linux/futex.h>
#include <netinet/in.h>
#include <time.h>
#include <unistd.h>

static int main_tid, period_us = 2000, bad;
static volatile int done;
static volatile long sent;
static volatile int alarms;
static double early = 1; /* how much too early a call may end, ms */

static void *kick(void *unused)
{
	sigset_t all;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, 0);
	while (!done) {
		usleep(period_us);
		syscall(SYS_tgkill, getpid(), main_tid, 64);
		sent++;
	}
	return unused;
}

static double now_ms(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static void check(const char *name, double began, long result, int error, long want, int want_errno, double ms)
{
	double took = now_ms() - began;
	int ok = result == want && (want >= 0 || error == want_errno) && took >= ms - early && took < ms + 150;
	if (!ok || getenv("VERBOSE"))
		printf("%-20s returned %ld (%s) after %.1f ms, wanted %ld after %.0f%s\n", name, result,
		       result < 0 ? strerrorname_np(error) : "-", took, want, ms, ok ? "" : "   <-- BAD");
	bad += !ok;
}

#define T(name, want, want_errno, ms, call)                                   \
	do {                                                                  \
		double began = now_ms();                                      \
		errno = 0;                                                    \
		long result = (call);                                         \
		check(name, began, result, errno, want, want_errno, ms);      \
	} while (0)

/* The end is up to a child, whose time began before ours. */
#define BY_CHILD(name, want, ms, call)            \
	do {                                      \
		early = 80;                       \
		T(name, want, 0, ms, call);       \
		early = 1;                        \
	} while (0)

static void on_alarm(int signal)
{
	(void)signal;
	alarms++;
}

static timer_t timer;

static void alarm_in(int ms)
{
	struct itimerspec in = {{0, 0}, {ms / 1000, ms % 1000 * 1000000L}};
	timer_settime(timer, 0, &in, 0);
}

static void timeouts(int *ends, int poller)
{
	struct timespec ts = {0, 200000000}, rest = {7, 7}, again = ts;
	struct timeval tv = {0, 200000}, raw_tv = {0, 200000};
	struct pollfd pf = {ends[0], POLLIN, 0};
	struct epoll_event event;
	sigset_t none, usr1;
	fd_set set;
	int word = 0;
	sigemptyset(&none);
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	T("nanosleep", 0, 0, 200, nanosleep(&ts, 0));
	T("nanosleep rest", 0, 0, 200, nanosleep(&ts, &rest));
	T("nanosleep same", 0, 0, 200, nanosleep(&again, &again));
	T("clock_nanosleep", 0, 0, 200, clock_nanosleep(CLOCK_MONOTONIC, 0, &ts, 0));
	T("usleep", 0, 0, 200, usleep(200000));
	T("sleep", 0, 0, 1000, sleep(1));
	struct timespec until;
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_nsec += 200000000;
	until.tv_sec += until.tv_nsec / 1000000000, until.tv_nsec %= 1000000000;
	T("clock_nanosleep abs", 0, 0, 200, clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, 0));
	T("poll", 0, 0, 200, poll(&pf, 1, 200));
	T("ppoll", 0, 0, 200, ppoll(&pf, 1, &ts, 0));
	T("ppoll mask", 0, 0, 200, ppoll(&pf, 1, &ts, &none));
	T("epoll_wait", 0, 0, 200, epoll_wait(poller, &event, 1, 200));
	T("epoll_pwait", 0, 0, 200, epoll_pwait(poller, &event, 1, 200, &none));
	T("epoll_pwait2", 0, 0, 200, syscall(SYS_epoll_pwait2, poller, &event, 1, &ts, 0, 8));
	FD_ZERO(&set);
	FD_SET(ends[0], &set);
	T("select", 0, 0, 200, select(ends[0] + 1, &set, 0, 0, &tv));
	FD_SET(ends[0], &set);
	T("pselect", 0, 0, 200, pselect(ends[0] + 1, &set, 0, 0, &ts, 0));
	FD_SET(ends[0], &set);
	T("pselect mask", 0, 0, 200, pselect(ends[0] + 1, &set, 0, 0, &ts, &none));
	FD_SET(ends[0], &set);
	T("select raw", 0, 0, 200, syscall(SYS_select, ends[0] + 1, &set, 0, 0, &raw_tv));
	if (raw_tv.tv_sec || raw_tv.tv_usec > 1000)
		bad++, printf("select left %ld.%06ld <-- BAD\n", raw_tv.tv_sec, raw_tv.tv_usec);
	sigprocmask(SIG_BLOCK, &usr1, 0);
	T("sigtimedwait", -1, EAGAIN, 200, sigtimedwait(&usr1, 0, &ts));
	sigprocmask(SIG_UNBLOCK, &usr1, 0);
	int sems = semget(IPC_PRIVATE, 1, 0600);
	struct sembuf down = {0, -1, 0};
	T("semtimedop", -1, EAGAIN, 200, semtimedop(sems, &down, 1, &ts));
	semctl(sems, 0, IPC_RMID);
	sem_t sem;
	sem_init(&sem, 0, 0);
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_nsec += 200000000;
	until.tv_sec += until.tv_nsec / 1000000000, until.tv_nsec %= 1000000000;
	T("sem_timedwait", -1, ETIMEDOUT, 200, sem_timedwait(&sem, &until));
	T("futex", -1, ETIMEDOUT, 200, syscall(SYS_futex, &word, FUTEX_WAIT, 0, &ts, 0, 0));
	T("poll by syscall(2)", 0, 0, 200, syscall(SYS_poll, &pf, 1, 200));
}

static void sockets(void)
{
	struct timeval tv = {0, 200000};
	int pair[2];
	char byte;
	socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
	setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
	setsockopt(pair[0], SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv);
	T("recv timeout", -1, EAGAIN, 200, recv(pair[0], &byte, 1, 0));
	T("read timeout", -1, EAGAIN, 200, read(pair[0], &byte, 1));
	while (send(pair[0], &byte, 1, MSG_DONTWAIT) == 1)
		;
	T("send timeout", -1, EAGAIN, 200, send(pair[0], &byte, 1, 0));
	if (!fork()) {
		usleep(100000);
		write(pair[1], "x", 1);
		_exit(0);
	}
	BY_CHILD("recv in time", 1, 100, recv(pair[0], &byte, 1, 0));
	wait(0);
	close(pair[0]), close(pair[1]);
	int listener = socket(AF_UNIX, SOCK_STREAM, 0);
	struct sockaddr_un_small { sa_family_t family; char path[6]; } at = {AF_UNIX, ""};
	snprintf(at.path + 1, 5, "%d", getpid() % 10000);
	bind(listener, (struct sockaddr *)&at, sizeof at);
	listen(listener, 5);
	setsockopt(listener, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
	T("accept timeout", -1, EAGAIN, 200, accept(listener, 0, 0));
	/* A full queue: nothing but the call itself waits for room in it. */
	listen(listener, 0);
	int first = socket(AF_UNIX, SOCK_STREAM, 0), second = socket(AF_UNIX, SOCK_STREAM, 0);
	connect(first, (struct sockaddr *)&at, sizeof at);
	setsockopt(second, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv);
	T("connect unix", -1, EAGAIN, 200, connect(second, (struct sockaddr *)&at, sizeof at));
	struct timeval now = {0, 0};
	socklen_t len = sizeof now;
	getsockopt(second, SOL_SOCKET, SO_SNDTIMEO, &now, &len);
	if (now.tv_sec || now.tv_usec != tv.tv_usec)
		bad++, printf("SO_SNDTIMEO is %ld.%06ld now <-- BAD\n", now.tv_sec, now.tv_usec);
	close(first), close(second);
	close(listener);
}

/* A transfer that needs several arrivals has one timeout for all of them. */
static void gathered(void)
{
	static char block[1 << 20];
	struct timeval tv = {0, 400000};
	char bytes[8];
	int pair[2];
	socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
	setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
	setsockopt(pair[0], SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv);
	T("recv all, nothing", -1, EAGAIN, 400, recv(pair[0], bytes, 8, MSG_WAITALL));
	write(pair[1], "abc", 3);
	T("recv all, a part", 3, 0, 400, recv(pair[0], bytes, 8, MSG_WAITALL));
	pid_t child = fork();
	if (!child) {
		for (int i = 0; i < 3; i++) {
			usleep(100000);
			write(pair[1], "def", 3);
		}
		_exit(0);
	}
	BY_CHILD("recv all, in time", 8, 300, recv(pair[0], bytes, 8, MSG_WAITALL));
	if (memcmp(bytes, "defdefde", 8))
		bad++, printf("recv all: %.8s <-- BAD\n", bytes);
	waitpid(child, 0, 0);
	recv(pair[0], bytes, 1, 0);
	if (!(child = fork())) {
		usleep(200000);
		write(pair[1], "gh", 2);
		_exit(0);
	}
	T("recv all, late", 2, 0, 400, recv(pair[0], bytes, 8, MSG_WAITALL));
	waitpid(child, 0, 0);
	if (!(child = fork())) {
		usleep(200000);
		write(pair[1], "ij", 2);
		close(pair[0]), close(pair[1]);
		_exit(0);
	}
	close(pair[1]);
	BY_CHILD("recv all, an end", 2, 200, recv(pair[0], bytes, 8, MSG_WAITALL));
	waitpid(child, 0, 0);
	close(pair[0]);
	/* What is sent at once takes as long as a socket's buffer is full: bare and here. */
	socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
	setsockopt(pair[0], SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv);
	double began = now_ms();
	long sent = send(pair[0], block, sizeof block, 0);
	if (sent <= 0 || sent >= (long)sizeof block || now_ms() - began < 399 || now_ms() - began > 550)
		bad++, printf("send, a part: %ld after %.1f ms <-- BAD\n", sent, now_ms() - began);
	if (!(child = fork())) {
		long n, total = 0;
		close(pair[0]);
		while ((n = recv(pair[1], block, 40000, 0)) > 0) {
			total += n;
			usleep(2000);
		}
		_exit(total != sent + (long)sizeof block);
	}
	sent = write(pair[0], block, sizeof block);
	close(pair[0]), close(pair[1]);
	int status;
	waitpid(child, &status, 0);
	if (sent != sizeof block || status)
		bad++, printf("write to a socket: %ld, reader's status %x <-- BAD\n", sent, status);
}

static void messages(void)
{
	struct timeval tv = {0, 200000};
	struct timespec for_ever = {9, 0};
	char text[3][8];
	struct iovec at[3] = {{text[0], 8}, {text[1], 8}, {text[2], 8}};
	struct mmsghdr all[3];
	int pair[2];
	memset(all, 0, sizeof all);
	for (int i = 0; i < 3; i++)
		all[i].msg_hdr.msg_iov = at + i, all[i].msg_hdr.msg_iovlen = 1;
	socketpair(AF_UNIX, SOCK_DGRAM, 0, pair);
	setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
	T("recvmmsg none", -1, EAGAIN, 200, recvmmsg(pair[0], all, 3, 0, 0));
	T("recvmmsg limit", -1, EAGAIN, 200, recvmmsg(pair[0], all, 3, 0, &for_ever));
	send(pair[1], "a", 1, 0);
	T("recvmmsg one", 1, 0, 200, recvmmsg(pair[0], all, 3, 0, 0));
	T("recv after it", -1, EAGAIN, 200, recv(pair[0], text[0], 8, 0));
	pid_t child = fork();
	if (!child) {
		for (int i = 0; i < 3; i++) {
			usleep(120000);
			send(pair[1], "xyz", i + 1, 0);
		}
		_exit(0);
	}
	/* Each message has the whole time. */
	BY_CHILD("recvmmsg three", 3, 360, recvmmsg(pair[0], all, 3, 0, 0));
	for (int i = 0; i < 3; i++)
		if (all[i].msg_len != i + 1u || memcmp(text[i], "xyz", i + 1))
			bad++, printf("message %d: %u %.3s <-- BAD\n", i, all[i].msg_len, text[i]);
	waitpid(child, 0, 0);
	if (!(child = fork())) {
		usleep(120000);
		send(pair[1], "x", 1, 0);
		_exit(0);
	}
	BY_CHILD("recvmmsg for one", 1, 120, recvmmsg(pair[0], all, 3, MSG_WAITFORONE, 0));
	waitpid(child, 0, 0);
	tv.tv_usec = 0;
	setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
	if (!(child = fork())) {
		usleep(120000);
		send(pair[1], "xy", 2, 0);
		_exit(0);
	}
	send(pair[1], "x", 1, 0);
	BY_CHILD("recvmmsg unlimited", 2, 120, recvmmsg(pair[0], all, 2, 0, 0));
	waitpid(child, 0, 0);
	alarm_in(100);
	send(pair[1], "x", 1, 0);
	T("recvmmsg alarm", 1, 0, 100, recvmmsg(pair[0], all, 2, 0, 0));
	int status;
	socklen_t len = sizeof status;
	getsockopt(pair[0], SOL_SOCKET, SO_ERROR, &status, &len); /* what Linux left of the alarm */
	close(pair[0]), close(pair[1]);
}

static void connects(void)
{
	/* A listener whose queue is full does not answer. */
	struct timeval tv = {0, 200000};
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t len = sizeof at;
	int listener = socket(AF_INET, SOCK_STREAM, 0), filler[3];
	bind(listener, (struct sockaddr *)&at, sizeof at);
	getsockname(listener, (struct sockaddr *)&at, &len);
	listen(listener, 0);
	for (int i = 0; i < 3; i++) {
		filler[i] = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
		connect(filler[i], (struct sockaddr *)&at, sizeof at);
	}
	usleep(50000);
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv);
	T("connect", -1, EINPROGRESS, 200, connect(fd, (struct sockaddr *)&at, sizeof at));
	T("connect again", -1, EALREADY, 200, connect(fd, (struct sockaddr *)&at, sizeof at));
	alarm_in(100);
	T("connect alarm", -1, EINTR, 100, connect(fd, (struct sockaddr *)&at, sizeof at));
	for (int i = 0; i < 3; i++)
		close(filler[i]);
	close(fd), close(listener);
}

static void interrupted_by_program(int *ends, int poller)
{
	struct sigaction action = {.sa_handler = on_alarm};
	struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM};
	struct timespec five = {5, 0}, rest;
	struct pollfd pf = {ends[0], POLLIN, 0};
	struct epoll_event ready;
	sigset_t all, none;
	sigaction(SIGALRM, &action, 0);
	timer_create(CLOCK_MONOTONIC, &event, &timer);
	sigemptyset(&none);
	sigfillset(&all);
	sigdelset(&all, 64);
	pthread_sigmask(SIG_BLOCK, &all, 0);
	alarm_in(200);
	T("sigsuspend", -1, EINTR, 200, sigsuspend(&none));
	pthread_sigmask(SIG_UNBLOCK, &all, 0);
	alarm_in(200);
	T("pause", -1, EINTR, 200, pause());
	alarm_in(200);
	T("nanosleep alarm", -1, EINTR, 200, nanosleep(&five, &rest));
	if (rest.tv_sec != 4 || rest.tv_nsec < 700000000)
		bad++, printf("nanosleep left %ld.%09ld <-- BAD\n", rest.tv_sec, rest.tv_nsec);
	alarm_in(200);
	T("poll alarm", -1, EINTR, 200, poll(&pf, 1, 5000));
	alarm_in(200);
	T("epoll_wait alarm", -1, EINTR, 200, epoll_wait(poller, &ready, 1, 5000));
	alarm_in(200);
	int queue = msgget(IPC_PRIVATE, 0600);
	struct { long type; char text[8]; } message;
	T("msgrcv alarm", -1, EINTR, 200, msgrcv(queue, &message, 8, 0, 0));
	msgctl(queue, IPC_RMID, 0);
	/* Alarms at random moments, many during a stop: none may be lost. */
	int lost = 0;
	for (int i = 0; i < 60; i++) {
		alarm_in(4 + rand() % 15);
		struct timespec long_enough = {0, 300000000};
		if (nanosleep(&long_enough, 0) == 0)
			lost++;
	}
	if (lost)
		bad++, printf("lost alarms: %d of 60 <-- BAD\n", lost);
}

static void transfers(void)
{
	/* A large write to a pipe whose reader is slow must not come back short. */
	static char buffer[1 << 20];
	int ends[2];
	pipe(ends);
	pid_t child = fork();
	if (!child) {
		close(ends[1]);
		static char in[65536];
		long total = 0, n;
		while ((n = read(ends[0], in, sizeof in)) > 0) {
			total += n;
			usleep(10000);
		}
		_exit(total != sizeof buffer);
	}
	close(ends[0]);
	long wrote = write(ends[1], buffer, sizeof buffer);
	close(ends[1]);
	int status;
	waitpid(child, &status, 0);
	if (wrote != sizeof buffer || status)
		bad++, printf("write to a pipe: %ld, reader's status %x <-- BAD\n", wrote, status);
	int pair[2];
	socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
	if (!(child = fork())) {
		for (int i = 0; i < 20; i++) {
			usleep(10000);
			write(pair[1], buffer, 1000);
		}
		_exit(0);
	}
	long got = recv(pair[0], buffer, 20000, MSG_WAITALL);
	if (got != 20000)
		bad++, printf("recv MSG_WAITALL: %ld <-- BAD\n", got);
	waitpid(child, 0, 0);
}

int main(int argc, char **argv)
{
	if (argc > 1)
		period_us = atoi(argv[1]);
	main_tid = syscall(SYS_gettid);
	int ends[2], poller = epoll_create1(0);
	pipe(ends);
	struct epoll_event event = {.events = EPOLLIN};
	epoll_ctl(poller, EPOLL_CTL_ADD, ends[0], &event);
	pthread_t kicker;
	pthread_create(&kicker, 0, kick, 0);
	timeouts(ends, poller);
	sockets();
	interrupted_by_program(ends, poller);
	transfers();
	gathered();
	messages();
	connects();
	pid_t child = fork();
	if (!child) {
		usleep(200000);
		write(ends[1], "x", 1);
		usleep(200000);
		_exit(0);
	}
	char byte;
	BY_CHILD("read pipe", 1, 200, read(ends[0], &byte, 1));
	BY_CHILD("waitpid", child, 200, waitpid(child, 0, 0));
	done = 1;
	pthread_join(kicker, 0);
	unsigned long (*restarts)(void) = dlsym(RTLD_DEFAULT, "netlib_restarts");
	printf("restart: %ld stops, %lu restarts, %d alarms, %d bad\n", sent, restarts ? restarts() : 0, alarms, bad);
	return bad != 0;
}
