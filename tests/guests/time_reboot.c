/* Proves: the clocks that count from the machine's start go on over a reboot (the test gives
 * each life another time namespace): CLOCK_MONOTONIC by libc, by a look into the vdso as some
 * runtimes do it, by syscall(2), and its relatives never go back and never leap; waits until
 * a time that was computed before the kill end at that time: a condition's, a semaphore's
 * and a mutex's, clock_nanosleep, timerfd, timer_create, futex_waitv, FUTEX_LOCK_PI2.
 * With the argument `spin` a thread does nothing but read the clock. */
#include "guest.h"
#include <elf.h>
#include <linux/futex.h>
#include <semaphore.h>
#include <sys/auxv.h>
#include <sys/sysinfo.h>
#include <sys/timerfd.h>
#include <sys/times.h>

/* No life lies dead, and no wait is late, for so long; namespaces differ by far more. */
#define LEAP 100.0

typedef int gettime_function(clockid_t, struct timespec *);
static gettime_function *by_vdso;
static volatile int over;

static double seconds(struct timespec t) { return t.tv_sec + t.tv_nsec / 1e9; }

static struct timespec in(double s, clockid_t clock)
{
    struct timespec t;
    CHECK(clock_gettime(clock, &t) == 0);
    long ns = t.tv_nsec + (long)((s - (long)s) * 1e9);
    t.tv_sec += (long)s + ns / 1000000000;
    t.tv_nsec = ns % 1000000000;
    return t;
}

/* Not before its time, and not much later. */
static void met(const char *what, struct timespec deadline, clockid_t clock)
{
    struct timespec now;
    CHECK(clock_gettime(clock, &now) == 0);
    double late = seconds(now) - seconds(deadline);
    if (late < 0 || late > LEAP)
        FAIL("%s ended %.6f s after its time (%.3f)", what, late, seconds(deadline));
}

static void find_in_vdso(void)
{
    char *base = (char *)getauxval(AT_SYSINFO_EHDR);
    if (!base)
        return; /* none, or a kernel without */
    Elf64_Ehdr *head = (Elf64_Ehdr *)base;
    Elf64_Phdr *parts = (Elf64_Phdr *)(base + head->e_phoff);
    Elf64_Dyn *dynamic = NULL;
    for (int i = 0; i < head->e_phnum; i++)
        if (parts[i].p_type == PT_DYNAMIC)
            dynamic = (Elf64_Dyn *)(base + parts[i].p_offset);
    CHECK(dynamic != NULL);
    Elf64_Sym *symbols = NULL;
    char *strings = NULL;
    for (; dynamic->d_tag != DT_NULL; dynamic++) {
        if (dynamic->d_tag == DT_SYMTAB)
            symbols = (Elf64_Sym *)(base + dynamic->d_un.d_ptr);
        if (dynamic->d_tag == DT_STRTAB)
            strings = base + dynamic->d_un.d_ptr;
    }
    CHECK(symbols && strings && (char *)symbols < strings);
    by_vdso = NULL;
    for (Elf64_Sym *s = symbols + 1; (char *)s < strings; s++)
        if (strcmp(strings + s->st_name, "__vdso_clock_gettime") == 0)
            by_vdso = (gettime_function *)(base + s->st_value);
    CHECK(by_vdso != NULL);
}

static int by_call(clockid_t clock, struct timespec *t)
{
    return (int)syscall(SYS_clock_gettime, clock, t);
}

struct past {
    const char *name;
    double last;
};

static void goes_on(struct past *past, double now)
{
    if (past->last != 0 && (now < past->last || now > past->last + LEAP))
        FAIL("%s went from %.6f to %.6f", past->name, past->last, now);
    past->last = now;
}

static void *reader(void *argument)
{
    (void)argument;
    static struct past monotonic = {"the monotonic clock", 0};
    static const clockid_t others[] = {CLOCK_MONOTONIC_RAW, CLOCK_MONOTONIC_COARSE, CLOCK_BOOTTIME};
    static struct past past[] = {{"the raw clock", 0}, {"the coarse clock", 0}, {"the boot clock", 0}};
    static struct past ticks = {"times()", 0}, up = {"uptime", 0}, real = {"the real clock", 0};
    while (!over) {
        gettime_function *ways[] = {clock_gettime, by_vdso ? by_vdso : by_call, by_call};
        struct timespec t;
        for (int way = 0; way < 3; way++) {
            CHECK(ways[way](CLOCK_MONOTONIC, &t) == 0);
            CHECK(t.tv_nsec >= 0 && t.tv_nsec < 1000000000);
            goes_on(&monotonic, seconds(t));
            for (int i = 0; i < 3; i++) {
                CHECK(ways[way](others[i], &t) == 0);
                goes_on(&past[i], seconds(t));
            }
            CHECK(ways[way](CLOCK_REALTIME, &t) == 0);
            CHECK(t.tv_sec > 1700000000);
        }
        goes_on(&real, seconds(t));
        long s = time(NULL) - t.tv_sec;
        CHECK(s >= -1 && s < LEAP);
        struct tms tms;
        goes_on(&ticks, (unsigned long)times(&tms) / 100.0);
        struct sysinfo info;
        CHECK(sysinfo(&info) == 0);
        goes_on(&up, info.uptime);
        find_in_vdso();
        usleep(500);
    }
    return NULL;
}

static void *spinner(void *argument)
{
    (void)argument;
    struct past past = {"the spinning thread's clock", 0};
    while (!over)
        goes_on(&past, guest_now());
    return NULL;
}

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t taken = PTHREAD_MUTEX_INITIALIZER;

