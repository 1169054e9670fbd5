# cython: language_level=3
"""A worker's inner loop. See _runner.pyx."""
from libc.stdint cimport int32_t, int64_t, uint32_t

from runtime._layout cimport lease_t
from runtime._lease cimport WorkerPort


cdef class Runner(WorkerPort):
    cdef public bint leaving    # finish what runs, claim nothing more, exit
    cdef public int64_t left    # items that may still be run; negative: any number
    cdef object worker          # what is not ordinary is its business
    cdef object context         # what runtime.current() shows
    cdef object functions       # FunctionCache
    cdef dict quick             # function id -> function, of those that refer to no global by value
    cdef int host_pidfd         # of ours: if it is gone, a task has closed what it did not own
    cdef int exit_descriptors   # the code to exit with then
    cdef int64_t check_at       # monotonic ns of the next check

    cdef object function_for(self, lease_t *lease)
    cdef int call(self, uint32_t entry, lease_t *lease, fn, int32_t status) except -1
    cdef int chunk(self, uint32_t entry, lease_t *lease) except -1
    cdef int check(self) except -1
