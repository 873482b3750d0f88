/* Single-steps through libc calls with the net installed and unwinds at every instruction
 * of the net's own code: each time the unwinder must find main. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>
#include <unwind.h>

int main(void);

static unsigned long range[4];
static volatile int inside_slots, inside_code, good, bad;
static unsigned long bad_at[64];

struct walk {
	int frames, found_main;
};

static _Unwind_Reason_Code frame(struct _Unwind_Context *context, void *data)
{
	struct walk *walk = data;
	void *ip = (void *)(_Unwind_GetIP(context) - 1);
	if (_Unwind_FindEnclosingFunction(ip) == (void *)main)
		walk->found_main = 1;
	return ++walk->frames > 60 ? _URC_END_OF_STACK : _URC_NO_REASON;
}

static void on_step(int signal, siginfo_t *info, void *data)
{
	(void)signal, (void)info;
	ucontext_t *uc = data;
	unsigned long pc = uc->uc_mcontext.gregs[REG_RIP];
	int slots = pc >= range[0] && pc < range[1];
	int code = pc >= range[2] && pc < range[3];
	if (!slots && !code)
		return;
	inside_slots += slots;
	inside_code += code;
	struct walk walk = {0, 0};
	_Unwind_Backtrace(frame, &walk);
	if (walk.found_main) {
		good++;
	} else if (bad++ < 64) {
		bad_at[bad - 1] = pc - range[slots ? 0 : 2];
	}
}

#define STEP_ON() __asm__ volatile("pushfq; orl $0x100,(%%rsp); popfq" ::: "cc", "memory")
#define STEP_OFF() __asm__ volatile("pushfq; andl $~0x100,(%%rsp); popfq" ::: "cc", "memory")

int main(void)
{
	void (*ranges)(unsigned long *) = dlsym(RTLD_DEFAULT, "netlib_ranges");
	if (!ranges)
		return 2;
	ranges(range);
	struct walk walk = {0, 0};
	_Unwind_Backtrace(frame, &walk);
	struct sigaction action = {.sa_sigaction = on_step, .sa_flags = SA_SIGINFO};
	sigaction(SIGTRAP, &action, 0);
	char buffer[16];
	int ends[2], fd;
	struct stat st;
	struct timespec ts = {0, 1000};
	struct pollfd pf;
	STEP_ON();
	getppid();
	fd = open("/dev/null", O_RDWR);
	write(fd, buffer, 1);
	read(fd, buffer, 1);
	lseek(fd, 0, 0);
	pipe(ends);
	pf.fd = ends[0], pf.events = POLLIN;
	poll(&pf, 1, 0);
	nanosleep(&ts, 0);
	syscall(SYS_getpid);
	stat("/", &st);
	unlink("/nonexistent/x");
	rename("/nonexistent/x", "/x");
	fallocate(fd, 0, 0, 1);
	dup2(fd, 100);
	close(fd);
	FILE *f = fopen("/dev/null", "w");
	fprintf(f, "x");
	fclose(f);
	STEP_OFF();
	printf("steps in slots %d, in code %d: good %d, bad %d\n", inside_slots, inside_code, good, bad);
	for (int i = 0; i < bad && i < 64; i++)
		printf("bad at +%#lx\n", bad_at[i]);
	return bad || !inside_slots || !inside_code;
}
