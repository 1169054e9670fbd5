# cython: language_level=3
"""Locks of a map by name."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._mapaccess cimport MapAccess
from runtime._maplayout cimport map_key
from runtime._maplock cimport lock_hold


cdef class StateLock:
    cdef MapAccess state
    cdef object text            # the key as it was given, which keeps its bytes
    cdef map_key key
    cdef object timeout
    cdef lock_hold hold
    cdef uint64_t identity      # who holds it; 0: not held through this object

    cdef int take(self, int64_t patience) except -1


# kind: K_LOCK, K_ONCE. timeout: seconds, None: for ever.
cdef StateLock new_lock(MapAccess state, object key, uint32_t kind, object timeout)
