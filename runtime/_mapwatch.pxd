# cython: language_level=3
"""Who watches a map, for nogil code: see "Tombstones" in _maplayout.pxd."""
from libc.stdint cimport uint64_t

from runtime._atomics cimport a64_load_seq_cst
from runtime._maplayout cimport map_bucket, map_t


# Something has changed in that bucket: raise the counter of its group, and wake those who sleep.
cdef void map_tell(map_t *m, map_bucket *bucket) noexcept nogil
# In all of them, it may be.
cdef void map_tell_all(map_t *m) noexcept nogil
# A row of this process that no other mapping of it watches by, from now on with a watch that looked then.
# row_count: all are taken.
cdef uint64_t watch_begin(map_t *m, uint64_t ns) noexcept nogil
# The last look of each of the watches of that row began then, or later; 0: none is open.
cdef void watch_since(map_t *m, uint64_t row, uint64_t ns) noexcept nogil
# A watch may have been the last one.
cdef void watch_ended(map_t *m) noexcept nogil
# The process in this row, which is dead, watches no more.
cdef void watch_dead(map_t *m, uint64_t row, uint64_t name) noexcept nogil
# Every watch of every process has begun a look since then; all bits: there is none.
cdef uint64_t watch_least(map_t *m) noexcept nogil


cdef inline bint map_watched(map_t *m) noexcept nogil:
    return a64_load_seq_cst(&m.head.watching) & 1
