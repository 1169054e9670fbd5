# cython: language_level=3
"""Frames: how items lie in a block, inline, or in a stream of pieces. The format stands in _frame.pxd.

An item is a tuple (status, data, buffers, readonly): a pickle and its out-of-band buffers; for a part of a
list of values or calls two numbers more: (..., start, count). A buffer that is a BlockSlice is not copied:
the frame says where it lies. The pickle is bytes, or a tuple of buffers that follow each other.
"""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.string cimport memcpy, memset

cdef extern from "include/copy.h" nogil:
    void copy_past_caches(char *to, const char *source, size_t n)

cdef uint64_t PAST_CACHES = 1 << 20         # bytes of a piece from which on it is copied past the caches


cdef uint64_t aligned(uint64_t n) noexcept nogil:
    return (n + FRAME_ALIGN - 1) // FRAME_ALIGN * FRAME_ALIGN


@cython.final
cdef class BlockSlice:
    """A part of a block of the region: it travels by reference. Its holder keeps the block.

    Thread-safety: immutable, but for `by_value`, its sender's.
    """

    @staticmethod
    cdef BlockSlice of(holder, char *data, frame_buffer_t about):
        cdef BlockSlice self = BlockSlice.__new__(BlockSlice)
        self.holder = holder
        self.data = data
        self.about = about
        return self

    @property
    def shared(self):
        """Whether it shows what its block shows, to whoever looks when: by its name, or for good."""
        return (self.about.flags & (B_FROZEN | B_SHARED)) != 0

    @property
    def key(self):
        """(offset, tag) of its block."""
        return self.about.block, self.about.tag

    @property
    def nbytes(self):
        """Bytes that it adds to a frame."""
        return self.about.nbytes if self.by_value else 0

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, <Py_ssize_t>self.about.nbytes, 1, flags)


