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
    __asm__(".weak ckpt_" #name "\n\tmovq ckpt_" #name "@GOTPCREL(%%rip), %0"   \
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
CKPT_WEAK_REFERENCE(int, heartbeat, (void));

/* A call that goes to the library where it is, else fails with ENOSYS. */
#define CKPT_CALL(name, parameters, arguments)                                 \
    static inline int ckpt_##name parameters __asm__("ckpt_call_" #name);      \
    static inline int ckpt_##name parameters                                   \
    {                                                                          \
        int (*library) parameters;                                             \
        CKPT_ADDRESS(name, library);                                           \
        if (library)                                                           \
            return library arguments;                                          \
        errno = ENOSYS;                                                        \
        return -1;                                                             \
    }

/*
 * Takes a checkpoint under the user's id (0 is the usual one). Returns 0 when it
 * was taken, the return value (> 0, CKPT_RETURN_VALUE, 1 unless set) when the
 * process comes back here from a restore, -1 and errno when it failed.
 */
CKPT_CALL(checkpoint, (int id), (id))

/*
 * Goes back to the checkpoint `id` inside this process; `protect` keeps its
 * content. Does not return on success.
 */
CKPT_CALL(rollback,
          (int id, int return_value, const struct ckpt_region *protect,
           size_t n),
          (id, return_value, protect, n))

/* Files that match the glob are left out of (taken into) file rollback. */
CKPT_CALL(exclude, (const char *glob), (glob))
CKPT_CALL(include, (const char *glob), (glob))

/* At a restore, open `to` where `from` was open. */
CKPT_CALL(redirect, (const char *from, const char *to), (from, to))

/* No checkpoint is taken between hold and release; they nest. */
CKPT_CALL(hold, (void), ())
CKPT_CALL(release, (void), ())

/* Tells a watchdog that the program is alive. */
CKPT_CALL(heartbeat, (void), ())

#undef CKPT_CALL
#undef CKPT_ADDRESS
#undef CKPT_WEAK_REFERENCE

#ifdef __cplusplus
}
#endif

#endif /* CKPT_H */
