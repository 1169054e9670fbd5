# cython: language_level=3
"""Cython's view of include/atomics.h: words whose every operation names its memory order."""
from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef extern from "include/atomics.h" nogil:
    ctypedef struct a64_t:
        pass
    ctypedef struct a32_t:
        pass

    uint64_t a64_load_relaxed(a64_t *w)
    uint64_t a64_load_acquire(a64_t *w)
    uint64_t a64_load_seq_cst(a64_t *w)
    void a64_store_relaxed(a64_t *w, uint64_t x)
    void a64_store_release(a64_t *w, uint64_t x)
    void a64_store_seq_cst(a64_t *w, uint64_t x)
    uint64_t a64_fetch_add_relaxed(a64_t *w, uint64_t x)
    uint64_t a64_fetch_add_seq_cst(a64_t *w, uint64_t x)
    bint a64_cas_acq_rel(a64_t *w, uint64_t expected, uint64_t desired)
    bint a64_cas_seq_cst(a64_t *w, uint64_t expected, uint64_t desired)

    uint32_t a32_load_relaxed(a32_t *w)
    uint32_t a32_load_acquire(a32_t *w)
    uint32_t a32_load_seq_cst(a32_t *w)
    void a32_store_relaxed(a32_t *w, uint32_t x)
    void a32_store_release(a32_t *w, uint32_t x)
    uint32_t a32_fetch_add_acq_rel(a32_t *w, uint32_t x)
    uint32_t a32_fetch_sub_acq_rel(a32_t *w, uint32_t x)
    uint32_t a32_fetch_add_seq_cst(a32_t *w, uint32_t x)
    bint a32_cas_relaxed(a32_t *w, uint32_t expected, uint32_t desired)
    bint a32_cas_acquire(a32_t *w, uint32_t expected, uint32_t desired)

    void fence_seq_cst()
    void fence_acquire()
    void fence_release()
    void words_store(void *to, const void *source, size_t n)
    void words_load(void *to, const void *source, size_t n)
    void cpu_relax()
    int64_t now_ns()

    bint futex_wait(a32_t *w, uint32_t expected, int64_t timeout_ns)
    int futex_wake(a32_t *w, int n)

    unsigned int MFD_CLOEXEC
    unsigned int MFD_ALLOW_SEALING
    int sys_memfd_create(const char *name, unsigned int flags)
    int sys_pidfd_open(int pid)
    bint sys_is_open(int fd)
    int sys_pidfd_send_signal(int pidfd, int sig)
