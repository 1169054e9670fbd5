# cython: language_level=3
"""An arena whose host gives it memory as it is needed, and takes it back. See _growth.pyx."""
from libc.stdint cimport int64_t, uint64_t

from runtime._arena cimport Arena


cdef class GrowingArena(Arena):
    cdef dict idle          # piece of PIECE extents -> its tags' sum, of those that the last look found free
    cdef int64_t looked     # monotonic ns of that look
    cdef readonly str refusal   # why the last growth came to nothing, for people; "" at first
    cdef uint64_t refused   # extents that were asked for then; 0: it may be tried again
    cdef int64_t refused_at     # monotonic ns
    cdef uint64_t refused_frees     # arena_t.frees then
    cdef unsigned long grower   # the thread that grows or trims, while one does
    cdef bint crowded       # there is no room in the arena, so no memory is lacking

    cdef int refuse(self, uint64_t need, str why, bint crowded) except -1
    cdef bint make_room(self, uint64_t need) except -1
    cdef uint64_t step(self, uint64_t need) noexcept
    cdef uint64_t backed(self) noexcept
    cdef int64_t find(self, uint64_t need, uint64_t *found) noexcept nogil
    cdef int fill(self, uint64_t at, uint64_t run) except -1
    cdef int extend(self, uint64_t more) except -1
    cdef bint wait_for_other(self) except -1
    cdef int drain(self, list runs) except -1
    cdef bint punch(self, uint64_t at, uint64_t run) except -1
