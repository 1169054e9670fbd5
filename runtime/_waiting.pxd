# cython: language_level=3
"""Who waits for workers, and who must be told. See _waiting.pyx."""
from libc.stdint cimport int64_t

from runtime._slots cimport Slots


cdef class Waiting(Slots):
    cdef bint asleep            # the collector sleeps, or is about to
    cdef public object tell     # called when somebody must be told of leases or outcomes
    cdef bint nudged            # it was told of outcomes, or of a wish for room

    cdef int work(self) except -1
    cdef bint within(self) noexcept
    cdef bint wishes(self) noexcept
    cdef int drain_out(self) except -1
    cdef int look_until(self, int64_t until) except -1
    cdef int sleep_here(self, int64_t ns) except -1
    cdef bint wait_here(self, int64_t ns) except -1
    cdef int hand_back(self) except -1
    cdef bint noisy(self) except -1
