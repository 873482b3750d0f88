/*
 * ckpt.h: the C interface of libckpt.so (inserted mode). C and C++.
 *
 * A program includes this header and links nothing. Every call goes through a
 * weak reference: under LD_PRELOAD=libckpt.so (or `ckpt run`) it reaches the
 * library, otherwise it returns -1 with errno ENOSYS and the program runs as if
 * the call were not there.
 *
 *     if (ckpt_checkpoint(0) > 0)
 *         puts("back from a restore");
 *
 * libckpt(3) describes all of it; ckpt_strerror says what errno means after -1.
 */
#ifndef CKPT_H
#define CKPT_H

#include <errno.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Memory that keeps its content through a rollback. */
struct ckpt_region {
    void *addr;
    size_t len;
};

/* Events of ckpt_on. */
#define CKPT_BEFORE 1   /* a checkpoint that was called is about to be taken */
#define CKPT_AFTER 2    /* it was taken, or could not be */
#define CKPT_RESTORED 3 /* the process is back from a restore or a rollback */

typedef void (*ckpt_handler)(int event, void *arg);

/*
 * The references. The names in front of `__asm__` are C's, the names behind it are
 * the library's; without the library they are null.
 */
#define CKPT_WEAK_REFERENCE(type, name, parameters)                            \
    extern type ckpt_library_##name parameters __asm__("ckpt_" #name)          \
        __attribute__((weak))

/*
 * Position-dependent code would have the linker put a plain 0 where the address of
 * a missing symbol is asked for; through the global offset table it stays open
 * until the program starts.
 */
#if defined(__x86_64__) && !defined(__PIC__) && !defined(__PIE__)
#define CKPT_ADDRESS(name, into)                                               \
    __asm__(".weak ckpt_" #name "\n\t"                                         \
            "{movq ckpt_" #name "@GOTPCREL(%%rip), %0"                         \
            "|mov %0, QWORD PTR ckpt_" #name "@GOTPCREL[rip]}"                 \
            : "=r"(into))
#else
#define CKPT_ADDRESS(name, into) ((into) = ckpt_library_##name)
#endif

CKPT_WEAK_REFERENCE(int, checkpoint, (int id));
CKPT_WEAK_REFERENCE(int, rollback,
                    (int id, int return_value,
                     const struct ckpt_region *protect, size_t n));
CKPT_WEAK_REFERENCE(int, exclude, (const char *glob));
CKPT_WEAK_REFERENCE(int, include, (const char *glob));
CKPT_WEAK_REFERENCE(int, redirect, (const char *from, const char *to));
CKPT_WEAK_REFERENCE(int, hold, (void));
CKPT_WEAK_REFERENCE(int, release, (void));
CKPT_WEAK_REFERENCE(int, on, (int event, ckpt_handler handler, void *arg));
CKPT_WEAK_REFERENCE(int, ready, (void));
CKPT_WEAK_REFERENCE(int, heartbeat, (void));
CKPT_WEAK_REFERENCE(long, generation, (void));
CKPT_WEAK_REFERENCE(const char *, argument, (int index));
CKPT_WEAK_REFERENCE(const char *, strerror, (int error));

/* A call that goes to the library where it is, else does `otherwise`. */
#define CKPT_CALL_OR(type, name, parameters, arguments, otherwise)             \
    static __inline__ type ckpt_##name parameters __asm__("ckpt_call_" #name)  \
        __attribute__((always_inline));                                        \
    static __inline__ type ckpt_##name parameters                              \
    {                                                                          \
        type(*library) parameters;                                             \
        CKPT_ADDRESS(name, library);                                           \
        if (library)                                                           \
            return library arguments;                                          \
        otherwise;                                                             \
    }

/* One that fails with ENOSYS without the library. */
#define CKPT_CALL(type, name, parameters, arguments)                           \
    CKPT_CALL_OR(type, name, parameters, arguments, errno = ENOSYS; return -1)

/*
 * Takes a checkpoint under the user's id (0 is the usual one, never negative).
 * Returns 0 when it was taken, the return value (> 0, CKPT_RETURN_VALUE, 1 unless
 * set) when the process comes back here from a restore, -1 and errno when it failed.
 */
CKPT_CALL(int, checkpoint, (int id), (id))

/*
 * Goes back to the checkpoint `id` (-1: the latest of any) inside this process;
 * `protect` keeps its content. Does not return on success.
 */
CKPT_CALL(int, rollback,
          (int id, int return_value, const struct ckpt_region *protect,
           size_t n),
          (id, return_value, protect, n))

/* Files that match the glob are left out of (taken into) file rollback. */
CKPT_CALL(int, exclude, (const char *glob), (glob))
CKPT_CALL(int, include, (const char *glob), (glob))

/* At a restore, open `to` where `from` was open. */
CKPT_CALL(int, redirect, (const char *from, const char *to), (from, to))

/*
 * No checkpoint is taken between hold and release. They nest, over all threads:
 * the process is free again when as many releases as holds were called.
 */
CKPT_CALL(int, hold, (void), ())
CKPT_CALL(int, release, (void), ())

/*
 * Has `handler(event, arg)` called. CKPT_BEFORE and then CKPT_AFTER or
 * CKPT_RESTORED run in the thread that calls ckpt_checkpoint, within the call.
 * After a restore to a checkpoint that the clock or the command took,
 * CKPT_RESTORED runs in the first thread that calls any of these functions.
 */
CKPT_CALL(int, on, (int event, ckpt_handler handler, void *arg),
          (event, handler, arg))

/* The program is initialised; tells a watchdog that it is alive. */
CKPT_CALL(int, ready, (void), ())
CKPT_CALL(int, heartbeat, (void), ())

/* The latest checkpoint of this process, 0 for none yet. */
CKPT_CALL(long, generation, (void), ())

/*
 * Argument `index` (from 0) of the start that went on from a template
 * (`ckpt restore --template JOB -- ARGUMENTS`), null when there is none.
 */
CKPT_CALL_OR(const char *, argument, (int index), (index), (void)index;
             return 0)

/* What errno means after one of these calls. */
CKPT_CALL_OR(const char *, strerror, (int error), (error),
             return error == ENOSYS ? "libckpt.so is not loaded"
                                    : "not an error of libckpt.so")

#undef CKPT_CALL
#undef CKPT_CALL_OR
#undef CKPT_ADDRESS
#undef CKPT_WEAK_REFERENCE

#ifdef __cplusplus
}
#endif

#endif /* CKPT_H */
