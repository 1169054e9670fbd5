# cython: language_level=3
"""The life of a slot. See _slots.pyx."""
from libc.stdint cimport uint32_t, uint64_t

from runtime._harvest cimport Harvest


# What is counted for a worker number, across its processes.
ctypedef struct tally_t:
    uint64_t tasks          # items that dead processes have finished
    uint64_t busy           # ns that they have spent in user code
    uint64_t shown          # the most ns that were said, of living ones too: it never goes backwards


cdef class Slots(Harvest):
    cdef tally_t *tallies   # by number

    cdef int stop_looking(self) except -1
    cdef int open_lane(self, uint32_t index, uint32_t number, uint32_t generation) except -1
    cdef bint lane_worked(self, uint32_t index) except -1
    cdef list counted_of(self, uint32_t number)
    cpdef uint64_t busy_ns(self, uint32_t index) except? 0xFFFFFFFFFFFFFFFF
