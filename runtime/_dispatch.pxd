# cython: language_level=3
"""The door to queue, leases, harvest, slots and waiting. See _dispatch.pyx."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._arena cimport HostBlock
from runtime._records cimport Batch, Span, Task
from runtime._rescue cimport Rescue


cdef class Dispatcher(Rescue):
    cdef public bint refusing   # users may submit nothing more
    cdef int64_t jobs           # that were accepted, and may submit more tasks: JobHolds

    cdef int take_in(self, entry) except -1
    cdef HostBlock room_for(self, Task task, uint64_t nbytes)
    cdef int rouse(self, uint64_t nbytes) except -1
    cdef bint enter(self, Task task) except -1
    cdef int retry_now(self, Task task, int64_t delay, bint counted) except -1
    cdef int retry_item_now(self, Batch batch, Span span, int64_t delay) except -1
    cdef int drop_now(self, Batch batch) except -1
    cdef int abandon_now(self, cancelled) except -1
