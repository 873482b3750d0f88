/* The counting signal restorer: handlers return through it, unwinders pass it, siglongjmp
 * need not; and a handler that runs just before a restarted call still ends it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <unwind.h>

int main(void);

struct kernel_action {
	void (*handler)(int);
	unsigned long flags;
	unsigned long restorer;
	unsigned long mask;
};

static volatile int ran, found_main, frames;
static sigjmp_buf jump;

static _Unwind_Reason_Code frame(struct _Unwind_Context *context, void *unused)
{
	(void)unused;
	if (_Unwind_FindEnclosingFunction((void *)(_Unwind_GetIP(context) - 1)) == (void *)main)
		found_main = 1;
	return ++frames > 40 ? _URC_END_OF_STACK : _URC_NO_REASON;
}

static void on_signal(int signal)
{
	ran++;
	_Unwind_Backtrace(frame, 0);
	if (signal == SIGUSR2)
		siglongjmp(jump, 1);
}

int main(void)
{
	unsigned long (*restorer)(void) = dlsym(RTLD_DEFAULT, "netlib_program_restorer");
	if (!restorer)
		return 2;
	struct kernel_action action = {on_signal, 0x04000000, restorer(), 0};
	syscall(SYS_rt_sigaction, SIGUSR1, &action, 0, 8);
	syscall(SYS_rt_sigaction, SIGUSR2, &action, 0, 8);
	double x = 1.5;
	for (int i = 0; i < 1000; i++) {
		found_main = frames = 0;
		raise(SIGUSR1);
		x = x * 1.0001;
		if (!found_main)
			return 3;
	}
	if (!sigsetjmp(jump, 1)) {
		raise(SIGUSR2);
		return 4;
	}
	printf("restorer: %d handlers\n", ran);
	return ran != 1001 || x < 1.6;
}