@cython.no_gc
cdef class Frame:
    """Items laid out as one frame. It borrows their memory and holds it until it is dropped.

    Thread-safety: immutable after construction. Raises: BufferError for a buffer that is not contiguous.
    """

    def __cinit__(self, list items):
        assert SINGLE_HEAD == sizeof(frame_head_t) + sizeof(frame_item_t)
        cdef uint32_t n = <uint32_t>len(items)
        cdef uint32_t total = 0
        cdef uint32_t i, k, b = 0
        cdef uint64_t at
        cdef frame_head_t *head
        cdef frame_item_t *item
        cdef frame_buffer_t *buffer
        cdef Py_ssize_t pieces = 0
        cdef Py_buffer *source
        cdef tuple buffers, readonly
        for entry in items:
            total += <uint32_t>len(<tuple>entry[2])
            pieces += len(<tuple>entry[1]) if type(entry[1]) is tuple else 0
        self.keep = items
        self.segments = <segment_t *>PyMem_Calloc(1 + n + pieces + 2 * total, sizeof(segment_t))
        self.buffers = <Py_buffer *>PyMem_Calloc(pieces + total + 1, sizeof(Py_buffer))
        if self.segments == NULL or self.buffers == NULL:
            raise MemoryError("no memory to lay out a frame")
        at = sizeof(frame_head_t) + n * sizeof(frame_item_t) + total * sizeof(frame_buffer_t)
        self.head = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>at)
        head = <frame_head_t *>PyBytes_AS_STRING(self.head)
        item = <frame_item_t *>(head + 1)
        buffer = <frame_buffer_t *>(item + n)
        head.items = n
        head.buffers = total
        self.add(<char *>head, at)
        for i in range(n):
            entry = items[i]
            item[i].data_bytes = self.add_stream(entry[1])
            item[i].buffers = <uint32_t>len(<tuple>entry[2])
            item[i].status = entry[0]
            item[i].start = entry[4] if len(<tuple>entry) == 6 else 0
            item[i].count = entry[5] if len(<tuple>entry) == 6 else 0
        for i in range(n):
            entry = items[i]
            buffers = entry[2]
            readonly = entry[3]
            for k in range(<uint32_t>len(buffers)):
                source = self.hold(buffers[k])
                if isinstance(buffers[k], BlockSlice) and not (<BlockSlice>buffers[k]).by_value:
                    buffer[b] = (<BlockSlice>buffers[k]).about
                    b += 1
                    continue
                buffer[b] = frame_buffer_t(
                    <uint64_t>source.len, B_READONLY if readonly[k] else 0, 0, 0, 0, 0, 0)
                self.add(NULL, aligned(self.nbytes) - self.nbytes)
                self.add(<char *>source.buf, buffer[b].nbytes)
                b += 1
        self.cold = self.nbytes >= COLD_BYTES

    cdef Py_buffer *hold(self, source) except NULL:
        """Memory of an object, held as long as the frame lives."""
        cdef Py_buffer *view = &self.buffers[self.buffer_count]
        PyObject_GetBuffer(source, view, PyBUF_SIMPLE)
        self.buffer_count += 1
        return view

    cdef uint64_t add_stream(self, data) except? 0xFFFFFFFFFFFFFFFFULL:
        """Add a pickle; its bytes."""
        cdef uint64_t before = self.nbytes
        cdef Py_buffer *view
        if type(data) is tuple:
            for piece in <tuple>data:
                view = self.hold(piece)
                self.add(<char *>view.buf, <uint64_t>view.len)
        else:
            self.add(PyBytes_AS_STRING(<bytes?>data), <uint64_t>len(<bytes>data))
        return self.nbytes - before

    cdef void add(self, const char *data, uint64_t nbytes) noexcept:
        self.segments[self.count].data = data
        self.segments[self.count].nbytes = nbytes
        self.count += 1
        self.nbytes += nbytes

    cdef void copy(self, char *dest, uint64_t offset, uint64_t nbytes) noexcept nogil:
        """Copy bytes offset .. offset+nbytes-1 of the frame to dest."""
        cdef uint32_t i = 0
        cdef uint64_t n
        while nbytes and i < self.count:
            if offset >= self.segments[i].nbytes:
                offset -= self.segments[i].nbytes
            else:
                n = min(self.segments[i].nbytes - offset, nbytes)
                if self.segments[i].data == NULL:
                    memset(dest, 0, n)
                elif self.cold and n >= PAST_CACHES:
                    copy_past_caches(dest, self.segments[i].data + offset, n)
                else:
                    memcpy(dest, self.segments[i].data + offset, n)
                dest += n
                nbytes -= n
                offset = 0
            i += 1

    def tobytes(self):
        """The whole frame as bytes."""
        out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>self.nbytes)
        self.copy(PyBytes_AS_STRING(out), 0, self.nbytes)
        return out

    def __dealloc__(self):
        cdef uint32_t i
        if self.buffers != NULL:
            for i in range(self.buffer_count):
                PyBuffer_Release(&self.buffers[i])
            PyMem_Free(self.buffers)
        PyMem_Free(self.segments)


cdef uint64_t stream_bytes(data) except? 0xFFFFFFFFFFFFFFFFULL:
    return sum([<object>len(piece) for piece in <tuple>data]) if type(data) is tuple else len(data)


cdef int frame_error(str what) except -1:
    raise ValueError(f"malformed frame: {what}")


