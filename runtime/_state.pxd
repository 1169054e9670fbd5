# cython: language_level=3
"""StateMap, which is a SharedState but for its Python part."""
from libc.stdint cimport int64_t, uint64_t

from runtime._mapaccess cimport MapAccess
from runtime._maplayout cimport map_key, map_status


cdef class StateMap(MapAccess):
    cdef object read(self, map_key *k, bint view, uint64_t *word)
    cdef object read_once(self, map_key *k, uint64_t *word)
    cdef object read_pinned(self, map_key *k, bint view, uint64_t *word)
    cdef object watchers        # of this process, a Watchers (_watch.pyx); None: it has never watched
    cdef list bucket_items(self, uint64_t i, map_key *start)
    cdef object put(self, key, value, ttl, bint conditional, expected)
    cdef map_status write(self, map_key *k, const char *data, uint64_t n, int64_t expires, bint conditional,
                          const char *expected, uint64_t expected_bytes) except *
    cdef void tidy(self) noexcept
