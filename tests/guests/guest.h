/*
 * guest.h: what all guests share.
 *
 * A guest sets up a state, then works in rounds and verifies all of its state in
 * every round, and exits with status 73 only at its true end. It is run bare and
 * under the library, killed and started again, always with the same expectations.
 *
 *   GUEST_SECONDS   about how long it runs (default 2); it sets the number of rounds,
 *                   never a deadline, so that a killed and resumed run does the same
 *                   work as an undisturbed one
 *   GUEST_LOG       a file that gets one line "begin" each time main() begins: a
 *                   run that was resumed has one, a run that started from scratch two
 */
#ifndef GUEST_H
#define GUEST_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define GUEST_END 73

/* Says where and why on descriptor 2, without stdio, and ends with 99. */
#define FAIL(...)                                                              \
    do {                                                                       \
        char fail_[512];                                                       \
        int n_ = snprintf(fail_, sizeof fail_, "%s:%d: ", __FILE__, __LINE__); \
        n_ += snprintf(fail_ + n_, sizeof fail_ - n_, __VA_ARGS__);            \
        if (n_ > (int)sizeof fail_ - 2)                                        \
            n_ = sizeof fail_ - 2;                                             \
        fail_[n_++] = '\n';                                                    \
        if (write(2, fail_, n_) < 0) { /* nobody left to tell */               \
        }                                                                      \
        _exit(99);                                                             \
    } while (0)

#define CHECK(condition)                                                       \
    do {                                                                       \
        if (!(condition))                                                      \
            FAIL("not true: %s (errno %d)", #condition, errno);                \
    } while (0)

/* Both sides as long, both shown. */
#define CHECK_EQ(left, right)                                                  \
    do {                                                                       \
        long l_ = (long)(left), r_ = (long)(right);                            \
        if (l_ != r_)                                                          \
            FAIL("%s is %ld, not %ld (%s) (errno %d)", #left, l_, r_, #right,  \
                 errno);                                                       \
    } while (0)

/* What this machine or user does not offer: the test shows it. */
#define NOT_TESTED(what) (void)!write(2, "*** NOT TESTED: " what "\n", sizeof "*** NOT TESTED: " what)

/* Appends a line to $GUEST_LOG by one write. */
static inline void guest_note(const char *line)
{
    const char *log = getenv("GUEST_LOG");
    if (!log)
        return;
    int fd = open(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0)
        FAIL("GUEST_LOG %s: errno %d", log, errno);
    char text[256];
    int n = snprintf(text, sizeof text, "%s\n", line);
    if (write(fd, text, n) != n)
        FAIL("GUEST_LOG: write");
    close(fd);
}

/* First statement of every main(). */
static inline void guest_begin(void) { guest_note("begin"); }

/* Last statement of every main(). */
static inline void guest_end(void) { exit(GUEST_END); }

static inline double guest_seconds(void)
{
    const char *text = getenv("GUEST_SECONDS");
    return text ? atof(text) : 2.0;
}

/* A hundred rounds for each second of life. */
static inline long guest_rounds(void)
{
    long rounds = (long)(guest_seconds() * 100);
    return rounds < 10 ? 10 : rounds;
}

/* Sleeps, whatever signals come. */
static inline void guest_sleep_ms(long ms)
{
    struct timespec left = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&left, &left) != 0)
        CHECK_EQ(errno, EINTR);
}

/* for (round = 0; round < rounds; ) { body; 10 ms } */
#define ROUNDS(round)                                                          \
    for (long round = 0, rounds_ = guest_rounds(); round < rounds_;            \
         round++, guest_sleep_ms(10))

/* A cheap generator of the same numbers everywhere. */
static inline uint64_t guest_mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

/* Fills / verifies memory with a pattern that belongs to `seed`. */
static inline void guest_fill(void *at, size_t len, uint64_t seed)
{
    unsigned char *p = (unsigned char *)at;
    for (size_t i = 0; i + 8 <= len; i += 8) {
        uint64_t v = guest_mix(seed + i);
        memcpy(p + i, &v, 8);
    }
}

static inline int guest_holds(const void *at, size_t len, uint64_t seed)
{
    const unsigned char *p = (const unsigned char *)at;
    for (size_t i = 0; i + 8 <= len; i += 8) {
        uint64_t v = guest_mix(seed + i);
        if (memcmp(p + i, &v, 8) != 0)
            return 0;
    }
    return 1;
}

static inline int guest_is_zero(const void *at, size_t len)
{
    const unsigned char *p = (const unsigned char *)at;
    for (size_t i = 0; i < len; i++)
        if (p[i])
            return 0;
    return 1;
}

static inline double guest_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

/* When the kernel began this life of the process, in its ticks. */
static inline unsigned long guest_life(void)
{
    char text[1024];
    int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (n <= 0)
        FAIL("/proc/self/stat: errno %d", errno);
    close(fd);
    text[n] = 0;
    char *word = strrchr(text, ')') + 2;
    for (int field = 3; field < 22; field++)
        word = strchr(word, ' ') + 1;
    return strtoul(word, NULL, 10);
}

/* A whole small file (a /proc file, say), with its end marked by 0. With a restart between two reads
 * the file of another process would be read on from there: then again from the start. */
static inline long guest_slurp(const char *path, char *into, size_t room)
{
    size_t have;
    unsigned long life;
    do {
        life = guest_life();
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return -1;
        have = 0;
        for (;;) {
            ssize_t n = read(fd, into + have, room - 1 - have);
            if (n < 0 && errno == EINTR)
                continue;
            if (n <= 0)
                break;
            have += n;
        }
        into[have] = 0;
        close(fd);
    } while (guest_life() != life);
    return (long)have;
}

/* mmap that must work. */
static inline void *guest_map(size_t len, int prot, int flags, int fd, off_t at)
{
    void *p = mmap(NULL, len, prot, flags, fd, at);
    if (p == MAP_FAILED)
        FAIL("mmap of %zu: errno %d", len, errno);
    return p;
}

static inline pthread_t guest_thread(void *(*body)(void *), void *argument)
{
    pthread_t thread;
    int error = pthread_create(&thread, NULL, body, argument);
    if (error)
        FAIL("pthread_create: %d", error);
    return thread;
}

static inline void guest_join(pthread_t thread)
{
    int error = pthread_join(thread, NULL);
    if (error)
        FAIL("pthread_join: %d", error);
}

#endif /* GUEST_H */
