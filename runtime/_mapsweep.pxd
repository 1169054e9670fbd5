# cython: language_level=3
"""What a map does now and then: see _mapsweep.pyx."""
from libc.stdint cimport int64_t, uint64_t

from runtime._maplayout cimport map_bucket, map_t


# Free what the dead leave (blocks, locks, pins, rows), and, if asked, items that are over and idle locks.
# How many blocks. Any number of processes at once; killed anywhere, the next one goes on.
cdef uint64_t map_sweep(map_t *m, bint thorough) noexcept nogil
# The same for one bucket; locks: idle ones, too.
cdef uint64_t tidy_bucket(map_t *m, map_bucket *bucket, int64_t now, bint locks) noexcept nogil
# Items that are over of a few buckets. Called with every 256th write.
cdef void map_tidy(map_t *m, int64_t now) noexcept nogil
