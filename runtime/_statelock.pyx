# cython: language_level=3
"""Locks of a map as Python has them: _maplock.pyx, with waiting."""
cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport INT64_MAX, int64_t, uint32_t

from runtime._atomics cimport a64_load_relaxed, a64_t, now_ns
from runtime._identity cimport identity_word
from runtime._mapaccess cimport MapAccess, key_of
from runtime._maplayout cimport MAP_AGAIN, MAP_OK, map_status
from runtime._maplock cimport lock_give, lock_take
from runtime._pool cimport patience_of

from runtime.errors import LockTimeout

cdef a64_t *own = identity_word()
cdef object ABSENT = object()


cdef StateLock new_lock(MapAccess state, object key, uint32_t kind, object timeout):
    cdef StateLock lock = StateLock.__new__(StateLock)
    if timeout is not None:
        patience_of(timeout)
    key_of(key, kind, &lock.key)
    lock.text = key
    lock.state = state
    lock.timeout = timeout
    return lock


@cython.final
@cython.no_gc
@cython.freelist(64)
cdef class StateLock:
    """A lock that processes share by its name: `with state.lock("name"):`.

    It is held by a process until it is released there, by any thread; not reentrant. Whoever comes takes a
    free lock, but one who has waited for 1 ms gets it next. A holder that is dead has lost it to the next
    one, who finds `inherited` True: what the lock protects may be half done. One that is stopped or slow
    keeps it.

    Thread-safety: a StateLock belongs to one thread at a time; each thread makes its own.
    Fork-safety: a child holds nothing that its parent holds.
    Blocking: acquire() waits as `timeout` says, in seconds (None: for ever); other threads run, Ctrl-C ends
    it.
    Raises: LockTimeout; RuntimeError when it is released and not held; RegionFull when there is no room for a
    new name.
    """

    def __init__(self, *args, **kwargs):
        raise TypeError("use SharedState.lock(key)")

    cdef int take(self, int64_t patience) except -1:
        cdef map_status status
        cdef int64_t since, rest
        cdef int turn = 0
        if self.identity != 0 and self.identity == a64_load_relaxed(own):
            raise RuntimeError(f"this object holds the lock {self.text!r} already")
        self.state.ready()
        status = lock_take(&self.state.m, &self.key, -1 if patience == 0 else 0, 0, &self.hold)
        if status != MAP_OK:
            since = now_ns()
            rest = INT64_MAX if patience < 0 else patience
            while status != MAP_OK:
                if status != MAP_AGAIN:
                    turn = self.state.make_room(status, 64, turn)
                elif rest == 0:
                    raise LockTimeout(f"the lock {self.text!r} was not free within {patience / 1e9:g} s")
                self.state.ready()
                self.state.region.enter()
                with nogil:
                    status = lock_take(&self.state.m, &self.key, since, rest, &self.hold)
                self.state.region.leave()
                if status != MAP_OK:
                    PyErr_CheckSignals()
                    if patience >= 0:
                        rest = max(0, since + patience - now_ns())
        self.identity = a64_load_relaxed(own)
        return 0

    def acquire(self, timeout=ABSENT):
        """Take the lock. timeout: seconds, None: for ever; by default what lock() was given. Raises:
        LockTimeout.
        """
        self.take(patience_of(self.timeout if timeout is ABSENT else timeout))

    def _try(self, int64_t since):
        """Take it if it can be had now. `since`: when waiting began (time.monotonic_ns()); 0: just now."""
        cdef map_status status
        cdef int turn = 0
        while True:
            self.state.ready()
            status = lock_take(&self.state.m, &self.key, since, 0, &self.hold)
            if status == MAP_OK:
                self.identity = a64_load_relaxed(own)
                return True
            if status == MAP_AGAIN:
                return False
            turn = self.state.make_room(status, 64, turn)

    def release(self):
        """Give the lock back. Raises: RuntimeError if this object does not hold it."""
        if self.identity == 0 or self.identity != a64_load_relaxed(own):
            raise RuntimeError(f"the lock {self.text!r} is not held by this object in this process")
        self.state.check()
        self.identity = 0
        if not lock_give(&self.hold):
            raise RuntimeError(f"the lock {self.text!r} was not held any more: the map is damaged")

    def __enter__(self):
        self.take(patience_of(self.timeout))
        return self

    def __exit__(self, kind, value, trace):
        if self.identity == a64_load_relaxed(own) or self.identity == 0:    # else: forked inside the block
            self.release()

    def __dealloc__(self):
        if self.identity != 0 and self.identity == a64_load_relaxed(own) and self.state.region.base != NULL:
            lock_give(&self.hold)

    @property
    def inherited(self):
        """True if the holder before died with it."""
        return self.hold.inherited

    def __repr__(self):
        held = "held" if self.identity and self.identity == a64_load_relaxed(own) else "not held"
        return f"<StateLock {self.text!r} {held}>"
