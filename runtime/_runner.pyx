# cython: language_level=3
"""A worker's inner loop: claim, unpickle, call, pickle, answer.

What most tasks need is done here: a call whose arguments fit into the lease, and the items of a map. A call
with arguments or results that are larger, or that are not plain, goes the same way with more steps in
calls.py; there is no other kind of task.
"""
from _pickle import loads

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject
from posix.unistd cimport _exit

from runtime._atomics cimport *
from runtime._frame cimport S_CALLS, S_PLAIN, SINGLE_HEAD, read_single, write_single
from runtime._frame import read_frame
from runtime._layout cimport *
from runtime._lease cimport Share
from runtime._plain cimport PLAIN_MAX, fixed_bytes, plain_bytes, plain_dumps, plain_loads, weigh_int
from runtime._report cimport fill_report, write_report
from runtime._series cimport is_series, pack_series, unpack_series

cdef extern from "Python.h":
    object PyObject_Call(object fn, object args, PyObject *kwargs)
    object PyObject_CallOneArg(object fn, object arg)

cdef int64_t SLOW_ITEM = 50_000         # ns: an item of a chunk that runs longer is committed by itself
cdef int64_t COMMIT = 500_000           # ns: quicker items are committed together, this much work at a time
cdef int64_t COMMIT_BYTES = 256 << 10   # or when their results have grown to this
cdef int64_t QUICK_ITEM = 2_000         # ns: for items that take less the clock is read once for several,
cdef uint32_t STRIDE = 16               # at most so many
cdef int64_t CHECK = 10_000_000         # ns between two checks while there is work
cdef int LOST = -2
LEASE_LOST = LOST                       # what `serve` returns when the host has killed the lease that ran
cdef int QUICK = 64                     # functions that are found without the cache's bookkeeping


