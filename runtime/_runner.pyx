# cython: language_level=3
"""A worker's inner loop: claim, unpickle, call, pickle, answer.

What most tasks need is done here: a call whose arguments fit into the lease, and the items of a map. A call
with arguments or results that are larger, or that are not plain, goes the same way with more steps in
worker.py; there is no other kind of task.
"""
from _pickle import dumps, loads

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject
from posix.fcntl cimport F_GETFD, fcntl
from posix.unistd cimport _exit

from runtime._atomics cimport *
from runtime._frame cimport S_CALLS, S_LIST, S_PLAIN, SINGLE_HEAD, read_single, write_single
from runtime._frame import read_frame
from runtime._layout cimport *
from runtime._plain cimport fixed_bytes, plain_bytes, plain_dumps, plain_loads

cdef extern from "Python.h":
    object PyObject_Call(object fn, object args, PyObject *kwargs)

cdef int64_t SLOW_ITEM = 50_000         # ns: an item of a chunk that runs longer is committed by itself
cdef int64_t COMMIT = 500_000           # ns: quicker items are committed together, this much work at a time
cdef int64_t COMMIT_BYTES = 256 << 10   # or when their results have grown to this
cdef int64_t CHECK = 1_000_000          # ns between two checks while there is work
LEASE_LOST = -2                         # what `serve` returns then
cdef int LOST = -2
cdef int QUICK = 64                     # functions that are found without the cache's bookkeeping


