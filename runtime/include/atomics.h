/* The only C of the package but for copy.h: C11 atomics as opaque words,
 * futexes, and the system calls that old glibc headers lack.
 *
 * A word is a struct, so `word += 1`, which would compile into a lost update
 * on a plain _Atomic typedef seen through Cython, does not compile at all.
 * Every operation names its memory order. Words live in memory that several
 * processes map: no operation here may take a lock or keep process-private
 * state, and the static asserts below refuse a platform on which they would.
 */
#ifndef RUNTIME_ATOMICS_H
#define RUNTIME_ATOMICS_H

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef struct { _Atomic uint64_t v; } a64_t;
typedef struct { _Atomic uint32_t v; } a32_t;

_Static_assert(sizeof(a64_t) == 8 && sizeof(a32_t) == 4, "words have no padding");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2,
               "words in shared memory need lock-free atomics");
_Static_assert(sizeof(void *) == 8, "offsets and lengths are 64 bits wide");

/* ---- 64-bit words ------------------------------------------------------ */
static inline uint64_t a64_load_relaxed(a64_t *w) { return atomic_load_explicit(&w->v, memory_order_relaxed); }
static inline uint64_t a64_load_acquire(a64_t *w) { return atomic_load_explicit(&w->v, memory_order_acquire); }
static inline uint64_t a64_load_seq_cst(a64_t *w) { return atomic_load_explicit(&w->v, memory_order_seq_cst); }
static inline void a64_store_relaxed(a64_t *w, uint64_t x) { atomic_store_explicit(&w->v, x, memory_order_relaxed); }
static inline void a64_store_release(a64_t *w, uint64_t x) { atomic_store_explicit(&w->v, x, memory_order_release); }
static inline void a64_store_seq_cst(a64_t *w, uint64_t x) { atomic_store_explicit(&w->v, x, memory_order_seq_cst); }
static inline uint64_t a64_fetch_add_relaxed(a64_t *w, uint64_t x) { return atomic_fetch_add_explicit(&w->v, x, memory_order_relaxed); }
static inline uint64_t a64_fetch_add_seq_cst(a64_t *w, uint64_t x) { return atomic_fetch_add_explicit(&w->v, x, memory_order_seq_cst); }
/* 1 and `desired` is in place, or 0 and nothing has changed. Strong: it never fails spuriously. */
static inline int a64_cas_acq_rel(a64_t *w, uint64_t expected, uint64_t desired) {
    return atomic_compare_exchange_strong_explicit(&w->v, &expected, desired, memory_order_acq_rel, memory_order_acquire);
}
static inline int a64_cas_seq_cst(a64_t *w, uint64_t expected, uint64_t desired) {
    return atomic_compare_exchange_strong_explicit(&w->v, &expected, desired, memory_order_seq_cst, memory_order_seq_cst);
}

/* ---- 32-bit words: what a futex waits on ------------------------------- */
static inline uint32_t a32_load_relaxed(a32_t *w) { return atomic_load_explicit(&w->v, memory_order_relaxed); }
static inline uint32_t a32_load_acquire(a32_t *w) { return atomic_load_explicit(&w->v, memory_order_acquire); }
static inline uint32_t a32_load_seq_cst(a32_t *w) { return atomic_load_explicit(&w->v, memory_order_seq_cst); }
static inline void a32_store_relaxed(a32_t *w, uint32_t x) { atomic_store_explicit(&w->v, x, memory_order_relaxed); }
static inline void a32_store_release(a32_t *w, uint32_t x) { atomic_store_explicit(&w->v, x, memory_order_release); }
static inline uint32_t a32_fetch_add_acq_rel(a32_t *w, uint32_t x) { return atomic_fetch_add_explicit(&w->v, x, memory_order_acq_rel); }
static inline uint32_t a32_fetch_sub_acq_rel(a32_t *w, uint32_t x) { return atomic_fetch_sub_explicit(&w->v, x, memory_order_acq_rel); }
static inline uint32_t a32_fetch_add_seq_cst(a32_t *w, uint32_t x) { return atomic_fetch_add_explicit(&w->v, x, memory_order_seq_cst); }
static inline int a32_cas_relaxed(a32_t *w, uint32_t expected, uint32_t desired) {
    return atomic_compare_exchange_strong_explicit(&w->v, &expected, desired, memory_order_relaxed, memory_order_relaxed);
}
static inline int a32_cas_acquire(a32_t *w, uint32_t expected, uint32_t desired) {
    return atomic_compare_exchange_strong_explicit(&w->v, &expected, desired, memory_order_acquire, memory_order_relaxed);
}

