# cython: language_level=3
"""The short way of `submit`: a function that a worker finds by its name, or has already, and plain arguments.

What is not so takes the long way through serializer.pack_call; both end in the same queue. The short way
is short because nothing of it can run anybody's code, wait, or fail half-way.
"""
from sys import modules

from cpython.dict cimport PyDict_GetItem
from cpython.object cimport PyObject
from runtime._dispatch cimport Dispatcher
from runtime._future cimport Promise
from runtime._records cimport Task
from runtime._plain cimport PLAIN_MAX, plain_bytes, plain_dumps

cdef extern from "Python.h":
    ctypedef struct PyTypeObject:
        object (*tp_new)(PyTypeObject *kind, object args, PyObject *kwargs)

cdef tuple _nothing = ()


cdef class Submitter:
    """Makes tasks and futures of one runtime.

    Thread-safety: any thread. Fork-safety: makes nothing in a fork. Blocking: never.
    """
    cdef Dispatcher dispatcher
    cdef object future          # the class of futures
    cdef object core            # what they belong to
    cdef dict plain             # id(function) -> (reference, module, name): FunctionTable.plain

    def __init__(self, Dispatcher dispatcher, future, core, dict plain):
        self.dispatcher = dispatcher
        self.future = future
        self.core = core
        self.plain = plain

    def submit(self, options, fn, tuple args, dict kwargs):
        """The future of a call, or None: it takes the long way."""
        cdef PyObject *found
        cdef tuple entry
        cdef Task task
        cdef Promise promise
        if self.dispatcher.refusing or self.dispatcher.inert:
            return None
        found = PyDict_GetItem(self.plain, <size_t><PyObject *>fn)
        if found == NULL:
            return None
        entry = <tuple><object>found
        found = PyDict_GetItem(modules, entry[1])
        if found == NULL or getattr(<object>found, entry[2], None) is not fn:
            return None
        if not 0 <= plain_bytes(args) <= PLAIN_MAX or (kwargs and not 0 <= plain_bytes(kwargs) <= PLAIN_MAX):
            return None
        try:
            data = plain_dumps((args, kwargs or None))
        except Exception:                           # no memory for it: the future says so
            return None
        promise = <Promise>(<PyTypeObject *>self.future).tp_new(<PyTypeObject *>self.future, _nothing, NULL)
        task = self.made(promise, entry[0], data)
        if options is not None:
            task.timeout = options.timeout_ns
            task.priority = options.priority
            task.retries = options.retries
            task.private_view = task.retries > 0
            task.retry_timeouts = options.retries_timeouts
            promise.retry_on = options.retry_on
        return promise if self.queue(promise, task) else None

    def join(self, Promise promise not None, options, ref, tuple args, tuple named):
        """Queue a task of a job that was accepted: also when no others are taken, and without retries. The
        future is there already. ref, named: see Task. False: it takes the long way.
        """
        cdef Task task
        if not 0 <= plain_bytes(args) <= PLAIN_MAX:
            return False
        task = self.made(promise, ref, plain_dumps((args, None)))
        task.named = named
        task.timeout = options.timeout_ns
        task.priority = options.priority
        return self.queue(promise, task)

    cdef Task made(self, Promise promise, ref, data):
        """A task with plain arguments, and nothing else that is out of the ordinary."""
        cdef Task task = Task.__new__(Task)
        task.data = data
        task.plain = True
        task.fn = ref
        task.future = promise
        task.buffers = task.readonly = _nothing
        task.attempt = 1
        task.count = 1
        task.reason = ""
        return task

    cdef bint queue(self, Promise promise, Task task) except -1:
        """False: the runtime has ended."""
        promise._task = task
        promise._core = self.core
        if not self.dispatcher.enter(task):
            promise._task = None                    # the two would keep each other
            return False
        # After shutdown there may be no workers, and the supervisor must know that some are needed.
        if self.dispatcher.noisy() or self.dispatcher.refusing:
            self.core.tell()
        return True
