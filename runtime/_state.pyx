# cython: language_level=3
"""SharedState: _map.pyx for Python. A region holds one, which uses all of it.

create() formats it under region_state.claim, as the first MemoryPool of a region does (_pool.pyx), and sets
region_state.at last; open() finds it there.
"""
cimport cython
from cpython.buffer cimport PyBuffer_FillInfo, PyBuffer_Release
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.unicode cimport PyUnicode_Check, PyUnicode_DecodeUTF8
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from runtime._atomics cimport (
    a32_load_acquire, a32_load_relaxed, a32_store_relaxed, a64_cas_acq_rel, a64_load_acquire,
    a64_load_relaxed, a64_load_seq_cst, a64_store_release, a64_t, now_ns,
)
from runtime._identity cimport identity_word, is_dead, my_identity
from runtime._map cimport map_add, map_cell, map_count, map_erase, map_find, map_put, map_unpin
from runtime._maplayout cimport (
    K_LOCK, K_ONCE, K_VALUE, MAP_AGAIN, MAP_MANY_CELLS, MAP_MANY_ITEMS, MAP_NOT_NUMBER, MAP_OK,
    MAP_OTHER, MAP_OVERFLOW, MAP_VERSION, MAX_KEY, MAX_UNITS, UNIT_BYTES, block_at, block_value, cell_block,
    cell_version, copy_out, map_about, map_block, map_bucket, map_header, map_key, map_key_of,
    map_magic, map_place, map_row, map_status, still, value_fits,
)
from runtime._maplock cimport lock_give, lock_take
from runtime._mapsweep cimport map_sweep, map_tidy
from runtime._pool cimport patience_of, pid_namespace
from runtime._region cimport HEADER_BYTES, SharedRegion, get_bytes, inside, region_header
from runtime._units cimport unit_enroll, unit_pin

from runtime.errors import LockTimeout, RegionFull


cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *n) except NULL


cdef enum:
    TRIES = 8                   # of a reader, before it pins
    LARGE = 65536               # bytes from which a write lets other threads run
    WRITES = 256                # to the next look for what is over

cdef a64_t *own = identity_word()
cdef object ABSENT = object()


# ---- keys and values -------------------------------------------------------------------------------

cdef int key_of(object key, uint32_t kind, map_key *k) except -1:
    cdef Py_ssize_t n = 0
    cdef const char *data
    if PyUnicode_Check(key):
        data = PyUnicode_AsUTF8AndSize(key, &n)
    elif PyBytes_Check(key):
        data = PyBytes_AS_STRING(key)
        n = PyBytes_GET_SIZE(key)
    else:
        raise TypeError(f"a key must be str or bytes, not {type(key).__name__}")
    if n > MAX_KEY:
        raise ValueError(f"a key has {MAX_KEY} bytes at most, this one has {n}")
    k[0] = map_key_of(data, <uint64_t>n, kind)
    return 0


cdef object shown_key(const char *data, uint64_t n):
    try:
        return PyUnicode_DecodeUTF8(data, <Py_ssize_t>n, NULL)
    except UnicodeDecodeError:
        return PyBytes_FromStringAndSize(data, <Py_ssize_t>n)


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


cdef uint64_t limited(object value, str what) except? 0:
    """A limit; 0: none."""
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what} must be an int, not {type(value).__name__}")
    if not 0 < value < 1 << 62:
        raise ValueError(f"{what} must be greater than 0, it is {value}")
    return <uint64_t>value


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