/* ThreadSanitizer runs a fence, but takes it for no edge between threads (-Wtsan says so). That is what we
 * want: each fence of ours orders a store before a load of another word. What one thread hands to another
 * rests on the word that is released and acquired, and where it does not, it shall be reported. */
static inline void fence_seq_cst(void) { atomic_thread_fence(memory_order_seq_cst); }
/* Between copying what others may overwrite and looking again whether they have; between taking memory and
 * overwriting it. No instruction on x86. */
static inline void fence_acquire(void) { atomic_thread_fence(memory_order_acquire); }
static inline void fence_release(void) { atomic_thread_fence(memory_order_release); }

/* ---- words of a seqlock: copied while another process may write them ---- */
/* Relaxed and word by word, since a memcpy that races is undefined. `n` bytes, a multiple of 8; `from` and
 * `to` are 8-aligned. What orders it, and who looks again, is said where it is called. */
typedef uint64_t __attribute__((__may_alias__)) any64_t;
static inline void words_store(void *to, const void *from, size_t n) {
    for (size_t i = 0; i < n / 8; i++)
        __atomic_store_n((any64_t *)to + i, ((const any64_t *)from)[i], __ATOMIC_RELAXED);
}
static inline void words_load(void *to, const void *from, size_t n) {
    for (size_t i = 0; i < n / 8; i++)
        ((any64_t *)to)[i] = __atomic_load_n((const any64_t *)from + i, __ATOMIC_RELAXED);
}

static inline void cpu_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield" ::: "memory");
#endif
}

/* ---- time -------------------------------------------------------------- */
/* Nanoseconds of CLOCK_MONOTONIC: the same clock in every process, and no
 * step of the wall clock moves it. */
static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* ---- futexes, shared between processes --------------------------------- */
/* Sleep while *w == expected. 0: woken, or the word had changed, or a signal
 * came: look again. 1: the timeout (ns; negative: none) has passed. */
static inline int futex_wait(a32_t *w, uint32_t expected, int64_t timeout_ns) {
    struct timespec t, *p = 0;
    if (timeout_ns >= 0) {
        t.tv_sec = timeout_ns / 1000000000LL;
        t.tv_nsec = timeout_ns % 1000000000LL;
        p = &t;
    }
    long rc = syscall(SYS_futex, (uint32_t *)w, FUTEX_WAIT, expected, p, 0, 0);
    return rc == -1 && errno == ETIMEDOUT;
}
/* Wakes up to n sleepers; how many there were. */
static inline int futex_wake(a32_t *w, int n) {
    return (int)syscall(SYS_futex, (uint32_t *)w, FUTEX_WAKE, n, 0, 0, 0);
}

/* ---- system calls by number: glibc's wrappers bind too new a symbol ----- */
#ifndef MFD_CLOEXEC
#define MFD_CLOEXEC 1U
#define MFD_ALLOW_SEALING 2U
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif
static inline int sys_memfd_create(const char *name, unsigned int flags) { return (int)syscall(SYS_memfd_create, name, flags); }
static inline int sys_pidfd_open(int pid) { return (int)syscall(SYS_pidfd_open, pid, 0); }
static inline int sys_is_open(int fd) { return syscall(SYS_fcntl, fd, F_GETFD) >= 0; }
static inline int sys_pidfd_send_signal(int pidfd, int sig) { return (int)syscall(SYS_pidfd_send_signal, pidfd, sig, (void *)0, 0); }

#endif
