# cython: language_level=3
"""What a worker's objects show of the region. See _views.pyx."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._arena cimport Arena
from runtime._layout cimport lease_t


cdef class Viewer:
    """The blocks that a worker looks into, and its own; the base of WorkerPort."""
    cdef readonly Arena arena
    cdef readonly uint32_t index
    cdef list opened            # BlockView: those of the lease that runs
    cdef dict shown             # offset of a block -> its youngest BlockView, borrowed

    cdef unkeep(self, uint64_t body, uint64_t tag)
    cdef BlockView show(self, uint64_t body, uint64_t tag, uint64_t nbytes, uint32_t access, bint private)
    cdef int note(self, BlockView view) except -1
    cdef BlockView create(self, uint64_t at, uint64_t tag, uint64_t nbytes)


cdef class BlockView:
    """The exporter of a block's memory in a worker."""
    cdef Viewer port
    cdef char *data
    cdef uint64_t nbytes
    cdef uint64_t body, tag     # offset and tag of the block
    cdef uint32_t access        # B_FROZEN, B_SHARED or neither
    cdef bint own               # a private block of this slot: freed with this object
    cdef bint kept              # it outlived its lease: the host was told, and is told when it is gone
    cdef char *mapping          # start of the private mapping, NULL: the shared memory itself
    cdef bytes copy             # instead of a mapping, where the page size forbids one

    cdef int map_private(self) except -1


cdef bint is_seen(BlockView view, list parts, list opened) except -1
