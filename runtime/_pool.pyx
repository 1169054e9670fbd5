# cython: language_level=3
"""MemoryPool and Block: _slab.pyx for Python, in a region.

The first pool in a region formats it, under region_pool.claim; later ones find it by region_pool.at.
"""
cimport cython
from cpython.buffer cimport PyBuffer_FillInfo, PyBuffer_Release
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.unistd cimport getpid

from runtime._atomics cimport (
    a64_cas_acq_rel, a64_load_acquire, a64_load_relaxed, a64_store_release, a64_t, fence_seq_cst, now_ns,
)
from runtime._identity cimport identity_pid, identity_word, is_dead, my_identity
from runtime._region cimport HEADER_BYTES, SharedRegion, copy_bytes, get_bytes, inside, region_header, to_size
from runtime._slab cimport (
    OWNER_ROWS, POOL_FULL, POOL_OK, POOL_VERSION, SLICE_NS, pool_about, pool_count_free, pool_enroll,
    pool_format, pool_give, pool_header, pool_magic, pool_recover, pool_status, pool_sweep, pool_take,
    pool_wait,
)

import os
import time

from runtime.errors import LockTimeout, RegionFull, StaleBlock


cdef extern from "Python.h":
    double PyFloat_AsDouble(object value) except? -1.0


cdef int64_t FORMAT_PATIENCE = 30000000000      # ns for which another process may format the pool
cdef object ZERO = 0
cdef a64_t *own = identity_word()


# ---- arguments -------------------------------------------------------------------------------------

cdef uint64_t counted(object value, str what) except 0:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what} must be an int, not {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"{what} must be greater than 0, it is {value}")
    if value >= 1 << 32:
        raise ValueError(f"{what} must be less than 2**32, it is {value}")
    return <uint64_t>value


cdef int64_t patience_of(object timeout) except -2:
    """Nanoseconds to wait; -1: for ever."""
    cdef double seconds
    if timeout is None:
        return -1
    seconds = PyFloat_AsDouble(timeout)
    if not seconds >= 0:
        raise ValueError(f"timeout must be a number of seconds, at least 0, or None; it is {timeout}")
    return -1 if seconds > 1e9 else <int64_t>(seconds * 1e9)


