# cython: language_level=3
"""SharedState: _map.pyx for Python. Reading, writing, and looking through."""
cimport cython
from cpython.buffer cimport PyBuffer_FillInfo, PyBuffer_Release
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.number cimport PyNumber_Index
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from runtime._atomics cimport (
    a32_load_relaxed, a32_store_relaxed, a64_load_acquire, a64_load_relaxed, a64_load_seq_cst, a64_t,
    now_ns,
)
from runtime._identity cimport identity_word
from runtime._map cimport map_add, map_cell, map_erase, map_find, map_put, map_unpin
from runtime._mapaccess cimport MapAccess, key_of, shown_key
from runtime._maplayout cimport (
    BURIED, K_LOCK, K_ONCE, K_VALUE, MAP_NOT_NUMBER, MAP_OK, MAP_OTHER, MAP_OVERFLOW, MAX_KEY, block_at,
    block_value, cell_block, cell_version, copy_out, map_block, map_bucket, map_key, map_key_of,
    map_place, map_status, still, value_fits,
)
from runtime._mapsweep cimport map_tidy
from runtime._region cimport get_bytes
from runtime._statelock cimport new_lock
from runtime._units cimport unit_pin


cdef enum:
    TRIES = 8                   # of a reader, before it pins
    LARGE = 65536               # bytes from which a write lets other threads run
    WRITES = 256                # to the next look for what is over

cdef a64_t *own = identity_word()
cdef object ABSENT = object()


# ---- values ---------------------------------------------------------------------------------------

cdef int64_t expiry(object ttl) except -1:
    """ns of CLOCK_MONOTONIC; 0: never."""
    cdef double seconds
    cdef int64_t now
    if ttl is None:
        return 0
    seconds = ttl
    if not seconds > 0:
        raise ValueError(f"ttl must be a number of seconds greater than 0, or None; it is {ttl}")
    now = now_ns()
    return 0 if seconds > 1e9 else now + <int64_t>(seconds * 1e9)


cdef bytes copied(object data):
    cdef Py_buffer buffer
    get_bytes(data, &buffer)
    try:
        return PyBytes_FromStringAndSize(<char *>buffer.buf, buffer.len)
    finally:
        PyBuffer_Release(&buffer)


cdef object full_version(uint64_t word, uint64_t newest):
    """64 bits of a cell's version, from its bucket's counter, which was read later and is ahead of it."""
    return newest - ((newest - cell_version(word)) & 0xFFFFFFFFFF)


@cython.final
@cython.no_gc
cdef class _StateView:
    """A value in place, for a memoryview: pinned while that lives."""
    cdef StateMap state
    cdef a64_t *pin
    cdef char *data
    cdef Py_ssize_t length
    cdef uint64_t identity

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.data, self.length, 1, flags)

    def __dealloc__(self):
        if self.pin == NULL:
            return
        self.state.region.drop()
        if self.identity == a64_load_relaxed(own):      # a fork's copy: the pin is the parent's
            map_unpin(&self.state.m, self.pin)


# ---- the map ---------------------------------------------------------------------------------------

