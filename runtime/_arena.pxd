# cython: language_level=3
"""Arena and HostBlock. See _arena.pyx."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._atomics cimport *
from runtime._extent cimport heap_t
from runtime._frame cimport BlockSlice
from runtime._layout cimport *
from runtime._region cimport SharedRegion


cdef class Arena:
    """The layout of one runtime's region: what is where, as this process maps it."""
    cdef object __weakref__
    cdef readonly SharedRegion region
    cdef char *base         # the region's data
    cdef arena_t *head      # == base
    cdef heap_t heap
    cdef readonly uint32_t slots, leases, outbox
    cdef readonly uint32_t threads  # slots of one process
    cdef readonly uint64_t bounce_bytes
    cdef readonly bint lanes  # parked words are heeded
    cdef readonly uint32_t room  # slots that are laid out; those from `slots` on have no memory yet
    cdef readonly uint32_t spin  # ns that a waiter watches the memory before it sleeps
    cdef uint64_t slots_at, slot_stride, words_at, extents_at
    cdef uint64_t capacity  # extents that are laid out; heap.count of them are there
    cdef uint64_t least     # extents that it began with; the host's: these always have memory
    cdef uint64_t holes     # of these, HOLE; host-private
    cdef bint grows         # there may be more of them, some time
    cdef bint host          # this process decides how many there are
    cdef bint growing       # memory is being reserved or given back
    cdef readonly uint32_t growths  # times that the region grew
    cdef readonly uint64_t held  # bytes of blocks that the host owns; host-private, under the GIL
    cdef dict watched       # a worker's: its BlockViews, as numbers -> index of the head
    cdef dict living        # of the host's blocks: index of the head -> its HostBlock, borrowed
    cdef int frozen         # forks under way: blocks that are dropped meanwhile are freed after them
    cdef list dropped       # (head, tag, state, owner) of those
    cdef bint ending        # release() was called
    cdef int lookers        # threads that are in the tables: without the GIL, or inside the dispatcher
    cdef bint private       # this is a fork of the process that the mapping serves
    cdef readonly int pid   # the process this mapping serves; in a user's fork it is inert

    cdef attach(self, SharedRegion region)
    cdef read_geometry(self)
    cdef uint64_t index_of(self, uint64_t offset) noexcept nogil
    cdef uint64_t counted(self) noexcept nogil
    cdef bint hopeful(self, uint64_t nbytes) noexcept
    cdef int drop(self, uint64_t at, uint64_t tag, uint64_t state, uint64_t owner) except -1
    cdef HostBlock block_at(self, uint64_t offset, uint64_t tag)
    cdef int64_t head_of(self, const char *data, uint64_t nbytes) noexcept nogil
    cdef int write_geometry(self) except -1
    cdef slot_t *slot(self, uint32_t index) noexcept nogil
    cdef a32_t *ring(self, uint32_t index) noexcept nogil
    cdef record_t *records(self, uint32_t index) noexcept nogil
    cdef lease_t *lease(self, uint32_t index, uint32_t entry) noexcept nogil
    cdef char *bounce(self, uint32_t index) noexcept nogil


cdef class HostBlock:
    """A block of the host: freed when the last reference, or the last view of it, is gone."""
    cdef Arena arena
    cdef uint64_t at        # index of the head
    cdef readonly uint64_t tag
    cdef readonly uint64_t nbytes
    cdef char *data
    cdef uint32_t access    # B_FROZEN, B_SHARED or neither
    cdef readonly dict holds    # other blocks that what lies in this one refers to; they live as long

    @staticmethod
    cdef HostBlock wrap(Arena arena, uint64_t at, uint64_t tag, uint64_t nbytes)
    cdef BlockSlice slice(self, const char *data, uint64_t nbytes, bint readonly)


cdef inline uint32_t first_lane(Arena arena, uint32_t index) noexcept nogil:
    """The first slot of the process that a slot belongs to."""
    return index if arena.threads == 1 else index - index % arena.threads


cdef inline uint64_t round_up(uint64_t n, uint64_t to) noexcept nogil:
    return (n + to - 1) // to * to
