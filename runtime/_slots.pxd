# cython: language_level=3
"""The life of a slot. See _slots.pyx."""
from libc.stdint cimport uint32_t, uint64_t

from runtime._harvest cimport Harvest
from runtime._layout cimport BUCKETS


# What is counted for a worker number, across its processes.
ctypedef struct tally_t:
    uint64_t tasks          # items that dead processes have finished
    uint64_t busy           # ns that they have spent in user code
    uint64_t shown          # the most ns that were said, of living ones too: it never goes backwards


# What dead processes have counted of times, and the most that was said of living ones too. See slot_t.
ctypedef struct times_t:
    uint64_t ran[BUCKETS]
    uint64_t waited[BUCKETS]
    uint64_t waited_ns


cdef class Slots(Harvest):
    cdef tally_t *tallies   # by number
    cdef times_t times, shown

    cdef int stop_looking(self) except -1
    cdef int open_lane(self, uint32_t index, uint32_t number, uint32_t generation) except -1
    cdef void add_times(self, uint32_t index, times_t *times) noexcept
    cdef bint lane_worked(self, uint32_t index) except -1
    cdef list counted_of(self, uint32_t number)
    cpdef uint64_t busy_ns(self, uint32_t index) except? 0xFFFFFFFFFFFFFFFF
