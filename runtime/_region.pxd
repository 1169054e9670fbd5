# cython: language_level=3
"""The region: one mapped file that every process of a family shares.

The file is a header page, then the data. Offsets count from the start of the data.

    0       region_header     who made it, how large it is, where its MemoryPool is
    4096    data              `data_bytes` bytes, rounded up to a page; the rest of the file is room to grow
"""
from libc.stdint cimport uint32_t, uint64_t

from runtime._atomics cimport a64_t


cdef enum:
    HEADER_BYTES = 4096         # where the data starts in the file


cdef struct region_about:       # written once by the creator, before anyone else can see the file
    uint64_t magic              # segment.py writes and checks this line
    uint32_t version            # raised with every change of the format
    uint32_t header_bytes       # HEADER_BYTES
    uint64_t data_bytes         # bytes of data, exactly as asked for
    uint64_t max_bytes          # bytes of address space that each process reserves for the data
    uint64_t creator_pid        # who made it
    uint64_t creator_start      # when that process started, in clock ticks since boot; 0: unknown
    uint64_t spare[2]

cdef struct region_pool:        # where the region's MemoryPool is; the protocol stands in _pool.pyx
    # claim: 0 -> identity            CAS, by who wants to format a pool
    #        dead identity -> identity  CAS, by who takes an unfinished format over
    #        identity -> 0            the formatter, when `at` is set
    a64_t claim
    # at: 0 -> file offset of the pool's header, by the holder of the claim, once; then never again.
    a64_t at
    uint64_t spare[6]

cdef struct region_state:       # where the region's SharedState is; the protocol stands in _mapaccess.pyx
    a64_t claim                 # as in region_pool, by who formats a map
    a64_t at                    # 0 -> file offset of the map's header, by the holder of the claim, once
    uint64_t spare[6]

cdef struct region_header:
    region_about about          # line 0
    region_pool pool            # line 1
    region_state state          # line 2
    char unused[3904]


cdef class SharedRegion:
    cdef char *base             # start of the data, 4096-aligned; NULL: closed
    cdef size_t length          # bytes of data
    cdef size_t reserved        # bytes of address space mapped, with the header page
    cdef Py_ssize_t exports     # live views and blocks: while there are any, close() refuses. Under the GIL
    cdef Py_ssize_t calls       # calls that copy or wait without the GIL at this moment. Under the GIL
    cdef int calls_pid          # the process that counted `calls`: a fork inherits numbers, not threads
    cdef int owner_pid          # the process that opened `_fd`
    cdef int _fd                # the file; -1: closed
    cdef bint private           # remap_private() has cut this process off
    cdef object _name           # the name under /dev/shm, or None
    cdef object _file           # (device, inode), by which close() and unlink() know the file again
    cdef object __weakref__

    cdef int check_open(self) except -1
    cdef int check_range(self, size_t offset, size_t length) except -1
    cdef a64_t *word(self, object offset) except NULL
    # A view or a block was made, or is gone. Who holds one may use base..base+length.
    cdef int hold(self) except -1
    cdef void drop(self) noexcept
    # Around a stretch without the GIL that uses the mapping: nobody closes it meanwhile.
    cdef int enter(self) except -1
    cdef void leave(self) noexcept
    # For atfork handlers: from now on writes of this process stay private; every address stays
    # readable. -1: the kernel has no memory for that, the mapping is read-only instead.
    cdef int remap_private(self) noexcept nogil
    # Ways to a mapping and its end; not for other modules.
    cdef int adopt(self, str what) except -1
    cdef int map_file(self, size_t data_bytes, size_t max_bytes) except -1
    cdef void unmap(self) noexcept


cdef inline bint inside(size_t offset, size_t length, size_t size) noexcept nogil:
    """offset .. offset+length lies in 0 .. size, without overflow."""
    return offset <= size and length <= size - offset


# A Python integer as an offset or a length. Too large for 63 bits becomes 2^63 - 1, which is inside nothing;
# negative is a ValueError.
cdef int to_size(object value, str what, size_t *out) except -1
# A buffer's bytes, whatever object it is of; the caller releases it.
cdef int get_bytes(object data, Py_buffer *out) except -1
# memmove; 64 KiB and more without the GIL, with the region held open.
cdef int copy_bytes(SharedRegion region, char *to, const char *source, size_t n) except -1