cdef uint64_t pid_namespace():
    """What tells PID namespaces apart, 0 if unknown: pids of one mean nothing in another."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


# ---- the pool --------------------------------------------------------------------------------------

@cython.final
@cython.no_gc                   # refers to its region alone, which refers to nothing
cdef class MemoryPool:
    """A fixed number of equal blocks of shared memory, each free or owned by one process.

    MemoryPool(capacity, block_size, *, region=None): `capacity` blocks of `block_size` bytes (each
    64-byte aligned), in a region of its own, or at the high end of `region`, whose low offsets stay free
    for the caller. A region has one pool: the same call in another process, or on another mapping of the
    region, finds it. Blocks of processes that ended without releasing are recovered by whoever would
    find none free.

    Thread-safety: every method may be called from any thread; taking and giving back is one atomic
    exchange each, no lock.
    Fork-safety: parent and child share the pool; each owns what it acquired itself. All processes must be
    in one PID namespace. Blocks held across exec stay owned until the process ends.
    Blocking: acquire() waits only as `timeout` says. Making a pool waits while another process formats it.
    Raises: ValueError for sizes and timeouts out of range, a region that is closed or too small, or that
    has a pool of other sizes; RegionFull when there is no memory, or 4096 processes use the pool.
    """

    def __cinit__(self, capacity, block_size, *, SharedRegion region=None):
        cdef uint64_t page
        self.p.capacity = counted(capacity, "capacity")
        self.p.block_bytes = counted(block_size, "block_size")
        self.p.stride = (self.p.block_bytes + 63) & ~<uint64_t>63
        page = 4095 if self.p.block_bytes % 4096 == 0 else 63   # whole pages begin at a page
        self.blocks_from = (sizeof(pool_header) + 8 * self.p.capacity + page) & ~page
        if self.p.stride > (<uint64_t>1 << 47) // self.p.capacity:
            raise ValueError(f"{capacity} blocks of {block_size} bytes are more than a process can address")
        self.total = self.blocks_from + self.p.capacity * self.p.stride
        if region is None:
            region = SharedRegion.create(self.total)
        self.region = region
        region.hold()
        try:
            self.find_or_format()
            self.enroll()
        finally:
            region.drop()

    cdef int find_or_format(self) except -1:
        """Attach to the region's pool, or make it.

        `claim` says who is formatting. It is taken from a dead process, whose half-made pool nobody has
        seen: `at` is set last, with release order (F1), and read before anything else (F2). Between a
        claim and F1 runs no Python code, so another thread of this process is never met in there.
        """
        cdef region_header *head = <region_header *>(self.region.base - HEADER_BYTES)
        cdef uint64_t me = my_identity(), at, claim, namespace = pid_namespace()
        cdef int64_t deadline = now_ns() + FORMAT_PATIENCE
        while True:
            at = a64_load_acquire(&head.pool.at)                                # F2
            if at != 0:
                return self.attach(at)
            if a64_load_acquire(&head.state.at) != 0:
                raise ValueError("the region holds a SharedState, which uses all of it: make another one")
            if self.total > self.region.length:
                raise ValueError(
                    f"the region has {self.region.length} bytes; "
                    f"{self.p.capacity} blocks of {self.p.block_bytes} bytes need {self.total}"
                )
            claim = a64_load_acquire(&head.pool.claim)
            if claim == me or (
                (claim == 0 or is_dead(claim)) and a64_cas_acq_rel(&head.pool.claim, claim, me)
            ):
                # The dead process may have come as far as F1.
                if a64_load_acquire(&head.pool.at) == 0:
                    at = HEADER_BYTES + ((self.region.length - self.total) & ~<uint64_t>4095)
                    pool_format(<char *>head + at, &self.p, namespace)
                    a64_store_release(&head.pool.at, at)                        # F1
                a64_cas_acq_rel(&head.pool.claim, me, 0)
                continue
            if now_ns() > deadline:
                raise LockTimeout(f"process {identity_pid(claim)} does not finish the region's pool")
            time.sleep(0.001)

    cdef int attach(self, uint64_t at) except -1:
        """Check the pool at file offset `at`, and use it. What is read from the region is read once."""
        cdef char *start = self.region.base - HEADER_BYTES + at
        cdef pool_about about
        cdef uint64_t namespace = pid_namespace()
        cdef uint64_t room = self.region.length
        if at % 64 or at < HEADER_BYTES or not inside(at - HEADER_BYTES, sizeof(pool_header), room):
            raise ValueError(f"the region's header is damaged: it names a pool at {at}")
        about = (<pool_header *>start).about
        if about.magic != pool_magic() or about.version != POOL_VERSION:
            raise ValueError(
                f"the region's pool has version {about.version} (magic {about.magic:#x}), expected "
                f"{POOL_VERSION} ({pool_magic():#x}): all processes must use the same release of this package"
            )
        if about.capacity != self.p.capacity or about.block_bytes != self.p.block_bytes:
            raise ValueError(
                f"the region already has a pool of {about.capacity} blocks of {about.block_bytes} bytes; "
                f"asked for {self.p.capacity} blocks of {self.p.block_bytes}"
            )
        if about.stride != self.p.stride or not inside(at - HEADER_BYTES, self.total, room):
            raise ValueError("the header of the region's pool is damaged")
        if about.namespace and namespace and about.namespace != namespace:
            raise ValueError("the region's pool belongs to another PID namespace: pids mean others there")
        self.p.head = <pool_header *>start
        self.p.words = <a64_t *>(start + sizeof(pool_header))
        self.p.blocks = start + self.blocks_from
        return 0

    cdef int enroll(self) except -1:
        """Give this process a row: at the start, and in a forked child at its first acquire."""
        cdef pool_status status
        self.region.enter()
        with nogil:
            status = pool_enroll(&self.p)
        self.region.leave()
        if status == POOL_FULL:
            raise RegionFull(f"{OWNER_ROWS} living processes use this pool, which is its limit")
        return 0

    def acquire(self, timeout=0):
        """A free block, or None if there is none within `timeout` seconds (0: do not wait; None: for ever).

        Its bytes are what the last owner left there. Waiting lets other threads run; Ctrl-C ends it.
        """
        cdef int64_t patience = 0, i
        cdef Block block
        if timeout is not ZERO:
            patience = patience_of(timeout)
        if a64_load_relaxed(&self.p.identity) != a64_load_relaxed(own):
            self.enroll()
        if self.region.base == NULL:        # after what may let other threads run, before what may not
            self.region.check_open()
        block = Block.__new__(Block)        # before the take: nothing may fail after it
        i = pool_take(&self.p, &block.held)
        if i < 0:
            i = self.wait(&block.held, patience)
            if i < 0:
                return None
        block.index = <uint32_t>i
        block.data = self.p.blocks + <uint64_t>i * self.p.stride
        block.identity = a64_load_relaxed(&self.p.identity)
        block.pool = self
        self.region.exports += 1
        return block

    cdef int64_t wait(self, uint64_t *held, int64_t patience) except -2:
        """A block that was not free at once: sweep, and then wait in slices."""
        cdef int64_t i, rest = patience, deadline = now_ns() + patience
        self.region.enter()
        try:
            with nogil:
                i = pool_recover(&self.p, held)
            while i < 0 and rest != 0:
                with nogil:
                    i = pool_wait(&self.p, held, rest if patience > 0 else SLICE_NS)
                if i < 0:
                    PyErr_CheckSignals()
                    if patience > 0:
                        rest = max(0, deadline - now_ns())
            return i
        finally:
            self.region.leave()

    def release(self, Block block not None):
        """Give a block back that this process acquired.

        Raises: StaleBlock if it was released before; BufferError while a memoryview of it is alive;
        ValueError if it is of another pool, or was acquired by another process.
        """
        if block.held != 0 and block.pool is not self and block.pool.p.words != self.p.words:
            raise ValueError("the block belongs to another pool")
        give_back(block)

    @property
    def available(self):
        """Blocks that could be acquired at this moment, those of ended processes included. A snapshot."""
        cdef uint64_t free
        self.region.enter()
        with nogil:
            free = pool_count_free(&self.p)
            if free < self.p.capacity and pool_sweep(&self.p):
                free = pool_count_free(&self.p)
        self.region.leave()
        return free

    @property
    def capacity(self):
        """Blocks of the pool."""
        return self.p.capacity

    @property
    def block_size(self):
        """Usable bytes of a block."""
        return self.p.block_bytes

    def __repr__(self):
        state = " (region closed)" if self.region.base == NULL else ""
        return f"<MemoryPool capacity={self.p.capacity} block_size={self.p.block_bytes}{state}>"

    def __reduce__(self):
        raise TypeError(
            "a MemoryPool cannot be pickled: share its region, and make a MemoryPool of the same sizes there"
        )


# ---- blocks ----------------------------------------------------------------------------------------

cdef int give_back(Block block) except -1:
    cdef uint64_t held = block.held
    if held == 0:
        raise StaleBlock("the block was released before")
    if block.identity != a64_load_relaxed(own):
        raise ValueError(
            f"the block was acquired by process {identity_pid(block.identity)}, and only that can "
            f"release it; this is its fork, process {getpid()}"
        )
    if block.exports:
        raise BufferError(f"{block.exports} memoryviews of the block are alive: release them first")
    block.held = 0
    block.pool.region.exports -= 1
    if pool_give(&block.pool.p, block.index, held) != POOL_OK:
        raise StaleBlock("the block is not owned by this process any more: somebody changed its word")
    return 0


@cython.final
@cython.no_gc                   # refers to its pool alone
@cython.freelist(64)
cdef class Block:
    """A block of a MemoryPool, owned by the process that acquired it until it is released.

    `memoryview(block)`, read(), write() reach its bytes; leaving a `with` block releases it; so does
    dropping the last reference. A live memoryview keeps it owned.

    Thread-safety: methods may be called from any thread; bytes are copied without a lock.
    Fork-safety: the copy in a forked child is inert: it can be read (memoryviews are read-only) while the
    parent owns the block, is not released when dropped, and release() is an error.
    Blocking: nothing waits; copies of 64 KiB and more let other threads run.
    Raises: StaleBlock for every use after the release; ValueError for offsets and lengths out of range.
    """

    def __init__(self, *args, **kwargs):
        raise TypeError("blocks are made by MemoryPool.acquire()")

    def __dealloc__(self):
        if self.held == 0:
            return
        self.pool.region.exports -= 1
        if self.identity == a64_load_relaxed(own):
            pool_give(&self.pool.p, self.index, self.held)

    cdef int check(self) except -1:
        if self.held == 0:
            raise StaleBlock("the block was released")
        if self.identity == a64_load_relaxed(own):
            return 0
        if a64_load_acquire(&self.pool.p.words[self.index]) != self.held:
            raise StaleBlock(f"process {identity_pid(self.identity)}, its owner, has released the block")
        return 0

    def read(self, offset=0, length=None):
        """`length` bytes from `offset` on (None: up to the end), as a copy."""
        cdef size_t at = 0, n = 0
        to_size(offset, "offset", &at)
        if length is not None:
            to_size(length, "length", &n)
        self.check()
        if length is None and at <= self.pool.p.block_bytes:
            n = self.pool.p.block_bytes - at
        check_inside(self, at, n)
        copy = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>n)
        self.exports += 1
        try:
            copy_bytes(self.pool.region, PyBytes_AS_STRING(copy), self.data + at, n)
        finally:
            self.exports -= 1
        fence_seq_cst()         # in a fork's copy: the owner may have released it while we copied
        self.check()
        return copy

    def write(self, offset, data):
        """Copy a bytes-like object to `offset`."""
        cdef size_t at = 0
        cdef Py_buffer source
        to_size(offset, "offset", &at)
        get_bytes(data, &source)
        self.exports += 1
        try:
            self.check()        # after the buffer was asked for: that may run code of others
            if self.identity != a64_load_relaxed(own):
                raise ValueError(
                    f"the block belongs to process {identity_pid(self.identity)}; in its fork it is read-only"
                )
            check_inside(self, at, <size_t>source.len)
            copy_bytes(self.pool.region, self.data + at, <char *>source.buf, <size_t>source.len)
        finally:
            self.exports -= 1
            PyBuffer_Release(&source)

    def release(self):
        """Give the block back to its pool; see MemoryPool.release."""
        give_back(self)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        self.check()
        PyBuffer_FillInfo(buffer, self, self.data, <Py_ssize_t>self.pool.p.block_bytes,
                          self.identity != a64_load_relaxed(own), flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.exports -= 1

    def __enter__(self):
        self.check()
        return self

    def __exit__(self, kind, value, trace):
        # Released early is fine; so is the copy in a child that was forked inside the block.
        if self.held != 0 and self.identity == a64_load_relaxed(own):
            give_back(self)

    @property
    def size(self):
        """Bytes of the block."""
        self.check()
        return self.pool.p.block_bytes

    @property
    def offset(self):
        """Where the block begins in the pool's region: region.read_at(block.offset, n) reads it."""
        self.check()
        return self.data - self.pool.region.base

    def __repr__(self):
        if self.held == 0:
            return "<Block released>"
        return f"<Block {self.index} of {self.pool!r}>"

    def __reduce__(self):
        raise TypeError("a Block cannot be pickled: pass block.offset, and read the region there")


cdef int check_inside(Block block, size_t at, size_t n) except -1:
    cdef size_t size = block.pool.p.block_bytes
    if not inside(at, n, size):
        raise ValueError(f"offset {at} and length {n} reach outside the block of {size} bytes")
    return 0
