// Deferred and asynchronous cancellation of threads blocked in all kinds of calls:
// destructors and clean-up handlers must run, whatever instruction the signal hits.
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int destroyed, cleaned;
static volatile int ready;
static int ends[2], full[2], poller;
static sem_t semaphore;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static pid_t child;
static pthread_t sleeper;

struct Counted {
	~Counted() { __atomic_add_fetch(&destroyed, 1, __ATOMIC_SEQ_CST); }
};

static void clean(void *) { __atomic_add_fetch(&cleaned, 1, __ATOMIC_SEQ_CST); }
static void unlock(void *m) { pthread_mutex_unlock(static_cast<pthread_mutex_t *>(m)); }

enum { READ, WRITE, NANOSLEEP, POLL, SEM, COND, EPOLL, WAIT, SELECT, PAUSE, SIGSUSPEND, JOIN, RECV,
       CLOCK_SLEEP, SPIN, KINDS };
static const char *const names[] = {"read", "write", "nanosleep", "poll", "sem_wait", "cond_wait",
	"epoll_wait", "waitpid", "select", "pause", "sigsuspend", "join", "recv", "clock_nanosleep", "spin"};

__attribute__((noinline)) static void block(int kind)
{
	static char buffer[65536];
	Counted counted;
	struct timespec ts = {100, 0};
	sigset_t none;
	sigemptyset(&none);
	switch (kind) {
	case READ: read(ends[0], buffer, 1); break;
	case WRITE: for (;;) write(full[1], buffer, sizeof buffer);
	case NANOSLEEP: nanosleep(&ts, 0); break;
	case POLL: { struct pollfd f = {ends[0], POLLIN, 0}; poll(&f, 1, -1); break; }
	case SEM: sem_wait(&semaphore); break;
	case COND:
		pthread_mutex_lock(&mutex);
		pthread_cleanup_push(unlock, &mutex);
		pthread_cond_wait(&condition, &mutex);
		pthread_cleanup_pop(1);
		break;
	case EPOLL: { struct epoll_event e; epoll_wait(poller, &e, 1, -1); break; }
	case WAIT: waitpid(child, 0, 0); break;
	case SELECT: { fd_set s; FD_ZERO(&s); FD_SET(ends[0], &s); select(ends[0] + 1, &s, 0, 0, 0); break; }
	case PAUSE: pause(); break;
	case SIGSUSPEND: sigsuspend(&none); break;
	case JOIN: pthread_join(sleeper, 0); break;
	case RECV: { int sv[2]; socketpair(AF_UNIX, SOCK_STREAM, 0, sv); recv(sv[0], buffer, 1, 0); break; }
	case CLOCK_SLEEP: clock_nanosleep(CLOCK_MONOTONIC, 0, &ts, 0); break;
	case SPIN: for (;;) { pthread_testcancel(); getppid(); lseek(ends[0], 0, 0); }
	}
}

struct Order { int kind, async; };

static void *victim(void *data)
{
	Order *order = static_cast<Order *>(data);
	Counted counted;
	if (order->async)
		pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, 0);
	pthread_cleanup_push(clean, 0);
	ready = 1;
	block(order->kind);
	pthread_cleanup_pop(0);
	return 0;
}

static void *sleep_long(void *) { sleep(1000); return 0; }

int main(int argc, char **argv)
{
	int rounds = argc > 1 ? atoi(argv[1]) : 3, bad = 0;
	pipe(ends);
	pipe(full);
	sem_init(&semaphore, 0, 0);
	poller = epoll_create1(0);
	if (!(child = fork())) {
		alarm(60);
		pause();
		_exit(0);
	}
	pthread_create(&sleeper, 0, sleep_long, 0);
	for (int round = 0; round < rounds; round++)
		for (int async = 0; async < 2; async++)
			for (int kind = 0; kind < KINDS; kind++) {
				Order order = {kind, async};
				pthread_t thread;
				void *result;
				destroyed = cleaned = ready = 0;
				pthread_create(&thread, 0, victim, &order);
				while (!ready)
					usleep(50);
				usleep(round == 0 ? 3000 : rand() % 400);
				pthread_cancel(thread);
				pthread_join(thread, &result);
				if (result != PTHREAD_CANCELED || cleaned != 1 || destroyed != 2) {
					printf("BAD %s async=%d result=%p cleaned=%d destroyed=%d\n", names[kind], async,
					       result, cleaned, destroyed);
					bad++;
				}
			}
	kill(child, SIGKILL);
	waitpid(child, 0, 0);
	printf("cancel: %d bad\n", bad);
	return bad != 0;
}
