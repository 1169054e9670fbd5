# cython: language_level=3
"""The door to queue, leases and harvest. See _dispatch.pyx."""
from libc.stdint cimport int64_t, uint32_t

from runtime._harvest cimport Harvest
from runtime._leasing cimport Batch, Span, Task


cdef class Dispatcher(Harvest):
    cdef public bint refusing   # users may submit nothing more
    cdef bint asleep            # the collector sleeps, or is about to
    cdef public object tell     # called when somebody must be told of leases or outcomes
    cdef bint nudged            # it was told of outcomes

    cdef int work(self) except -1
    cdef int take_in(self, entry) except -1
    cdef bint enter(self, Task task) except -1
    cdef bint noisy(self) except -1
    cdef int retry_now(self, Task task) except -1
    cdef int retry_item_now(self, Batch batch, Span span) except -1
    cdef int drop_now(self, Batch batch) except -1
    cdef int look_until(self, int64_t until) except -1
    cdef int sleep_here(self, int64_t ns) except -1
    cdef bint wait_here(self, int64_t ns) except -1
    cdef int hand_back(self) except -1
    cdef int stop_looking(self) except -1
    cdef bint others(self, uint32_t index) except -1
    cdef int abandon_now(self, cancelled) except -1