cdef class StateMap:
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

    def __init__(self, *args, **kwargs):
        raise TypeError("use SharedState.create(region) or SharedState.open(region)")

    @classmethod
    def create(cls, SharedRegion region not None, *, max_items=None, max_bytes=None, bint _fresh=False):
        """A new, empty map in `region`, all of which it uses.

        `max_items`: RegionFull when a new key would be one more. `max_bytes` (of keys and values, each item
        rounded up to a multiple of 128 or more): less than the region has. `_fresh` (for the runtime itself):
        the region is new, so all zero. Raises: ValueError if the region has a map or a MemoryPool, or is too
        small.
        """
        cdef StateMap self = cls.__new__(cls)
        cdef region_header *head
        cdef uint64_t claim, me = my_identity(), items = limited(max_items, "max_items")
        cdef uint64_t limit = limited(max_bytes, "max_bytes")
        region.check_open()
        self.region = region
        head = <region_header *>(region.base - HEADER_BYTES)
        if a64_load_acquire(&head.pool.at) != 0:
            raise ValueError("the region holds a MemoryPool: a SharedState needs one of its own")
        # From here on runs no Python code until `at` is set: no other thread of this process comes between.
        claim = a64_load_acquire(&head.state.claim)
        if a64_load_acquire(&head.state.at) == 0 and (claim == 0 or claim == me or is_dead(claim)):
            if a64_cas_acq_rel(&head.state.claim, claim, me) and a64_load_acquire(&head.state.at) == 0:
                try:
                    self.format(limit, items, _fresh)
                    a64_store_release(&head.state.at, HEADER_BYTES)
                finally:
                    a64_cas_acq_rel(&head.state.claim, me, 0)
                self.attach(HEADER_BYTES)
                return self
        raise ValueError("the region has a SharedState already: SharedState.open(region) finds it")

    @classmethod
    def open(cls, SharedRegion region not None):
        """The map that another process, or another mapping, has created in `region`. Raises: ValueError."""
        cdef StateMap self = cls.__new__(cls)
        cdef uint64_t at
        region.check_open()
        self.region = region
        at = a64_load_acquire(&(<region_header *>(region.base - HEADER_BYTES)).state.at)
        if at == 0:
            raise ValueError("the region has no SharedState: SharedState.create(region) makes one")
        self.attach(at)
        return self

    cdef int format(self, size_t limit, uint64_t max_items, bint zero) except -1:
        """Geometry and empty tables, over whatever is there; zero: nothing is, so no page is touched."""
        cdef uint64_t size = self.region.length & ~<uint64_t>63
        cdef uint64_t rows = 64 if size < 1 << 20 else 512 if size < 1 << 24 else 2048
        cdef uint64_t unit = UNIT_BYTES, fixed = sizeof(map_header) + rows * sizeof(map_row)
        cdef uint64_t units, buckets = 1
        cdef map_header *head = <map_header *>self.region.base
        while size // unit > MAX_UNITS:
            unit *= 2
        units = (size - fixed) // (unit + 24) if size > fixed else 0
        while 4 * buckets < units:
            buckets *= 2
        fixed += buckets * sizeof(map_bucket) + 64
        units = (size - fixed) // (unit + 8) if size > fixed else 0
        if limit and units > limit // unit:
            units = limit // unit
        if units < 8:
            raise ValueError(
                f"a SharedState needs a region of 16 KiB, and max_bytes of 1 KiB, at least; "
                f"this region has {self.region.length} bytes"
            )
        if not zero:
            memset(head, 0, fixed + 8 * units)
        head.about.magic = map_magic()
        head.about.version = MAP_VERSION
        head.about.namespace = pid_namespace()
        head.about.units = units
        head.about.unit_bytes = unit
        head.about.buckets = buckets
        head.about.rows = rows
        head.about.max_items = max_items
        return 0

    cdef int attach(self, uint64_t at) except -1:
        """Check what the header says, and use it. What is read from the region is read once."""
        cdef map_about about
        cdef uint64_t namespace = pid_namespace(), used
        if at != HEADER_BYTES or self.region.length < sizeof(map_header):
            raise ValueError(f"the region's header is damaged: it names a map at {at}")
        about = (<map_header *>self.region.base).about
        if about.magic != map_magic() or about.version != MAP_VERSION:
            raise ValueError(
                f"the region's map has version {about.version} (magic {about.magic:#x}), expected "
                f"{MAP_VERSION} ({map_magic():#x}): all processes must use the same release of this package"
            )
        if about.namespace and namespace and about.namespace != namespace:
            raise ValueError("the region's map belongs to another PID namespace: pids mean others there")
        if (
            not 0 < about.units <= MAX_UNITS or not 0 < about.rows <= 4096 or about.unit_bytes > 1 << 30
            or about.unit_bytes < UNIT_BYTES or about.unit_bytes & 63 or about.buckets & (about.buckets - 1)
            or not 0 < about.buckets <= MAX_UNITS
        ):
            raise ValueError("the header of the region's map is damaged")
        used = sizeof(map_header) + about.rows * sizeof(map_row) + about.buckets * sizeof(map_bucket)
        used += (8 * about.units + 63) & ~<uint64_t>63
        if not inside(used, about.units * about.unit_bytes, self.region.length):
            raise ValueError("the header of the region's map is damaged: it needs more than the region has")
        self.m.head = <map_header *>self.region.base
        self.m.rows = <map_row *>(self.region.base + sizeof(map_header))
        self.m.buckets = <map_bucket *>(self.m.rows + about.rows)
        self.m.words = <a64_t *>(self.m.buckets + about.buckets)
        self.m.units = self.region.base + used
        self.m.count = about.units
        self.m.unit_bytes = about.unit_bytes
        self.m.mask = about.buckets - 1
        self.m.row_count = about.rows
        self.m.max_items = about.max_items
        # Nobody's: not 0, which is what identity_word() says in a fork that has not asked for its own yet.
        a64_store_release(&self.m.identity, 1)
        return 0

    cdef int check(self) except -1:
        if self.region.base == NULL:
            self.region.check_open()
        return 0

    cdef int ready(self) except -1:
        """Before a write: the region is open, and this process has a row."""
        if a64_load_acquire(&self.m.identity) != a64_load_relaxed(own):
            self.check()
            if unit_enroll(&self.m) != MAP_OK:
                map_sweep(&self.m, False)
                if unit_enroll(&self.m) != MAP_OK:
                    raise RegionFull(f"{self.m.row_count} living processes use this map, which is its limit")
            # While there are rows left: one without a row could not take over what the dead own.
            if 2 * a64_load_relaxed(&self.m.row) >= self.m.row_count:
                map_sweep(&self.m, False)
        if self.region.base == NULL:
            self.region.check_open()
        return 0

    cdef int make_room(self, map_status status, uint64_t need, bint again) except -1:
        """After a write that failed for want of room: sweep, and try once more. What `again` is next time."""
        if not again:
            self.sweep()
            return 1
        if status == MAP_MANY_ITEMS:
            raise RegionFull(f"the map has {len(self)} items, and max_items is {self.m.max_items}")
        if status == MAP_MANY_CELLS:
            raise RegionFull("a bucket of the map is full: too many keys for so small a region")
        raise RegionFull(
            f"the map has no room for {need} bytes in one piece: of its "
            f"{self.m.count * self.m.unit_bytes} bytes, {self.bytes_free()} are free"
        )

    def bytes_free(self):
        """Bytes of units that are free. A snapshot."""
        cdef uint64_t i, free = 0
        self.check()
        for i in range(self.m.count):
            free += a64_load_relaxed(&self.m.words[i]) & 7 == 0
        return free * self.m.unit_bytes

    def sweep(self):
        """Free at once what dead processes leave, and items whose time is over; else that is done when room
        is short. How many blocks that were."""
        cdef uint64_t freed
        self.ready()
        self.region.enter()
        with nogil:
            freed = map_sweep(&self.m, True)
        self.region.leave()
        return freed

    def _bury(self):
        """A process has died that may have used the map: its locks pass on, what it held is given back.

        For the runtime, which knows; at once if nobody has ever used the map.
        """
        if a32_load_acquire(&self.m.head.high) == 0:
            return
        self.ready()
        self.region.enter()
        with nogil:
            map_sweep(&self.m, False)
        self.region.leave()

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

    def __len__(self):
        cdef uint64_t n
        self.check()
        self.region.enter()
        with nogil:
            n = map_count(&self.m, now_ns())
        self.region.leave()
        return n

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
            for key, _version, value in self.bucket_items(i, &start, True):
                found.append((key, value))
        return found

    cdef list bucket_items(self, uint64_t i, map_key *start, bint values):
        """[(key, version, value)] of a bucket's keys that begin so."""
        cdef map_bucket *bucket = &self.m.buckets[i]
        cdef list found = []
        cdef uint64_t at = 0, key_bytes
        cdef map_place place
        cdef map_block *block
        cdef map_key k
        cdef char text[1024]
        cdef bint matches
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
            value = self.read(&k, False, &place.word)
            if value is not ABSENT:
                found.append((shown_key(text, key_bytes), full_version(
                    place.word, a64_load_seq_cst(&bucket.counter)), value))

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
        cdef bint again = False
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
            again = self.make_room(status, n, again)

    cdef void tidy(self) noexcept:
        """With every so many writes."""
        cdef uint32_t n = a32_load_relaxed(&self.m.writes) + 1
        a32_store_relaxed(&self.m.writes, n)
        if n % WRITES == 0:
            map_tidy(&self.m, now_ns())

    def add(self, key, n=1):
        """Add `n` to a number of 8 bytes (little-endian, signed; none: 0), and what it is then.

        An item keeps the time at which it is over. Raises: TypeError if the value has not 8 bytes;
        OverflowError if the sum needs more; nothing is changed then.
        """
        cdef map_key k
        cdef int64_t amount = n, result = 0
        cdef map_status status
        cdef bint again = False
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
            again = self.make_room(status, 8, again)

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


# ---- locks -----------------------------------------------------------------------------------------

cdef StateLock new_lock(StateMap state, object key, uint32_t kind, object timeout):
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
        cdef bint again = False
        if self.identity != 0 and self.identity == a64_load_relaxed(own):
            raise RuntimeError(f"this object holds the lock {self.text!r} already")
        self.state.ready()
        status = lock_take(&self.state.m, &self.key, -1 if patience == 0 else 0, 0, &self.hold)
        if status != MAP_OK:
            since = now_ns()
            rest = INT64_MAX if patience < 0 else patience
            while status != MAP_OK:
                if status != MAP_AGAIN:
                    again = self.state.make_room(status, 64, again)
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
        cdef bint again = False
        while True:
            self.state.ready()
            status = lock_take(&self.state.m, &self.key, since, 0, &self.hold)
            if status == MAP_OK:
                self.identity = a64_load_relaxed(own)
                return True
            if status == MAP_AGAIN:
                return False
            again = self.state.make_room(status, 64, again)

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
