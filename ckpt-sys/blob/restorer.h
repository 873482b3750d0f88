/* The restorer blob's arguments. Mirrored in ckpt-sys/src/blob.rs: change both.
 * Everything lies in the restorer's area, which is mapped in the old and in the
 * new memory image alike. */
#ifndef CKPT_RESTORER_H
#define CKPT_RESTORER_H

typedef unsigned long u64;
typedef unsigned int u32;
typedef int i32;

/* One system call of the tape. */
struct tape_op {
    u32 nr;
    u32 flags;
    u64 arg[6];
};

enum {
    OP_KEEP_FD = 1,       /* the result becomes the current descriptor */
    OP_MAY_FAIL = 2,      /* an error is ignored */
    OP_READ_FULL = 4,     /* pread64: repeat until all bytes are there */
    OP_FIXED_RESULT = 8,  /* the result must be arg[0] (mmap at a fixed place) */
    OP_READV_FULL = 16,   /* preadv: the same; its vector is used up */
    OP_COPY = 32,         /* no call: arg[2] bytes from arg[1] to arg[0] */
    OP_FD_ARG_SHIFT = 8,  /* bits 8-10: 1 + index of the argument that is replaced
                             by the current descriptor; 0 = none */
};

/* One thread to be born. */
struct restorer_thread {
    i32 tid;         /* wanted id */
    i32 new_tid;     /* what the kernel gave */
    u64 fs_base, gs_base;
    u64 robust_list, robust_list_len;
    u64 clear_child_tid;
    u64 rseq;
    u32 rseq_len, rseq_sig;
    u64 entry;       /* resume function in the image */
    u64 entry_stack; /* its stack pointer, 16-byte aligned, on the thread's own stack */
    u64 entry_arg[3];
    u32 is_main;     /* the initial thread takes this role */
    u32 pad;
};

struct restorer_args {
    u64 area, area_len;
    u64 task_size;
    u64 rseq, rseq_len, rseq_sig; /* the calling thread's present registration; 0 = none */
    struct tape_op *tape;
    u64 tape_len;
    struct restorer_thread *threads;
    u64 nthreads;
    u64 thread_stacks; /* blob_thread_stack bytes for each thread */
    u32 use_set_tid;
    i32 message_fd;
    u64 vvar_start;
    /* the helper thread */
    u64 helper_stack, helper_tls, helper_entry, helper_arg;
    i32 *close_fds;   /* closed in the program's table once the helper has its copy */
    u64 nclose_fds;
    /* barrier words */
    volatile u32 ready, go;
    u32 leader_exits;     /* no thread of the image is the main thread */
    volatile u32 leader_word; /* cleared by the kernel when the initial thread is gone */
    u64 stays;        /* memory is left mapped: the tape unmaps what must go */
    /* tape[share_from..share_to) may be played by two threads, in any order (0, 0: none). The
       helper is born before it then. */
    u64 share_from, share_to;
    volatile u64 share_next; /* the first one that nobody has taken */
    volatile u32 helper_busy; /* futex: the helper plays some of them */
    volatile u32 played;      /* futex: the whole tape is played */
    u64 stage_ns[4];  /* CLOCK_MONOTONIC: entry, unmapped, mapped, threads born */
};

#define BLOB_THREAD_STACK 1024

#endif
