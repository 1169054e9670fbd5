# cython: language_level=3
"""The region of one runtime as a process maps it: its tables, its extents, and the host's blocks in them."""
from weakref import WeakSet

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.object cimport PyObject
from libc.stdint cimport uintptr_t
from posix.unistd cimport getpid

from runtime._extent cimport heap_free, heap_run, heap_take, heap_used, heap_largest, vacant
from runtime._frame cimport B_FROZEN, B_READONLY, B_REF, B_SHARED, Frame, frame_buffer_t

from runtime.errors import RegionFull


cdef uint64_t MAGIC = 0x52544D4152454E41ULL     # "RTMARENA"

cdef list losses = None         # what arenas have lost that have ended, in tests; see note_losses


def note_losses(list into):
    """For tests: an arena that ends adds what it has lost, {state: how many}, if it has lost anything.

    Lost is a block that is not free or a lease that is not FREE when the memory is given back: whoever
    owned it has ended without the sweep.
    """
    global losses
    losses = into


arenas = WeakSet()              # of this process


def in_region(view):
    """Whether the memory of a contiguous buffer lies in a block of an arena of this process."""
    cdef Py_buffer buffer
    cdef Arena arena
    PyObject_GetBuffer(view, &buffer, PyBUF_SIMPLE)
    try:
        for arena in tuple(arenas):
            if arena.head_of(<const char *>buffer.buf, <uint64_t>buffer.len) >= 0:
                return True
        return False
    finally:
        PyBuffer_Release(&buffer)


