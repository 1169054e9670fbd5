# cython: language_level=3
"""A process's access to a map in a region. The format in the region stands in _maplayout.pxd."""
from libc.stdint cimport uint32_t, uint64_t

from runtime._maplayout cimport map_key, map_status, map_t
from runtime._mapsweep cimport sweep_t
from runtime._region cimport SharedRegion


cdef class MapAccess:
    cdef readonly SharedRegion region
    cdef map_t m

    cdef int check(self) except -1
    cdef int ready(self) except -1
    cdef int format(self, size_t limit, uint64_t max_items, bint zero) except -1
    cdef int attach(self, uint64_t at) except -1
    cdef int make_room(self, map_status status, uint64_t need, int turn) except -1
    cdef uint64_t swept(self, sweep_t extent) except? 0


# The bytes of a key, str as its UTF-8; the object keeps them. -1: TypeError or ValueError.
cdef int key_of(object key, uint32_t kind, map_key *k) except -1
# A key as users see it: str where it is UTF-8.
cdef object shown_key(const char *data, uint64_t n)
