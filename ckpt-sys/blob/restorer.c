/* The restorer: replaces the memory of the process by that of an image.
 *
 * Runs from the restorer's area: position-independent, no libc, no data
 * relocations, general registers only. Entered by the initial thread with all
 * signals blocked, on a stack in the area. It plays a tape of system calls that
 * Rust has prepared (agent/restore/tape.rs), gives birth to the threads and
 * never returns.
 *
 * Order (each step was proven necessary):
 *  1. unregister rseq (the kernel writes the area at every preemption), forget
 *     the robust list and the child-tid word;
 *  2. two munmap calls, below and above the area;
 *  3. a fresh vdso at the image's address (ARCH_MAP_VDSO_64);
 *     (2 and 3 not at a rollback that leaves memory mapped: the tape begins with that)
 *  4. the tape: mappings, contents, mm fields, signal actions;
 *  5. the helper thread, then the image's threads (where there is much to be read the helper
 *     is born before that and takes its share);
 *  6. everyone waits for `go`, then enters the image's resume function.
 */
#include "restorer.h"
#include <linux/futex.h>
#include <linux/sched.h>
#include <sys/syscall.h>

#define INLINE static inline __attribute__((always_inline))

INLINE long sc(long n, u64 a, u64 b, u64 c, u64 d, u64 e, u64 f)
{
    register u64 r10 __asm__("r10") = d;
    register u64 r8 __asm__("r8") = e;
    register u64 r9 __asm__("r9") = f;
    long ret;
    __asm__ volatile("syscall"
                     : "=a"(ret)
                     : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return ret;
}

INLINE u64 now_ns(void)
{
    u64 ts[2];
    sc(SYS_clock_gettime, 1, (u64)ts, 0, 0, 0, 0);
    return ts[0] * 1000000000ul + ts[1];
}

static char *put_number(char *p, u64 v, u32 base)
{
    char digits[24];
    int n = 0;
    do {
        u32 d = v % base;
        digits[n++] = d < 10 ? '0' + d : 'a' + d - 10;
        v /= base;
    } while (v);
    while (n)
        *p++ = digits[--n];
    return p;
}

/* Text must be built on the stack: the blob has no relocated pointers. */
#define PUT(p, text)                                                                                 \
    do {                                                                                             \
        static const char t_[] = text;                                                               \
        for (u32 i_ = 0; i_ + 1 < sizeof t_; i_++)                                                   \
            *p++ = t_[i_];                                                                           \
    } while (0)

/* The memory of the process is half replaced: nothing can be saved but a clear
 * message and the documented exit status. The store is untouched. */
static __attribute__((noreturn)) void die(struct restorer_args *a, u64 step, long nr, long err, u64 at)
{
    char line[200], *p = line;
    PUT(p, "ckpt: restore failed in the restorer, step ");
    p = put_number(p, step, 10);
    PUT(p, ", system call ");
    p = put_number(p, nr, 10);
    PUT(p, ", errno ");
    p = put_number(p, -err, 10);
    PUT(p, ", at 0x");
    p = put_number(p, at, 16);
    PUT(p, "; the checkpoint is untouched\n");
    sc(SYS_write, a->message_fd, (u64)line, p - line, 0, 0, 0);
    sc(SYS_exit_group, 125, 0, 0, 0, 0, 0);
    for (;;)
        ;
}

static __attribute__((noreturn)) void enter(struct restorer_thread *t)
{
    __asm__ volatile("mov %0, %%rsp\n\t"
                     "xor %%ebp, %%ebp\n\t"
                     "push $0\n\t"
                     "jmp *%1"
                     :
                     : "r"(t->entry_stack), "r"(t->entry), "D"(t->entry_arg[0]), "S"(t->entry_arg[1]),
                       "d"(t->entry_arg[2])
                     : "memory");
    __builtin_unreachable();
}

struct start {
    struct restorer_args *args;
    struct restorer_thread *thread;
};

/* A thread takes on its identity and waits for the common start. */
static __attribute__((noreturn)) void become(struct restorer_args *a, struct restorer_thread *t)
{
    long r;
    if (sc(SYS_arch_prctl, 0x1002 /* ARCH_SET_FS */, t->fs_base, 0, 0, 0, 0))
        die(a, 20, SYS_arch_prctl, 0, t->fs_base);
    if (t->gs_base)
        sc(SYS_arch_prctl, 0x1001 /* ARCH_SET_GS */, t->gs_base, 0, 0, 0, 0);
    t->new_tid = sc(SYS_set_tid_address, t->clear_child_tid, 0, 0, 0, 0, 0);
    if (t->robust_list)
        sc(SYS_set_robust_list, t->robust_list, t->robust_list_len, 0, 0, 0, 0);
    if (t->rseq) {
        r = sc(SYS_rseq, t->rseq, t->rseq_len, 0, t->rseq_sig, 0, 0);
        if (r)
            die(a, 21, SYS_rseq, r, t->rseq);
    }
    __atomic_add_fetch(&a->ready, 1, __ATOMIC_SEQ_CST);
    sc(SYS_futex, (u64)&a->ready, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1, 0, 0, 0);
    while (!__atomic_load_n(&a->go, __ATOMIC_ACQUIRE))
        sc(SYS_futex, (u64)&a->go, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, 0, 0, 0, 0);
    enter(t);
}

static __attribute__((noreturn, used)) void thread_main(struct start *s)
{
    become(s->args, s->thread);
}

/* A task of this process that begins in `main(arg)` on the stack whose end is `top`: clone(2), or
 * clone3(2) with the arguments given. */
#define SPAWN(ret, number, one, two, tls, main, arg_)                                                \
    do {                                                                                             \
        register u64 r10_ __asm__("r10") = 0;                                                        \
        register u64 r8_ __asm__("r8") = (tls);                                                      \
        register void *r13_ __asm__("r13") = (arg_);                                                 \
        __asm__ volatile("syscall\n\t"                                                               \
                         "test %%rax, %%rax\n\t"                                                     \
                         "jnz 1f\n\t"                                                                \
                         "mov %%r13, %%rdi\n\t"                                                      \
                         "xor %%ebp, %%ebp\n\t"                                                      \
                         "call " #main "\n\t"                                                        \
                         "ud2\n"                                                                     \
                         "1:"                                                                        \
                         : "=a"(ret)                                                                 \
                         : "a"(number), "D"(one), "S"(two), "d"(0ul), "r"(r10_), "r"(r8_), "r"(r13_)  \
                         : "rcx", "r11", "memory");                                                  \
    } while (0)

/* With an id that is chosen it must be clone3; containers' filters know only clone (they say that
 * there is no clone3). */
static long spawn(struct restorer_thread *t, struct restorer_args *a, u64 stack, u32 set_tid)
{
    struct start *s = (struct start *)(stack + BLOB_THREAD_STACK - 64);
    u64 flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM;
    i32 tid = t->tid;
    long ret;
    s->args = a;
    s->thread = t;
    if (!set_tid) {
        SPAWN(ret, SYS_clone, flags, s, 0, thread_main, s);
        return ret;
    }
    struct clone_args ca;
    for (u32 i = 0; i < sizeof ca; i++)
        ((volatile char *)&ca)[i] = 0;
    ca.flags = flags;
    ca.stack = stack;
    ca.stack_size = BLOB_THREAD_STACK - 64;
    ca.set_tid = (u64)&tid;
    ca.set_tid_size = 1;
    SPAWN(ret, SYS_clone3, &ca, sizeof ca, 0, thread_main, s);
    return ret;
}

static void play(struct restorer_args *a, u64 from, u64 to);

/* So many operations are taken at a time by each of two threads. */
#define SHARE 8
/* So often a word is looked at before the thread sleeps. */
#define SPINS 400

/* Plays what nobody has taken yet of the part that two threads may play. */
static void play_share(struct restorer_args *a)
{
    for (;;) {
        u64 from = __atomic_fetch_add(&a->share_next, SHARE, __ATOMIC_SEQ_CST);
        if (from >= a->share_to)
            return;
        u64 to = from + SHARE < a->share_to ? from + SHARE : a->share_to;
        play(a, from, to);
    }
}

/* Until the word is `wanted`. */
static void await_word(volatile u32 *word, u32 wanted)
{
    for (u32 i = 0; i < SPINS; i++) {
        if (__atomic_load_n(word, __ATOMIC_SEQ_CST) == wanted)
            return;
        __builtin_ia32_pause();
    }
    while (__atomic_load_n(word, __ATOMIC_SEQ_CST) != wanted)
        sc(SYS_futex, (u64)word, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, !wanted, 0, 0, 0);
}

static void set_word(volatile u32 *word, u32 value)
{
    __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
    sc(SYS_futex, (u64)word, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1, 0, 0, 0);
}

/* The helper before it enters the image. It is busy before it takes anything: who finds that
 * nothing is left, and then that it is not busy, knows that all of it is played. */
static __attribute__((noreturn, used)) void helper_main(struct restorer_args *a)
{
    if (a->share_from < a->share_to) {
        __atomic_store_n(&a->helper_busy, 1, __ATOMIC_SEQ_CST);
        play_share(a);
        set_word(&a->helper_busy, 0);
        await_word(&a->played, 1);
    }
    ((void (*)(u64))a->helper_entry)(a->helper_arg);
    __builtin_unreachable();
}

/* The helper has its own descriptor table and working directory: no CLONE_FILES,
 * no CLONE_FS. */
static long spawn_helper(struct restorer_args *a)
{
    u64 flags = CLONE_VM | CLONE_SIGHAND | CLONE_THREAD | CLONE_SETTLS;
    long ret;
    SPAWN(ret, SYS_clone, flags, a->helper_stack, a->helper_tls, helper_main, a);
    return ret;
}

static void play(struct restorer_args *a, u64 from, u64 to)
{
    long fd = -1;
    for (u64 i = from; i < to; i++) {
        struct tape_op *op = &a->tape[i];
        u64 v[6];
        for (u32 k = 0; k < 6; k++)
            v[k] = op->arg[k];
        u32 fd_arg = (op->flags >> OP_FD_ARG_SHIFT) & 7;
        if (fd_arg)
            v[fd_arg - 1] = fd;
        long r;
        if (op->flags & OP_COPY) {
            __asm__ volatile("cld\n\trep movsb" : "+D"(v[0]), "+S"(v[1]), "+c"(v[2]) : : "memory");
            continue;
        }
        if (op->flags & OP_READ_FULL) {
            while (v[2]) {
                r = sc(op->nr, v[0], v[1], v[2], v[3], 0, 0);
                if (r <= 0)
                    die(a, 100 + i, op->nr, r, v[1]);
                v[1] += r;
                v[2] -= r;
                v[3] += r;
            }
            continue;
        }
        if (op->flags & OP_READV_FULL) {
            u64(*part)[2] = (u64(*)[2])v[1]; /* struct iovec */
            u64 left = v[2];
            while (left) {
                r = sc(op->nr, v[0], (u64)part, left, v[3], 0, 0);
                if (r <= 0)
                    die(a, 100 + i, op->nr, r, part[0][0]);
                v[3] += r;
                while (r) {
                    u64 n = part[0][1] < (u64)r ? part[0][1] : (u64)r;
                    part[0][0] += n;
                    part[0][1] -= n;
                    r -= n;
                    if (!part[0][1]) {
                        part++;
                        left--;
                    }
                }
            }
            continue;
        }
        r = sc(op->nr, v[0], v[1], v[2], v[3], v[4], v[5]);
        if (op->flags & OP_KEEP_FD)
            fd = r;
        if (r < 0 && r > -4096 && !(op->flags & OP_MAY_FAIL))
            die(a, 100 + i, op->nr, r, v[0]);
        if ((op->flags & OP_FIXED_RESULT) && (u64)r != v[0])
            die(a, 100 + i, op->nr, r, v[0]);
    }
}

/* Everything but the area goes; a new vdso. */
static void unmap_all(struct restorer_args *a)
{
    long r = sc(SYS_munmap, 0, a->area, 0, 0, 0, 0);
    if (r)
        die(a, 2, SYS_munmap, r, 0);
    u64 above = a->area + a->area_len;
    r = sc(SYS_munmap, above, a->task_size - above, 0, 0, 0, 0);
    if (r)
        die(a, 3, SYS_munmap, r, above);
    if (a->vvar_start) {
        r = sc(SYS_arch_prctl, 0x2003 /* ARCH_MAP_VDSO_64 */, a->vvar_start, 0, 0, 0, 0);
        if (r < 0)
            die(a, 4, SYS_arch_prctl, r, a->vvar_start);
    }
}

__attribute__((section(".text.entry"), used)) void blob_entry(struct restorer_args *a)
{
    long r;
    a->stage_ns[0] = now_ns();
    if (a->rseq) {
        r = sc(SYS_rseq, a->rseq, a->rseq_len, 1 /* RSEQ_FLAG_UNREGISTER */, a->rseq_sig, 0, 0);
        if (r)
            die(a, 1, SYS_rseq, r, a->rseq);
    }
    sc(SYS_set_robust_list, 0, 24, 0, 0, 0, 0);
    sc(SYS_set_tid_address, 0, 0, 0, 0, 0, 0);
    if (!a->stays)
        unmap_all(a);
    a->stage_ns[1] = now_ns();
    u64 rest = 0;
    u32 shares = a->share_from < a->share_to;
    if (shares) {
        play(a, 0, a->share_from);
        a->share_next = a->share_from;
        r = spawn_helper(a);
        if (r < 0)
            die(a, 10, SYS_clone, r, 0);
        play_share(a);
        await_word(&a->helper_busy, 0);
        rest = a->share_to;
    }
    play(a, rest, a->tape_len);
    a->stage_ns[2] = now_ns();

    if (shares) {
        set_word(&a->played, 1);
    } else {
        r = spawn_helper(a);
        if (r < 0)
            die(a, 10, SYS_clone, r, 0);
    }
    struct restorer_thread *leader = 0;
    for (u64 i = 0; i < a->nthreads; i++) {
        struct restorer_thread *t = &a->threads[i];
        if (t->is_main) {
            leader = t;
            continue;
        }
        u64 stack = a->thread_stacks + i * BLOB_THREAD_STACK;
        r = spawn(t, a, stack, a->use_set_tid);
        if (r < 0 && a->use_set_tid) /* the id is taken: a new one, translated later */
            r = spawn(t, a, stack, 0);
        if (r < 0)
            die(a, 11, SYS_clone, r, t->tid);
    }
    for (u64 i = 0; i < a->nclose_fds; i++)
        sc(SYS_close, a->close_fds[i], 0, 0, 0, 0, 0);
    a->stage_ns[3] = now_ns();
    if (leader)
        become(a, leader);
    /* The image's leader had exited: so does ours, once the others are born. */
    sc(SYS_set_tid_address, (u64)&a->leader_word, 0, 0, 0, 0, 0);
    for (;;)
        sc(SYS_exit, 0, 0, 0, 0, 0, 0);
}
