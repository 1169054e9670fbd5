# cython: language_level=3
"""What a map does now and then: see _mapsweep.pyx."""
from libc.stdint cimport int64_t, uint64_t

from runtime._maplayout cimport map_bucket, map_t


cdef enum sweep_t:              # what is freed
    SWEEP_DEAD = 0              # what the dead leave
    SWEEP_OVER = 1              # and items that are over, tombstones of which all watches know, idle locks
    SWEEP_ALL = 2               # and all tombstones


# How many blocks that were. Any number of processes at once; killed anywhere, the next one goes on.
cdef uint64_t map_sweep(map_t *m, sweep_t extent) noexcept nogil
# Items of one bucket that are over, in any case; idle locks and tombstones as said.
cdef uint64_t tidy_bucket(map_t *m, map_bucket *bucket, int64_t now, sweep_t extent) noexcept nogil
# Items that are over of a few buckets. Called with every 256th write.
cdef void map_tidy(map_t *m, int64_t now) noexcept nogil
