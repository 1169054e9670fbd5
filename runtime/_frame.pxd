# cython: language_level=3
"""Frames: how items (pickles with out-of-band buffers) lie in a block, inline, or in a stream of pieces.

    u32 items, u32 buffers
    items   x {u64 bytes of the pickle, u32 buffers of this item, u32 status, u32 start, u32 count}
    buffers x {u64 bytes, u32 B_*, u32 0; of one by reference: u64 block, its bytes, its tag, start; else 0}
    the pickles, one behind the other
    the buffers, each at a multiple of 64 from the start of the frame; not those by reference
"""
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    FRAME_ALIGN = 64
    COLD_BYTES = 32 << 20   # so much in use at a time is in no cache any more when it is written again

# frame_item_t.status: what the pickle of an item holds
cdef enum:
    S_VALUE = 0             # a value, or a call
    S_ERROR = 1             # an exception
    S_PLAIN = 2             # a plain value, or a call with plain arguments; not a pickle, see _plain
    S_LIST = 3              # a series (_series.pyx) of plain values; `count` from `start` on are meant
    S_INTS = 4              # the same of 64-bit integers
    S_FLOATS = 5            # of doubles
    S_CALLS = 6             # of tuples of arguments

ctypedef struct frame_head_t:
    uint32_t items
    uint32_t buffers

ctypedef struct frame_item_t:
    uint64_t data_bytes
    uint32_t buffers
    uint32_t status         # S_*
    uint32_t start          # of a series; else 0
    uint32_t count

# frame_buffer_t.flags
cdef enum:
    B_READONLY = 1          # the original was read-only
    B_REF = 2               # by reference: it lies in a block of the region, and is not in the frame
    B_FROZEN = 4            # that block never changes: views of it are read-only everywhere
    B_SHARED = 8            # whoever has a view of that block writes into it, and all see it
    # neither of the two: the block is its holder's own; a worker writes into a private copy of its pages

ctypedef struct frame_buffer_t:
    uint64_t nbytes
    uint32_t flags          # B_*
    uint32_t spare
    uint64_t block          # offset of the block in the region
    uint64_t block_bytes    # bytes of the block
    uint64_t tag            # of its head
    uint64_t start          # of the buffer in the block

ctypedef struct segment_t:
    const char *data        # NULL: padding
    uint64_t nbytes


# A frame of one item without buffers, which is what most tasks need, is written and read without objects.
cdef enum:
    SINGLE_HEAD = 32        # bytes before its pickle: frame_head_t and one frame_item_t

cdef inline void write_single(char *dest, uint32_t status, const char *data, uint64_t nbytes) noexcept nogil:
    cdef frame_head_t *head = <frame_head_t *>dest
    cdef frame_item_t *item = <frame_item_t *>(dest + sizeof(frame_head_t))
    head[0] = frame_head_t(1, 0)
    item[0] = frame_item_t(nbytes, 0, status, 0, 0)
    memcpy(dest + SINGLE_HEAD, data, nbytes)

cdef inline int32_t read_single(const char *src, uint64_t total) noexcept nogil:
    """The status of the item, if these `total` bytes are such a frame, whole; else -1."""
    cdef const frame_head_t *head = <const frame_head_t *>src
    cdef const frame_item_t *item = <const frame_item_t *>(src + sizeof(frame_head_t))
    if total < SINGLE_HEAD or head.items != 1 or head.buffers != 0 or item.buffers != 0:
        return -1
    return <int32_t>item.status if item.data_bytes == total - SINGLE_HEAD and item.status <= S_PLAIN else -1


cdef class BlockSlice:
    """A part of a block of the region: it travels by reference. Its holder keeps the block."""
    cdef readonly object holder     # HostBlock in the host, BlockView in a worker
    cdef char *data                 # where this process maps it
    cdef frame_buffer_t about
    cdef bint by_value              # it is laid out as any other buffer, after all

    @staticmethod
    cdef BlockSlice of(holder, char *data, frame_buffer_t about)


cdef class Frame:
    """Items laid out as one frame, without copying them: read it piece by piece, or whole."""
    cdef readonly uint64_t nbytes
    cdef uint32_t count
    cdef segment_t *segments
    cdef Py_buffer *buffers
    cdef uint32_t buffer_count
    cdef bytes head
    cdef object keep
    cdef list parts             # for its sender: the slices among its buffers
    cdef bint cold              # where it is copied to is in no cache, so nothing is lost by passing them

    cdef void add(self, const char *data, uint64_t nbytes) noexcept
    cdef Py_buffer *hold(self, source) except NULL
    cdef uint64_t add_stream(self, data) except? 0xFFFFFFFFFFFFFFFFULL
    cdef void copy(self, char *dest, uint64_t offset, uint64_t nbytes) noexcept nogil


# Bytes of a pickle: of bytes, or of a tuple of pieces.
cdef uint64_t stream_bytes(data) except? 0xFFFFFFFFFFFFFFFFULL
cdef set frame_refs(const char *data, uint64_t total)
