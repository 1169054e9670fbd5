# cython: language_level=3
"""Blocks: runs of extents in the region, each with exactly one owner. The words are in _layout.pxd.

Every function here may be killed at any instruction and leaves no extent that is neither free nor owned.
"""
from libc.stdint cimport int64_t, uint64_t

from runtime._atomics cimport *
from runtime._layout cimport *


ctypedef struct heap_t:
    a64_t *words            # the extent words, in the region
    char *extents           # extent 0, in the region
    uint64_t count          # how many extents there are by now
    a64_t *frees            # arena_t.frees, in the region
    uint64_t hint           # process-private: where a run was freed last, to reuse warm pages


# A "ref" is {index of the head, tag}. `owner` is a slot, or NO_SLOT for the host.
cdef int64_t heap_take(heap_t *heap, uint64_t nbytes, uint64_t owner, uint64_t *tag) noexcept nogil
cdef bint heap_free(heap_t *heap, uint64_t at, uint64_t tag, uint64_t state, uint64_t owner) noexcept nogil
cdef bint heap_publish(heap_t *heap, uint64_t at, uint64_t tag, uint64_t slot) noexcept nogil
cdef bint heap_adopt(heap_t *heap, uint64_t at, uint64_t tag, uint64_t slot) noexcept nogil
cdef uint64_t heap_sweep(heap_t *heap, uint64_t slot) noexcept nogil
cdef uint64_t heap_run(heap_t *heap, uint64_t at) noexcept nogil
cdef uint64_t heap_used(heap_t *heap) noexcept nogil
cdef uint64_t heap_largest(heap_t *heap) noexcept nogil


cdef inline bint vacant(uint64_t w) noexcept nogil:
    """Nobody owns it: FREE or HOLE."""
    return x_state(w) == X_FREE or x_state(w) == X_HOLE