cdef class Runner(WorkerPort):
    """A worker's end of its slot, with the loop that runs what comes. For the worker's main thread."""

    def begin_item(self, uint32_t entry):
        """The clock of a lease starts: its timeout counts from here."""
        self.begin(self.lease(entry), now_ns())

    def end_item(self, uint32_t entry):
        """The clock of a lease stops."""
        self.end(self.lease(entry))
        self.left -= 1

    def attend(self, worker, context, functions, int host_pidfd, int64_t left, int exit_descriptors):
        """What the loop needs, once it exists."""
        self.worker = worker
        self.context = context
        self.functions = functions
        self.host_pidfd = host_pidfd
        self.left = left
        self.exit_descriptors = exit_descriptors
        self.quick = {}

    def serve(self):
        """Run what is in the ring. The entry of a call that needs more; -1: there is nothing;
        LEASE_LOST: the host has killed the lease that ran, exit.
        """
        cdef int64_t found
        cdef uint32_t entry
        cdef lease_t *lease
        cdef int alive
        cdef int32_t status
        while not (self.leaving or a32_load_acquire(&self.slot.control) & C_STOP):
            found = self.claim()
            if found < 0:
                return -1
            entry = <uint32_t>found
            lease = self.lease(entry)
            self.context.task = lease.task
            self.context.attempt = lease.attempt
            if lease.kind == KIND_CHUNK:
                alive = self.chunk(entry, lease)
            else:
                fn = self.function_for(lease)
                status = read_single(lease.inline_, lease.body_bytes) if lease.where == AT_INLINE else -1
                if fn is None or status < 0:
                    return entry
                alive = self.call(entry, lease, fn, status)
                fn = None
            if not alive:
                return LOST
            self.check()
        return -1

    def ended(self):
        """A call that was run outside of `serve` has been answered."""
        self.check()

    cdef int check(self) except -1:
        """Between two tasks: is this process still fit for the next one?"""
        self.context.task = None
        if self.left == 0:
            self.leaving = True
        if fcntl(self.host_pidfd, F_GETFD) < 0:
            _exit(self.exit_descriptors)        # before it claims what it could not answer for
        if now_ns() >= self.check_at:
            self.worker.check()
            self.check_at = now_ns() + CHECK
        PyErr_CheckSignals()
        return 0

    cdef object function_for(self, lease_t *lease):
        """The function of a lease, if it is loaded already."""
        if lease.fn_body == 0:
            return None
        fn = self.quick.get(lease.fn)
        if fn is None and lease.fn in self.functions:
            try:
                fn = self.functions.load(lease.fn)
            except BaseException:                   # the long way meets it again, and says so
                return None
            if self.functions.settled(lease.fn):
                if len(self.quick) >= QUICK:
                    self.quick.clear()
                self.quick[lease.fn] = fn
        return fn

    cdef int call(self, uint32_t entry, lease_t *lease, fn, int32_t status) except -1:
        """Run a call whose frame lies in the lease. False: the host has killed it."""
        cdef bytes out = None
        cdef uint64_t nbytes = lease.body_bytes - SINGLE_HEAD
        cdef object result = None
        cdef object item = None
        cdef tuple packed
        self.begin(lease, now_ns())
        try:
            if status == S_PLAIN:
                packed = plain_loads(lease.inline_ + SINGLE_HEAD, <Py_ssize_t>nbytes)
            else:
                packed = loads(PyBytes_FromStringAndSize(lease.inline_ + SINGLE_HEAD, <Py_ssize_t>nbytes))
            if len(packed) == 3:
                fn = self.worker.bound(fn, packed)
            kwargs = packed[1]
            result = PyObject_Call(fn, packed[0], NULL if kwargs is None else <PyObject *>kwargs)
        except BaseException as error:
            item = self.worker.failed(error)
        else:
            if not self.arena.private and plain_bytes(result) >= 0:
                try:
                    out = plain_dumps(result)
                except Exception:               # no memory for it: the outcome says so
                    pass
            if out is None:
                item = self.worker.succeeded(result)
        fn = packed = kwargs = result = None    # their destructors run within the time of the call
        self.end(lease)
        self.left -= 1
        if out is not None:
            nbytes = SINGLE_HEAD + <uint64_t>PyBytes_GET_SIZE(out)
            if nbytes <= INLINE_BYTES:
                write_single(lease.inline_, S_PLAIN, PyBytes_AS_STRING(out), nbytes - SINGLE_HEAD)
                lease.out_flags = 0
                lease.out_bytes = nbytes
                lease.out_where = AT_INLINE
                return self.complete(entry, 1)
            item = (S_PLAIN, out, (), ())
        return self.worker.deliver(entry, [item], 1, 1, None)

    cdef int chunk(self, uint32_t entry, lease_t *lease) except -1:
        """Run the items of a chunk, committing results as they come. False: the host has killed it."""
        cdef list items = []
        cdef list done = []             # outcomes that were not delivered yet, as items of a frame
        cdef list fixed = []            # of them, plain values that end up in one pickle
        cdef uint64_t ran = 0, held = 0
        cdef int64_t since = 0, nbytes = 0, took, before, each
        cdef uint32_t status, start, count, k
        cdef bint more = True
        cdef object failure = None
        cdef object fn_data = None
        cdef object exporter = None
        try:
            exporter = self.frame(entry)
            items = read_frame(exporter)
            fn_data = self.worker.function_data(entry, items)
        except BaseException as error:
            failure = self.worker.failed(error)
        if failure is not None and not items:   # the frame cannot be read: the first item answers for it
            return self.worker.deliver(entry, [failure], 1, 1, exporter)
        before = now_ns()
        items.reverse()
        while items and more:
            status, data, views, start, count = items.pop()
            values = fn = None
            if status != S_LIST and status != S_CALLS:
                start, count = 0, 1
            for k in range(start, start + count):
                if ran and not self.advance(lease):
                    return False
                self.begin(lease, before)
                try:
                    if failure is not None:
                        outcome = failure
                        each = -1
                    elif status == S_LIST or status == S_CALLS:
                        if values is None:
                            fn = self.functions.load(lease.fn, fn_data)
                            values = loads(data)
                        value = values[k]
                        values[k] = None
                        if status == S_LIST:
                            outcome = fn(value)
                        else:
                            outcome = PyObject_Call(fn, value, NULL)
                        value = None
                        each = -1 if self.arena.private else fixed_bytes(outcome)
                        if each < 0:
                            outcome = self.worker.succeeded(outcome)
                        elif each > COMMIT_BYTES:   # by itself: there may be no memory for its pickle
                            outcome = (S_PLAIN, plain_dumps(outcome), (), ())
                            nbytes += each
                            each = -1
                    else:
                        outcome = self.worker.run_item(lease.fn, fn_data, data, views)
                        each = -1
                except BaseException as error:
                    value = None
                    outcome = self.worker.failed(error)
                    each = -1
                if each >= 0:
                    fixed.append(outcome)
                    nbytes += each
                else:
                    if fixed:
                        done.append((S_LIST, dumps(fixed, 5), (), (), 0, len(fixed)))
                        fixed = []
                    done.append(outcome)
                outcome = None
                ran += 1
                held += 1
                self.left -= 1
                took = before
                before = self.end(lease)
                took = before - took
                since += took
                PyErr_CheckSignals()
                if self.left == 0 or self.leaving or a32_load_relaxed(&self.slot.control) & C_STOP:
                    more = False
                    break
                if (took >= SLOW_ITEM or since >= COMMIT or nbytes >= COMMIT_BYTES) and (
                        items or k + 1 < start + count):
                    since = nbytes = 0
                    if fixed:
                        done.append((S_LIST, dumps(fixed, 5), (), (), 0, len(fixed)))
                        fixed = []
                    if self.committed(entry, done, held):
                        done = []
                        held = 0
                    before = now_ns()
            data = views = None
        items.clear()
        values = fn = None
        if fixed:
            done.append((S_LIST, dumps(fixed, 5), (), (), 0, len(fixed)))
        return self.worker.deliver(entry, done, ran, held, exporter)

    def committed(self, uint32_t entry, list items, uint64_t count):
        """Deliver outcomes ahead of the rest. False: they go with the last ones."""
        try:
            return self.commit(entry, items, count)
        except (BufferError, MemoryError):
            return False
