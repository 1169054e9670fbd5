# cython: language_level=3, cdivision=True, boundscheck=False
"""Loops for costs.py and state.py: what MemoryPool and SharedState do without the GIL (the shipped code), and
what the machine can.
"""
from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport int64_t, uint64_t

from runtime._atomics cimport *
from runtime._map cimport map_find
from runtime._maplayout cimport (
    K_VALUE, block_at, block_value, copy_out, map_block, map_key, map_key_of, map_place, map_t, still,
)
from runtime._pool cimport MemoryPool
from runtime._slab cimport pool_give, pool_t, pool_take
from runtime._state cimport StateMap


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


def swap(int64_t times):
    """Nanoseconds of one compare-and-swap, on average over so many."""
    cdef a64_t word
    cdef int64_t _i, began, ended
    a64_store_relaxed(&word, 0)
    with nogil:
        began = now_ns()
        for _i in range(times):
            a64_cas_acq_rel(&word, <uint64_t>_i, <uint64_t>_i + 1)
        ended = now_ns()
    return (ended - began) / <double>times


def look_up(StateMap state not None, list keys not None, int64_t times):
    """Nanoseconds to find a key and copy its value of up to 64 bytes, each key in its turn."""
    cdef map_t *m = &state.m
    cdef map_key[1024] wanted
    cdef map_place place
    cdef char[64] value
    cdef int64_t i, began, ended, found = 0, count = min(1024, len(keys))
    cdef map_block *block
    for i in range(count):
        wanted[i] = map_key_of(PyBytes_AS_STRING(keys[i]), len(keys[i]), K_VALUE)
    with nogil:
        began = now_ns()
        for i in range(times):
            if map_find(m, &wanted[i % count], &place):
                block = block_at(m, place.block)
                if block.value_bytes <= 64:
                    copy_out(value, block_value(block), block.value_bytes)
                found += still(&place)
        ended = now_ns()
    assert found == times, "a key was not found"
    return (ended - began) / <double>times
