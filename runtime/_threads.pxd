# cython: language_level=3
"""Native threads that never touch a Python object: the host's deadline keeper, a worker's host watch."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._atomics cimport *
from runtime._arena cimport Arena, first_lane
from runtime._layout cimport *


# Host-private, one per process, in the row of its first slot. The lock orders the deadline thread against the
# host's Python threads: a pidfd may be used or closed, and a lease may be killed, only under it. Sections are
# short, run without bytecode and never wait for the GIL, so a thread that holds the GIL may spin for it.
ctypedef struct guard_t:
    a32_t lock              # 0 free, 1 held
    int pidfd               # of the process in the slot; -1: none
    bint armed              # leases of its slots may be killed: the process lives
    bint killing            # a lease was killed: lease nothing more to any of its slots
    char pad[48]


# Host-private, one per slot: what the keeper saw of a lease that runs though its clock stands, because it is
# just claimed, or while arguments or results cross.
ctypedef struct standing_t:
    uint64_t word           # the lease word
    uint64_t records        # that its worker had put into the outbox by then
    int64_t ns              # for so long nothing has moved, though it was the worker's turn


cdef inline void guard_acquire(guard_t *guard) noexcept nogil:
    while not a32_cas_acquire(&guard.lock, 0, 1):
        cpu_relax()

cdef inline void guard_release(guard_t *guard) noexcept nogil:
    a32_store_release(&guard.lock, 0)

cdef bint kill_lease(guard_t *guard, lease_t *lease, uint64_t word) noexcept nogil


cdef class DeadlineKeeper:
    """Ends tasks that run longer than their timeout, also while user code holds the GIL."""
    cdef Arena arena
    cdef guard_t *guards        # one per slot; see guard_of
    cdef int64_t *timeouts      # per slot and entry, ns, 0: none. The host's own: a worker may run wild
    cdef standing_t *standing   # one per slot
    cdef int64_t looked         # monotonic ns of the last look
    cdef a32_t bell             # futex: moves when a lease with a timeout was made
    cdef a32_t stopped          # 1: the thread shall end
    cdef a32_t timed            # leases with a timeout that are out
    cdef readonly int eventfd   # written when a lease was killed, so that the supervisor looks

    cdef void look(self, int64_t now) noexcept nogil
    cdef int64_t claimed(self, uint32_t i) noexcept nogil
    cdef bint overdue(self, uint32_t i, uint32_t entry, int64_t now, int64_t step) noexcept nogil
    cdef bint stuck(self, uint32_t i, lease_t *lease, uint64_t word, int64_t allowed,
                    int64_t step) noexcept nogil
    cdef void arm(self) noexcept nogil
    cdef void disarm(self) noexcept nogil


cdef inline guard_t *guard_of(DeadlineKeeper keeper, uint32_t index) noexcept nogil:
    """The guard of the process that a slot belongs to."""
    return &keeper.guards[first_lane(keeper.arena, index)]
