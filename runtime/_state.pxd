# cython: language_level=3
"""StateMap, which is a SharedState but for its Python part, and its locks. The format in the region stands in
_maplayout.pxd."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._maplayout cimport map_key, map_status, map_t
from runtime._maplock cimport lock_hold
from runtime._region cimport SharedRegion


cdef class StateMap:
    cdef readonly SharedRegion region
    cdef map_t m

    cdef int check(self) except -1
    cdef int ready(self) except -1
    cdef int format(self, size_t limit, uint64_t max_items, bint zero) except -1
    cdef int attach(self, uint64_t at) except -1
    cdef int make_room(self, map_status status, uint64_t need, bint again) except -1
    cdef object read(self, map_key *k, bint view, uint64_t *word)
    cdef object read_once(self, map_key *k, uint64_t *word)
    cdef object read_pinned(self, map_key *k, bint view, uint64_t *word)
    cdef list bucket_items(self, uint64_t i, map_key *start, bint values)
    cdef object put(self, key, value, ttl, bint conditional, expected)
    cdef map_status write(self, map_key *k, const char *data, uint64_t n, int64_t expires, bint conditional,
                          const char *expected, uint64_t expected_bytes) except *
    cdef void tidy(self) noexcept


cdef class StateLock:
    cdef StateMap state
    cdef object text            # the key as it was given, which keeps its bytes
    cdef map_key key
    cdef object timeout
    cdef lock_hold hold
    cdef uint64_t identity      # who holds it; 0: not held through this object

    cdef int take(self, int64_t patience) except -1


# The bytes of a key, str as its UTF-8; the object keeps them. -1: TypeError or ValueError.
cdef int key_of(object key, uint32_t kind, map_key *k) except -1
# A key as users see it: str where it is UTF-8.
cdef object shown_key(const char *data, uint64_t n)