cdef set frame_refs(const char *data, uint64_t total):
    """What a frame, or as much of one as is there, refers to: {(block, tag)}; None: nothing.

    Every word is copied out once: another process may be writing there.
    """
    cdef frame_head_t head
    cdef frame_buffer_t buffer
    cdef uint64_t at, i
    cdef set found = None
    if total < sizeof(frame_head_t):
        return None
    memcpy(&head, data, sizeof(frame_head_t))
    at = sizeof(frame_head_t) + <uint64_t>head.items * sizeof(frame_item_t)
    if at > total:
        return None
    for i in range(min(<uint64_t>head.buffers, (total - at) // sizeof(frame_buffer_t))):
        memcpy(&buffer, data + at + i * sizeof(frame_buffer_t), sizeof(frame_buffer_t))
        if buffer.flags & B_REF:
            if found is None:
                found = set()
            found.add((buffer.block, buffer.tag))
    return found


def read_frame(exporter, resolve=None):
    """The items of a frame in any buffer: a list of (status, data, views, start, count).

    `data` and `views` are memoryviews that keep the exporter alive. Every length is copied out of the
    buffer once and checked before it is used: another process may be writing there. What lies elsewhere in
    the region is resolve(block, tag, bytes of the block, flags), something with a buffer that is the block.
    Raises: ValueError for a frame that does not fit its buffer, or refers to what `resolve` does not know.
    """
    cdef Py_buffer view
    cdef frame_head_t head
    cdef frame_item_t item
    cdef frame_buffer_t buffer
    cdef uint64_t items_at = sizeof(frame_head_t)
    cdef uint64_t at, data_at, buffer_at, total, fixed
    cdef uint32_t i, _k, used = 0
    cdef list out = []
    whole = memoryview(exporter).cast("B")
    PyObject_GetBuffer(whole, &view, PyBUF_SIMPLE)
    try:
        total = <uint64_t>view.len
        if total < sizeof(frame_head_t):
            frame_error(f"{total} bytes are too few for its head")
        memcpy(&head, view.buf, sizeof(frame_head_t))
        fixed = (sizeof(frame_head_t) + <uint64_t>head.items * sizeof(frame_item_t)
                 + <uint64_t>head.buffers * sizeof(frame_buffer_t))
        if fixed > total:
            frame_error(f"{head.items} items and {head.buffers} buffers do not fit into {total} bytes")
        data_at = fixed
        buffer_at = fixed
        for i in range(head.items):
            memcpy(&item, <char *>view.buf + items_at + i * sizeof(frame_item_t), sizeof(frame_item_t))
            if item.data_bytes > total - buffer_at:
                frame_error(f"item {i} claims {item.data_bytes} bytes")
            buffer_at += item.data_bytes
        at = items_at + head.items * sizeof(frame_item_t)
        for i in range(head.items):
            memcpy(&item, <char *>view.buf + items_at + i * sizeof(frame_item_t), sizeof(frame_item_t))
            if item.data_bytes > total - data_at or item.buffers > head.buffers - used:
                frame_error(f"item {i} claims {item.data_bytes} bytes and {item.buffers} buffers")
            views = []
            for _k in range(item.buffers):
                memcpy(&buffer, <char *>view.buf + at + used * sizeof(frame_buffer_t), sizeof(frame_buffer_t))
                used += 1
                if buffer.flags & B_REF:
                    views.append(referred(&buffer, resolve))
                    continue
                buffer_at = aligned(buffer_at)
                if buffer_at > total or buffer.nbytes > total - buffer_at:
                    frame_error(f"a buffer of item {i} claims {buffer.nbytes} bytes")
                part = whole[buffer_at:buffer_at + buffer.nbytes]
                views.append(part.toreadonly() if buffer.flags & B_READONLY else part)
                buffer_at += buffer.nbytes
            out.append((item.status, whole[data_at:data_at + item.data_bytes], views, item.start, item.count))
            data_at += item.data_bytes
    finally:
        PyBuffer_Release(&view)
    return out


cdef object referred(frame_buffer_t *buffer, resolve):
    """A view of what a frame refers to. Raises: ValueError when there is no such thing."""
    if resolve is None:
        frame_error("it refers to a block of a region")
    whole = memoryview(resolve(buffer.block, buffer.tag, buffer.block_bytes, buffer.flags)).cast("B")
    if buffer.start > <uint64_t>len(whole) or buffer.nbytes > <uint64_t>len(whole) - buffer.start:
        frame_error(f"{buffer.nbytes} bytes from {buffer.start} on are not all in a block of {len(whole)}")
    part = whole[buffer.start:buffer.start + buffer.nbytes]
    return part.toreadonly() if buffer.flags & B_READONLY else part
