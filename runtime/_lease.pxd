# cython: language_level=3
"""Rings, outboxes and the worker's moves on lease words. The protocols of the words are in _layout.pxd.

The ring of a slot (host -> worker) and its outbox (worker -> host) have one producer and one consumer
each, so a place is written first and its number published after. A producer that is killed between the
two has published nothing; a consumer that is killed has taken a number and not acted on it, which the
sweep sees from the lease word.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._atomics cimport *
from runtime._arena cimport Arena
from runtime._extent cimport heap_publish, heap_take
from runtime._frame cimport Frame
from runtime._layout cimport *
from runtime._views cimport BlockView, Viewer


# A place holds {tag 24 | entry 8}. A lease that was taken back leaves its place behind; the tag keeps the
# worker from taking a later lease of the same entry out of its turn.
cdef inline uint32_t ring_place(uint32_t entry, uint64_t tag) noexcept nogil:
    return entry | (<uint32_t>(tag & 0xFFFFFF) << 8)


cdef inline void ring_put(slot_t *slot, a32_t *ring, uint64_t *tail, uint32_t mask,
                          uint32_t place) noexcept nogil:
    """Host: publish a lease; there is room. `tail` is the host's own count, the slot's only its copy."""
    a32_store_relaxed(&ring[tail[0] & mask], place)
    tail[0] += 1
    a64_store_release(&slot.ring_tail, tail[0])                 # G1 pairs with G2


cdef inline int64_t ring_take(slot_t *slot, a32_t *ring, uint32_t mask) noexcept nogil:
    """Worker: the next place, or -1."""
    cdef uint64_t head = a64_load_relaxed(&slot.ring_head)      # ours alone
    cdef uint32_t place
    if a64_load_acquire(&slot.ring_tail) == head:               # G2
        return -1
    place = a32_load_relaxed(&ring[head & mask])
    a64_store_release(&slot.ring_head, head + 1)
    return place


cdef inline bint ring_waiting(slot_t *slot) noexcept nogil:
    """Worker: whether there is a place to take."""
    return a64_load_acquire(&slot.ring_tail) != a64_load_relaxed(&slot.ring_head)   # G2


cdef inline uint32_t ring_room(slot_t *slot, uint64_t tail, uint32_t mask) noexcept nogil:
    """Host: free places. Leases that were taken back leave their places behind, so this is the credit."""
    cdef uint64_t used = tail - a64_load_acquire(&slot.ring_head)
    return mask + 1 - <uint32_t>used if used <= mask else 0     # a worker that runs wild gets nothing


cdef inline bint outbox_put(slot_t *slot, record_t *records, uint32_t mask, record_t *record) noexcept nogil:
    """Worker: publish a record. False: the outbox is full."""
    cdef uint64_t tail = a64_load_relaxed(&slot.outbox_tail)    # ours alone
    if tail - a64_load_acquire(&slot.outbox_head) > mask:
        return False
    records[tail & mask] = record[0]
    a64_store_release(&slot.outbox_tail, tail + 1)              # O1 pairs with O2
    return True


cdef inline void slot_renew(slot_t *slot) noexcept nogil:
    """Host: ring, outbox and hints as a new process shall find them; nobody looks before what comes next."""
    a64_store_relaxed(&slot.ring_tail, 0)
    a64_store_relaxed(&slot.ring_head, 0)
    a64_store_relaxed(&slot.outbox_tail, 0)
    a64_store_relaxed(&slot.outbox_head, 0)
    a32_store_relaxed(&slot.running, 0)
    a32_store_relaxed(&slot.turn, 0)
    a32_store_relaxed(&slot.parked, AWAKE)


cdef inline uint32_t must_tell(a32_t *parked) noexcept nogil:
    """A producer, after its put: how the other side sleeps, if it is on us to wake it; else AWAKE."""
    cdef uint32_t how
    fence_seq_cst()                                             # P1 pairs with P2
    how = a32_load_relaxed(parked)
    return how if how != AWAKE and a32_cas_relaxed(parked, how, AWAKE) else AWAKE


cdef inline void park(a32_t *parked, uint32_t how) noexcept nogil:
    """A waiter, before it sleeps; it must look once more between this and its sleep."""
    a32_store_relaxed(parked, how)
    fence_seq_cst()                                             # P2


cdef inline uint64_t outbox_waiting(slot_t *slot, uint64_t head) noexcept nogil:
    """Host: records that were not taken yet; more than the outbox holds: the worker has run wild."""
    return a64_load_acquire(&slot.outbox_tail) - head           # O2


cdef inline void outbox_take(slot_t *slot, record_t *records, uint64_t *head, uint32_t mask,
                             record_t *record) noexcept nogil:
    """Host: copy the next record out; there is one. `head` is the host's own count."""
    record[0] = records[head[0] & mask]
    head[0] += 1
    a64_store_release(&slot.outbox_head, head[0])


cdef class Share:
    cdef readonly int64_t left
    cdef bint watching          # a lane watches its ring

    cdef bint take(self) noexcept
    cdef void give_back(self) noexcept
    cdef bint sit(self) noexcept


cdef class WorkerPort(Viewer):
    """A worker's end of its slot: claims leases, reads arguments, delivers results."""
    cdef slot_t *slot
    cdef a32_t *ring
    cdef record_t *records
    cdef uint32_t ring_mask, outbox_mask
    cdef uint64_t full_at       # arena.frees when a search for room failed last: no use to search again
    cdef bint was_full
    cdef int64_t clock          # when the last call ended, if nothing since then took long; 0: read it anew
    cdef bint untold            # records were published that no hint has told of
    cdef bint pushed            # the host had to be woken by a message since work was found last
    cdef bint woke              # a thread that waited for the result was woken; it may have more to do
    cdef list unkept            # (head, tag) of released views whose record found the outbox full
    cdef object notify          # called to tell the host to look at the outbox
    cdef unsigned long thread   # the one that claims here, which alone may do that
    cdef public bint leaving    # finish what runs, claim nothing more, exit
    cdef Share share            # of a lane: what it has in common with the others; else None

    cdef lease_t *lease(self, uint32_t entry) noexcept nogil
    cdef int64_t claim(self) noexcept nogil
    cdef void begin(self, lease_t *lease, int64_t now) noexcept nogil
    cdef void count_wait(self, int64_t ns) noexcept nogil
    cdef int64_t stop(self, lease_t *lease, uint64_t items) noexcept nogil
    cdef int64_t end(self, lease_t *lease, uint64_t items) noexcept nogil
    cdef bint advance(self, lease_t *lease) noexcept nogil
    cdef bint complete(self, uint32_t entry, uint64_t count) except -1
    cdef int await_forks(self) except -1
    cdef receive(self, uint32_t entry)
    cdef fill(self, Frame frame, uint64_t at)
    cdef offer(self, uint32_t entry, Frame frame)
    cdef uint64_t offset_of(self, uint64_t at) noexcept
    cdef Frame lay_out(self, list items)
    cdef int hand_over(self, Frame frame) except -1
    cdef int close_views(self, Frame frame) except -1
    cdef int keep(self, BlockView view, list parts) except -1
    cdef int put(self, record_t *record) except -1
    cdef int tell(self) except -1
    cdef int take_room(self, uint64_t nbytes, bint patient, uint64_t *at, uint64_t *tag) except -1
    cdef int wish(self, uint64_t nbytes) except -1
    cdef bint wanted(self) noexcept
    cdef bint await_room(self, uint64_t frees, int64_t until, int64_t last) noexcept nogil
    cdef int wait_turn(self, uint32_t seen) except -1
