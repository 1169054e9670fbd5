# cython: language_level=3
"""What the host notes about work: items of maps, tasks, slots. None of it is shared with a worker."""
cimport cython
from collections import deque

from runtime._frame cimport S_CALLS, S_VALUE, stream_bytes
from runtime._plain cimport fixed_run
from runtime._series cimport number_run, pack_series, series_part, unpack_series

cdef int64_t CHUNK_NS = 2_000_000           # ns of work that a chunk aims at
cdef uint32_t MAX_CHUNK = 8192              # items of a chunk, at most
cdef int64_t SPAN_BYTES = 16 << 10          # bytes of a pickle of several items: it travels with any part
cdef Py_ssize_t NUMBERS = 64                # in a row: fewer are pickled with what is around them
cdef uint32_t LONGEST_CHUNK = 65536         # whatever the user asks for: the lease word has 21 bits for it


@cython.final
cdef class Span:
    """Consecutive items of a map. Immutable but for the queue, which takes from its front."""

    @staticmethod
    def of(uint64_t first, tuple item, str shown):
        """One item that has a pickle of its own: (S_VALUE, data, buffers, readonly)."""
        cdef Span self = Span.__new__(Span)
        self.first = first
        self.count = self.attempts = 1
        self.status = S_VALUE
        self.item = item
        self.shown = shown
        return self

    @staticmethod
    def pack(uint64_t first, list values, Py_ssize_t start, bint calls):
        """As many of `values` from `start` on as are plain and fixed, in a series; None: not even one.

        calls: each is a tuple of arguments, else the only argument.
        """
        cdef Span self
        cdef Py_ssize_t left = len(values) - start
        cdef Py_ssize_t count = 0 if calls else number_run(values, start, left)
        if count < NUMBERS and count < left:
            count = fixed_run(values, start, SPAN_BYTES)
            if count == 0:
                return None
        self = Span.__new__(Span)
        self.first = first
        self.count = <uint32_t>count
        self.attempts = 1
        self.status, self.data = pack_series(values if count == len(values) else values[start:start + count])
        if calls:
            self.status = S_CALLS
        return self

    @property
    def several(self):
        """Whether an item is a tuple of arguments."""
        return self.status == S_CALLS

    def value(self):
        """Its first item, of one that was packed."""
        return unpack_series(self.status, self.data, self.start, 1)[0]

    def singles(self):
        """Its items, each by itself."""
        cdef uint32_t i
        return [self.part(i, 1) for i in range(self.count)]

    @property
    def nbytes(self):
        """Bytes of its pickle and buffers."""
        if self.data is not None:
            return len(self.data)
        return stream_bytes(self.item[1]) + sum([(<object>b).nbytes for b in <tuple>self.item[2]])

    cdef Span part(self, uint32_t offset, uint32_t count):
        cdef Span other = Span.__new__(Span)
        other.first = self.first + offset
        other.count = count
        other.attempts = self.attempts
        other.deaths = self.deaths
        other.status = self.status
        other.start = self.start + offset
        other.data = self.data
        other.item = self.item
        other.alone = self.alone
        other.shown = self.shown
        return other

    cdef tuple framed(self):
        """What a Frame is given."""
        if self.data is None:
            return self.item
        data, start = series_part(self.status, self.data, self.start, self.count)
        return (self.status, data, (), (), start, self.count)


cdef class Batch:
    """The items of one map that are not leased yet, with what all of them share."""

    def __init__(self, fn, sink, int64_t timeout=0, int priority=0, bint retryable=False,
                 bint retry_timeouts=False, uint32_t chunksize=0):
        self.fn = fn
        self.sink = sink
        self.timeout = timeout
        self.priority = priority
        self.retryable = retryable
        self.retry_timeouts = retry_timeouts
        self.fixed = chunksize
        self.pending = deque()

    cdef uint32_t chunk(self, uint32_t workers):
        """Items for the next chunk: about 2 ms of work, and towards the end a fair share of what is left."""
        cdef uint32_t left = <uint32_t>min(self.waiting, <uint64_t>LONGEST_CHUNK)
        cdef double most, share
        if self.fixed:
            return min(self.fixed, left)
        if self.ran_items <= 0:
            return 1
        most = min(<double>MAX_CHUNK, CHUNK_NS * self.ran_items / self.ran_ns)
        # A share that takes less than a tenth of that is not worth a lease of its own.
        share = max(<double>self.waiting / (2 * workers), most / 10)
        return max(1, min(<uint32_t>min(most, share), left))

    cdef void measured(self, int64_t ns, uint64_t items):
        if ns > 0 and items:
            self.ran_ns = self.ran_ns / 2 + ns
            self.ran_items = self.ran_items / 2 + items


@cython.final
@cython.no_gc                                       # its only cycle, with its future, ends with the task
@cython.freelist(256)
cdef class Task:
    """One lease's worth of work: a call, or a chunk of a batch. Host-private."""

    def __init__(self, fn, Promise future, int64_t timeout=0, int priority=0, uint32_t retries=0,
                 bint retry_timeouts=False):
        self.fn = fn
        self.future = future
        self.timeout = timeout
        self.priority = priority
        self.retries = retries
        self.private_view = retries > 0
        self.retry_timeouts = retry_timeouts
        self.attempt = 1
        self.count = 1
        self.reason = ""

    def hold(self, data, tuple buffers, tuple readonly, tuple named=()):
        """The arguments of a call, in private memory until there is a lease for them.

        named: blocks that they name by offset; they live until no process runs the task.
        """
        self.named = named
        self.data = data
        self.buffers = buffers
        self.readonly = readonly

    def part(self):
        """The future of a call has its outcome, and the task knows it no more.

        An exception that the host itself has met names its frames, and these name the task.
        """
        self.future = None

    cdef Span one(self, uint64_t item):
        """A chunk's item by itself."""
        cdef Span span
        for span in self.spans:
            if item < span.count:
                return span.part(<uint32_t>item, 1)
            item -= span.count
        raise IndexError("no such item in the chunk")

    def item(self, uint64_t item):
        """An item of a chunk by itself."""
        return self.one(item)

    def attempts(self, uint64_t item):
        """Which attempt this is of a call, or of an item of a chunk."""
        return self.attempt if self.batch is None else self.one(item).attempts

    def history(self, uint64_t item):
        """How earlier attempts of a call, or of an item of a chunk, died: a line each, the last ones."""
        return (self.deaths if self.batch is None else self.one(item).deaths) or ()

    def stretches(self, uint64_t first, uint64_t count):
        """[(index in the map, how many)] for items first .. first+count-1 of a chunk."""
        cdef Span span
        cdef uint64_t here
        cdef list out = []
        for span in self.spans:
            if count == 0:
                break
            if first >= span.count:
                first -= span.count
                continue
            here = min(count, span.count - first)
            if out and out[len(out) - 1][0] + out[len(out) - 1][1] == span.first + first:
                index, before = out.pop()
                out.append((index, before + here))
            else:
                out.append((span.first + first, here))
            count -= here
            first = 0
        return out


@cython.final
cdef class SlotTable:
    """Host-private bookkeeping of one slot."""
    # What the host writes into the slot is decided from these, never read back: a worker may run wild.

    def __init__(self, uint32_t leases):
        self.tasks = [None] * leases
        self.free = list(range(leases - 1, -1, -1))
        self.kept = {}
