# cython: language_level=3, cdivision=True, boundscheck=False
"""Loops for costs.py: what MemoryPool does without the GIL (the shipped code), and what the machine can."""
from libc.stdint cimport int64_t, uint64_t

from runtime._atomics cimport *
from runtime._pool cimport MemoryPool
from runtime._slab cimport pool_give, pool_t, pool_take


def take_and_give(MemoryPool pool not None, int64_t times):
    """Nanoseconds of one acquire and release, on average over so many."""
    cdef pool_t *p = &pool.p
    cdef uint64_t held = 0
    cdef int64_t _i, index, began, ended
    with nogil:
        began = now_ns()
        for _i in range(times):
            index = pool_take(p, &held)
            pool_give(p, <uint64_t>index, held)
        ended = now_ns()
    return (ended - began) / <double>times


def swap_and_store(int64_t times):
    """Nanoseconds of one compare-and-swap and one release store, on average over so many."""
    cdef a64_t word
    cdef int64_t _i, began, ended
    a64_store_relaxed(&word, 0)
    with nogil:
        began = now_ns()
        for _i in range(times):
            a64_cas_acq_rel(&word, 0, 1)
            a64_store_release(&word, 0)
        ended = now_ns()
    return (ended - began) / <double>times


def swap_twice(int64_t times):
    """Nanoseconds of two compare-and-swaps on one word, on average over so many."""
    cdef a64_t word
    cdef int64_t _i, began, ended
    a64_store_relaxed(&word, 0)
    with nogil:
        began = now_ns()
        for _i in range(times):
            a64_cas_acq_rel(&word, 0, 1)
            a64_cas_acq_rel(&word, 1, 0)
        ended = now_ns()
    return (ended - began) / <double>times