cdef class Arena:
    """The layout of one runtime's region, formatted by the host, read by its workers.

    Thread-safety: the geometry is constant; the words are moved by atomics.
    Fork-safety: a worker is forked with the mapping and says so by `adopt_process()`; in any other fork
    the mapping has become private and every object that hangs on it is inert.
    Raises: RegionFull when the system has no memory for it.
    """

    def __cinit__(self):
        assert sizeof(lease_t) == 640 and sizeof(slot_t) == 832 and sizeof(record_t) == 48
        assert sizeof(arena_t) == PAGE + 192

    @staticmethod
    def footprint(uint32_t slots, uint32_t leases, uint32_t outbox, uint64_t bounce_bytes):
        """Bytes of one slot."""
        return round_up(sizeof(slot_t) + 4 * leases + sizeof(record_t) * outbox
                        + sizeof(lease_t) * leases, PAGE) + round_up(bounce_bytes, PAGE)

    @classmethod
    def create(cls, uint64_t size, uint32_t slots, uint32_t leases, uint32_t outbox, uint64_t bounce_bytes,
               bint lanes=True, uint32_t spin=50_000, uint32_t room=0, uint64_t most=0, uint32_t threads=1):
        """A fresh region with `size` bytes for blocks beside the tables.

        `room`: slots that are laid out, if more than `slots`; `most`: bytes for blocks, if more than `size`.
        The others are a hole in the file: address space, no memory, until `add_slots` and `grow`.
        `threads`: slots that a process has.
        """
        cdef Arena self = <Arena>cls.__new__(cls)
        cdef uint64_t stride = Arena.footprint(slots, leases, outbox, bounce_bytes)
        cdef uint64_t slots_at = round_up(sizeof(arena_t), PAGE)
        cdef uint64_t later = slots_at + stride * slots
        cdef uint64_t words_at = slots_at + stride * max(room, slots)
        cdef uint64_t extents = (size + EXTENT - 1) // EXTENT
        cdef uint64_t capacity = max(extents, (most + EXTENT - 1) // EXTENT)
        cdef uint64_t extents_at = round_up(words_at + 8 * capacity, PAGE)
        assert slots % threads == 0 and room % threads == 0
        assert leases <= MAX_LEASES and leases & (leases - 1) == 0 and outbox & (outbox - 1) == 0
        if capacity >= NO_SLOT:
            limit = <uint64_t>NO_SLOT * EXTENT
            raise ValueError(f"a region of {max(size, most)} bytes is over the limit of {limit} bytes")
        region = SharedRegion.create(extents_at + capacity * EXTENT, _later=(
            (later, words_at), (round_up(words_at + 8 * extents, PAGE), extents_at),
            (extents_at + extents * EXTENT, extents_at + capacity * EXTENT)))
        self.attach(region)
        self.room = max(room, slots)
        self.leases, self.outbox, self.threads = leases, outbox, threads
        self.bounce_bytes = round_up(bounce_bytes, PAGE)
        self.lanes, self.spin = lanes, spin
        self.slots_at, self.slot_stride = slots_at, stride
        self.words_at, self.extents_at = words_at, extents_at
        self.capacity, self.least, self.heap.count = capacity, extents, extents
        self.write_geometry()
        self.read_geometry()
        self.slots = slots
        self.host = True
        return self

    @staticmethod
    def attach_fd(int fd):
        """The arena that another process of the family made. Raises: ValueError if there is none in it."""
        cdef Arena self = Arena.__new__(Arena)
        cdef arena_t *head
        self.attach(SharedRegion.from_fd(fd))
        head = self.head
        if self.region.length < sizeof(arena_t) or head.magic != MAGIC or head.version != LAYOUT_VERSION:
            raise ValueError("the region holds no arena of this version of the runtime")
        if head.capacity >= NO_SLOT or head.extents_at + head.capacity * EXTENT > self.region.length:
            raise ValueError("the arena's tables do not fit into the region")
        self.read_geometry()
        return self

    cdef attach(self, SharedRegion region):
        self.region = region
        self.base = region.base
        self.head = <arena_t *>region.base
        self.pid = getpid()
        self.living = {}
        self.watched = {}
        arenas.add(self)

    def restate(self):
        """Host: write the headers anew, as a worker may have run wild there.

        At each rescan, for the count of extents, by which workers go; and before a process attaches that has
        not inherited the sizes. They are what they were, so nobody minds who reads them meanwhile.
        """
        if self.base != NULL:
            self.region._restate()
            self.write_geometry()

    cdef int write_geometry(self) except -1:
        self.head.version = LAYOUT_VERSION
        self.head.slots = self.room
        self.head.leases = self.leases
        self.head.outbox = self.outbox
        self.head.bounce_bytes = self.bounce_bytes
        self.head.slots_at = self.slots_at
        self.head.slot_stride = self.slot_stride
        self.head.words_at = self.words_at
        self.head.extents_at = self.extents_at
        a64_store_release(&self.head.extents, self.heap.count)
        self.head.lanes = self.lanes
        self.head.spin = self.spin
        self.head.capacity = self.capacity
        self.head.least = self.least
        self.head.threads = self.threads
        self.head.magic = MAGIC
        return 0

    cdef read_geometry(self):
        """Copy the sizes out once; the copies are what is used from here on."""
        self.slots = self.room = self.head.slots
        self.leases = self.head.leases
        self.outbox = self.head.outbox
        self.threads = self.head.threads
        self.bounce_bytes = self.head.bounce_bytes
        self.lanes = self.head.lanes == 1
        self.spin = self.head.spin if self.lanes else 0
        self.slots_at = self.head.slots_at
        self.slot_stride = self.head.slot_stride
        self.words_at = self.head.words_at
        self.extents_at = self.head.extents_at
        self.capacity = self.head.capacity
        self.least = self.head.least
        self.grows = self.least < self.capacity
        self.heap.words = <a64_t *>(self.base + self.words_at)
        self.heap.extents = self.base + self.extents_at
        self.counted()
        self.heap.frees = &self.head.frees
        self.heap.hint = 0

    def add_slots(self, uint32_t slots):
        """From now on there are so many. In the host alone: nobody else counts them.

        Raises: ValueError beyond the room; RegionFull when there is no memory, and nothing has changed.
        """
        if slots > self.room:
            raise ValueError(f"{slots} slots: there is room for {self.room}")
        if slots > self.slots and self.base != NULL:
            self.region._supply(self.slots_at + self.slot_stride * self.slots,
                                self.slots_at + self.slot_stride * slots)
            if self.base != NULL:               # it may have ended meanwhile
                self.slots = max(self.slots, slots)

    def adopt_process(self):
        """A worker calls this right after it was forked: the mapping serves this process from now on."""
        self.pid = getpid()
        self.host = False

    cdef uint64_t counted(self) noexcept nogil:
        """How many extents there are. The host decides that; for the others it may have risen."""
        if not self.host and self.head != NULL:
            # X3 pairs with X4 in _growth: who sees the new count sees words and memory.
            self.heap.count = min(a64_load_acquire(&self.head.extents), self.capacity)
        return self.heap.count

    cdef bint hopeful(self, uint64_t nbytes) noexcept:
        """Whether `grow` may succeed."""
        return False

    def grow(self, uint64_t nbytes):
        """Make room for so many bytes; see GrowingArena. Whether there is some: here never."""
        return False

    def trim(self, int64_t every=0):
        """Give back what has not been used for a while; see GrowingArena. How many bytes."""
        return 0

    def make_private(self):
        """In a user's fork: the same memory, copy on write, so that nothing done here reaches the runtime."""
        cdef uint64_t i, at
        self.private = True
        if self.base == NULL:
            return
        self.region.remap_private()
        # A private page is the file's own until it is written: write to those that something here shows, so
        # that what the parent does with them later does not show here.
        self.counted()
        for at in {*self.living, *self.watched.values()}:
            for i in range(at, at + heap_run(&self.heap, at)):
                a64_fetch_add_relaxed(<a64_t *>(self.heap.extents + i * EXTENT), 0)

    @property
    def showing(self):
        """Whether anything here may show a block."""
        return self.held != 0 or len(self.watched) != 0

    def freeze(self):
        """A fork is about to happen: this process frees no block until `thaw`."""
        if self.dropped is None:
            self.dropped = []
        self.frozen += 1

    cdef int drop(self, uint64_t at, uint64_t tag, uint64_t state, uint64_t owner) except -1:
        """Free a block of this process, or after the fork that is under way."""
        if self.frozen:
            self.dropped.append((at, tag, state, owner))
        else:
            heap_free(&self.heap, at, tag, state, owner)
        return 0

    def thaw(self):
        """The child has its own copy of what its views show."""
        self.frozen -= 1
        while self.dropped and self.frozen == 0:
            at, tag, state, owner = self.dropped.pop()
            heap_free(&self.heap, at, tag, state, owner)
        if self.ending and self.held == 0:
            self.release()

    def release(self):
        """The runtime has ended: give the memory back, now or when the last view of it is gone.

        After it the arena has no slots and no room, so whatever looks at it finds nothing.
        """
        self.ending = True
        if self.held or self.frozen or self.lookers:
            return                              # whoever ends that comes back here
        if self.base != NULL and self.pid == getpid():
            if losses is not None:
                lost = self.owners()
                lost.update(self.held_leases())
                if lost:
                    losses.append(lost)
            self.slots = 0
            self.heap.count = self.capacity = 0
            self.base = NULL
            self.head = NULL
            self.region.close()

    cdef int64_t head_of(self, const char *data, uint64_t nbytes) noexcept nogil:
        """The head of the run that some bytes lie in; -1: they do not, or there are none."""
        cdef uint64_t at, w
        if self.base == NULL or nbytes == 0 or self.private or data < self.heap.extents:
            return -1
        at = <uint64_t>(data - self.heap.extents) // EXTENT
        if at >= self.counted():
            return -1
        w = a64_load_acquire(&self.heap.words[at])
        return <int64_t>(x_field(w) if x_state(w) == X_TAIL else at)

    cdef uint64_t index_of(self, uint64_t offset) noexcept nogil:
        """The extent at an offset; beyond all extents if there is none."""
        return (offset - self.extents_at) // EXTENT

    cdef HostBlock block_at(self, uint64_t offset, uint64_t tag):
        """The host's block at an offset; None: there is none with this tag."""
        cdef uint64_t at = self.index_of(offset)
        cdef HostBlock block
        if offset < self.extents_at or (offset - self.extents_at) % EXTENT:
            return None
        found = self.living.get(at)
        if found is None:
            return None
        block = <HostBlock><PyObject *><uintptr_t>found
        return block if block.tag == tag else None

    def locate(self, view):
        """The slice of the host's block that a flat buffer lies in, which then travels by reference; or None.

        Raises: ValueError for a Ref of another runtime.
        """
        cdef Py_buffer buffer
        cdef HostBlock block
        cdef int64_t at
        PyObject_GetBuffer(view, &buffer, PyBUF_SIMPLE)
        try:
            at = self.head_of(<const char *>buffer.buf, <uint64_t>buffer.len)
            found = self.living.get(at)
            if found is None:
                if isinstance(view.obj, HostBlock) and (<HostBlock>view.obj).access == B_FROZEN:
                    raise ValueError("this Ref belongs to another Runtime; put the object into this one, too")
                return None
            block = <HostBlock><PyObject *><uintptr_t>found
            return block.slice(<const char *>buffer.buf, <uint64_t>buffer.len, buffer.readonly)
        finally:
            PyBuffer_Release(&buffer)

    def take(self, nbytes):
        """A new block of the host. Raises: RegionFull when there is no room for it."""
        block = HostBlock.take(self, nbytes) if nbytes <= self.max_bytes else None
        if block is None:
            raise RegionFull(f"no room for {nbytes} bytes")
        return block

    def locate_frozen(self, view):
        """As `locate`, but only what never changes: all else is copied."""
        cdef BlockSlice found = self.locate(view)
        return found if found is not None and found.about.flags & B_FROZEN else None

    @property
    def fd(self):
        """Descriptor of the region."""
        return self.region.fd

    @property
    def data_bytes(self):
        """Bytes for blocks, those included that have no memory at the moment."""
        return self.counted() * EXTENT

    @property
    def max_bytes(self):
        """Bytes for blocks that there may ever be."""
        return self.capacity * EXTENT

    @property
    def frees(self):
        """Blocks freed so far, and times that the region grew; it goes round at 2^64."""
        return a64_load_relaxed(self.heap.frees) if self.base != NULL else 0

    @property
    def reserved_bytes(self):
        """Bytes of the whole region that have memory."""
        if self.base == NULL:
            return 0
        return (self.region.length - self.slot_stride * (self.room - self.slots)
                - (self.extents_at - round_up(self.words_at + 8 * self.heap.count, PAGE))
                - (self.capacity - self.heap.count + self.holes) * EXTENT)

    @property
    def used_bytes(self):
        """Bytes in blocks that are not free: a snapshot."""
        return heap_used(&self.heap) * EXTENT

    @property
    def largest_free_bytes(self):
        """Bytes of the largest free run: a snapshot."""
        return heap_largest(&self.heap) * EXTENT

    def owners(self):
        """For tests: {state name: heads} of all extents that are not free."""
        cdef uint64_t i, w
        names = ("free", "claim", "private", "publishing", "host", "freeing", "tail")
        found = {}
        for i in range(self.heap.count):
            w = a64_load_acquire(&self.heap.words[i])
            if not vacant(w) and x_state(w) != X_TAIL:
                key = names[x_state(w)]
                found[key] = found.get(key, 0) + 1
        return found

    def held_leases(self):
        """For tests: {state name: leases} of all that are not FREE."""
        cdef uint32_t i, k, state
        names = {L_LEASED: "leased", L_RUNNING: "running", L_DONE: "done", L_KILLED: "killed"}
        found = {}
        for i in range(self.slots):
            for k in range(self.leases):
                state = l_state(a64_load_acquire(&self.lease(i, k).word))
                if state != L_FREE:
                    key = names.get(state, "strange")
                    found[key] = found.get(key, 0) + 1
        return found

    cdef slot_t *slot(self, uint32_t index) noexcept nogil:
        return <slot_t *>(self.base + self.slots_at + self.slot_stride * index)

    cdef a32_t *ring(self, uint32_t index) noexcept nogil:
        return <a32_t *>(<char *>self.slot(index) + sizeof(slot_t))

    cdef record_t *records(self, uint32_t index) noexcept nogil:
        return <record_t *>(<char *>self.ring(index) + 4 * self.leases)

    cdef lease_t *lease(self, uint32_t index, uint32_t entry) noexcept nogil:
        return <lease_t *>(<char *>self.records(index) + sizeof(record_t) * self.outbox) + entry

    cdef char *bounce(self, uint32_t index) noexcept nogil:
        return <char *>self.slot(index) + self.slot_stride - self.bounce_bytes


@cython.no_gc
cdef class HostBlock:
    """A block that the host owns, and the exporter of every view of it in the host.

    Its reference count is Python's own, so it is private to the host: no counter in shared memory.
    Thread-safety: immutable. Fork-safety: a copy in another process frees nothing.
    """

    @staticmethod
    cdef HostBlock wrap(Arena arena, uint64_t at, uint64_t tag, uint64_t nbytes):
        cdef HostBlock self = HostBlock.__new__(HostBlock)
        self.arena = arena
        self.at = at
        self.tag = tag
        self.nbytes = nbytes
        self.data = arena.heap.extents + at * EXTENT
        arena.held += round_up(nbytes, EXTENT)
        arena.living[at] = <uintptr_t><PyObject *>self
        return self

    @staticmethod
    def take(Arena arena, uint64_t nbytes):
        """A new block of the host, or None when there is no room now."""
        cdef uint64_t tag = 0
        cdef int64_t at = heap_take(&arena.heap, nbytes, NO_SLOT, &tag)
        if at < 0:
            return None
        return HostBlock.wrap(arena, <uint64_t>at, tag, nbytes)

    @property
    def offset(self):
        """Offset of the block in the region's data."""
        return self.arena.extents_at + self.at * EXTENT

    cdef BlockSlice slice(self, const char *data, uint64_t nbytes, bint readonly):
        """Some bytes of it, to travel by reference; None: they are not all in it."""
        cdef uint64_t start = <uint64_t>(data - self.data)
        if data < self.data or start > self.nbytes or nbytes > self.nbytes - start:
            return None
        return BlockSlice.of(self, <char *>data, frame_buffer_t(
            nbytes, B_REF | self.access | (B_READONLY if readonly else 0), 0, self.offset, self.nbytes,
            self.tag, start))

    def fill(self, Frame frame not None):
        """Lay a frame out in it, without the GIL."""
        if frame.nbytes > self.nbytes:
            raise ValueError(f"{frame.nbytes} bytes do not fit into a block of {self.nbytes}")
        with nogil:
            frame.copy(self.data, 0, frame.nbytes)

    def freeze(self, dict holds):
        """From now on it never changes: every view is read-only. For a block that has no view yet.

        holds: {(offset, tag): block} that what lies in it refers to; they live as long.
        """
        self.access = B_FROZEN
        self.holds = holds

    def share(self):
        """Whoever has a view of it may write, and all see it."""
        self.access = B_SHARED

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, <Py_ssize_t>self.nbytes, self.access == B_FROZEN, flags)

    def __dealloc__(self):
        if self.arena is not None and self.data != NULL and self.arena.pid == getpid():
            self.arena.living.pop(self.at, None)
            self.arena.held -= round_up(self.nbytes, EXTENT)
            self.arena.drop(self.at, self.tag, X_HOST, NO_SLOT)
            if self.arena.ending and self.arena.held == 0:
                self.arena.release()
