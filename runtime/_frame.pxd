# cython: language_level=3
"""Frames: how items (pickles with out-of-band buffers) lie in a block, inline, or in a stream of pieces.

    u32 items, u32 buffers
    items   x {u64 bytes of the pickle, u32 buffers of this item, u32 status}
    buffers x {u64 bytes, u64 1 if the original was read-only}
    the pickles, one behind the other
    the buffers, each at a multiple of 64 from the start of the frame
"""
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    FRAME_ALIGN = 64

ctypedef struct frame_head_t:
    uint32_t items
    uint32_t buffers

ctypedef struct frame_item_t:
    uint64_t data_bytes
    uint32_t buffers
    uint32_t status         # 0: a value; 1: an exception

ctypedef struct frame_buffer_t:
    uint64_t nbytes
    uint64_t readonly

ctypedef struct segment_t:
    const char *data        # NULL: padding
    uint64_t nbytes


cdef class Frame:
    """Items laid out as one frame, without copying them: read it piece by piece, or whole."""
    cdef readonly uint64_t nbytes
    cdef uint32_t count
    cdef segment_t *segments
    cdef Py_buffer *buffers
    cdef uint32_t buffer_count
    cdef bytes head
    cdef object keep

    cdef void add(self, const char *data, uint64_t nbytes) noexcept
    cdef void copy(self, char *dest, uint64_t offset, uint64_t nbytes) noexcept nogil