static void condition(struct timespec t)
{
    pthread_condattr_t attr;
    pthread_cond_t never;
    CHECK(pthread_condattr_init(&attr) == 0 && pthread_condattr_setclock(&attr, CLOCK_MONOTONIC) == 0);
    CHECK(pthread_cond_init(&never, &attr) == 0 && pthread_mutex_lock(&mutex) == 0);
    CHECK_EQ(pthread_cond_timedwait(&never, &mutex, &t), ETIMEDOUT);
    CHECK(pthread_mutex_unlock(&mutex) == 0 && pthread_cond_destroy(&never) == 0);
}

static void semaphore(struct timespec t)
{
    sem_t never;
    CHECK(sem_init(&never, 0, 0) == 0);
    CHECK(sem_clockwait(&never, CLOCK_MONOTONIC, &t) == -1);
    CHECK_EQ(errno, ETIMEDOUT);
}

static void lock(struct timespec t)
{
    CHECK_EQ(pthread_mutex_clocklock(&taken, CLOCK_MONOTONIC, &t), ETIMEDOUT);
}

static void sleep_until(struct timespec t)
{
    CHECK_EQ(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL), 0);
}

static void boot_sleep(struct timespec t)
{
    CHECK_EQ(clock_nanosleep(CLOCK_BOOTTIME, TIMER_ABSTIME, &t, NULL), 0);
}

static void descriptor(struct timespec t)
{
    static _Thread_local int fd = -1;
    if (fd < 0)
        fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    struct itimerspec at = {{0, 0}, t};
    CHECK(fd >= 0 && timerfd_settime(fd, TFD_TIMER_ABSTIME, &at, NULL) == 0);
    uint64_t n;
    CHECK_EQ(read(fd, &n, 8), 8);
    CHECK_EQ(n, 1);
}

static void timer(struct timespec t)
{
    static _Thread_local timer_t id;
    static _Thread_local int made;
    int sig = SIGRTMIN + 3;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = sig};
    if (!made++)
        CHECK(timer_create(CLOCK_MONOTONIC, &event, &id) == 0);
    struct itimerspec at = {{0, 0}, t};
    CHECK(timer_settime(id, TIMER_ABSTIME, &at, NULL) == 0);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, sig);
    CHECK_EQ(sigwaitinfo(&set, NULL), sig);
}

static void many(struct timespec t)
{
    static uint32_t word;
    struct futex_waitv wait = {.val = 0, .uaddr = (uintptr_t)&word, .flags = FUTEX_32 | FUTEX_PRIVATE_FLAG};
    int r;
    do
        r = (int)syscall(SYS_futex_waitv, &wait, 1, 0, &t, CLOCK_MONOTONIC);
    while (r < 0 && errno == EINTR);
    CHECK(r == -1);
    if (errno == ENOSYS)
        sleep_until(t);
    else
        CHECK_EQ(errno, ETIMEDOUT);
}

#ifndef FUTEX_LOCK_PI2
#define FUTEX_LOCK_PI2 13
#endif
static uint32_t pi_word;
static void inheriting(struct timespec t)
{
    int r;
    do
        r = (int)syscall(SYS_futex, &pi_word, FUTEX_LOCK_PI2 | FUTEX_PRIVATE_FLAG, 0, &t);
    while (r < 0 && errno == EINTR);
    CHECK(r == -1);
    if (errno == ENOSYS)
        sleep_until(t);
    else
        CHECK_EQ(errno, ETIMEDOUT);
}

static const struct kind {
    const char *name;
    void (*wait)(struct timespec);
    clockid_t clock;
} kinds[] = {
    {"pthread_cond_timedwait", condition, CLOCK_MONOTONIC},
    {"sem_clockwait", semaphore, CLOCK_MONOTONIC},
    {"pthread_mutex_clocklock", lock, CLOCK_MONOTONIC},
    {"clock_nanosleep", sleep_until, CLOCK_MONOTONIC},
    {"clock_nanosleep of the boot clock", boot_sleep, CLOCK_BOOTTIME},
    {"timerfd", descriptor, CLOCK_MONOTONIC},
    {"timer_create", timer, CLOCK_MONOTONIC},
    {"futex_waitv", many, CLOCK_MONOTONIC},
    {"FUTEX_LOCK_PI2", inheriting, CLOCK_MONOTONIC},
};
enum { KINDS = sizeof kinds / sizeof *kinds };
static long count[KINDS];

static void *waiter(void *argument)
{
    long k = (long)argument;
    while (!over) {
        /* Computed here, waited for in another life, perhaps. */
        struct timespec t = in(0.3, kinds[k].clock);
        guest_sleep_ms(k % 2 ? 150 : 20);
        kinds[k].wait(t);
        met(kinds[k].name, t, kinds[k].clock);
        count[k]++;
    }
    return NULL;
}

int main(int argc, char **argv)
{
    guest_begin();
    find_in_vdso();
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 3);
    CHECK(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0);
    CHECK(pthread_mutex_lock(&taken) == 0);
    /* The first thread has it, and never lets go. */
    pi_word = (uint32_t)syscall(SYS_gettid);
    pthread_t threads[KINDS + 2];
    for (long i = 0; i < KINDS; i++)
        threads[i] = guest_thread(waiter, (void *)i);
    threads[KINDS] = guest_thread(reader, NULL);
    int spin = argc > 1 && strcmp(argv[1], "spin") == 0;
    if (spin)
        threads[KINDS + 1] = guest_thread(spinner, NULL);
    ROUNDS(round)
    {
    }
    over = 1;
    for (int i = 0; i < KINDS + 1 + spin; i++)
        guest_join(threads[i]);
    for (int i = 0; i < KINDS; i++)
        CHECK(count[i] >= 1);
    printf("clocks ok\n");
    guest_end();
}