cdef class Runner(WorkerPort):
    """A worker's end of its slot, with the loop that runs what comes. For the thread that claims there."""

    def begin_item(self, uint32_t entry):
        """The clock of a lease starts: its timeout counts from here."""
        self.begin(self.lease(entry), now_ns())

    def end_item(self, uint32_t entry):
        """The clock of a lease stops."""
        self.ended_at = self.end(self.lease(entry), 1)
        self.left -= 1

    def report(self, done, total, note):
        """What the running task says of its progress; nothing while none runs.

        In a fork of the worker the region is private, so there it reaches nobody.
        """
        cdef report_t report
        cdef uint64_t before = self.runs()
        fill_report(&report, done, total, note)     # here, code of the user's may run, and another task begin
        if before and self.runs() == before:
            write_report(self.lease(a32_load_relaxed(&self.slot.running) - 1), &report)

    cdef uint64_t runs(self) noexcept:
        """Which lease runs: its entry and its tag; 0: none."""
        cdef uint32_t running = a32_load_relaxed(&self.slot.running)    # ours alone
        if running == 0:
            return 0
        return lease_word(0, running, l_tag(a64_load_relaxed(&self.lease(running - 1).word)))

    def attend(self, worker, context, functions, int host_pidfd, int64_t left, int exit_descriptors):
        """What the loop needs, once it exists."""
        self.worker = worker
        self.context = context
        self.functions = functions
        self.host_pidfd = host_pidfd
        self.left = left
        self.exit_descriptors = exit_descriptors
        self.born = self.slot.incarnation
        self.quick = {}

    def join(self, Share share not None):
        """This is a lane: how many items it may run is for all lanes of the process together."""
        self.share = share
        self.left = -1

    cdef bint another(self) noexcept:
        """Whether one more item may be begun; if so, it counts as that."""
        return self.left != 0 if self.share is None else self.share.take()

    def serve(self):
        """Run what is in the ring. The entry of a call that needs more; -1: there is nothing;
        LEASE_LOST: the host has killed the lease that ran, or takes this process for dead: exit.
        """
        cdef int64_t found
        cdef uint32_t entry
        cdef lease_t *lease
        cdef int alive
        cdef int32_t status
        self.clock = 0
        while not (self.leaving or a32_load_acquire(&self.slot.control) & C_STOP):
            if a32_load_relaxed(&self.slot.state) != S_LIVE or self.slot.incarnation != self.born:
                return LOST                     # a zygote that was killed had not told the host of us
            if self.share is not None and not self.share.take():
                self.leaving = True
                return -1
            found = self.claim()
            if found < 0:
                if self.share is not None:
                    self.share.give_back()
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
        """Between two tasks: is this process still fit for the next one?

        After each: what the next one would pay for. What may wait for some milliseconds waits, and the clock
        was read when the task ended.
        """
        self.context.task = None
        if self.share is not None:
            self.functions.leave()
        if self.left == 0:
            self.leaving = True
        if not sys_is_open(self.host_pidfd):
            _exit(self.exit_descriptors)        # before it claims what it could not answer for
        if self.ended_at >= self.check_at:
            self.clock = 0
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
            self.clock = 0
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
        self.begin(lease, self.clock or now_ns())
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
            out = self.plain_of(result)
            if out is None:
                item = self.worker.succeeded(result)
        fn = packed = kwargs = result = None    # their destructors run within the time of the call
        self.clock = self.ended_at = self.end(lease, 1)
        self.left -= 1
        if out is not None:
            nbytes = SINGLE_HEAD + <uint64_t>PyBytes_GET_SIZE(out)
            if nbytes <= INLINE_BYTES:
                write_single(lease.inline_, S_PLAIN, PyBytes_AS_STRING(out), nbytes - SINGLE_HEAD)
                lease.out_bytes = nbytes
                lease.out_where = AT_INLINE
                return self.complete(entry, 1)
            item = (S_PLAIN, out, (), ())
        self.clock = 0
        return self.worker.deliver(entry, [item], 1, 1)

    cdef bytes plain_of(self, result):
        """A result in short, if it is plain; else None."""
        if not self.arena.private and 0 <= plain_bytes(result) <= PLAIN_MAX:
            try:
                return plain_dumps(result)
            except Exception:                   # no memory for it: the outcome says so
                pass
        return None

    def plain_outcome(self, result):
        """The outcome of a call with a plain result, as an item; None: it is none. The host takes such a one
        in with fewer steps than a pickle.
        """
        cdef bytes out = self.plain_of(result)
        return None if out is None else (S_PLAIN, out, (), ())

    cdef int chunk(self, uint32_t entry, lease_t *lease) except -1:
        """Run the items of a chunk, committing results as they come. False: the host has killed it."""
        cdef list items = []
        cdef Answers answers = Answers.__new__(Answers)
        cdef Clock clock
        cdef uint64_t ran = 0
        cdef uint32_t status, start, count, k
        cdef bint series
        cdef object failure = None, fn_data = None, exporter = None
        cdef object data, views, fn
        cdef list values
        self.clock = 0
        try:
            exporter = self.frame(entry)
            items = read_frame(exporter, self.resolve)
            exporter = None                     # what holds it from now on are views
            fn_data = self.worker.function_data(entry, items)
        except BaseException as error:
            failure = self.worker.failed(error)
        if failure is not None and not items:   # the frame cannot be read: the first item answers for it
            return self.worker.deliver(entry, [failure], 1, 1)
        answers.done, answers.fixed = [], []
        clock = Clock(now_ns(), 0, 0, 1, lease.flags & F_TIMED, 0)
        items.reverse()
        while items:
            status, data, views, start, count = items.pop()
            values = fn = None
            series = status == S_CALLS or is_series(status)
            if not series:
                count = 1
            for k in range(count):
                if ran and not self.advance(lease):
                    return False
                if clock.skipped == 0:
                    self.begin(lease, clock.last)
                if failure is not None:
                    answers.add(failure)
                elif not series:
                    answers.add(self.worker.run_item(lease.fn, fn_data, data, views))
                else:
                    try:
                        if values is None:
                            fn = self.functions.load(lease.fn, fn_data)
                            values = unpack_series(status, data, start, count)
                        self.answer(answers, fn, values, k, status)
                    except BaseException as error:
                        answers.add(self.worker.failed(error))
                ran += 1
                self.left -= 1
                if clock.skipped == 0:
                    PyErr_CheckSignals()
                self.tick(lease, &clock, k + 1 == count and not items)
                if (self.leaving or a32_load_relaxed(&self.slot.control) & C_STOP
                        or ((items or k + 1 < count) and not self.another())):
                    if clock.skipped:
                        self.ended_at = self.stop(lease, clock.skipped)
                    items.clear()
                    break
                if (clock.took >= SLOW_ITEM or clock.since >= COMMIT or answers.nbytes >= COMMIT_BYTES
                        or answers.borrowed) and (items or k + 1 < count):
                    clock.since = clock.took = 0
                    self.commit_answers(entry, answers)
                    if now_ns() >= self.check_at:       # it may have grown too large to stay
                        self.worker.check()
                        self.check_at = now_ns() + CHECK
                    if clock.skipped == 0:
                        clock.last = now_ns()
            data = views = values = fn = None
        return self.worker.deliver(entry, answers.items(), ran, answers.count)

    cdef int answer(self, Answers answers, fn, list values, uint32_t k, uint32_t status) except -1:
        """Call the function with one of the values, which is kept no longer than that."""
        cdef object value = values[k]
        cdef object outcome
        cdef int64_t nbytes
        values[k] = None
        outcome = PyObject_Call(fn, value, NULL) if status == S_CALLS else PyObject_CallOneArg(fn, value)
        value = None
        if self.arena.private:
            nbytes = -1
        elif type(outcome) is int:
            nbytes = weigh_int(outcome)
        else:
            nbytes = fixed_bytes(outcome)
        if nbytes < 0 or nbytes > PLAIN_MAX:
            answers.add(self.worker.succeeded(outcome))
            answers.nbytes += max(0, nbytes)
        else:
            answers.fixed.append(outcome)
            answers.count += 1
            answers.nbytes += nbytes
        return 0

    cdef int tick(self, lease_t *lease, Clock *clock, bint last) except -1:
        """An item has ended. While they are quick and have no deadline, the clock is read for several."""
        cdef int64_t now
        clock.skipped += 1
        clock.took = 0
        if not last and not clock.timed and clock.skipped < clock.stride:
            a64_store_relaxed(&self.slot.tasks_done, a64_load_relaxed(&self.slot.tasks_done) + 1)
            return 0
        now = self.ended_at = self.end(lease, clock.skipped)
        clock.took = (now - clock.last) // clock.skipped
        clock.since += now - clock.last
        if clock.took > QUICK_ITEM:
            clock.stride = 1
        elif clock.stride < STRIDE:
            clock.stride *= 2
        clock.last = now
        clock.skipped = 0
        return 0

    cdef int commit_answers(self, uint32_t entry, Answers answers) except -1:
        """Deliver outcomes ahead of the rest, if there is room; else they go with the last ones, as they are
        now.
        """
        cdef list items = answers.items()
        try:
            if self.commit(entry, items, answers.count):
                answers.done = []
                answers.count = 0
        except (BufferError, MemoryError):
            pass
        if answers.borrowed:
            answers.borrowed = False
            if answers.done:                        # the last one
                try:
                    answers.done.append(self.worker.frozen(answers.done.pop()))
                except MemoryError as error:
                    answers.done.append(self.worker.failed(error))
        return 0


cdef class Answers:
    """The outcomes of a chunk's items that were not delivered yet."""

    cdef int add(self, item) except -1:
        """An outcome with a pickle of its own."""
        self.close()
        self.done.append(item)
        self.count += 1
        self.borrowed = len(<tuple>(<tuple>item)[2]) > 0 or type((<tuple>item)[1]) is tuple
        return 0

    cdef int close(self) except -1:
        """The plain values so far become one series."""
        if self.fixed:
            status, data = pack_series(self.fixed)
            self.done.append((status, data, (), (), 0, len(self.fixed)))
            self.fixed = []
        return 0

    cdef list items(self):
        """What a frame is made of."""
        self.close()
        self.nbytes = 0
        return self.done
