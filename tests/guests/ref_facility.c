/* Proves: each thing of the kernel's that cannot be kept (argument: which) makes checkpoints be
 * refused while it is there, and the program runs on. Where it can be given back checkpoints
 * succeed again. Before it comes the program works for a while, so that there is a generation
 * to go on from. */
#include "guest.h"
#include <asm/ldt.h>
#include <linux/bpf.h>
#include <linux/capability.h>
#include <linux/perf_event.h>
#include <sys/prctl.h>

static int fd = -1;
static void *memory = MAP_FAILED;
static int key = -1;
static int root = -1;

/* What comes: 0, or the kernel does not offer it to this user. */
static int perf(void)
{
    struct perf_event_attr attr = {.type = PERF_TYPE_SOFTWARE, .size = sizeof attr, .config = PERF_COUNT_SW_TASK_CLOCK, .exclude_kernel = 1};
    return (fd = syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0)) < 0;
}

static int bpf(void)
{
    union bpf_attr attr = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 8, .max_entries = 4};
    return (fd = syscall(SYS_bpf, BPF_MAP_CREATE, &attr, sizeof attr)) < 0;
}

static int secret(void)
{
    fd = syscall(SYS_memfd_secret, 0);
    if (fd < 0)
        return 1;
    CHECK(ftruncate(fd, 4096) == 0);
    memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        return 1;
    strcpy(memory, "secret");
    return 0;
}

static int keys(void)
{
    key = pkey_alloc(0, 0);
    if (key < 0)
        return 1;
    memory = guest_map(4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(pkey_mprotect(memory, 4096, PROT_READ | PROT_WRITE, key) == 0);
    strcpy(memory, "guarded");
    return 0;
}

static int ldt(void)
{
    struct user_desc entry = {.entry_number = 1, .base_addr = 0x1000, .limit = 1, .seg_32bit = 1, .limit_in_pages = 1, .useable = 1};
    return syscall(SYS_modify_ldt, 1, &entry, sizeof entry) != 0;
}

static int capabilities(int on)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    CHECK(syscall(SYS_capget, &header, data) == 0);
    if (!data[0].permitted)
        return 1;
    for (int i = 0; i < 2; i++)
        data[i].effective = on ? data[i].permitted : 0;
    CHECK(syscall(SYS_capset, &header, data) == 0);
    return 0;
}

static int effective(void) { return capabilities(0); }
static void effective_back(void) { capabilities(1); }

/* The capabilities of one thread that is not the first. */
static volatile int phase;
static pthread_t other;

static void *without(void *unused)
{
    if (capabilities(0) != 0) { /* it has none */
        phase = 9;
        return unused;
    }
    phase = 1;
    while (phase == 1)
        guest_sleep_ms(5);
    if (phase == 2)
        capabilities(1);
    phase = 3;
    while (phase == 3)
        guest_sleep_ms(5);
    return unused;
}

static int thread(void)
{
    other = guest_thread(without, NULL);
    while (!phase)
        guest_sleep_ms(1);
    return phase == 9;
}

static void thread_back(void)
{
    phase = 2;
    while (phase != 3)
        guest_sleep_ms(1);
}

static int user(void) { return geteuid() != 0 || seteuid(65534) != 0; }
static void user_back(void) { CHECK(seteuid(0) == 0); }

/* Only when nothing is forbidden afterwards: the directory is the same, seen as the root. */
static int chrooted(void)
{
    root = open("/", O_RDONLY | O_DIRECTORY);
    return geteuid() != 0 || chroot(".") != 0;
}

static void chrooted_back(void)
{
    CHECK(fchdir(root) == 0 && chroot(".") == 0);
    CHECK(chdir(getenv("HOME")) == 0 && close(root) == 0);
}

static int landlock(void)
{
    /* Block devices cannot be made any more. */
    unsigned long long access[3] = {1ull << 11};
    int rules = syscall(444 /* landlock_create_ruleset */, access, 8, 0);
    if (rules < 0)
        return 1;
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    CHECK(syscall(446 /* landlock_restrict_self */, rules, 0) == 0);
    close(rules);
    return 0;
}

static int securebits(void) { return prctl(PR_SET_SECUREBITS, 1 << 6 /* no ambient capabilities */) != 0; }

static volatile char selector; /* 0: system calls are allowed */

static int dispatch(void) { return prctl(59 /* PR_SET_SYSCALL_USER_DISPATCH */, 1, 0, 0, &selector) != 0; }

/* As root everything can be read all the same. */
static int unreadable(void) { return geteuid() == 0 || prctl(PR_SET_DUMPABLE, 0) != 0; }
static void readable(void) { CHECK(prctl(PR_SET_DUMPABLE, 1) == 0); }

static void give_back(void)
{
    if (memory != MAP_FAILED)
        CHECK(munmap(memory, 4096) == 0);
    CHECK(fd < 0 || close(fd) == 0);
}

static const struct {
    const char *name;
    int (*come)(void);
    void (*go)(void); /* NULL: it stays */
} kinds[] = {
    {"perf", perf, give_back},
    {"bpf", bpf, give_back},
    {"secret", secret, give_back},
    {"keys", keys, NULL},
    {"ldt", ldt, NULL},
    {"capabilities", effective, effective_back},
    {"thread", thread, thread_back},
    {"user", user, user_back},
    {"chroot", chrooted, chrooted_back},
    {"landlock", landlock, NULL},
    {"securebits", securebits, NULL},
    {"dispatch", dispatch, NULL},
    {"dumpable", unreadable, readable},
};

/* Open from the start: another user, or under another root, cannot reach it by its path. */
static int notes = -1;

static void note(const char *line)
{
    char text[64];
    int n = snprintf(text, sizeof text, "%s\n", line);
    CHECK(notes < 0 || write(notes, text, n) == n);
}

int main(int argc, char **argv)
{
    guest_begin();
    CHECK(argc == 2);
    if (getenv("GUEST_LOG"))
        CHECK((notes = open(getenv("GUEST_LOG"), O_WRONLY | O_APPEND | O_CLOEXEC)) >= 0);
    unsigned kind = 0;
    while (strcmp(kinds[kind].name, argv[1]) != 0)
        CHECK(++kind < sizeof kinds / sizeof *kinds);
    for (long i = 0; i < guest_rounds() / 2; i++)
        guest_sleep_ms(10);
    int there = kinds[kind].come() == 0;
    note(there ? "reason there" : "no reason");
    for (long i = 0; i < guest_rounds(); i++) {
        CHECK(memory == MAP_FAILED || strlen(memory) > 5);
        guest_sleep_ms(10);
    }
    note("reason goes");
    if (kinds[kind].go) {
        if (there)
            kinds[kind].go();
        note("reason gone");
        ROUNDS(round) CHECK(round >= 0);
    }
    if (there && kinds[kind].come == thread) {
        phase = 4;
        guest_join(other);
    }
    printf("%s ok\n", argv[1]);
    guest_end();
}
