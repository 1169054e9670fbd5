# cython: language_level=3
"""One process's access to a map in a region: made, found, checked; its row there, and room.

create() formats the map under region_state.claim, as the first MemoryPool of a region does (_pool.pyx), and
sets region_state.at last; open() finds it there. A region holds one, which uses all of it.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_Check, PyUnicode_DecodeUTF8
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from runtime._atomics cimport (
    a32_load_acquire, a64_cas_acq_rel, a64_load_acquire, a64_load_relaxed, a64_store_release, a64_t,
    now_ns,
)
from runtime._identity cimport identity_word, is_dead, my_identity
from runtime._map cimport map_count
from runtime._maplayout cimport (
    MAP_MANY_CELLS, MAP_MANY_ITEMS, MAP_OK, MAP_VERSION, MAX_KEY, MAX_UNITS, UNIT_BYTES, groups_of, map_about,
    map_bucket, map_header, map_key, map_key_of, map_magic, map_row, map_status,
)
from runtime._mapsweep cimport SWEEP_ALL, SWEEP_DEAD, SWEEP_OVER, map_sweep, sweep_t
from runtime._pool cimport pid_namespace
from runtime._region cimport HEADER_BYTES, SharedRegion, inside, region_header
from runtime._units cimport unit_enroll

from runtime.errors import RegionFull


cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *n) except NULL

cdef a64_t *own = identity_word()


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


cdef inline uint64_t whole_lines(uint64_t nbytes) noexcept:
    return (nbytes + 63) & ~<uint64_t>63


cdef uint64_t limited(object value, str what) except? 0:
    """A limit; 0: none."""
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what} must be an int, not {type(value).__name__}")
    if not 0 < value < 1 << 62:
        raise ValueError(f"{what} must be greater than 0, it is {value}")
    return <uint64_t>value


# ---- access ----------------------------------------------------------------------------------------

cdef class MapAccess:
    """What StateMap and its locks have in common."""

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
        cdef MapAccess self = cls.__new__(cls)
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
        cdef MapAccess self = cls.__new__(cls)
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
        cdef uint64_t unit = UNIT_BYTES, fixed = sizeof(map_header) + rows * (sizeof(map_row) + sizeof(a64_t))
        cdef uint64_t units, buckets = 1
        cdef map_header *head = <map_header *>self.region.base
        while size // unit > MAX_UNITS:
            unit *= 2
        units = (size - fixed) // (unit + 24) if size > fixed else 0
        while 4 * buckets < units:
            buckets *= 2
        fixed += buckets * sizeof(map_bucket) + groups_of(buckets) * sizeof(a64_t) + 128
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
        cdef uint64_t namespace = pid_namespace(), changes_at, buckets_at, used
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
        used = whole_lines(sizeof(map_header) + about.rows * (sizeof(map_row) + sizeof(a64_t)))
        changes_at = used
        buckets_at = whole_lines(changes_at + groups_of(about.buckets) * sizeof(a64_t))
        used = buckets_at + about.buckets * sizeof(map_bucket)
        used += whole_lines(about.units * sizeof(a64_t))
        if not inside(used, about.units * about.unit_bytes, self.region.length):
            raise ValueError("the header of the region's map is damaged: it needs more than the region has")
        self.m.head = <map_header *>self.region.base
        self.m.rows = <map_row *>(self.region.base + sizeof(map_header))
        self.m.looked = <a64_t *>(self.m.rows + about.rows)
        self.m.changes = <a64_t *>(self.region.base + changes_at)
        self.m.buckets = <map_bucket *>(self.region.base + buckets_at)
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
                map_sweep(&self.m, SWEEP_DEAD)
                if unit_enroll(&self.m) != MAP_OK:
                    raise RegionFull(f"{self.m.row_count} living processes use this map, which is its limit")
            # While there are rows left: one without a row could not take over what the dead own.
            if 2 * a64_load_relaxed(&self.m.row) >= self.m.row_count:
                map_sweep(&self.m, SWEEP_DEAD)
        if self.region.base == NULL:
            self.region.check_open()
        return 0

    cdef int make_room(self, map_status status, uint64_t need, int turn) except -1:
        """After a write that failed for want of room: sweep, and the number of the next turn."""
        if turn < (1 if status == MAP_MANY_ITEMS else 2):       # tombstones are no items
            self.swept(SWEEP_ALL if turn else SWEEP_OVER)
            return turn + 1
        if status == MAP_MANY_ITEMS:
            raise RegionFull(f"the map has {len(self)} items, and max_items is {self.m.max_items}")
        if status == MAP_MANY_CELLS:
            raise RegionFull("a bucket of the map is full: too many keys for so small a region")
        raise RegionFull(
            f"the map has no room for {need} bytes in one piece: of its "
            f"{self.m.count * self.m.unit_bytes} bytes, {self.bytes_free()} are free"
        )

    def __len__(self):
        cdef uint64_t n
        self.check()
        self.region.enter()
        with nogil:
            n = map_count(&self.m, now_ns())
        self.region.leave()
        return n

    def bytes_free(self):
        """Bytes of units that are free. A snapshot."""
        cdef uint64_t i, free = 0
        self.check()
        for i in range(self.m.count):
            free += a64_load_relaxed(&self.m.words[i]) & 7 == 0
        return free * self.m.unit_bytes

    cdef uint64_t swept(self, sweep_t extent) except? 0:
        cdef uint64_t freed
        self.ready()
        self.region.enter()
        with nogil:
            freed = map_sweep(&self.m, extent)
        self.region.leave()
        return freed

    def sweep(self):
        """Free at once what dead processes leave, and items whose time is over; else that is done when room
        is short. How many blocks that were."""
        return self.swept(SWEEP_OVER)

    def _bury(self):
        """A process has died that may have used the map: its locks pass on, what it held is given back.

        For the runtime, which knows; at once if nobody has ever used the map.
        """
        if a32_load_acquire(&self.m.head.high) != 0:
            self.swept(SWEEP_DEAD)
