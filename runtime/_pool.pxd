# cython: language_level=3
"""MemoryPool and Block. The format in the region, and the algorithms for nogil code, stand in _slab.pxd."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._region cimport SharedRegion
from runtime._slab cimport pool_t


# Arguments and surroundings, as SharedState has them, too.
cdef int64_t patience_of(object timeout) except -2
cdef uint64_t pid_namespace()


cdef class MemoryPool:
    cdef readonly SharedRegion region
    cdef pool_t p
    cdef uint64_t total         # bytes of header, words and blocks
    cdef uint64_t blocks_from   # bytes from the header to block 0

    cdef int enroll(self) except -1
    cdef int find_or_format(self) except -1
    cdef int attach(self, uint64_t at) except -1
    cdef int64_t wait(self, uint64_t *held, int64_t patience) except -2


cdef class Block:
    cdef MemoryPool pool
    cdef uint64_t held          # the word with which the block was taken; 0: given back
    cdef uint64_t identity      # the process that took it
    cdef char *data             # its first byte
    cdef Py_ssize_t exports     # live views, and copies under way
    cdef uint32_t index         # which block of the pool

    cdef int check(self) except -1