cdef class StateMap(MapAccess):
    """A map key -> bytes in shared memory, which every process reads and writes directly.

    SharedState.create(region, *, max_items=None, max_bytes=None) makes one in a region that is used for
    nothing else; SharedState.open(region), in another process or on another mapping, finds it. Keys are str
    or bytes of at most 1 KiB; a str is its UTF-8, so "a" and b"a" are one key. Values are bytes. Each
    operation on a key is atomic, and they are linearizable: all processes see them in one order.

    Thread-safety: every method may be called from any thread; nothing takes a lock but lock() and
    get_or_set().
    Fork-safety: parent and child share the map. A lock that is held at a fork is the parent's alone, and so
    is a view: the child's copy is valid while the parent keeps its own. All processes must be in one PID
    namespace.
    Blocking: nothing waits but locks, get_or_set() while another process makes the value, and watches. A
    process that is killed or stopped anywhere keeps nobody waiting, but for a lock that it holds while
    stopped.
    Raises: TypeError and ValueError for keys, values and limits that are not as said; RegionFull when there
    is no room for a value, or max_items are there; ValueError when the region is closed.
    """

    # ---- reading ----

    def get(self, key, default=None, *, bint view=False):
        """The value of `key` as bytes, or `default`.

        `view`: as a read-only memoryview of the value in place, which stays what it is even when the key is
        set anew. A process has seven of them at a time; further ones are copies.
        """
        cdef map_key k
        cdef uint64_t word
        key_of(key, K_VALUE, &k)
        if self.region.base == NULL:
            self.region.check_open()
        value = self.read(&k, view, &word)
        return default if value is ABSENT else value

    cdef object read(self, map_key *k, bint view, uint64_t *word):
        cdef int _i
        if not view:
            for _i in range(TRIES):
                value = self.read_once(k, word)
                if value is not None:
                    return value
        return self.read_pinned(k, view, word)

    cdef object read_once(self, map_key *k, uint64_t *word):
        """The value, ABSENT, or None when it changed while it was copied; and the entry's word."""
        cdef map_place place
        cdef map_block *block
        cdef char *source
        cdef char *to
        cdef uint64_t n
        cdef int64_t expires
        word[0] = 0
        if not map_find(&self.m, k, &place):
            return ABSENT
        block = block_at(&self.m, place.block)
        n = block.value_bytes
        expires = block.expires
        # A length that others have written meanwhile is not to be believed.
        if not value_fits(&self.m, place.block, k.bytes, n) or (n >= LARGE and not still(&place)):
            return None
        value = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>n)
        to = PyBytes_AS_STRING(value)
        source = <char *>block + sizeof(map_block) + ((k.bytes + 7) & ~<uint64_t>7)
        if n < LARGE:
            copy_out(to, source, n)
        else:
            self.region.enter()
            with nogil:
                copy_out(to, source, n)
            self.region.leave()
        if not still(&place):
            return None
        word[0] = place.word
        return ABSENT if expires != 0 and expires <= now_ns() else value

    cdef object read_pinned(self, map_key *k, bint view, uint64_t *word):
        """Pin before copying: then the value stays, however fast others set it anew."""
        cdef map_place place
        cdef map_block *block
        cdef a64_t *pin
        cdef _StateView window
        while True:
            self.ready()
            if not map_find(&self.m, k, &place):
                return ABSENT
            pin = unit_pin(&self.m, place.block)
            if pin == NULL:             # all pins of this process are in use
                value = self.read_once(k, word)
                if value is not None:
                    return memoryview(value) if view and value is not ABSENT else value
                continue
            if a64_load_seq_cst(place.cell) == place.word:
                break
            map_unpin(&self.m, pin)
        block = block_at(&self.m, place.block)
        word[0] = place.word
        window = _StateView.__new__(_StateView)
        window.state = self
        window.pin = pin
        window.identity = a64_load_relaxed(&self.m.identity)
        window.data = block_value(block)
        window.length = <Py_ssize_t>block.value_bytes
        self.region.exports += 1
        if block.expires != 0 and block.expires <= now_ns():
            return ABSENT
        if not value_fits(&self.m, place.block, k.bytes, block.value_bytes):
            raise ValueError("the map is damaged: a value reaches out of its region")
        return memoryview(window) if view else PyBytes_FromStringAndSize(window.data, window.length)

    def __contains__(self, key):
        return self.version(key) != 0

    def version(self, key):
        """A number that grows with each change of `key`, also when it is deleted and set again; 0: absent."""
        cdef map_key k
        cdef map_place place
        cdef int64_t expires
        cdef uint64_t newest
        key_of(key, K_VALUE, &k)
        self.check()
        while map_find(&self.m, &k, &place):
            expires = block_at(&self.m, place.block).expires
            newest = a64_load_seq_cst(&self.m.buckets[k.hash & self.m.mask].counter)
            if still(&place):
                if expires != 0 and expires <= now_ns():
                    return 0
                return full_version(place.word, newest)
        return 0

    def items(self, prefix=""):
        """[(key, value)] of all keys that begin so, each as it was at some moment of the call, in no order.

        A key is given as str if it is UTF-8, else as bytes.
        """
        cdef map_key start
        cdef uint64_t i
        cdef list found = []
        key_of(prefix, K_VALUE, &start)
        for i in range(self.m.mask + 1):
            self.check()
            for key, _version, value, _expires in self.bucket_items(i, &start):
                if value is not None:
                    found.append((key, value))
        return found

    cdef list bucket_items(self, uint64_t i, map_key *start):
        """[(key, version, value, expires)] of a bucket's keys that begin so; value: None when it is over."""
        cdef map_bucket *bucket = &self.m.buckets[i]
        cdef list found = []
        cdef uint64_t at = 0, key_bytes, word
        cdef map_place place
        cdef map_block *block
        cdef map_key k
        cdef char text[1024]
        cdef bint matches
        cdef int64_t expires = 0
        while True:
            place.cell = map_cell(&self.m, bucket, at)
            if place.cell == NULL:
                return found
            at += 1
            while True:
                place.word = a64_load_acquire(place.cell)
                place.block = cell_block(place.word) - 1
                matches = False
                if cell_block(place.word) == 0 or place.block >= self.m.count:
                    break
                block = block_at(&self.m, place.block)
                key_bytes = block.key_bytes
                expires = block.expires
                if block.kind == K_VALUE and start.bytes <= key_bytes <= MAX_KEY and value_fits(
                    &self.m, place.block, key_bytes, 0
                ):
                    memcpy(text, <char *>block + sizeof(map_block), key_bytes)
                    matches = memcmp(text, start.data, start.bytes) == 0
                if still(&place):
                    break
            if not matches:
                continue
            k = map_key_of(text, key_bytes, K_VALUE)
            if k.hash & self.m.mask != i:
                continue
            word = place.word
            value = None if expires == BURIED else self.read(&k, False, &word)
            if value is ABSENT:
                value = None            # it is over, or goes at this moment
            else:
                place.word = word
            found.append((shown_key(text, key_bytes), full_version(
                place.word, a64_load_seq_cst(&bucket.counter)), value, expires))

    # ---- writing ----

    def set(self, key, value, *, ttl=None):
        """Set `key` to a bytes-like object. `ttl`: seconds after which it is gone; None: it stays."""
        self.put(key, value, ttl, False, None)

    def compare_and_set(self, key, expected, value):
        """Set `key` if its value is `expected` (None: if it has none). True: it was, and is set."""
        return self.put(key, value, None, True, expected)

    cdef object put(self, key, value, ttl, bint conditional, expected):
        cdef map_key k
        cdef Py_buffer data
        cdef const char *wanted = NULL
        cdef uint64_t wanted_bytes = 0
        cdef bytes text
        cdef map_status status
        cdef int64_t expires = 0
        if ttl is not None:
            expires = expiry(ttl)
        if expected is not None:
            text = expected if PyBytes_Check(expected) else copied(expected)
            wanted = PyBytes_AS_STRING(text)
            wanted_bytes = <uint64_t>PyBytes_GET_SIZE(text)
        key_of(key, K_VALUE, &k)
        if PyBytes_Check(value):
            status = self.write(&k, PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value), expires, conditional,
                                wanted, wanted_bytes)
        else:
            get_bytes(value, &data)
            try:
                status = self.write(&k, <char *>data.buf, data.len, expires, conditional, wanted,
                                    wanted_bytes)
            finally:
                PyBuffer_Release(&data)
        return status == MAP_OK

    cdef map_status write(self, map_key *k, const char *data, uint64_t n, int64_t expires, bint conditional,
                          const char *expected, uint64_t expected_bytes) except *:
        """MAP_OK or MAP_OTHER."""
        cdef map_status status
        cdef int turn = 0
        while True:
            self.ready()
            if n < LARGE:
                status = map_put(&self.m, k, data, n, expires, conditional, expected, expected_bytes)
            else:
                self.region.enter()
                with nogil:
                    status = map_put(&self.m, k, data, n, expires, conditional, expected, expected_bytes)
                self.region.leave()
            if status == MAP_OK or status == MAP_OTHER:
                self.tidy()
                return status
            turn = self.make_room(status, n, turn)

    cdef void tidy(self) noexcept:
        """With every so many writes."""
        cdef uint32_t n = a32_load_relaxed(&self.m.writes) + 1
        a32_store_relaxed(&self.m.writes, n)
        if n % WRITES == 0:
            map_tidy(&self.m, now_ns())

    def add(self, key, n=1):
        """Add `n` to a number of 8 bytes (little-endian, signed; none: 0), and what it is then.

        An item keeps the time at which it is over. Raises: TypeError if the value has not 8 bytes,
        or `n` is no int; OverflowError if the sum needs more; nothing is changed then.
        """
        cdef map_key k
        cdef int64_t amount = PyNumber_Index(n), result = 0  # not of a float, as a C cast would
        cdef map_status status
        cdef int turn = 0
        key_of(key, K_VALUE, &k)
        while True:
            self.ready()
            status = map_add(&self.m, &k, amount, &result)
            if status == MAP_OK:
                self.tidy()
                return result
            if status == MAP_NOT_NUMBER:
                raise TypeError(f"the value of {key!r} is no number: it has not 8 bytes")
            if status == MAP_OVERFLOW:
                raise OverflowError(f"{key!r} plus {n} does not fit into 8 bytes")
            turn = self.make_room(status, 8, turn)

    def delete(self, key):
        """Remove `key`. True: it was there."""
        cdef map_key k
        key_of(key, K_VALUE, &k)
        self.ready()
        return map_erase(&self.m, &k) == MAP_OK

    # ---- locks ----

    def lock(self, key, timeout=None):
        """The lock of that name, a context manager: see StateLock. The key's value is another thing."""
        return new_lock(self, key, K_LOCK, timeout)

    def _once(self, key):
        """The lock under which get_or_set() makes a value."""
        return new_lock(self, key, K_ONCE, None)

    def __repr__(self):
        state = " (region closed)" if self.region.base == NULL else ""
        return f"<{type(self).__name__} of {self.m.count * self.m.unit_bytes} bytes{state}>"

    def __reduce__(self):
        raise TypeError(
            "a SharedState cannot be pickled: in a task, runtime.current().state is that of the Runtime; "
            "elsewhere share its region, and open it there"
        )
