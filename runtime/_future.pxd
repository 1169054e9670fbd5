# cython: language_level=3
"""What a Future is made of, without its lock. See _future.pyx."""


cdef class Waiters(list):
    cdef list hold(self)


cdef class Promise:
    cdef public object _state       # as in concurrent.futures: PENDING, RUNNING, CANCELLED, ..., FINISHED
    cdef public object _result
    cdef public object _exception
    cdef public object _task        # Task, while it is under way; None before, after, and without a runtime
    cdef public object _core        # the runtime it is of
    cdef public object retry_on     # exceptions to run it again on
    cdef public object reported     # (done, total, note) that the call reported last; None: nothing
    cdef object condition           # threading.Condition, from the first time that somebody asks for it
    cdef Waiters waiters            # from then on
    cdef object callbacks           # list, from then on

    cdef bint watched(self) noexcept
    cdef bint fulfil(self, value)
    cdef int wait_long(self) except -1
    cdef object expected(self, timeout)
