# cython: language_level=3
"""A worker's inner loop. See _runner.pyx."""
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from runtime._layout cimport lease_t
from runtime._lease cimport WorkerPort


ctypedef struct Clock:
    int64_t last            # monotonic ns when it was read last: the start of the items since
    int64_t since           # ns of work since results were committed
    int64_t took            # ns of the last item; 0: not known
    uint32_t stride         # items for which the clock is read once
    bint timed              # each item has a deadline: it is read for each
    uint32_t skipped        # items since it was read


cdef class Answers:
    cdef list done              # items of a frame
    cdef list fixed             # results behind them that will share a pickle
    cdef int64_t nbytes         # of these, about
    cdef uint64_t count         # outcomes in all
    cdef bint borrowed          # the last one is made of memory that the next item may change

    cdef int add(self, item) except -1
    cdef int close(self) except -1
    cdef list items(self)


cdef class Runner(WorkerPort):
    cdef public int64_t left    # items that may still be run; negative: any number, or `share` says
    cdef object worker          # what is not ordinary is its business
    cdef object context         # what runtime.current() shows
    cdef uint64_t born          # incarnation of the slot whose process this is
    cdef object functions       # FunctionCache
    cdef dict quick             # function id -> function, of those that refer to no global by value
    cdef int host_pidfd         # of ours: if it is gone, a task has closed what it did not own
    cdef int exit_descriptors   # the code to exit with then
    cdef int64_t check_at       # monotonic ns of the next check
    cdef int64_t ended_at       # monotonic ns at which the last item ended

    cdef object function_for(self, lease_t *lease)
    cdef int call(self, uint32_t entry, lease_t *lease, fn, int32_t status) except -1
    cdef bytes plain_of(self, result)
    cdef int chunk(self, uint32_t entry, lease_t *lease) except -1
    cdef int answer(self, Answers answers, fn, list values, uint32_t k, uint32_t status) except -1
    cdef int tick(self, lease_t *lease, Clock *clock, bint last) except -1
    cdef int commit_answers(self, uint32_t entry, Answers answers) except -1
    cdef bint another(self) noexcept
    cdef int check(self) except -1
    cdef uint64_t runs(self) noexcept
