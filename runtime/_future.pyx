# cython: language_level=3
"""What a Future is made of: the fields of concurrent.futures.Future, its lock made only when somebody asks.

Making the Condition of a stdlib Future takes longer than all the rest of a small task. Most futures never
need it: they are over before anybody waits. So `_condition`, which is all that `wait`, `as_completed`,
`add_done_callback` and asyncio reach for, is a property that makes it.

Why no lock is needed to make it: everything here runs under the GIL without bytecode in between, so `fulfil`
either finds a condition (and then leaves the outcome to who may lock and notify) or sets the outcome before
anybody has one; whoever makes it afterwards looks at the state under it first, as the stdlib does.
"""
from threading import Condition, RLock
from time import monotonic

from concurrent.futures._base import (
    CANCELLED,
    CANCELLED_AND_NOTIFIED,
    FINISHED,
    PENDING,
    RUNNING,
    CancelledError,
    Future as _Future,
    _Waiter,
)

from runtime.locks import SLICE

cdef object _pending = PENDING
cdef object _running = RUNNING
cdef object _finished = FINISHED
cdef object _cancelled = (CANCELLED, CANCELLED_AND_NOTIFIED)
cdef type _Reentrant = type(RLock())


cdef class Waiters(list):
    """Who waits for a future, in `concurrent.futures.wait` and `as_completed`.

    The stdlib puts a waiter here before anybody else knows it. So its locks can be exchanged for re-entrant
    ones: who tells it holds them first, as telling takes them, too.
    """

    def append(self, waiter):
        if isinstance(waiter, _Waiter):
            event = waiter.event
            if hasattr(event, "_cond") and not reentrant(event._cond):
                event._cond = Condition()
            if hasattr(waiter, "lock") and not reentrant(waiter.lock):
                waiter.lock = RLock()
        list.append(self, waiter)

    cdef list hold(self):
        """Take every lock of theirs that telling them takes. None: another thread has one.

        A waiter that is not the stdlib's may have one that is not re-entrant: that is tried only.
        """
        cdef list held = []
        for waiter in self:
            event = getattr(waiter, "event", None)
            for lock in (getattr(waiter, "lock", None), getattr(event, "_cond", None)):
                if lock is not None:
                    if not lock.acquire(False):
                        release(held)
                        return None
                    if reentrant(lock):
                        held.append(lock)
                    else:
                        lock.release()
        return held


cdef bint reentrant(lock) except -1:
    """Whether it is an RLock, or a Condition with one."""
    return isinstance(getattr(lock, "_lock", lock), _Reentrant)


cdef int release(list locks) except -1:
    for lock in locks:
        lock.release()
    return 0


cdef class Promise:
    """The fields and the short methods of a Future; the stdlib's own class is its other base."""

    def __cinit__(self, *args, **kwargs):
        self._state = _pending
        self.retry_on = ()

    @property
    def _condition(self):
        if self.condition is None:
            fresh = Condition()
            if self.condition is None:          # another thread may have been here meanwhile
                self.condition = fresh
        return self.condition

    @_condition.setter
    def _condition(self, condition):
        self.condition = condition

    @property
    def _waiters(self):
        if self.waiters is None:
            self.waiters = Waiters()
        return self.waiters

    @_waiters.setter
    def _waiters(self, waiters):
        self.waiters = Waiters(waiters)

    @property
    def _done_callbacks(self):
        if self.callbacks is None:
            self.callbacks = []
        return self.callbacks

    @_done_callbacks.setter
    def _done_callbacks(self, callbacks):
        self.callbacks = callbacks

    cdef bint fulfil(self, value):
        """Set the result, if nobody has a lock on this or waits for it. False: nothing was done."""
        if self.condition is not None or not (self._state is _pending or self._state is _running):
            return False
        self._result = value
        self._state = _finished
        self._task = None
        return True

    cdef bint watched(self) noexcept:
        """Whether anybody may wait for it, or has added a callback."""
        return self.condition is not None

    def done(self):
        """Whether it was cancelled or is finished."""
        return not (self._state is _pending or self._state is _running)

    def cancelled(self):
        """Whether it was cancelled."""
        return self._state in _cancelled

    def set_result(self, result):
        """For executors: the outcome is this value."""
        if not self.fulfil(result):
            _Future.set_result(self, result)

    def conclude(self, ok, value):
        """For the collector: the outcome is a value (ok is True), an exception (False), or cancelled (None).

        A future that was settled before keeps its outcome. False: nothing was done, since another thread has
        the lock. Who waits in `concurrent.futures.wait` has it for a while, and may be in a signal handler
        that waits for another call: the collector must not wait for him. Raises: what a callback does.
        """
        cdef bint fresh
        cdef list held = []
        if ok and self.fulfil(value):
            return True
        condition = self._condition
        if not condition.acquire(False):
            return False
        try:
            fresh = not self.done()
            if fresh and self.waiters is not None:
                held = self.waiters.hold()
                if held is None:
                    return False
            if fresh:                               # as the stdlib's set_result and its kin
                if ok:
                    self._result = value
                elif ok is not None:
                    self._exception = value
                self._state = CANCELLED_AND_NOTIFIED if ok is None else _finished
                condition.notify_all()              # first: telling a waiter may raise, for lack of memory
                for waiter in self._waiters:
                    if ok:
                        waiter.add_result(self)
                    elif ok is None:
                        waiter.add_cancelled(self)
                    else:
                        waiter.add_exception(self)
        finally:
            if held is not None:
                release(held)
            condition.release()
        if fresh:
            self._invoke_callbacks()
        return True

    def result(self, timeout=None):
        """The outcome, when it is there. Raises: what the call raised; CancelledError; TimeoutError after
        `timeout` seconds; RuntimeError at once, whatever the timeout, where there is something to wait for
        and waiting would be in vain: in a destructor that runs in the middle of the runtime's own work.
        """
        if self._state is _finished and self._exception is None:
            return self._result
        timeout = self.expected(timeout)
        if self._state is _finished and self._exception is None:
            return self._result
        if timeout is None:
            self.wait_long()
        return _Future.result(self, timeout)

    def exception(self, timeout=None):
        """The exception that the call raised, or None, when it is over. Raises as `result` does else."""
        if self._state is not _finished:
            timeout = self.expected(timeout)
            if timeout is None:
                self.wait_long()
        return self._exception if self._state is _finished else _Future.exception(self, timeout)

    cdef int wait_long(self) except -1:
        """Until it is done, a slice at a time: see SLICE in locks.py."""
        while not self.done():
            try:
                _Future.exception(self, SLICE)
            except (CancelledError, TimeoutError):
                pass
        return 0

    cdef object expected(self, timeout):
        """Let the thread look for the outcome by itself. What is left of its timeout then."""
        if self._task is None or self.done() or (timeout is not None and timeout <= 0):
            return timeout
        if timeout is None:
            self._core.expect(self, None)
            return None
        end = monotonic() + timeout
        self._core.expect(self, timeout)
        return max(0.0, end - monotonic())
